"""Derivatives of the ops of any order, forward mode and vmap.

torch.library.register_autograd knows reverse mode alone: under torch.func's transforms it raises, and forward mode drops
the tangents. So each op gets the kernel that register_autograd would have made, with a jvp beside the backward, and a
kernel for torch.func's dispatch key, which calls a torch.autograd.Function that torch.func knows how to transform. Both
hold for calls of ``torch.ops.convrnn`` too. Neither costs the usual call anything: the dispatcher takes the second one
only inside of a transform.

With F an op, p its inputs, u a direction of p and v a cotangent of F(p): the backward op is B(v, p) = J(p)^T v, linear in
v. Everything that is more than a first derivative in reverse mode follows from J(p) u, one function an op:

* forward mode of F is J(p) u;
* the gradients of <u, B(v, p)> = <v, J(p) u> are J(p) u for v, and S(v, p, u) = grad_p <v, J(p) u> for p;
* forward mode of B is B(dv, p) + S(v, p, dp), second derivatives being symmetric.

J(p) u is written with differentiable operations - our own ops among them - so this repeats to any order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ._library import autocast_kernel, register_kernel

Maybe = Tensor | None
Tensors = tuple[Maybe, ...]
Vmap = Callable[..., tuple[Any, Any]]


class Formulas(NamedTuple):
    """What an op needs for the transforms; inputs are those of the schema, with their defaults."""

    setup_context: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]
    backward: Callable[..., Tensors]  # (ctx, *gradients of the outputs) -> a gradient for each input
    jvp: Callable[..., Tensors]  # (inputs, outputs, tangents of the inputs) -> a tangent for each output
    vmap: Vmap  # torch.autograd.Function.vmap
    setup_reverse: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None] | None = None
    """In place of ``setup_context`` where reverse mode alone follows, outside of transforms: it may save what it makes."""


class Forward(NamedTuple):
    """The op F as :func:`register_backward_op` needs it; ``jvp`` computes F itself on the way."""

    jvp: Callable[[Sequence[Maybe], Sequence[Maybe]], Tensors]  # (p, u) -> J(p) u; p ends with the constants
    cotangents: tuple[int, ...]  # where the backward op takes v
    primals: tuple[int, ...]  # where it takes p; its outputs come in the same order
    constants: tuple[int, ...] = ()  # where it takes the last inputs of F, of which there is no derivative
    returned: tuple[int, ...] = ()  # where it takes what F returned, as far as ``restore`` reads it
    restore: Callable[[list[Maybe], Sequence[Maybe]], list[Maybe]] | None = None
    """(p as the backward op got it, what F returned) -> p, where the backward op was given less than p."""


def register(name: str, formulas: Formulas) -> None:
    """Registers reverse mode, forward mode and the torch.func transforms of ``convrnn::name``."""
    op = getattr(torch.ops.convrnn, name).default
    defaults = [argument.default_value for argument in op._schema.arguments]
    single = len(op._schema.returns) == 1

    def outputs_of(result: Any) -> tuple[Tensor, ...]:
        return (result,) if single else result

    def setup_context(ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
        formulas.setup_context(ctx, inputs, outputs_of(result))

    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
        ctx.save_for_forward(*(x if isinstance(x, Tensor) else None for x in (*inputs, *outputs_of(result))))
        ctx.constants = tuple(None if isinstance(x, Tensor) else x for x in inputs)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        # Off here by default, which makes zeros of the outer tangents where forward mode is nested. Tangents of this
        # level must not be differentiated once more.
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [None if x is None else forward_ad.unpack_dual(x, level=0).primal for x in ctx.saved_tensors]
            count = len(ctx.constants)
            inputs = [constant if x is None else x for x, constant in zip(saved[:count], ctx.constants, strict=True)]
            given = [t if isinstance(t, Tensor) else None for t in tangents[:count]]
            result = formulas.jvp(inputs, saved[count:], given)
        return result[0] if single else result

    def transformed_forward(*inputs: Any) -> Any:
        return op(*inputs)

    def transformed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        save_for_jvp(ctx, inputs, output)  # kept until the tangents are there, if there are any

    def eager_forward(ctx: Any, *args: Any) -> Any:
        # torch.autograd.Function binds signatures at every call where setup_context is a method of its own
        *inputs, (keyset, forward_mode) = args
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
        full = (*inputs, *defaults[len(inputs) :])
        if forward_mode or formulas.setup_reverse is None:
            setup_context(ctx, full, result)
        else:
            formulas.setup_reverse(ctx, full, outputs_of(result))
        if forward_mode:
            save_for_jvp(ctx, full, result)
        ctx.num_inputs = len(inputs)
        return result

    def eager_backward(ctx: Any, *gradients: Any) -> Any:
        return (*formulas.backward(ctx, *gradients)[: ctx.num_inputs], None)

    def function(**methods: Callable[..., Any]) -> Any:
        # the name is what anomaly mode and grad_fn show
        return type(f"convrnn_{name}", (Function,), {key: staticmethod(method) for key, method in methods.items()})

    eager = function(forward=eager_forward, backward=eager_backward, jvp=jvp)
    transformed = function(
        forward=transformed_forward,
        setup_context=transformed_setup_context,
        backward=formulas.backward,
        jvp=jvp,
        vmap=formulas.vmap,
    )

    def autograd_kernel(keyset: Any, *inputs: Any) -> Any:
        forward_mode = _forward_mode(inputs)
        if forward_mode or (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return eager.apply(*inputs, (keyset, forward_mode))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def transform_kernel(*inputs: Any) -> Any:
        # Autocast comes after torch.func in the dispatcher's order, but its casts must be differentiated
        kernel = autocast_kernel(name, inputs)
        if kernel is not None:
            return kernel(*inputs)
        return transformed.apply(*inputs, *defaults[len(inputs) :])

    register_kernel(name, autograd_kernel, "Autograd", with_keyset=True)
    register_kernel(name, transform_kernel, "FuncTorchDynamicLayerFrontMode")


def _forward_mode(inputs: Sequence[Any]) -> bool:
    """Whether an input may have a tangent."""
    if forward_ad._current_level >= 0:
        return True
    # a graph of torch.compile enters the level behind the back of the variable above
    return torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(x, level=0).tangent is not None for x in inputs if isinstance(x, Tensor)
    )


def register_backward_op(name: str, forward: Forward, vmap: Vmap) -> None:
    """Registers derivatives of the backward op B(v, p) of the op ``forward`` (see the top of this file).

    Its other inputs are what the forward op returned for p. They are no variables of their own: the derivatives for p
    are whole.
    """
    op = getattr(torch.ops.convrnn, name).default
    count = len(op._schema.arguments)

    def taken(inputs: Sequence[Any]) -> tuple[list[Maybe], list[Maybe]]:
        """v and p."""
        p = [inputs[i] for i in forward.primals]
        if forward.restore is not None:
            p = forward.restore(p, [inputs[i] for i in forward.returned])
        return [inputs[i] for i in forward.cotangents], p

    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        used = {*forward.cotangents, *forward.primals, *forward.constants, *forward.returned}
        ctx.save_for_backward(*(x if i in used else None for i, x in enumerate(inputs)))
        ctx.set_materialize_grads(False)

    def jvp_at(inputs: Sequence[Any]) -> Callable[[Sequence[Maybe], Sequence[Maybe]], Tensors]:
        constants = [inputs[i] for i in forward.constants]
        return lambda primals, directions: forward.jvp((*primals, *constants), directions)

    def directions_of(primals: Sequence[Maybe], given: Sequence[Maybe]) -> list[Maybe]:
        # outputs that were not wanted have no elements, and neither have their gradients
        return [
            None if p is None or u is None or u.shape != p.shape else u for p, u in zip(primals, given, strict=True)
        ]

    def backward(ctx: Any, *gradients: Maybe) -> Tensors:
        saved = ctx.saved_tensors
        u = directions_of([saved[i] for i in forward.primals], gradients)
        found: list[Maybe] = [None] * count
        if any(x is not None for x in u):
            v, p = taken(saved)
            wanted = [ctx.needs_input_grad[i] if i < len(ctx.needs_input_grad) else False for i in forward.primals]
            dv, dp = second_order(jvp_at(saved), p, u, v, wanted)
            for i, gradient in zip((*forward.cotangents, *forward.primals), (*dv, *dp), strict=True):
                found[i] = gradient
        return tuple(found)

    def jvp(inputs: Sequence[Any], outputs: Sequence[Maybe], tangents: Sequence[Maybe]) -> Tensors:
        v, p = taken(inputs)
        dv, dp = [tangents[i] for i in forward.cotangents], [tangents[i] for i in forward.primals]
        terms: list[Sequence[Maybe]] = []
        if any(x is not None for x in dv):
            replaced = list(inputs)
            for i, tangent in zip(forward.cotangents, zeros_if_none(dv, v), strict=True):
                replaced[i] = tangent
            terms.append(op(*replaced))
        if any(x is not None for x in dp) and any(x is not None for x in v):
            wanted = [x is not None and y is not None and x.shape == y.shape for x, y in zip(p, outputs, strict=True)]
            terms.append(second_order(jvp_at(inputs), p, dp, v, wanted)[1])
        return tuple(None if y is None else _sum([term[i] for term in terms], y) for i, y in enumerate(outputs))

    register(name, Formulas(setup_context, backward, jvp, vmap))


def _sum(terms: list[Maybe], like: Tensor) -> Tensor:
    present = [x for x in terms if x is not None and x.shape == like.shape]
    if not present:
        return torch.zeros_like(like)
    return present[0] if len(present) == 1 else present[0] + present[1]


def second_order(
    jvp: Callable[[Sequence[Maybe], Sequence[Maybe]], Tensors],
    primals: Sequence[Maybe],
    directions: Sequence[Maybe],
    cotangents: Sequence[Maybe],
    wanted: Sequence[bool],
) -> tuple[list[Maybe], list[Maybe]]:
    """J(p) u, and the gradients of <v, J(p) u> for those primals that are wanted; None for the others.

    Entries of J(p) u are None where v is.
    """
    used = {i: v for i, v in enumerate(cotangents) if v is not None}

    def along(*at: Maybe) -> tuple[Tensor, ...]:
        tangents = jvp(at, directions)
        return tuple(tangents[i] for i in used)  # type: ignore[misc]

    tangents, dp = pull_back(along, primals, list(used.values()), wanted)
    dv: list[Maybe] = [None] * len(cotangents)
    for i, tangent in zip(used, tangents, strict=True):
        dv[i] = tangent
    return dv, dp


def pull_back(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Maybe],
    cotangents: list[Tensor],
    wanted: Sequence[bool],
) -> tuple[Sequence[Tensor], list[Maybe]]:
    """``function(*inputs)``, and the gradients of its inner product with ``cotangents``, themselves differentiable, for
    those inputs that are wanted; None for the others."""
    moving = {i: x for i, x in enumerate(inputs) if x is not None and wanted[i]}
    gradients: list[Maybe] = [None] * len(inputs)

    def moved(*values: Tensor) -> tuple[Tensor, ...]:
        at = list(inputs)
        for i, x in zip(moving, values, strict=True):
            at[i] = x
        return function(*at)

    if not moving:
        return moved(), gradients
    if torch._C._are_functorch_transforms_active():
        outputs, pull = torch.func.vjp(moved, *moving.values())  # type: ignore[misc]
        found: Sequence[Maybe] = pull(tuple(cotangents))
    else:  # torch.func.vjp refuses to run under saved-tensor hooks; this does not
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            tracked = [
                x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
                for x in moving.values()
            ]
            outputs = moved(*tracked)
            pairs = [(y, v) for y, v in zip(outputs, cotangents, strict=True) if y.requires_grad]
            found = [None] * len(tracked)
            if pairs:
                found = torch.autograd.grad(
                    [y for y, _ in pairs], tracked, [v for _, v in pairs], allow_unused=True, create_graph=create_graph
                )
        outputs = outputs if create_graph else [y.detach() for y in outputs]
    for i, gradient in zip(moving, found, strict=True):
        gradients[i] = gradient
    return outputs, gradients


def zeros_if_none(tangents: Sequence[Maybe], inputs: Sequence[Any]) -> list[Any]:
    """``tangents``, with zeros for those that are missing beside an input that is not."""
    return [
        torch.zeros_like(x) if t is None and isinstance(x, Tensor) else t for t, x in zip(tangents, inputs, strict=True)
    ]


def is_placeholder(x: Tensor) -> bool:
    """Whether ``x`` stands for an output that was not wanted."""
    return x.dim() == 1 and x.shape[0] == 0


def fold(name: str, shared: tuple[int, ...] = ()) -> Vmap:
    """The vmap rule of an op whose tensors begin with the batch, but for the ``shared`` ones: the mapped dimension joins it."""
    op = getattr(torch.ops.convrnn, name)

    def rule(info: Any, in_dims: Sequence[Any], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def folded(i: int, x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor) or i in shared or is_placeholder(x):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        def unfolded(y: Tensor) -> tuple[Tensor, int | None]:
            if is_placeholder(y):
                return y, None
            return y.unflatten(0, (size, y.shape[0] // size)), 0

        result = op(*(folded(i, x, dim) for i, (x, dim) in enumerate(zip(inputs, in_dims, strict=True))))
        return unfolded(result) if isinstance(result, Tensor) else _transpose(unfolded(y) for y in result)

    return rule


def loop(name: str) -> Vmap:
    """The vmap rule that calls the op once for each entry of the mapped dimension."""
    op = getattr(torch.ops.convrnn, name)

    def rule(info: Any, in_dims: Sequence[Any], *inputs: Any) -> tuple[Any, Any]:
        def stacked(ys: tuple[Tensor, ...]) -> tuple[Tensor, int | None]:
            return (ys[0], None) if is_placeholder(ys[0]) else (torch.stack(ys), 0)

        def entry(i: int) -> list[Any]:
            pairs = zip(inputs, in_dims, strict=True)  # of a list, a list of dimensions
            return [x.select(d, i) if isinstance(x, Tensor) and d is not None else x for x, d in pairs]

        results = [op(*entry(i)) for i in range(info.batch_size)]
        return _transpose(stacked(ys) for ys in zip(*results, strict=True))

    return rule


def _transpose(pairs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    outputs, out_dims = zip(*pairs, strict=True)
    return outputs, out_dims
