"""Faults in machine code, each planted in that of a shipped kernel: the executor refuses every one of them, and says where."""

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from convrnn.kernels import gru_gates, gru_rcn, mingru

from .harness.inputs import randn
from .harness.ptx import Fault, UnknownPtx
from .harness.ptx.driver import recorded, using
from .test_triton_gru_step import inputs_of

pytestmark = pytest.mark.executed


def run_mingru() -> None:
    """Odd lanes, so that some threads of a program have none; frames whose addresses are multiples of 16 bytes."""
    mingru.mingru_fwd(randn(2, 5, 10, dtype=torch.float32, seed=1))


def run_wide_mingru() -> None:
    mingru.mingru_fwd(randn(2, 5, 512, dtype=torch.float32, seed=1))


def run_update(channels: int = 256) -> None:
    """A float32 state beside bfloat16: threads exchange lanes through shared memory, and with one warp by shuffles."""
    x = randn(2, channels, 4, dtype=torch.bfloat16, seed=1)
    gru_gates.gru_update_fwd(x, x, x, x.float())


def run_product() -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        gru_rcn.gru_rcn_fwd(*inputs_of(1, 2, 40, 5, 5, torch.bfloat16), "gemm")


def replace_first(pattern: str, new: str, kernel: str = "") -> Callable[[str], str]:
    """Replaces the first match in the text of a kernel, which must have one."""

    def rewrite(text: str) -> str:
        if kernel and f".entry {kernel}(" not in text:
            return text
        changed, count = re.subn(pattern, new, text, count=1)
        assert count == 1, f"the code has no longer: {pattern}"
        return changed

    return rewrite


PLACE = r"_kernel, program \d+, thread \d+: .*{}.*\(\w+\.py:\d+.*\): {}"

FAULTS = {
    "outside": (run_wide_mingru, r"(ld\.global\.v4\.b32 .*?) \+ 0 \]", r"\1 + 65536 ]", r"ld\.global\.v4", "outside of the tensors"),
    "misaligned": (run_wide_mingru, r"(ld\.global\.v4\.b32 .*?) \+ 0 \]", r"\1 + 4 ]", r"ld\.global\.v4", "misaligned: .* 16 bytes"),
    "misaligned_store": (run_wide_mingru, r"(st\.global\.v4\.b32 .*?) \+ 0 \]", r"\1 + 8 ]", r"st\.global\.v4", "misaligned"),
    "unwritten_register": (run_mingru, r"\tshl\.b64 .*;", "", "", r"register %rd\d+ is read before it is written"),
    "partly_written_register": (
        run_mingru,
        r"mov\.u32 (%r\d+), 0x0;\n\s*@(%p\d+) ld",
        r"@\2 ld",
        "",
        r"register %r\d+ is read before it is written",
    ),
    "no_barrier": (run_update, r"bar\.sync\s+0;", "", r"ld\.shared", r"read here and written by thread \d+ without a barrier"),
    "barrier_of_some": (
        run_update,
        r"bar\.sync\s+0;",
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 100; @!%p1 ret; bar.sync 0;",
        r"bar\.sync",
        "not all threads of the program come here: thread 100 has ended",
    ),
    "shuffle_of_some": (
        lambda: run_update(8),
        r"(shfl\.sync\.idx\.b32 .*;)",
        r"mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 20; @%p1 \1",
        r"shfl\.sync",
        r"not all threads of the warp come here: thread 20 ",
    ),
    "early_copy": (
        run_product,
        r"cp\.async\.wait_group\s+\d+;",
        "cp.async.wait_group 9;",
        "",
        r"read before the wait for the cp\.async that writes it",
    ),
    "copy_seen_without_barrier": (
        run_product,
        r"(cp\.async\.wait_group\s+\d+;\s*(?:\.loc[^\n]*\n\s*)*)bar\.sync\s+0;",
        r"\1",
        r"ldmatrix",
        r"read here and written by thread \d+ without",
    ),
    "outside_of_shared": (
        run_update,
        r"(ld\.shared\S*\s+.*\[%r\d+)\+1024\]",
        r"\1+65536]",
        r"ld\.shared",
        r"outside of shared memory: \d+ bytes at \d+ of \d+",
    ),
    "unwritten_shared": (
        run_update, r"@?%?p?\d*\s*st\.shared.*;", "", r"ld\.shared", "shared memory is read that nobody wrote",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    run, old, new, opcode, what = FAULTS[name]
    with using(rewrite=replace_first(old, new)), pytest.raises(Fault, match=PLACE.format(opcode, what)):
        run()


@pytest.mark.parametrize("run", (run_mingru, run_wide_mingru, run_update, lambda: run_update(8), run_product))
def test_the_same_launches_without_a_fault(run: Callable[[], None]) -> None:
    with recorded() as launches:
        run()
    assert launches


def test_two_programs_that_write_the_same_bytes() -> None:
    """Every program takes itself for the first; no thread of one program meets another."""
    with (
        using(rewrite=replace_first(r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;")),
        pytest.raises(Fault, match=r"st\.global.*: written here and by program 1, thread \d+ at once"),
    ):
        run_wide_mingru()


def test_a_program_that_reads_what_another_writes() -> None:
    memory = torch.zeros(768)
    x, state = memory[:512].view(2, 256), memory[256:].view(2, 256)
    with pytest.raises(
        Fault, match=r"program \d, thread \d+: .*: (read|written) here and (written|read) by program \d, thread"
    ):
        # the second sample's x lies where the first one's state is written
        gru_gates.gru_update_fwd(x, x, x, x, (torch.empty_like(x), state, None))


@pytest.mark.parametrize(
    "new, what",
    (
        ("add.cc.s64", r"add\.cc\.s64 .*: the instruction is not known"),
        ("add.sat.s64", r"add\.sat\.s64"),
        ("madc.lo.s64", r"madc\.lo\.s64"),
        (".local .b8 x[4]; add.s64", r"\.local \.b8"),
    ),
)
def test_an_unknown_instruction_is_named(new: str, what: str) -> None:
    with (
        using(rewrite=replace_first(r"add\.s64", new)),
        pytest.raises(UnknownPtx, match=rf"mingru_fwd_kernel, \w+\.py:\d+.*: {what}"),
    ):
        run_mingru()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_every_barrier_of_the_fused_step_is_needed(dtype: torch.dtype) -> None:
    """In the loop over the depth and in the epilogue: without any of them something is refused. Not so the two between the
    copies that fill the pipeline, before anything is read."""
    kernel = "gru_conv_gates_fwd_kernel"
    texts: list[str] = []

    def run(rewrite: Callable[[str], str]) -> None:
        with using(rewrite=rewrite), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            gru_rcn.gru_rcn_fwd(*inputs_of(1, 1, 40, 5, 5, dtype), "gemm")

    run(lambda text: texts.append(text) or text)
    barriers = [found.span() for found in re.finditer(r"bar\.sync\s+0;", texts[0])]
    assert f".entry {kernel}(" in texts[0] and len(barriers) > 5
    missed = []
    for start, end in barriers:
        try:
            run(lambda text, span=(start, end): text[: span[0]] + text[span[1] :] if kernel in text else text)
        except Fault:
            continue
        missed.append(texts[0][:start].count("\n"))
    assert len(missed) <= 2, missed
