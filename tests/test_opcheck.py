"""torch.library.opcheck for every op and its backward: dtypes, strides, optional arguments present and absent."""

import pytest
import torch

from convrnn.info import OPS

from .compare import DTYPES
from .conftest import INTERPRETED
from .samples import backward_samples, forward_samples, grown

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
# Traced and eager gradients of 16-bit dtypes differ by rounding, and so do sums over pixels in another order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}

# in the interpreter one dtype: of the others test_registration.py compares the fakes, of float16 for one op
each_dtype = pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES, ids=str)
each_op = pytest.mark.parametrize("op", [name for op in OPS for name in (op, f"{op}_backward")])


def samples(op, device, dtype):
    if op.endswith("_backward"):
        return backward_samples(op.removesuffix("_backward"), device, dtype)
    return forward_samples(op, device, dtype)


@each_dtype
@each_op
def test_schema_registration_and_fakes(op, dtype, device):
    """Every sample in every dtype: nothing is mutated or aliased, and the fake is what the kernel returns."""
    overload = getattr(torch.ops.convrnn, op).default
    for arguments in samples(op, device, dtype):
        torch.library.opcheck(overload, grown(arguments), test_utils=QUICK)


@pytest.mark.compiled  # tracing is the same, and kernels have tests of their own
@each_op
def test_traced_with_dynamic_shapes(op, device):
    """AOTAutograd with symbolic sizes against eager, forward and gradients; samples and dtypes take turns."""
    overload = getattr(torch.ops.convrnn, op).default
    backward = op.endswith("_backward")
    # of the backward ops' samples, three or four for each of the forward's, one in five meets every mask; their own
    # gradients are second derivatives, which have tests of their own
    count, every = len(samples(op, device, torch.float32)), 5 if backward else 1
    for turn, i in enumerate(range(0, count, every)):
        dtype = DTYPES[turn % len(DTYPES)]
        arguments = samples(op, device, dtype)[i]
        torch.library.opcheck(
            overload,
            arguments if backward else grown(arguments),
            test_utils="test_aot_dispatch_dynamic",
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
        )


STRIDES = {
    "contiguous": lambda x: x.is_contiguous(),
    "a view of a larger tensor": lambda x: x.untyped_storage().nbytes() > x.nbytes,
    "permuted": lambda x: not x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes,
}


@each_op
def test_samples_cover_the_matrix(op, device):
    """Every optional argument is there and missing; among the inputs are all kinds of strides."""
    given = samples(op, device, torch.float32)
    for i, argument in enumerate(getattr(torch.ops.convrnn, op).default._schema.arguments):
        if isinstance(argument.type, torch.OptionalType):
            values = [a[i] if i < len(a) else argument.default_value for a in given]
            assert any(v is None for v in values) and any(v is not None for v in values), argument.name
    tensors = [a for arguments in given for a in arguments if isinstance(a, torch.Tensor) and a.numel()]
    for kind, holds in STRIDES.items():
        assert any(holds(x) for x in tensors), kind


def test_no_op_is_left_out():
    """What the library registers is what is checked, but for cpu_isa, which takes no tensor."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("convrnn::")}
    checked = {f"convrnn::{name}" for op in OPS for name in (op, f"{op}_backward")}
    assert registered == checked | {"convrnn::cpu_isa"}
