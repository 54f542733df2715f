"""Matrix fragments: what ldmatrix hands out and what mma.sync multiplies, against plain matrix products."""

import pytest
import torch

pytest.importorskip("triton")

from .harness.snippet import run

pytestmark = pytest.mark.executed

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("trans", (False, True), ids=("rows", "columns"))
def test_product_of_16_bits(kind: str, trans: bool) -> None:
    """A (16, 16) from shared memory by ldmatrix.x4; B (8, 16), one row a column of the product, by ldmatrix.x2, or stored
    (16, 8) and transposed by it; both copied there as they lie."""
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randn(n, m, generator=generator) for n, m in ((16, 16), (8, 16), (16, 8)))
    a, b = a.to(DTYPES[kind]), b.to(DTYPES[kind])
    stored = b.T.contiguous() if trans else b
    words = torch.cat((a.flatten(), stored.flatten())).view(torch.int32)
    out = torch.empty(16, 8)
    # B's matrices of 8x8: as stored, rows 0-7 and columns 0-7, then columns 8-15; transposed, rows 0-7, then 8-15.
    second = "16; mul.lo.s32 %r20, %r20, 1" if not trans else "128; mul.lo.s32 %r20, %r20, 1"
    stride = 16 if trans else 32
    body = f"""
        {"".join(f"ld.global.b32 %r10, [%rd0+{128 * i}]; shl.b32 %r11, %r0, 2; st.shared.b32 [%r11+{128 * i}], %r10;" for i in range(6))}
        bar.warp.sync -1;
        and.b32 %r20, %r0, 15; shl.b32 %r20, %r20, 5; shr.u32 %r21, %r0, 4; shl.b32 %r21, %r21, 4; add.s32 %r20, %r20, %r21;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r30, %r31, %r32, %r33}}, [%r20];
        and.b32 %r22, %r0, 7; mul.lo.s32 %r22, %r22, {stride}; shr.u32 %r23, %r0, 3; and.b32 %r23, %r23, 1;
        mov.b32 %r20, {second}; mad.lo.s32 %r22, %r23, %r20, %r22;
        ldmatrix.sync.aligned.m8n8.x2{".trans" if trans else ""}.shared.b16 {{%r34, %r35}}, [%r22+512];
        ld.param.b64 %rd2, [p2]; shr.u32 %r24, %r0, 2; and.b32 %r25, %r0, 3;
        shl.b32 %r24, %r24, 5; shl.b32 %r25, %r25, 3; add.s32 %r24, %r24, %r25; cvt.u64.u32 %rd3, %r24;
        add.s64 %rd2, %rd2, %rd3; ld.param.b64 %rd1, [p1]; add.s64 %rd1, %rd1, %rd3;
        ld.global.v2.b32 {{%r40, %r41}}, [%rd2]; ld.global.v2.b32 {{%r42, %r43}}, [%rd2+256];
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r50, %r51, %r52, %r53}}, {{%r30, %r31, %r32, %r33}}, {{%r34, %r35}}, {{%r40, %r41, %r42, %r43}};
        st.global.v2.b32 [%rd1], {{%r50, %r51}}; st.global.v2.b32 [%rd1+256], {{%r52, %r53}};
    """
    run(body, words, out, c, shared=1024)
    exact = a.double() @ b.double().T + c.double()
    error = (out.double() - exact).abs().max() / (a.double().abs() @ b.double().abs().T).max()
    assert 0 < error < 2.0**-22


def test_product_of_tf32() -> None:
    """Registers of A: (row, k), (row + 8, k), (row, k + 4), (row + 8, k + 4); of B: k, k + 4. 13 bits do not count."""
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(16, 8, generator=generator), torch.randn(8, 8, generator=generator)
    rounded = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    out = torch.empty(16, 8)
    body = """
        ld.param.b64 %rd4, [p0]; ld.param.b64 %rd5, [p2]; ld.param.b64 %rd6, [p1];
        shr.u32 %r2, %r0, 2; and.b32 %r3, %r0, 3; shl.b32 %r4, %r2, 5; shl.b32 %r5, %r3, 2; add.s32 %r6, %r4, %r5;
        cvt.u64.u32 %rd7, %r6; add.s64 %rd4, %rd4, %rd7; add.s64 %rd5, %rd5, %rd7;
        ld.global.b32 %r10, [%rd4]; ld.global.b32 %r11, [%rd4+256]; ld.global.b32 %r12, [%rd4+16]; ld.global.b32 %r13, [%rd4+272];
        ld.global.b32 %r14, [%rd5]; ld.global.b32 %r15, [%rd5+16];
        mov.b32 %r16, 0;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r16, %r16, %r16};
        shl.b32 %r5, %r3, 3; add.s32 %r6, %r4, %r5; cvt.u64.u32 %rd7, %r6; add.s64 %rd6, %rd6, %rd7;
        st.global.v2.b32 [%rd6], {%r20, %r21}; st.global.v2.b32 [%rd6+256], {%r22, %r23};
    """
    run(body, a, out, b)
    exact = rounded[0].double() @ rounded[1].double().T
    scale = (a.double().abs() @ b.double().abs().T).max()
    assert 0 < (out.double() - exact).abs().max() / scale < 2.0**-22
    assert (out.double() - a.double() @ b.double().T).abs().max() / scale > 2.0**-13


def test_stmatrix_is_the_inverse_of_ldmatrix() -> None:
    x, y = torch.arange(128, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    for trans in ("", ".trans"):
        body = f"""
            shl.b32 %r2, %r0, 4;
            stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2], {{%r0, %r0, %r0, %r0}};
            bar.warp.sync -1;
            ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r3}}, [%r2+128];
            st.global.b32 [%rd1], %r3;
        """
        run(body, x, y, shared=1024)
        assert y.tolist() == list(range(32))
