"""A few instructions of PTX on tensors."""

import re

import torch
from torch import Tensor

from .ptx import assemble
from .ptx.driver import Launch, execute, recorded

REGISTERS = """
	.reg .pred %p<20>; .reg .b16 %rs<50>; .reg .b32 %r<90>; .reg .b64 %rd<50>; .reg .f32 %f<20>; .reg .f64 %fd<20>;
"""
# x and y are the first two parameters; %r0 is the thread, %rd0 and %rd1 where its word of each of them is.
HEAD = """
	ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1];
	mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, {threads}, %r0;
	mad.wide.s32 %rd0, %r1, {width}, %rd0; mad.wide.s32 %rd1, %r1, {out}, %rd1;
"""


def run(
    body: str, *tensors: Tensor, threads: int = 32, grid: int = 1, shared: int = 0, detailed: bool = False
) -> Launch:
    """Execute statements on x, y and more tensors."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(len(tensors)))
    head = HEAD.format(threads=threads, width=tensors[0].element_size(), out=tensors[1].element_size())
    lines = "\n".join(f".loc 1 {i + 1} 0\n{line}" for i, line in enumerate(body.strip().splitlines()))
    text = f"""
.extern .shared .align 16 .b8 smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
{REGISTERS}{head}{lines}
	ret;
}}
	.file 1 "/snippet.py"
"""
    with recorded(detailed) as launches:
        names = [f"p{i}" for i in range(len(tensors))]
        execute(assemble(re.sub(r"\t", " ", text)), grid, names, list(tensors), shared)
    return launches[0]


def unary(opcode: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``opcode`` of each element: a multiple of 32."""
    y = torch.empty(x.shape, dtype=dtype)
    load, store = (f"b{8 * t.itemsize}" for t in (x.dtype, dtype))
    registers = {"b8": "%rs", "b16": "%rs", "b32": "%r", "b64": "%rd"}
    a, b = f"{registers[load]}20", f"{registers[store]}30"
    body = f"ld.global.{load} {a}, [%rd0];\n{opcode} {b}, {a};\nst.global.{store} [%rd1], {b};"
    run(body, x, y, grid=x.numel() // 32)
    return y


def of_three(opcode: str, *x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``opcode`` of the elements of one to three tensors of one width."""
    rows = torch.stack(x)
    n, bits = x[0].numel(), 8 * rows.element_size()
    register = {16: "%rs", 32: "%r", 64: "%rd"}[bits]
    y = torch.empty(n, dtype=dtype or rows.dtype)
    loads = "".join(f"ld.global.b{bits} {register}{20 + i}, [%rd0+{i * n * bits // 8}];\n" for i in range(len(x)))
    sources = ", ".join(f"{register}{20 + i}" for i in range(len(x)))
    out = {16: "%rs", 32: "%r", 64: "%rd"}[8 * y.element_size()]
    body = f"{loads}{opcode} {out}40, {sources};\nst.global.b{8 * y.element_size()} [%rd1], {out}40;"
    run(body, rows, y, grid=n // 32)
    return y
