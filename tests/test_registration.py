"""What PyTorch expects of an op beside opcheck: fakes, torch.compile, autocast, scripting; for every op."""

import copy

import pytest
import torch

import convrnn
from convrnn.info import OPS

from .conftest import INTERPRETED
from .samples import backward_samples, forward_samples, grown

# in the interpreter test_opcheck.py has float32, and float16, which the fakes treat as bfloat16, is for one op
DTYPES = [torch.float64, torch.bfloat16, *([] if INTERPRETED else [torch.float32, torch.float16])]
FAKES = [(op, dtype) for dtype in DTYPES for op in OPS] + ([("gru_update", torch.float16)] if INTERPRETED else [])


@pytest.mark.parametrize(("op", "dtype"), FAKES, ids=str)
def test_fakes_have_exact_shapes_strides_and_dtypes(op, dtype, device):
    mode = torch._subclasses.FakeTensorMode()
    for name, samples in ((op, forward_samples), (f"{op}_backward", backward_samples)):
        f = getattr(torch.ops.convrnn, name)
        for arguments in samples(op, device, dtype):
            real = f(*arguments)
            with mode:
                fake = f(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
            real, fake = ((y,) if isinstance(y, torch.Tensor) else y for y in (real, fake))
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


def _bad_calls(op, device):
    """Argument tuples that would read or write out of bounds, or mix devices, if an op believed them."""
    good = {
        name: samples(op, device)[-1] for name, samples in ((op, forward_samples), (f"{op}_backward", backward_samples))
    }
    for name, arguments in good.items():
        for i, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                continue
            for bad in (argument[:1, :1], argument.new_zeros(()), argument.to(torch.int64), argument.to("meta")):
                yield name, (*arguments[:i], bad, *arguments[i + 1 :])


@pytest.mark.parametrize("op", OPS)
def test_ops_called_directly_refuse_what_does_not_fit(op, device):
    for name, arguments in _bad_calls(op, device):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            getattr(torch.ops.convrnn, name)(*arguments)
            pytest.fail(f"{name} took {[(tuple(a.shape), a.dtype, a.device) for a in arguments if torch.is_tensor(a)]}")


@pytest.mark.parametrize("op", OPS)
def test_outputs_share_no_memory(op, device):
    for name, samples in ((op, forward_samples), (f"{op}_backward", backward_samples)):
        f = getattr(torch.ops.convrnn, name)
        for arguments in samples(op, device):
            outputs = f(*arguments)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            tensors = [*outputs, *(a for a in arguments if isinstance(a, torch.Tensor))]
            storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
            given = len([a for a in arguments if isinstance(a, torch.Tensor) and a.numel()])
            fresh, old = storages[: len(storages) - given], storages[len(storages) - given :]
            assert len(set(fresh)) == len(fresh) and not set(fresh) & set(old)


@pytest.mark.parametrize("op", [op for op in OPS if op != "gru_rcn"])
def test_threads_do_not_change_a_bit(op, device):
    """GRU-RCN has a test of its own: on the GPU's path a library sums its weight gradients in an order of its own."""
    before = torch.get_num_threads()
    for name, samples in ((op, forward_samples), (f"{op}_backward", backward_samples)):
        for arguments in samples(op, device):
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                outputs = getattr(torch.ops.convrnn, name)(*arguments)
                results.append((outputs,) if isinstance(outputs, torch.Tensor) else outputs)
            torch.set_num_threads(before)
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def _public(op, arguments):
    """The arguments and the masks that the public function takes for those of its op."""
    if op not in CODES:
        return arguments, {}
    codes = arguments[CODES[op]] if len(arguments) > CODES[op] else None
    masks = {} if codes is None else {"reset": codes % 2 == 1, "hold": codes >= 2}
    return arguments[: 2 if op == "mingru" else 6], masks


CODES = {"mingru": 2, "gru_rcn": 7}  # where they stand


PUBLIC = {
    "mingru": convrnn.mingru,
    "log_scan": convrnn.parallel_scan_log,
    "gru_gates": convrnn.ops.gru_gates,
    "gru_update": convrnn.ops.gru_update,
    "gru_rcn": convrnn.gru_rcn,
}


def _loss(outputs):
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return sum(y.float().square().sum() for y in outputs)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph(op, dynamic, device):
    """Without the optional arguments and with them; what strides and ranks make of it is opcheck's."""
    torch._dynamo.reset()
    compiled = torch.compile(PUBLIC[op], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    samples = forward_samples(op, device)
    for arguments in [*samples[:2], *(a for a in samples if _public(op, a)[1])][:3]:
        given, masks = _public(op, arguments)
        eager, traced = (grown(copy.deepcopy(given)) for _ in range(2))
        expected, got = _loss(PUBLIC[op](*eager, **masks)), _loss(compiled(*traced, **masks))
        torch.testing.assert_close(got, expected)
        expected.backward()
        got.backward()
        for a, b in zip(eager, traced, strict=True):
            if isinstance(a, torch.Tensor) and a.requires_grad:
                torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    x, h0, W, U, C, bias = forward_samples("gru_rcn", device)[1]
    W.requires_grad_()
    with torch.autocast(device, dtype=dtype):
        out, h_n = convrnn.gru_rcn(x, h0, W, U, C, bias)
        (gradient,) = torch.autograd.grad(out.float().sum(), W)
    assert out.dtype == dtype and h_n.dtype == torch.float32 and gradient.dtype == torch.float32
    low = [a.to(dtype) for a in (W, U, C, bias)]
    assert torch.equal(out, convrnn.gru_rcn(x.to(dtype), h0, *low)[0])


@pytest.mark.parametrize("op", ["mingru", "gru_rcn"])
def test_scripting(op, device, tmp_path):
    scripted = torch.jit.script(PUBLIC[op])
    for arguments in forward_samples(op, device):
        given, masks = _public(op, arguments)
        for a, b in zip(scripted(*given, **masks), PUBLIC[op](*given, **masks), strict=True):
            assert torch.equal(a, b)
