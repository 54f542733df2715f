"""Every public launcher at real shapes, on tensors that need no memory: resources of each launch, on NVIDIA and AMD."""

import re
from collections.abc import Iterator

import pytest
import torch

triton = pytest.importorskip("triton")

from bench.kernels import OPS, phases

from .harness.compiled import AMD, ARCHS, Launch, check, check_product, compiling

pytestmark = pytest.mark.compiled

# Registers of a thread at most, on any architecture and in any dtype up to 32 bits; others have check()'s 128.
REGISTERS = {
    "mingru_fwd_kernel": 56,
    "mingru_bwd_kernel": 80,
    "log_scan_fwd_kernel": 64,
    "log_scan_bwd_kernel": 64,
    "mingru_fwd_kernel, reduce": 88,
    "mingru_fwd_kernel, replay": 64,
    "mingru_bwd_kernel, reduce": 64,
    "mingru_bwd_kernel, replay": 96,
    "carry_kernel": 64,
    "log_scan_fwd_kernel, reduce": 88,
    "log_scan_fwd_kernel, replay": 64,
    "log_scan_bwd_kernel, reduce": 80,
    "log_scan_bwd_kernel, replay": 96,
    "log_scan_carry_kernel": 64,
    "gru_gates_fwd_kernel": 40,
    "gru_gates_bwd_kernel": 56,
    "gru_update_fwd_kernel": 48,
    "gru_update_bwd_kernel": 56,
    "gru_conv_gates_fwd_kernel": 184,
    "gru_conv_update_fwd_kernel": 192,
    "gru_rcn_bwd_candidate_kernel": 64,
    "gru_rcn_bwd_reset_kernel": 48,
}


def launches_of(name: str, dtype: torch.dtype, arch: int | str) -> Iterator[tuple[str, Launch]]:
    """Each launch, and the name of its kernel and phase."""
    for shape in OPS[name].shapes:
        with compiling(arch) as launches:
            OPS[name].run(shape, dtype, "meta")
        assert launches
        yield from zip(phases([launch.kernel for launch in launches]), launches, strict=True)


# float16 compiles to what bfloat16 does but for the conversions: once is enough.
CODES = [(arch, dtype) for dtype in (torch.float32, torch.bfloat16) for arch in ARCHS] + [(90, torch.float16)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPS if not OPS[name].codes])  # test_gru_codes has these
@pytest.mark.parametrize("arch, dtype", CODES, ids=str)
def test_budget(arch: int, name: str, dtype: torch.dtype) -> None:
    # A float32 state beside 16-bit gates: a step exchanges lanes once before it stores, a scan never.
    barriers = int(name.startswith("gru_rcn") and dtype.itemsize == 2)
    for phase, launch in launches_of(name, dtype, arch):
        if OPS[name].convolves:
            check_product(launch, dtype.itemsize, REGISTERS[phase])
            continue
        # 64 bits of a 16-bit tensor beside 128 of log x, or of a map; carries lane by lane, h0 and log b_0 among them.
        narrow = dtype.itemsize == 2 and (name.startswith("log_scan") or phase != launch.kernel)
        widths = {64, 128} if narrow else {128}
        if launch.kernel.endswith("carry_kernel"):
            widths = {8 * dtype.itemsize, 32}
        check([launch], aligned=widths == {128}, barriers=barriers, registers=REGISTERS[phase])
        assert set(launch.loads + launch.stores) <= widths, phase
        # Chunks have few warps to a program, and are there because lanes do not fill the device.
        assert launch.occupancy >= (3 / 8 if phase in OPS[name].kernels else 5 / 16), phase


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_amd(name: str, dtype: torch.dtype) -> None:
    """It compiles; a wavefront has twice the threads, so a thread has half the vector."""
    for phase, launch in launches_of(name, dtype, AMD):
        assert launch.stack == launch.spills == 0, phase
        assert not launch.narrow_offsets and not launch.low_precision, phase
        assert launch.loads and launch.stores, phase
        assert launch.shared <= 64 << 10, phase  # of a compute unit
        assert not OPS[name].convolves or "v_mfma" in launch.asm["amdgcn"], phase


@pytest.mark.parametrize("lanes, warps", ((64, 1), (256, 2), (512, 4), (8192, 4)))
def test_chunks_have_no_more_warps_than_lanes_fill(lanes: int, warps: int) -> None:
    with compiling(90) as launches:
        OPS["mingru_fwd"].run((1, 1024, lanes), torch.float32, "meta")
    chunks = OPS["mingru_fwd"].chunks((1, 1024, lanes), torch.float32)
    reduce, carries, replay = launches
    assert reduce.warps == replay.warps == warps and carries.warps == 1
    assert reduce.grid == replay.grid == (chunks * triton.cdiv(lanes, 128 * warps),)
    assert carries.grid == (lanes // 32,)


def test_amd_addresses_large_tensors_with_64_bits() -> None:
    """Instructions of the buffer kind have 32-bit offsets; Triton takes them for tensors below 2 GB alone."""
    codes = []
    for steps in (16, 16 << 12):
        with compiling(AMD) as launches:
            OPS["mingru_fwd"].run((4, steps, 64, 56, 56), torch.bfloat16, "meta")
        codes.append(launches[0].asm["amdgcn"])
    small, large = (len(re.findall(r"^\s+buffer_(?:load|store)", code, re.MULTILINE)) for code in codes)
    assert small > 2
    assert large <= 2  # h0 and h_n, which are small in both
