"""Context parallelism: split over processes, a sequence gives what one process computes, for bytes that T does not change."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import convrnn.distributed
from tests.compare import TOLERANCE, assert_close
from tests.processes import run_group

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")

# dtype, B, T, C, *S, whether h0 is given, scale and shift of the logits, and with a True more whether there are masks
CASES = [
    (torch.float64, 2, 37, 3, (), True, 1.0, 0.0),
    (torch.float64, 2, 8, 3, (2, 3), False, 3.0, 0.0),
    (torch.float64, 1, 3, 5, (), True, 1.0, 0.0),  # four ranks: one of them has no step at all
    (torch.float64, 1, 400, 2, (), True, 0.1, -14.0),  # z near 1e-6, which rounding 1 - z would lose in float32
    (torch.float32, 1, 400, 2, (), True, 0.1, -14.0),
    (torch.float32, 2, 64, 4, (), True, 2.0, 0.0),
    (torch.bfloat16, 2, 64, 4, (), True, 2.0, 0.0),
    (torch.float64, 4, 37, 3, (2,), True, 1.0, 0.0, True),
]


class SentBytes(TorchDispatchMode):
    """Bytes that this process hands to collectives, by name: none passes the dispatcher unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name, given = func._schema.name, dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            given = given.get("input_tensor", given.get("input_tensors"))
            tensors = [given] if isinstance(given, torch.Tensor) else given
            self.sent[name] = self.sent.get(name, 0) + sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def inputs(case):
    dtype, B, T, C, S, with_h0, scale, shift, *_ = case
    generator = torch.Generator().manual_seed(7)
    packed = torch.randn(B, T, 2 * C, *S, generator=generator, dtype=torch.float64) * scale
    packed[:, :, :C] += shift
    if held := masks(case):
        packed[:2][held["hold"][:2]] = float("nan")
        packed[2, 21], packed[3, 30] = float("nan"), float("nan")  # not held: a reset alone keeps them from other ranks
    h0 = torch.randn(B, C, *S, generator=generator, dtype=torch.float64) if with_h0 else None
    upstream = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, T, C, *S), (B, C, *S))]
    return [None if x is None else x.to(dtype) for x in (packed, h0, *upstream)]


def masks(case):
    """Resets on no rank, on one, and on the first step of a rank; frames that are held, all of a rank's among them."""
    _, B, T, *_, masked = case
    if masked is not True:
        return {}
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[1, 5], reset[2, [0, 20]], reset[2:, T * 2 // 3] = True, True, True
    hold = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.3
    hold[1, 20:], hold[2, 21], hold[3, 30] = True, False, False
    return {"reset": reset, "hold": hold}


def run_cases(rank: int) -> dict:
    ranks = dist.get_world_size()
    results = []
    for case in CASES:
        packed, h0, dh, dh_n = inputs(case)
        T = packed.shape[1]
        # parts of unequal length: the first rank has about twice the steps of the others
        cuts = [0, *(T * (r + 2) // (ranks + 1) for r in range(ranks))]
        part = slice(cuts[rank], cuts[rank + 1])
        leaf = packed[:, part].detach().clone().requires_grad_()
        first = None if h0 is None else h0.clone().requires_grad_()
        h, h_n = convrnn.distributed.mingru(leaf, first, **{name: mask[:, part] for name, mask in masks(case).items()})
        # the loss is the sum of the ranks': each takes its share of h_n's upstream gradient
        share = (rank + 1) / sum(range(1, ranks + 1))
        ((h * dh[:, part]).double().sum() + share * (h_n.double() * dh_n.double()).sum()).backward()
        results.append((h.detach(), h_n.detach(), leaf.grad, None if first is None else first.grad))
    sent = {}
    for T in (64, 4096):
        leaf = torch.randn(2, T // ranks, 2 * 6, dtype=torch.float32, requires_grad=True)
        with SentBytes() as forward:
            h, _ = convrnn.distributed.mingru(leaf)
        with SentBytes() as backward:
            h.sum().backward()
        sent[T] = forward.sent, backward.sent
    leaf = torch.randn(1, 2, 2, requires_grad=True)
    h, _ = convrnn.distributed.mingru(leaf)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(h.sum(), leaf, create_graph=True)
    pairs = [dist.new_group([r]) for r in range(ranks)]
    with pytest.raises(ValueError, match="group must be a process group that this process belongs to"):
        convrnn.distributed.mingru(leaf, group=pairs[(rank + 1) % ranks])
    alone, _ = convrnn.distributed.mingru(leaf, group=pairs[rank])
    torch.testing.assert_close(alone, convrnn.mingru(leaf)[0])
    return {"cases": results, "sent": sent}


def check(name, actual, expected, tolerance):
    """assert_close of what are numbers, and NaN where the other has it."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places"
    assert_close(name, actual.nan_to_num(), expected.nan_to_num(), tolerance)


@pytest.mark.slow
@pytest.mark.compiled  # minutes in the interpreter, of scans that other tests run there
@pytest.mark.parametrize("ranks", [2, 4])
def test_split_over_processes_equals_one_process(ranks, tmp_path):
    results = run_group(run_cases, ranks, tmp_path)
    for number, case in enumerate(CASES):
        packed, h0, dh, dh_n = inputs(case)
        packed, h0 = (None if x is None else x.double().requires_grad_() for x in (packed, h0))
        # in float64; the loop's gradients lose z near 1e-6 in sigmoid'(-gate)
        h, h_n = convrnn.mingru(packed, h0, **masks(case))
        ((h * dh.double()).sum() + (h_n * dh_n.double()).sum()).backward()
        parts = [result["cases"][number] for result in results]
        tolerance = TOLERANCE[case[0]]
        check(f"{case}: h", torch.cat([part[0] for part in parts], 1), h, tolerance)
        check(f"{case}: gradient", torch.cat([part[2] for part in parts], 1), packed.grad, 2 * tolerance)
        for rank, part in enumerate(parts):
            check(f"{case}: h_n of rank {rank}", part[1], h_n, tolerance)
            if h0 is not None:
                check(f"{case}: dh0", part[3], h0.grad if rank == 0 else h0 * 0, 2 * tolerance)
    # a pair of states of (2, 6) float32 each way, for 64 steps and for 4,096
    pair = {"c10d::allgather_": 2 * 2 * 6 * 4}
    assert all(result["sent"] == {64: (pair, pair), 4096: (pair, pair)} for result in results)


def test_needs_a_process_group():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        convrnn.distributed.mingru(torch.zeros(1, 2, 2))
    with pytest.raises(TypeError, match="reset must be a bool Tensor, got torch.int64"):
        convrnn.distributed.mingru(torch.zeros(1, 2, 2), reset=torch.ones(1, 2).long())
    with pytest.raises(ValueError, match=r"hold must have shape \[1, 2\], got \[2, 1\]"):
        convrnn.distributed.mingru(torch.zeros(1, 2, 2), hold=torch.zeros(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="gate_hidden must be"):
        convrnn.distributed.mingru(torch.zeros(1, 2, 3))
