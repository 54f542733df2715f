"""torch.func over every op and over the modules: vmap in all its nestings, jacobians, functional_call."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import convrnn

from .conftest import INTERPRETED
from .differentiable import CASES, loss
from .modules import MODULES
from .samples import backward_samples

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def every(count):
    """Dimensions to map: all inputs' first, all inputs' last, and each input alone; fewer in the interpreter."""
    yield (0,) * count
    if not INTERPRETED:
        yield (-1,) * count
        yield from (tuple(0 if i == j else None for j in range(count)) for i in range(count))
        yield from (tuple(None if i == j and count > 1 else 1 for j in range(count)) for i in range(count))
    elif count > 1:
        yield (None, *(1,) * (count - 1))


def mapped(case, device, in_dims, size=3):
    """Inputs with a mapped dimension of ``size`` where ``in_dims`` has one."""
    inputs = case.inputs(device, torch.float64, 0, size)
    return [x[0] if d is None else x.movedim(0, d) for x, d in zip(inputs, in_dims, strict=True)]


def looped(f, inputs, in_dims, size=3):
    rows = [f(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True))) for i in range(size)]
    return tuple(torch.stack(ys) for ys in zip(*rows, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_a_loop(name, device):
    case = CASES[name]
    for in_dims in every(len(case.shapes)):
        inputs = mapped(case, device, in_dims)
        for y, expected in zip(vmap(case.ours, in_dims)(*inputs), looped(case.reference, inputs, in_dims), strict=True):
            close(y, expected)


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_gradients_through_vmap(name, device):
    """vmap of grad (per-sample gradients), grad of vmap, and backward of vmap outside of torch.func."""
    case = CASES[name]
    count = len(case.shapes)
    per_sample = grad(lambda *inputs: loss(case.ours(*inputs)), tuple(range(count)))
    expected_sample = grad(lambda *inputs: loss(case.reference(*inputs)), tuple(range(count)))
    for in_dims in list(every(count))[:5]:
        inputs = mapped(case, device, in_dims)
        expected = looped(expected_sample, inputs, in_dims)
        for a, b in zip(vmap(per_sample, in_dims)(*inputs), expected, strict=True):
            close(a, b)
        through = grad(lambda *inputs, d=in_dims: loss(vmap(case.ours, d)(*inputs)), tuple(range(count)))(*inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        plain = torch.autograd.grad(loss(vmap(case.ours, in_dims)(*leaves)), leaves)
        truth = torch.autograd.grad(loss(looped(case.reference, leaves, in_dims)), leaves)
        for a, b, c in zip(through, plain, truth, strict=True):
            close(a, c)
            close(b, c)


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_nested_vmap(name, device):
    case = CASES[name]
    count = len(case.shapes)
    inputs = case.inputs(device, torch.float64, 0, 2, 3)
    for outer, inner in (((1,) * count, (0,) * count), ((0,) * count, (0,) * count)):
        ys = vmap(vmap(case.ours, inner), outer)(*inputs)
        rows = [
            looped(case.reference, [x.select(outer[0], i) for x in inputs], inner, (3, 2)[outer[0]])
            for i in range(2 + outer[0])
        ]
        for y, expected in zip(ys, (torch.stack(r) for r in zip(*rows, strict=True)), strict=True):
            close(y, expected)
    # the first input mapped outside, the last inside
    if count > 1:
        a, *middle, b = inputs[0][:, 0], *(x[0, 0] for x in inputs[1:-1]), inputs[-1][0]
        f = vmap(lambda a: vmap(lambda b: case.ours(a, *middle, b))(b))
        for y, expected in zip(f(a), case.reference(a[1], *middle, b[2]), strict=True):
            close(y[1, 2], expected)


@pytest.mark.compiled  # vmap over every entry: minutes in the interpreter
@pytest.mark.parametrize("name", CASES)
def test_jacobians_and_hessians(name, device):
    case = CASES[name]
    inputs = case.inputs(device)
    for i in range(len(inputs)):
        expected = jacrev(case.reference, i)(*inputs)
        for transform in (jacfwd, jacrev):
            for a, b in zip(transform(case.ours, i)(*inputs), expected, strict=True):
                close(a, b)

    def value(f):
        return lambda *inputs: loss(f(*inputs))

    argnums = tuple({0, len(inputs) - 1})
    expected = hessian(value(case.reference), argnums)(*inputs)
    for second in (
        hessian,
        lambda f, i: jacrev(jacrev(f, i), i),
        lambda f, i: jacrev(jacfwd(f, i), i),
        lambda f, i: jacfwd(jacfwd(f, i), i),
    ):
        got = second(value(case.ours), argnums)(*inputs)
        for (i, row), j in itertools.product(enumerate(expected), range(len(argnums))):
            close(got[i][j], row[j], 1e-8)


@pytest.mark.parametrize("name", CASES)
def test_vjp_of_jvp_and_jvp_of_vjp(name, device):
    case = CASES[name]
    inputs, directions = tuple(case.inputs(device)), tuple(case.inputs(device, seed=1))

    def both(f):
        def derivative(*inputs):
            return jvp(f, inputs, directions)[1]

        tangents, pull = vjp(derivative, *inputs)
        back = pull(tuple(torch.ones_like(t) for t in tangents))
        product = jvp(grad(lambda *inputs: loss(f(*inputs)), tuple(range(len(inputs)))), inputs, directions)[1]
        return (*tangents, *back, *product)

    for a, b in zip(both(case.ours), both(case.reference), strict=True):
        close(a, b)


@pytest.mark.compiled
@pytest.mark.parametrize("op", ["mingru", "log_scan", "gru_gates", "gru_update", "gru_rcn"])
def test_vmap_of_the_backward_ops(op, device):
    """Called on their own: every optional argument, every mask, everything mapped and all but one."""
    f = getattr(torch.ops.convrnn, f"{op}_backward")
    for arguments in backward_samples(op, device, torch.float64):
        tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.numel()]
        for kept in (None, tensors[0], tensors[-1]):
            chosen = [i for i in tensors if i != kept]
            stacked = [torch.stack((arguments[i], (0.5 * arguments[i]).to(arguments[i].dtype))) for i in chosen]

            def call(*rows, chosen=chosen, arguments=arguments):
                full = list(arguments)
                for i, row in zip(chosen, rows, strict=True):
                    full[i] = row
                return f(*full)

            for y, expected in zip(vmap(call)(*stacked), looped(call, stacked, [0] * len(stacked), 2), strict=True):
                close(y, expected)


@pytest.mark.compiled
@pytest.mark.parametrize("name", MODULES)
def test_ensembles_and_per_sample_gradients_of_modules(name, device):
    (first, x), (second, _) = (MODULES[name].make(device, dtype=torch.float64) for _ in range(2))
    modules, x = [first, second], x.double()

    def run(state, x):
        return functional_call(modules[0], state, (x,))[0]

    # an ensemble: weights mapped, the input shared or not
    state = stack_module_state(modules)[0]
    expected = torch.stack([module(x)[0] for module in modules])
    close(vmap(run, (0, None))(state, x), expected.detach())
    close(vmap(run)(state, torch.stack((x, x))), expected.detach())

    # per-sample gradients: every entry of the batch as a batch of one
    parameters = {key: value.detach() for key, value in modules[0].named_parameters()}
    per_sample = vmap(grad(lambda p, x: run(p, x[None]).square().sum()), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        gradients = torch.autograd.grad(modules[0](sample[None])[0].square().sum(), list(modules[0].parameters()))
        for key, gradient in zip(parameters, gradients, strict=True):
            close(per_sample[key][i], gradient)

    # forward mode through a module and its parameters, against reverse mode, in one direction and in all of one weight
    directions = {key: torch.randn_like(value) for key, value in parameters.items()}, torch.randn_like(x)
    _, tangent = jvp(run, (parameters, x), directions)
    by_weight, by_x = grad(lambda p, x: run(p, x).sum(), (0, 1))(parameters, x)
    expected = sum((by_weight[key] * direction).sum() for key, direction in directions[0].items())
    close(tangent.sum(), expected + (by_x * directions[1]).sum())
    smallest = min(parameters, key=lambda key: parameters[key].numel())
    by_smallest = jacfwd(lambda p: run(parameters | {smallest: p}, x).sum())(parameters[smallest])
    close(by_smallest, by_weight[smallest])


MASKED = ["MinGRU", "MinConv2dGRU", "Bidirectional-MinGRU", "ConvGRU", "ConvGRU1d", "ConvGRU3d", "ConvGRU-walking"]


@pytest.mark.compiled
@pytest.mark.parametrize("name", MASKED)
def test_lengths_and_resets_of_modules(name, device):
    """Mapped with their rows, and shared by all that is mapped; per-sample gradients and tangents beside them."""
    module, x = MODULES[name].make(device, dtype=torch.float64)
    x = x.double()
    steps = x.shape[1]
    lengths = torch.tensor([steps, 1, 0], device=device)
    reset = torch.rand(x.shape[:2], device=device) < 0.5
    masks = {"lengths": lengths, "reset": reset}
    parameters = {key: value.detach() for key, value in module.named_parameters()}

    def run(p, x, lengths, reset):
        return functional_call(module, p, (x[None],), {"lengths": lengths[None], "reset": reset[None]})[0][0]

    close(vmap(run, (None, 0, 0, 0))(parameters, x, lengths, reset), module(x, **masks)[0].detach())
    several = torch.stack((x, 2 * x))
    expected = torch.stack([module(y, **masks)[0] for y in several]).detach()
    close(vmap(lambda y: module(y, **masks)[0])(several), expected)

    per_sample = vmap(grad(lambda *args: run(*args).square().sum()), (None, 0, 0, 0))(parameters, x, lengths, reset)
    whole = torch.autograd.grad(module(x, **masks)[0].square().sum(), list(module.parameters()))
    for gradient, total in zip(per_sample.values(), whole, strict=True):
        close(gradient.sum(0), total)

    direction = torch.randn_like(x)
    _, tangent = jvp(lambda x: module(x, **masks)[0], (x,), (direction,))
    gradient = grad(lambda x: module(x, **masks)[0].sum())(x)
    close(tangent.sum(), (gradient * direction).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_a_transform(dtype, device):
    """Autocast's casts are part of what is differentiated."""
    x, h0, W, U, C, bias = (x.float() for x in CASES["gru_rcn-h0-bias"].inputs(device))

    def value(W, x):
        with torch.autocast(device, dtype):
            return loss([y.float() for y in convrnn.gru_rcn(x, h0, W, U, C, bias)])

    leaf = W.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf, x), leaf)
    got = grad(value)(W, x)
    assert got.dtype == torch.float32
    close(got, expected, 1e-6)
    close(vmap(grad(value), (None, 0))(W, torch.stack((x, x)))[1], expected, 1e-6)
    assert jvp(lambda W: value(W, x), (W,), (W,))[1].isfinite()


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["mingru-h0", "log_scan", "gru_update", "gru_rcn-h0-bias"])
def test_compiled_transforms(name, device):
    """One graph, the transform inside of it."""
    case = CASES[name]
    inputs, directions = case.inputs(device), case.inputs(device, seed=1)
    count = len(inputs)

    def gradient(*inputs):
        return grad(lambda *inputs: loss(case.ours(*inputs)), tuple(range(count)))(*inputs)

    def per_sample(*inputs):
        return vmap(gradient)(*(torch.stack((x, 2 * x)) for x in inputs))

    def tangent(*inputs):
        return jvp(lambda *inputs: case.ours(*inputs), inputs, tuple(directions))[1]

    for f in (per_sample, tangent):  # gradient is what per_sample maps
        torch._dynamo.reset()
        for a, b in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs), f(*inputs), strict=True):
            close(a, b)
