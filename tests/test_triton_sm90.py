"""The code that the kernels compile to for sm_90, executed: it has instructions for bfloat16 that sm_80 lacks. The fused step
takes wgmma there, which is not executed."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from convrnn.kernels import chunks

from .harness.inputs import DTYPES, randn
from .harness.ptx import UnknownPtx
from .harness.ptx.driver import recorded, using
from .test_harness_ptx_planted import run_product
from .test_triton_gru import check_gru_rcn, sequence
from .test_triton_scans import check_log_scan, check_mingru

pytestmark = pytest.mark.executed


@pytest.fixture(autouse=True)
def sm_90() -> Iterator[None]:
    with using(arch=90):
        yield


@pytest.mark.parametrize("lanes", (35, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scans(dtype: torch.dtype, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (9, 4):  # T whole, and in chunks
        monkeypatch.setattr(chunks, "chunk_steps", lambda *_, steps=steps: steps)
        h0 = randn(2, lanes, dtype=torch.float32 if dtype.itemsize == 2 else dtype, seed=2)
        check_mingru(randn(2, 9, 2 * lanes, dtype=dtype, seed=1), h0)
        check_log_scan(-randn(2, 8, lanes, dtype=dtype, seed=1).abs(), randn(2, 9, lanes, dtype=dtype, seed=2))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru_rcn(dtype: torch.dtype, layout: str) -> None:
    check_gru_rcn(sequence(dtype, 2, (4, 3), True), layout)


def test_the_code_is_of_sm_90() -> None:
    texts: list[str] = []
    with using(rewrite=lambda text: texts.append(text) or text), recorded():
        check_mingru(randn(2, 3, 10, dtype=torch.bfloat16, seed=1), None)
    assert texts and all(".target sm_90" in text for text in texts)


def test_wgmma_is_named() -> None:
    with pytest.raises(UnknownPtx, match=r"gru_conv_gates_fwd_kernel, .*(wgmma|elect|fence|mbarrier)"):
        run_product()
