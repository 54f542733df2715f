"""How the executor runs threads: divergence, what a warp and a program do together, memory and the counts."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from .harness.ptx import TABLE, Fault
from .harness.ptx.driver import execute, executed, settings
from .harness.snippet import run

pytestmark = pytest.mark.executed


def test_threads_part_and_meet_again() -> None:
    """Thread i turns i times in a loop, odd ones take another way in it; then the warp sums up."""
    y = torch.empty(32, dtype=torch.int32)
    run(
        """
        mov.b32 %r2, 0; mov.b32 %r3, 0;
        $again: setp.ge.s32 %p1, %r2, %r0;
        @%p1 bra $done;
        and.b32 %r4, %r0, 1; setp.eq.b32 %p2, %r4, 1;
        @%p2 bra $odd;
        add.s32 %r3, %r3, 1;
        bra.uni $next;
        $odd: add.s32 %r3, %r3, 100;
        $next: add.s32 %r2, %r2, 1;
        bra.uni $again;
        $done: shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
        st.global.b32 [%rd1], %r5;
        """,
        torch.zeros(32, dtype=torch.int32),
        y,
    )
    assert y.tolist() == [100 * (i ^ 1) if (i ^ 1) % 2 else i ^ 1 for i in range(32)]


def test_a_shuffle_waits_for_threads_that_come_from_below() -> None:
    """Half of the warp comes to the shuffle from a block behind it."""
    y = torch.empty(32, dtype=torch.int32)
    run(
        """
        setp.lt.s32 %p1, %r0, 16; mov.b32 %r2, 7;
        @!%p1 bra $far;
        $shuffle: shfl.sync.idx.b32 %r3, %r2, 31, 31, -1;
        st.global.b32 [%rd1], %r3;
        ret;
        $far: mov.b32 %r2, 9;
        bra.uni $shuffle;
        """,
        torch.zeros(32, dtype=torch.int32),
        y,
    )
    assert y.tolist() == [9] * 32


@pytest.mark.parametrize(
    "mode, operands, source",
    (
        ("up", "1, 0", lambda i: max(i - 1, 0)),
        ("down", "2, 31", lambda i: i + 2 if i < 30 else i),
        ("bfly", "16, 31", lambda i: i ^ 16),
        ("idx", "5, 31", lambda i: 5),
        ("idx", "5, 6175", lambda i: i // 8 * 8 + 5),  # in segments of 8: 31 | 24 << 8
        ("down", "3, 6175", lambda i: i + 3 if i % 8 < 5 else i),
    ),
)
def test_shuffles(mode: str, operands: str, source) -> None:
    y = torch.empty(64, dtype=torch.int32)
    run(
        f"shfl.sync.{mode}.b32 %r5|%p1, %r1, {operands}, -1; st.global.b32 [%rd1], %r5;",
        torch.zeros(64, dtype=torch.int32),
        y,
        grid=2,
    )
    assert y.tolist() == [32 * (i // 32) + source(i % 32) for i in range(64)]


def test_a_written_half_of_a_register_is_not_read_by_the_others() -> None:
    body = "setp.lt.s32 %p1, %r0, 16; @%p1 mov.b32 %r2, 7; @%p1 st.global.b32 [%rd1], %r2;"
    x, y = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run(body, x, y)
    assert y.sum() == 16 * 7
    with pytest.raises(Fault, match=r"snippet, program 0, thread 16: add\.s32 .*snippet\.py:2\): register %r2 is read"):
        run(body + "\nadd.s32 %r2, %r2, 1;", x, y)


WRITE = "shl.b32 %r2, %r0, 2; mov.b32 %r3, smem; add.s32 %r2, %r2, %r3; st.shared.b32 [%r2], %r0;"
READ = "shl.b32 %r4, %r0, 2; sub.s32 %r4, 252, %r4; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd1], %r5;"


def exchange(*parts: str) -> list[int]:
    """64 threads write their number to shared memory and read that of the thread opposite."""
    y = torch.empty(64, dtype=torch.int32)
    run("\n".join(parts), torch.zeros(64, dtype=torch.int32), y, threads=64, shared=256)
    return y.tolist()


def test_shared_memory_and_barriers() -> None:
    assert exchange(WRITE, "bar.sync 0;", READ) == list(range(63, -1, -1))
    with pytest.raises(Fault, match=r"snippet\.py:2\): read here and written by thread \d+ without a barrier between"):
        exchange(WRITE, READ)
    with pytest.raises(Fault, match=r"snippet\.py:2\): read here and written by thread \d+ without"):
        exchange(WRITE + "bar.warp.sync -1;", READ)  # the thread opposite is of the other warp
    with pytest.raises(Fault, match=r"snippet\.py:3\): written here and read by thread \d+ without a barrier between"):
        exchange(WRITE + "bar.sync 0;", READ, "st.shared.b32 [%r2], %r0;")
    exchange(WRITE + "bar.sync 0;", READ + "bar.sync 0;", "st.shared.b32 [%r2], %r0;")
    with pytest.raises(Fault, match=r"written here and by thread \d+ at once"):
        exchange("mov.b32 %r2, smem; st.shared.b32 [%r2], %r0;")
    with pytest.raises(Fault, match="outside of shared memory: 4 bytes at 256 of 256"):
        exchange(WRITE, "st.shared.b32 [%r2+4], %r0;")
    with pytest.raises(Fault, match="shared memory is read that nobody wrote"):
        exchange("bar.sync 0;", READ)


def test_a_barrier_of_a_warp_orders_the_warp() -> None:
    near = "xor.b32 %r4, %r0, 1; shl.b32 %r4, %r4, 2; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd1], %r5;"
    assert exchange(WRITE, "bar.warp.sync -1;", near) == [i ^ 1 for i in range(64)]
    with pytest.raises(Fault, match="without a barrier between"):
        exchange(WRITE, near)


@pytest.mark.parametrize(
    "wait, groups", (("cp.async.wait_group 0;", 1), ("cp.async.wait_all;", 1), ("cp.async.wait_group 1;", 2))
)
def test_asynchronous_copies(wait: str, groups: int) -> None:
    """The second group's target is not read; zeros come where the source's size is 0."""
    x, y = torch.arange(1, 33, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    issue = (
        """
        shl.b32 %r2, %r0, 2; and.b32 %r3, %r0, 4;
        cp.async.ca.shared.global [%r2], [%rd0], 4, %r3;
        cp.async.commit_group;
    """
        + "cp.async.ca.shared.global [%r2+128], [%rd0], 4; cp.async.commit_group;" * (groups - 1)
    )
    read = "ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd1], %r4; cp.async.wait_all;"
    run(issue + wait + read, x, y, shared=256)
    assert y.tolist() == [i + 1 if i & 4 else 0 for i in range(32)]
    with pytest.raises(Fault, match=r"read before the wait for the cp\.async that writes it"):
        run(issue + read, x, y, shared=256)
    with pytest.raises(Fault, match="the target of two cp.async at once"):
        run(issue + issue, x, y, shared=256)
    with pytest.raises(Fault, match="written before the wait"):
        run(issue + "st.shared.b32 [%r2], %r0;", x, y, shared=256)
    with pytest.raises(Fault, match="ends before the wait"):
        run(issue, x, y, shared=256)


def test_memory_between_the_elements_of_a_view_is_outside() -> None:
    x, y = torch.zeros(32, 2, dtype=torch.int32)[:, 0], torch.empty(32, dtype=torch.int32)
    run(
        "mul.wide.s32 %rd2, %r0, 4; add.s64 %rd0, %rd0, %rd2; ld.global.b32 %r2, [%rd0]; st.global.b32 [%rd1], %r2;",
        x,
        y,
    )
    with pytest.raises(
        Fault, match=r"thread 1: ld\.global.*: outside of the tensors of the launch: 4 bytes at byte 4 of p0"
    ):
        run("ld.global.b32 %r2, [%rd0];", x, y)


def test_addresses_that_other_tensors_may_have_are_outside() -> None:
    """However near the tensors of a launch lie, a stray address meets none of them."""
    both = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match=r"program 0, thread 0: .* 4 bytes at byte 128 of p0, which has 128"):
        run("ld.global.b32 %r2, [%rd0+128];", both[:32].clone(), both[32:].clone())


def test_what_never_ends_and_what_divides_by_zero() -> None:
    x, y = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with pytest.raises(Fault, match="division by zero"):
        run("ld.global.b32 %r2, [%rd0]; div.s32 %r3, %r0, %r2;", x, y)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Fault, match="no end after 1,000 steps"):
        patch.setattr("tests.harness.ptx.machine.MAX_STEPS", 1000)
        run("$again: bra.uni $again;", x, y)


def test_counts() -> None:
    """32 words at 128 bytes from one another, then 32 side by side; a column of shared memory, and a row."""
    x, y = torch.zeros(1024, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    launch = run(
        """
        mul.wide.s32 %rd2, %r0, 124; add.s64 %rd3, %rd0, %rd2;
        ld.global.b32 %r2, [%rd3];
        ld.global.b32 %r3, [%rd0];
        st.global.b32 [%rd1], %r3;
        shl.b32 %r4, %r0, 7; st.shared.b32 [%r4], %r0;
        shl.b32 %r5, %r0, 2; st.shared.b32 [%r5+4096], %r0;
        """,
        x,
        y,
        shared=8192,
        detailed=True,
    )
    counts = launch.counts
    assert (counts.loaded, counts.stored, launch.distinct_loaded, launch.distinct_stored) == (256, 128, 252, 128)
    assert counts.sectors == 32 + 4 + 4
    assert (counts.wavefronts, counts.least_wavefronts) == (33, 2)
    assert launch.instructions["memory"] == 32 * 5 and launch.instructions["control"] == 32


def test_fresh_memory_is_nan_and_settings_come_back() -> None:
    before = dataclasses.replace(settings)
    with executed(seed=3):
        assert settings.seed == 3 and torch.empty(3, 5).isnan().all()
    assert settings == before


def test_nothing_happens_without_programs() -> None:
    assert execute(None, 0, [], []) is None


def test_every_row_of_the_table_says_where_the_manual_has_it() -> None:
    kinds = {"memory", "float", "special", "tensor", "integer", "control", "parameter"}
    assert len(TABLE) > 50 and {row.kind for row in TABLE} == kinds
    assert all("Instruction" in row.section and ":" in row.section for row in TABLE)
