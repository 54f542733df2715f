"""Count the arithmetic that Triton kernels' source asks for, in Triton's interpreter: the one thing that it shows and machine
code does not, where an exponential is a multiplication more, and a multiplication and an addition are one instruction.

    with counted() as launches:
        h, h_n = mingru_fwd(gate_hidden)
    assert launches[0].flop == 10 * h.numel()

Needs a process that set ``TRITON_INTERPRET=1`` before Triton was imported.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@dataclasses.dataclass
class Launch:
    kernel: str
    flop: int = 0  # floating-point operations and functions, each counted as one, masked lanes included


# Every operation on floating-point numbers that is arithmetic; comparisons, selections, signs and conversions are not.
_ARITHMETIC = {
    name: 1 for name in ("fadd", "fsub", "fmul", "fdiv", "precise_divf", "frem", "exp", "exp2", "log", "log2")
}
_ARITHMETIC |= {name: 1 for name in ("sqrt", "precise_sqrt", "rsqrt", "sin", "cos", "erf")} | {"fma": 2}
_ARITHMETIC |= {name: 1 for name in ("maximumf", "maxnumf", "minimumf", "minnumf", "clampf")}


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """The list receives each launch, in order."""
    builder, executor = InterpreterBuilder, GridExecutor
    call, dot = executor.__call__, builder.create_dot
    launches: list[Launch] = []

    def counted_call(self, *args, **kwargs):
        launches.append(Launch(self.fn.__name__))
        call(self, *args, **kwargs)

    def counted_dot(self, a, b, *rest):
        launches[-1].flop += 2 * a.data.shape[0] * b.data.size  # (m, k) and (k, n)
        return dot(self, a, b, *rest)

    def counting(name: str, flop: int):
        compute = getattr(builder, name)

        def count(self, *args):
            result = compute(self, *args)
            launches[-1].flop += flop * result.data.size
            return result

        return count

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(executor, "__call__", counted_call))
        stack.enter_context(mock.patch.object(builder, "create_dot", counted_dot))
        for name, flop in _ARITHMETIC.items():
            member = f"create_{name}"
            stack.enter_context(mock.patch.object(builder, member, counting(member, flop)))
        yield launches
