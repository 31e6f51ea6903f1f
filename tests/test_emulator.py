"""The emulator: instructions by the layouts that the PTX manual gives, faults that are seeded and found, a few kernels.

`make emulate` runs all kernels and the mutations.
"""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from importlib.metadata import version

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from emulator import Fault, Log, emulated, execute, mutations, trial
from emulator.__main__ import main, report, report_mutations
from emulator.arithmetic import operation
from emulator.cases import CASES
from lowbit_kernels import configs
from lowbit_kernels._triton import INTERPRET, tl, triton
from lowbit_kernels.linear import gpu as linear_gpu

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 keeps Triton from compiling", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BY_NAME = {case.name: case for case in CASES}


def kernel(body: str, pointers: int, threads: int = 32) -> str:
    """PTX of a kernel with pointers %rd1, %rd2, ... and the thread in %r1."""
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(pointers))
    loads = "\n".join(f"\tld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(pointers))
    return f"""
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{parameters}
)
.reqntid {threads}
{{
\t.reg .pred %p<9>;
\t.reg .b16 %rs<9>;
\t.reg .b32 %r<300>;
\t.reg .b64 %rd<30>;
{loads}
\tmov.u32 %r1, %tid.x;
{body}
\tret;
}}
"""


def place(register: str, pointer: str, size: int) -> str:
    """register = pointer + size * thread."""
    return f"\tmad.wide.u32 {register}, %r1, {size}, {pointer};\n"


def compute(instructions: str, *operands: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """32-bit operands %r2, %r3, ... of each thread, the result from %r20."""
    n = len(operands[0])
    loads = "".join(
        place("%rd20", f"%rd{i + 1}", 4) + f"\tld.global.b32 %r{i + 2}, [%rd20];\n" for i in range(len(operands))
    )
    result = torch.zeros(n, dtype=out)
    store = place("%rd20", f"%rd{len(operands) + 1}", 4) + "\tst.global.b32 [%rd20], %r20;\n"
    log = execute(kernel(loads + instructions + store, len(operands) + 1, n), [*operands, result])
    assert not log.findings.counts
    return result


def words(n: int = 256) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32)


def floats(n: int = 256) -> torch.Tensor:
    """Of all sizes, with special values."""
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-127), 3.4e38, 65504.0, 65520.0]
    )
    x = torch.randn(n) * 2.0 ** torch.randint(-30, 30, (n,)).float()
    x[: len(special)] = special
    return x[torch.randperm(n)]


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("table", [0x6A, 0xE8, 0x96, 0x01, 0xCA])
def test_lop3(table: int) -> None:
    a, b, c = words(), words(), words()
    got = compute(f"\tlop3.b32 %r20, %r2, %r3, %r4, {table};\n", a, b, c, out=torch.int32)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        bits = [table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1 for i in range(32)]
        assert result & 0xFFFFFFFF == sum(bit << i for i, bit in enumerate(bits))


def test_prmt() -> None:
    a, b, selector = words(), words(), words() & 0xFFFF
    got = compute("\tprmt.b32 %r20, %r2, %r3, %r4;\n", a, b, selector, out=torch.int32)
    for x, y, s, result in zip(a.tolist(), b.tolist(), selector.tolist(), got.tolist(), strict=True):
        source = (x & 0xFFFFFFFF).to_bytes(4, "little") + (y & 0xFFFFFFFF).to_bytes(4, "little")
        expected = []
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = source[nibble & 7]
            expected.append((0xFF if byte >= 128 else 0) if nibble & 8 else byte)
        assert (result & 0xFFFFFFFF).to_bytes(4, "little") == bytes(expected)


def test_bit_fields_and_shifts() -> None:
    a, n = words(), torch.arange(256, dtype=torch.int32) % 40
    unsigned = [x & 0xFFFFFFFF for x in a.tolist()]
    position, length = (torch.randint(0, 40, (256,), dtype=torch.int32) for _ in range(2))
    for kind in ("s32", "u32"):
        got = compute(f"\tbfe.{kind} %r20, %r2, %r3, %r4;\n", a, position, length, out=torch.int32).tolist()
        for x, first, count, result in zip(unsigned, position.tolist(), length.tolist(), got, strict=True):
            sign = x >> min(first + count - 1, 31) & 1 if kind == "s32" and count else 0
            bits = [x >> first + i & 1 if i < count and first + i < 32 else sign for i in range(32)]
            assert result & 0xFFFFFFFF == sum(bit << i for i, bit in enumerate(bits))
    got = compute("\tshr.s32 %r20, %r2, %r3;\n", a, n, out=torch.int32).tolist()
    assert got == [x >> min(s, 31) for x, s in zip(a.tolist(), n.tolist(), strict=True)]
    got = compute("\tshl.b32 %r20, %r2, %r3;\n", a, n, out=torch.int32).tolist()
    assert [x & 0xFFFFFFFF for x in got] == [x << s & 0xFFFFFFFF for x, s in zip(unsigned, n.tolist(), strict=True)]
    got = compute("\tshf.r.wrap.b32 %r20, %r2, %r2, %r3;\n", a, n, out=torch.int32).tolist()
    expected = [(x >> s % 32 | x << 32 - s % 32) & 0xFFFFFFFF for x, s in zip(unsigned, n.tolist(), strict=True)]
    assert [x & 0xFFFFFFFF for x in got] == expected


def test_quotients_of_integers_go_to_zero() -> None:
    a, b = words(), torch.randint(-9, 10, (256,), dtype=torch.int32)
    b[b == 0] = 3
    quotient = compute("\tdiv.s32 %r20, %r2, %r3;\n", a, b, out=torch.int32)
    assert torch.equal(quotient.long(), torch.div(a.long(), b.long(), rounding_mode="trunc"))
    remainder = compute("\trem.s32 %r20, %r2, %r3;\n", a, b, out=torch.int32)
    assert torch.equal(remainder.long(), torch.fmod(a.long(), b.long()))


def test_dp4a() -> None:
    a, b, c = words(), words(), words() // 2
    got = compute("\tdp4a.s32.s32 %r20, %r2, %r3, %r4;\n", a, b, c, out=torch.int32)
    bytes_of = [x.view(torch.int8).view(-1, 4).long() for x in (a, b)]
    assert torch.equal(got.long(), (bytes_of[0] * bytes_of[1]).sum(1) + c)


def nearest(value: Fraction, digits: int) -> Fraction:
    """To so many binary digits, half to even; no subnormal results."""
    if value == 0:
        return value
    exponent = math.frexp(abs(float(value)))[1] - digits
    if abs(value) >= Fraction(2) ** (exponent + digits):  # float() rounded up to a power of two
        exponent += 1
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent


def test_fma_rounds_once() -> None:
    a, b, c = (torch.randn(1024) * 2.0 ** torch.randint(-9, 9, (1024,)).float() for _ in range(3))
    c[:500] = -(a * b)[:500] * (1 + 2.0 ** torch.randint(-24, 0, (500,)).float())
    # a b = 1 + 2^-12 + .., c far below half a unit: rounding twice goes to the wrong side of ties.
    a[500:700], b[500:700] = 1 + 2.0**-12, 1 + 2.0**-12
    c[500:700] = torch.randn(200) * 2.0**-60
    got = compute("\tfma.rn.f32 %r20, %r2, %r3, %r4;\n", a, b, c, out=torch.float32)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        assert Fraction(result) == nearest(Fraction(x) * Fraction(y) + Fraction(z), 24)


def test_fma_of_float64_rounds_once() -> None:
    fma = operation("fma.rn.f64").function
    a, b, c = np.array([[1 + 2.0**-30, 3.0, 0.0, np.inf], [1 - 2.0**-30, 1 / 3, 1.0, 1.0], [-1.0, -1.0, -0.0, 2.0]])
    assert fma(a, b, c).tolist() == [-(2.0**-60), -(2.0**-54), 0.0, np.inf]


def test_half_precision_arithmetic_is_that_of_torch() -> None:
    for dtype, name in ((torch.float16, "f16x2"), (torch.bfloat16, "bf16x2")):
        a, b = (torch.randn(512).to(dtype) for _ in range(2))
        for op, expected in (("add.rn", a + b), ("mul.rn", a * b), ("max", torch.maximum(a, b))):
            operands = a.view(torch.int32), b.view(torch.int32)
            got = compute(f"\t{op}.{name} %r20, %r2, %r3;\n", *operands, out=torch.int32)
            assert torch.equal(got.view(dtype), expected), (op, name)


def test_conversions_round_to_nearest_even_and_saturate() -> None:
    x = floats()
    x[50:100] = (1 + torch.arange(50) * 2.0**-9) * (1 + 2.0**-30)  # ties of bfloat16, and just beside
    x[100:150] = 1 + torch.arange(50) * 2.0**-12  # ties of float16
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        code = f"\tcvt.rn.{name}.f32 %rs1, %r2;\n\tcvt.u32.u16 %r20, %rs1;\n"
        got = compute(code, x, out=torch.int32).to(torch.int16).view(dtype)
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        code = f"\tcvt.rn.{name}x2.f32 %r20, %r2, %r3;\n"  # the first operand is the upper half
        got = compute(code, x, -x, out=torch.int32).view(dtype).view(-1, 2)
        expected = torch.stack([-x, x], 1).to(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    got = compute("\tcvt.rzi.s32.f32 %r20, %r2;\n", x, out=torch.int32)
    clamped = x.double().clamp(-(2.0**31), 2.0**31 - 1).trunc().nan_to_num(nan=0.0)
    assert torch.equal(got.double(), clamped)
    halves = torch.arange(-64, 64).float() / 2
    got = compute("\tcvt.rni.s32.f32 %r20, %r2;\n", halves, out=torch.int32)
    assert torch.equal(got, halves.round().int())
    a = words()
    got = compute("\tcvt.rn.f32.s32 %r20, %r2;\n", a, out=torch.float32)
    assert got.tolist() == [float(nearest(Fraction(v), 24)) for v in a.tolist()]
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-23])
    got = compute("\tcvt.rna.tf32.f32 %r20, %r2;\n", ties, out=torch.float32)
    assert got.tolist() == [1 + 2.0**-10, 1 + 2.0**-9, -1 - 2.0**-10, 1.0]  # half away from zero


def test_nan_in_comparisons_and_extrema() -> None:
    a, b = floats(), floats()
    for name, expected in (
        ("lt", a < b),
        ("ne", (a != b) & ~(a.isnan() | b.isnan())),
        ("neu", (a != b) | a.isnan() | b.isnan()),
        ("geu", ~(a < b)),
        ("num", ~(a.isnan() | b.isnan())),
    ):
        code = f"\tsetp.{name}.f32 %p1, %r2, %r3;\n\tselp.b32 %r20, 1, 0, %p1;\n"
        assert torch.equal(compute(code, a, b, out=torch.int32).bool(), expected), name
    got = compute("\tmax.f32 %r20, %r2, %r3;\n", a, b, out=torch.float32)
    torch.testing.assert_close(got, torch.fmax(a, b), rtol=0, atol=0, equal_nan=True)
    got = compute("\tmul.ftz.f32 %r20, %r2, %r3;\n", a, torch.ones(256), out=torch.float32)
    torch.testing.assert_close(got, torch.where(a.abs() < 2.0**-126, a * 0, a), rtol=0, atol=0, equal_nan=True)


def test_shuffles_stay_in_their_warp() -> None:
    a = torch.arange(64, dtype=torch.int32)
    assert torch.equal(compute("\tshfl.sync.bfly.b32 %r20, %r2, 5, 31, -1;\n", a, out=torch.int32), a ^ 5)
    got = compute("\tshfl.sync.up.b32 %r20, %r2, 3, 0, -1;\n", a, out=torch.int32)
    assert got.tolist() == [lane - 3 if lane % 32 >= 3 else lane for lane in range(64)]
    got = compute("\tshfl.sync.idx.b32 %r20, %r2, 9, 31, -1;\n", a, out=torch.int32)
    assert got.tolist() == [9] * 32 + [41] * 32
    assert compute("\tredux.sync.add.s32 %r20, %r2, -1;\n", a, out=torch.int32).tolist() == [496] * 32 + [1520] * 32


# --------------------------------------------------------------------------------------------------- products

# Where value i of register r of lane (g, t) = (lane / 4, lane % 4) lies, as the PTX manual writes it.


def of_a(each: int):
    """(row, column) of A [16, K], `each` values a register."""
    return lambda g, t, r, i: (g if r in (0, 2) else g + 8, each * t + i if r < 2 else each * t + i + 4 * each)


def of_b(each: int):
    """(row, column) of B [K, 8]."""
    return lambda g, t, r, i: (each * t + i + 4 * each * r, g)


LAYOUTS = {  # K of an instruction, dtype, A, B
    "s8": (32, torch.int8, of_a(4), of_b(4)),
    "f16": (16, torch.float16, of_a(2), of_b(2)),
    "bf16": (16, torch.bfloat16, of_a(2), of_b(2)),
    "tf32": (8, torch.float32, of_a(1), of_b(1)),
}


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), dtype=dtype)
    return torch.randint(-64, 64, (rows, columns)).to(dtype) / 8  # exact in all types, and in sums


def fragment(source: torch.Tensor, layout, registers: int, each: int) -> torch.Tensor:
    """[32 lanes, registers, each] of a matrix."""
    places = itertools.product(range(32), range(registers), range(each))
    values = [source[layout(lane // 4, lane % 4, r, i)] for lane, r, i in places]
    return torch.stack(values).view(32, registers, each).contiguous()


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{i}" for i in range(first, first + count)) + "}"


@pytest.mark.parametrize("kind", LAYOUTS)
def test_mma(kind: str) -> None:
    K, dtype, layout_a, layout_b = LAYOUTS[kind]
    a, b = matrix(16, K, dtype), matrix(K, 8, dtype)
    each = 4 // dtype.itemsize
    result = torch.int32 if kind == "s8" else torch.float32
    c = torch.randint(-99, 99, (16, 8)).to(result)
    own = [fragment(a, layout_a, 4, each), fragment(b, layout_b, 2, each)]

    def layout_c(g: int, t: int, r: int, i: int) -> tuple[int, int]:
        return g + 8 * (r >= 2), 2 * t + r % 2

    own.append(fragment(c, layout_c, 4, 1))
    out = torch.zeros(32, 4, dtype=result)
    body = place("%rd20", "%rd1", 16) + f"\tld.global.v4.b32 {names(10, 4)}, [%rd20];\n"
    body += place("%rd20", "%rd2", 8) + f"\tld.global.v2.b32 {names(14, 2)}, [%rd20];\n"
    body += place("%rd20", "%rd3", 16) + f"\tld.global.v4.b32 {names(16, 4)}, [%rd20];\n"
    types = ".satfinite.s32.s8.s8.s32" if kind == "s8" else f".f32.{kind}.{kind}.f32"
    body += (
        f"\tmma.sync.aligned.m16n8k{K}.row.col{types} {names(30, 4)}, {names(10, 4)}, {names(14, 2)}, {names(16, 4)};\n"
    )
    body += place("%rd20", "%rd4", 16) + f"\tst.global.v4.b32 [%rd20], {names(30, 4)};\n"
    log = execute(kernel(body, 4), [*own, out])
    expected = fragment((a.double() @ b.double() + c.double()).to(result), layout_c, 4, 1)
    assert torch.equal(out, expected[..., 0]) and not log.findings.counts


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed: bool) -> None:
    """Four 8 x 8 matrices of 16 bits, one after the other; lane l holds the address of row l of all."""
    data, out = torch.randint(0, 30000, (4, 8, 8), dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)
    trans = ".trans" if transposed else ""
    body = place("%rd20", "%rd1", 16) + f"\tld.global.v4.b32 {names(10, 4)}, [%rd20];\n"
    body += "\tmov.b32 %r2, global_smem;\n\tshl.b32 %r3, %r1, 4;\n\tadd.s32 %r4, %r2, %r3;\n"
    body += f"\tst.shared.v4.b32 [%r4], {names(10, 4)};\n\tbar.warp.sync -1;\n"
    body += f"\tldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names(20, 4)}, [%r4];\n"
    body += place("%rd20", "%rd2", 16) + f"\tst.global.v4.b32 [%rd20], {names(20, 4)};\n"
    # And back: what stmatrix writes at 512 is what was there at 0.
    body += f"\tstmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r4+512], {names(20, 4)};\n\tbar.warp.sync -1;\n"
    body += f"\tld.shared.v4.b32 {names(30, 4)}, [%r4+512];\n"
    body += place("%rd20", "%rd3", 16) + f"\tst.global.v4.b32 [%rd20], {names(30, 4)};\n"
    back = torch.zeros_like(data)
    log = execute(kernel(body, 3), [data, out, back], shared=1024)
    assert not log.findings.counts and torch.equal(back, data)
    for lane, m, i in itertools.product(range(32), range(4), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + i
        assert out[lane, 2 * m + i] == (data[m, column, row] if transposed else data[m, row, column])


def swizzled(operand: torch.Tensor, span: int) -> torch.Tensor:
    """uint8 [rows, span] as it lies in shared memory: in blocks of 8 rows, chunks of 16 bytes change places.

    The chunk of a row is flipped by the row's number, counted in lines of 128 bytes.
    """
    rows = len(operand)
    lying = torch.zeros(rows * span, dtype=torch.uint8)
    for row in range(rows):
        for chunk in range(span // 16):
            moved = chunk ^ (row * span // 128 % 8) % (span // 16)
            lying[row * span + 16 * moved :][:16] = operand[row, 16 * chunk :][:16]
    return lying


def descriptor(offset: int, leading: int, stride: int, span: int) -> int:
    return (1024 + offset) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {128: 1, 64: 2, 32: 3, 16: 0}[span] << 62


def wgmma(
    shared: torch.Tensor, a: torch.Tensor | None, a_desc: int, b_desc: int, N: int, kind: str, flags: str, early: bool,
    end: str = "\twgmma.wait_group.sync.aligned 0;\n", without: str = "",
) -> tuple[torch.Tensor, Log]:  # fmt: skip
    """D [64, N] of one product; A in registers of the layout of mma, 16 rows a warp, or by its descriptor.

    The code ends with `end` and lacks what is in `without`.
    """
    K, dtype, layout_a, _ = LAYOUTS[kind]
    result = torch.int32 if kind == "s8" else torch.float32
    fragments = torch.zeros(128, 4, dtype=torch.int32)
    if a is not None:
        parts = [fragment(a[16 * w : 16 * w + 16], layout_a, 4, 4 // dtype.itemsize) for w in range(4)]
        fragments = torch.cat(parts).flatten(1).contiguous()
    count = N // 2
    out = torch.zeros(128, count, dtype=result)
    assert len(shared) % 2048 == 0
    body = "\tmov.b32 %r2, global_smem;\n\tshl.b32 %r3, %r1, 4;\n\tadd.s32 %r4, %r2, %r3;\n"
    for begin in range(0, len(shared), 2048):
        body += place("%rd20", "%rd1", 16) + f"\tld.global.v4.b32 {names(10, 4)}, [%rd20+{begin}];\n"
        body += f"\tst.shared.v4.b32 [%r4+{begin}], {names(10, 4)};\n"
    body += place("%rd20", "%rd2", 16) + f"\tld.global.v4.b32 {names(10, 4)}, [%rd20];\n"
    body += "\tfence.proxy.async.shared::cta;\n\tbar.sync 0;\n"
    body += f"\tmov.b64 %rd21, {a_desc};\n\tmov.b64 %rd22, {b_desc};\n\twgmma.fence.sync.aligned;\n"
    left = names(10, 4) if a is not None else "%rd21"
    accumulate = "s32.s8.s8" if kind == "s8" else f"f32.{kind}.{kind}"
    body += f"\twgmma.mma_async.sync.aligned.m64n{N}k{K}.{accumulate} {names(100, count)}, {left}, %rd22, 0{flags};\n"
    body += "\twgmma.commit_group.sync.aligned;\n" + end
    body += place("%rd20", "%rd3", 4 * count)
    body += "".join(f"\tst.global.b32 [%rd20+{4 * i}], %r{100 + i};\n" for i in range(count))
    assert without in body
    body = body.replace(without, "")
    log = execute(kernel(body, 3, 128), [shared, fragments, out], shared=len(shared), early=early)
    d = torch.zeros(64, N, dtype=result)
    for thread, i in itertools.product(range(128), range(count)):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        d[16 * warp + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2] = out[thread, i]
    return d, log


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("span", [32, 64, 128])
def test_wgmma_of_int8_by_swizzle(span: int, early: bool) -> None:
    """A in registers; B [N, span bytes] along K, of which the product takes the second 32 bytes where there are two."""
    N = 64
    a, b = matrix(64, 32, torch.int8), matrix(N, span, torch.int8)
    first = 32 if span > 32 else 0
    shared = swizzled(b.view(torch.uint8), span)
    b_desc = descriptor(first, 0, 8 * span, span)
    d, log = wgmma(shared, a, 0, b_desc, N, "s8", "", early)
    assert torch.equal(d.long(), a.long() @ b[:, first : first + 32].long().T) and not log.findings.counts


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wgmma_of_halves_by_descriptors_and_transposed(kind: str) -> None:
    """A [64, 64] along K by a descriptor; B [K, N] along N, in blocks of 64 columns that are `leading` bytes apart."""
    dtype, N = LAYOUTS[kind][1], 128
    a, b = matrix(64, 64, dtype), matrix(16, N, dtype)
    left = swizzled(a.view(torch.uint8), 128)
    right = torch.cat([swizzled(b[:, n : n + 64].contiguous().view(torch.uint8), 128) for n in (0, 64)])
    shared = torch.cat([left, right])
    # The second 16 columns of A; of B a block of 8 rows is 1024 bytes, 64 columns of 16 rows are 2048.
    a_desc, b_desc = descriptor(32, 0, 1024, 128), descriptor(len(left), 2048, 1024, 128)
    for early in (False, True):
        d, log = wgmma(shared, None, a_desc, b_desc, N, kind, ", 1, 1, 0, 1", early)
        expected = a[:, 16:32].double() @ b.double()
        assert torch.equal(d.double(), expected) and not log.findings.counts


def test_a_wgmma_that_is_not_waited_for_is_seen() -> None:
    a, b = matrix(64, 32, torch.int8), matrix(64, 32, torch.int8)
    given = (swizzled(b.view(torch.uint8), 32), a, 0, descriptor(0, 0, 256, 32), 64, "s8", "")
    for early in (False, True):
        d, log = wgmma(*given, early, end="")
        assert log.findings.counts["race"]
        assert torch.equal(d.long(), a.long() @ b.long().T) == early  # late there is nothing yet


@pytest.mark.parametrize("fence", ["\tfence.proxy.async.shared::cta;\n", "\twgmma.fence.sync.aligned;\n"])
def test_a_wgmma_needs_its_fences(fence: str) -> None:
    a, b = matrix(64, 32, torch.int8), matrix(64, 32, torch.int8)
    given = (swizzled(b.view(torch.uint8), 32), a, 0, descriptor(0, 0, 256, 32), 64, "s8", "", False)
    assert not wgmma(*given)[1].findings.counts
    assert wgmma(*given, without=fence)[1].findings.counts == {"order": 1}


# ----------------------------------------------------------------------------------------------- memory, threads


def moving(code: str, threads: int = 64, shared: int = 256) -> tuple[torch.Tensor, Log]:
    """Thread i has i in %r2 and its place in shared memory in %r4; what it has in %r5 afterwards, and the log."""
    body = "\tmov.b32 %r2, %r1;\n\tmov.b32 %r3, global_smem;\n\tshl.b32 %r4, %r1, 2;\n\tadd.s32 %r4, %r4, %r3;\n"
    out = torch.full((threads,), -1, dtype=torch.int32)
    body += code + place("%rd20", "%rd1", 4) + "\tst.global.b32 [%rd20], %r5;\n"
    return out, execute(kernel(body, 1, threads), [out], shared=shared)


STORE = "\tst.shared.b32 [%r4], %r2;\n"
OTHER = "\txor.b32 %r6, %r1, {};\n\tshl.b32 %r6, %r6, 2;\n\tadd.s32 %r6, %r6, %r3;\n\tld.shared.b32 %r5, [%r6];\n"


@pytest.mark.parametrize(
    ("between", "distance", "races"),
    [
        ("\tbar.sync 0;\n", 33, False),
        ("", 33, True),
        ("\tbar.warp.sync -1;\n", 33, True),
        ("\tbar.warp.sync -1;\n", 3, False),
        ("", 3, True),
        ("", 0, False),
    ],
)
def test_reads_of_what_others_wrote_need_a_barrier(between: str, distance: int, races: bool) -> None:
    out, log = moving(STORE + between + OTHER.format(distance))
    assert (log.findings.counts["race"] > 0) == races and set(log.findings.counts) <= {"race"}
    assert out.tolist() == [thread ^ distance for thread in range(64)]  # in lockstep the race goes well


def test_writes_over_what_others_read_need_a_barrier() -> None:
    for between, races in (("\tbar.sync 0;\n", False), ("", True)):
        again = "\tadd.s32 %r2, %r2, 100;\n" + STORE
        _, log = moving(STORE + "\tbar.sync 0;\n" + OTHER.format(33) + between + again)
        assert (log.findings.counts["race"] > 0) == races
    _, log = moving("\tst.shared.b32 [%r3], %r2;\n\tmov.b32 %r5, 0;\n")  # all at once
    assert log.findings.counts["race"]


def test_shared_memory_has_ends_is_aligned_and_not_initialised() -> None:
    for code, kind in (
        ("\tld.shared.b32 %r5, [%r4];\n", "uninitialised"),
        (STORE + "\tbar.sync 0;\n\tld.shared.b32 %r5, [%r4+4];\n", "out of bounds"),
        ("\tmov.b32 %r5, 0;\n\tst.shared.b32 [%r4+-4], %r2;\n", "out of bounds"),
        ("\tmov.b32 %r5, 0;\n\tst.shared.b32 [%r4+4000], %r2;\n", "out of bounds"),
        ("\tld.shared.b32 %r5, [%r4+4000];\n", "out of bounds"),
        ("\tmov.b32 %r5, 0;\n\tst.shared.v2.b32 [%r4], {%r2, %r2};\n", "misaligned"),
    ):
        _, log = moving(code)
        assert log.findings.counts[kind], code


@pytest.mark.parametrize("early", [False, True])
def test_copies_are_there_when_waited_for(early: bool) -> None:
    """Two groups of copies: waiting until one is left makes the first one good, and a barrier shows it to others."""
    data = torch.arange(256, dtype=torch.int32)
    for pending, barrier, good in ((1, True, True), (2, True, False), (1, False, False)):
        body = "\tmov.b32 %r3, global_smem;\n\tshl.b32 %r4, %r1, 4;\n\tadd.s32 %r4, %r4, %r3;\n"
        body += place("%rd20", "%rd1", 16)
        body += "\tcp.async.cg.shared.global [ %r4 + 0 ], [ %rd20 + 0 ], 0x10, 16;\n\tcp.async.commit_group;\n"
        body += "\tcp.async.cg.shared.global [ %r4 + 1024 ], [ %rd20 + 0 ], 0x10, 8;\n\tcp.async.commit_group;\n"
        body += f"\tcp.async.wait_group {pending};\n" + ("\tbar.sync 0;\n" if barrier else "")
        body += "\txor.b32 %r6, %r1, 33;\n\tshl.b32 %r6, %r6, 4;\n\tadd.s32 %r6, %r6, %r3;\n"
        body += f"\tld.shared.v4.b32 {names(10, 4)}, [%r6];\n"
        body += "\tcp.async.wait_group 0;\n\tbar.sync 0;\n" + f"\tld.shared.v4.b32 {names(14, 4)}, [%r6+1024];\n"
        body += place("%rd20", "%rd2", 32)
        body += f"\tst.global.v4.b32 [%rd20], {names(10, 4)};\n\tst.global.v4.b32 [%rd20+16], {names(14, 4)};\n"
        out = torch.zeros(64, 8, dtype=torch.int32)
        log = execute(kernel(body, 2, 64), [data, out], shared=2048, early=early)
        rows = data.view(64, 4)[torch.arange(64) ^ 33]
        assert (log.findings.counts["race"] == 0) == good
        assert torch.equal(out[:, :4], rows) == (good or early or not barrier)
        assert torch.equal(out[:, 4:6], rows[:, :2]) and not out[:, 6:].any()  # 8 bytes are read, the others are 0


def test_global_memory_is_what_tensors_own() -> None:
    whole = torch.zeros(100, 4)
    part = whole[10:42, :2]  # rows of two values, two apart
    for offset, size, kind in ((0, 2, None), (4, 2, "out of bounds"), (-16, 2, "out of bounds"), (4, 1, None)):
        values = "{%r1, %r1}" if size == 2 else "%r1"
        vector = ".v2" if size == 2 else ""
        body = place("%rd20", "%rd1", 16) + f"\tst.global{vector}.b32 [%rd20 + {offset}], {values};\n"
        log = execute(kernel(body, 1), [part])
        expected = ({kind} if kind else set()) | ({"misaligned"} if offset % (4 * size) else set())
        assert set(log.findings.counts) == expected
        assert not whole[:10].any() and not whole[42:].any() and not whole[:, 2:].any()
    whole.zero_()
    log = execute(kernel(body, 1), [part], read_only=[whole.untyped_storage().data_ptr()])
    assert log.findings.counts == {"out of bounds": 32} and not whole.any()
    assert "global write, st.global.b32 (line" in next(iter(log.findings.examples.values()))


def test_atomics_of_one_place_add_up() -> None:
    total, old = torch.tensor([5], dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = "\tatom.global.gpu.relaxed.add.u32 %r2, [%rd1], 3;\n"
    body += place("%rd20", "%rd2", 4) + "\tst.global.b32 [%rd20], %r2;\n"
    log = execute(kernel(body, 2, 64), [total, old])
    assert total.item() == 5 + 3 * 64 and sorted(old.tolist()) == list(range(5, 5 + 3 * 64, 3))
    assert not log.findings.counts


@pytest.mark.parametrize(
    ("code", "blocks", "races"),
    [
        ("st.global.b32 [%rd20], %r1;", 1, False),
        ("st.global.b32 [%rd20], %r1;", 2, True),
        ("ld.global.b32 %r2, [%rd20];", 2, False),
        ("ld.global.b32 %r2, [%rd20]; st.global.b32 [%rd20], %r2;", 1, False),
        ("ld.global.b32 %r2, [%rd21]; st.global.b32 [%rd20], %r2;", 1, True),
        ("ld.global.b32 %r2, [%rd21]; bar.sync 0; st.global.b32 [%rd20], %r2;", 1, False),
        ("st.global.b32 [%rd20], %r1; bar.sync 0; ld.global.b32 %r2, [%rd21];", 1, False),
        ("st.global.b32 [%rd20], %r1; ld.global.b32 %r2, [%rd21];", 1, True),
        ("st.global.b32 [%rd1], %r1;", 1, True),
        ("atom.global.gpu.relaxed.add.u32 %r2, [%rd20], 1;", 2, False),
        ("atom.global.gpu.relaxed.add.u32 %r2, [%rd20], 1; ld.global.b32 %r2, [%rd21];", 1, True),
        ("atom.global.gpu.relaxed.add.u32 %r2, [%rd20], 1; bar.sync 0; ld.global.b32 %r2, [%rd21];", 1, False),
        ("atom.global.gpu.relaxed.add.u32 %r2, [%rd20], 1; bar.sync 0; ld.global.b32 %r2, [%rd21];", 2, True),
    ],
)
def test_races_in_global_memory(code: str, blocks: int, races: bool) -> None:
    """%rd20 is the thread's own place, %rd21 that of thread 0, in every block."""
    places = place("%rd20", "%rd1", 4) + "\tmov.b64 %rd21, %rd1;\n"
    log = execute(kernel(f"{places}\t{code}\n", 1, 64), [torch.zeros(64, dtype=torch.int32)], grid=(blocks,))
    assert (log.findings.counts["race"] > 0) == races and set(log.findings.counts) <= {"race"}
    assert log.blocks == blocks


ADD = "atom.global.gpu.relaxed.add.u32 %r2, [%rd20], 1;"
ARRIVE = "@%p1 atom.global.gpu.acq_rel.add.u32 %r3, [%rd2], 1;"
HAND_OVER = [ADD, "bar.sync 0;", ARRIVE, "bar.sync 0;", "ld.global.b32 %r4, [%rd21];"]


@pytest.mark.parametrize(
    ("changed", "races"),
    [
        ({}, False),
        ({1: ""}, True),  # what other threads added is not released
        ({3: ""}, True),  # other threads do not acquire
        ({2: ARRIVE.replace("acq_rel", "release")}, True),
        ({2: ARRIVE.replace("acq_rel", "acquire")}, True),
        ({2: ARRIVE.replace("acq_rel", "relaxed")}, True),
        ({2: ""}, True),
        ({4: "ld.global.b32 %r4, [%rd20];"}, False),
        ({4: "st.global.b32 [%rd20], %r1;"}, False),
    ],
)
def test_blocks_hand_over_by_a_counter(changed: dict[int, str], races: bool) -> None:
    """Blocks add to the same places, thread 0 counts each block, the last block reads or clears the sums."""
    code = "\n".join(changed.get(i, line) for i, line in enumerate(HAND_OVER))
    places = place("%rd20", "%rd1", 4) + "\tadd.s64 %rd21, %rd1, 252;\n\tsetp.eq.b32 %p1, %r1, 0;\n"
    sums, counter = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    places += "\tmov.u32 %r5, %ctaid.x;\n\tsetp.eq.b32 %p2, %r5, 2;\n"
    code = code.replace("ld.global", "@%p2 ld.global").replace("st.global", "@%p2 st.global")
    log = execute(kernel(places + code + "\n", 2, 64), [sums, counter], grid=(3,), seed=5)  # block 2 comes last
    assert (log.findings.counts["race"] > 0) == races and set(log.findings.counts) <= {"race"}


def test_threads_that_part_meet_again() -> None:
    """Each thread goes round as often as its number, then all wait at a barrier."""
    code = "\tmov.b32 %r5, 0;\n$L1:\n\tsetp.ge.u32 %p1, %r5, %r1;\n\t@%p1 bra $L2;\n\tadd.s32 %r5, %r5, 1;\n"
    out, log = moving(code + "\tbra.uni $L1;\n$L2:\n" + "\tbar.sync 0;\n" + STORE + "\tbar.sync 0;\n")
    assert out.tolist() == list(range(64)) and not log.findings.counts
    # Warps may come to a barrier by two ways.
    ways = "\tsetp.lt.u32 %p1, %r1, 32;\n\t@%p1 bra $L1;\n\tmov.b32 %r5, 7;\n\tbar.sync 0;\n\tbra.uni $L2;\n"
    out, _ = moving(ways + "$L1:\n\tmov.b32 %r5, 8;\n\tbar.sync 0;\n$L2:\n")
    assert out.tolist() == [8] * 32 + [7] * 32


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\tsetp.lt.u32 %p1, %r1, 9;\n\t@%p1 bra $L1;\n\tbar.sync 0;\n$L1:\n", "a barrier that 9 threads never reach"),
        ("\tsetp.lt.u32 %p1, %r1, 9;\n\t@%p1 shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1;\n", "shfl by a part of a warp"),
        ("$L1:\n\tbra.uni $L1;\n", "no end after"),
        ("\tatom.global.gpu.relaxed.inc.u32 %r5, [%rd1], 3;\n", r"does not have atom.global.gpu.relaxed.inc.u32"),
        ("\tbrev.b32 %r5, %r2;\n", r"does not have brev.b32 \(line"),
        ("\tadd.rz.f32 %r5, %r2, %r2;\n", r"does not have add.rz.f32 \(line"),
        ("\tfma.rn.bf16x2 %r5, %r2, %r2, %r2;\n", "does not have fma.rn.bf16x2"),
    ],
)
def test_what_it_cannot_do_is_a_fault(code: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        moving(code)


def test_text_that_is_no_kernel() -> None:
    with pytest.raises(ValueError, match="holds 0 kernels"):
        execute("nothing", [])
    with pytest.raises(ValueError, match=r"no \.reqntid"):
        execute(kernel("", 0).replace(".reqntid 32", ""), [])
    with pytest.raises(ValueError, match="2 values for the 1 parameters"):
        execute(kernel("", 1), [torch.zeros(1), 0])


# ------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("linear ternary, ragged", 80),
        ("linear ternary, ragged", 90),
        ("linear split, 1 token", 80),
        ("quantize fake 3x2x5x32 bfloat16, 4 bits asymmetric", 90),
        ("attention fp16 D=16, short", 80),
        ("attention fp16", 90),
    ],
)
def test_kernels(name: str, arch: int) -> None:
    result = trial.run(BY_NAME[name], arch, seed=random.getrandbits(20))
    if tuple(map(int, version("triton").split(".")[:2])) < (
        3,
        7,
    ):  # which puts no fence.proxy.async between cp.async and wgmma
        del result.findings["order"]
    assert result.clean and result.runs == 2 and result.launches == 2, report([result])


@triton.jit
def _one(out_ptr):
    tl.store(out_ptr + tl.program_id(0), 1.0)


def test_launches_that_a_device_refuses() -> None:
    x, packed = torch.zeros(64, 2048, dtype=torch.int8), torch.zeros(64, 512, dtype=torch.uint8)
    tile = linear_gpu.Tile(64, 64, 256, 4, 8, 1)  # eight stages of 80 KiB
    with (
        emulated(80),
        pytest.raises(Fault, match=r"_linear_kernel asks for \d+ bytes of shared .*, sm_80 has 166912"),
    ):
        linear_gpu.launch(x, packed, torch.ones(64), None, torch.ones(64), None, None, torch.float32, "ternary", tile)
    out = torch.zeros(1)
    with emulated(80) as log, pytest.raises(Fault, match=r"_one has a grid of \(1, 65536\), at most"):
        _one[(1, 65536)](out)
    assert not log.blocks and not out.any()


def test_names_of_cases_are_their_own() -> None:
    assert len(BY_NAME) == len(CASES)


def test_a_wrong_result_is_counted() -> None:
    """The same launch, compared with what another input gives."""
    case = BY_NAME["quantize fake 3x2x5x32 bfloat16, 4 bits asymmetric"]

    def make() -> trial.Trial:
        own, other = case.make(), case.make()
        return trial.Trial(own.inputs, own.launch, other.wrong)

    result = trial.run(trial.Case("wrong", make), 80, modes=(False,))
    assert result.wrong > 100 and not result.findings and not result.clean
    assert "1 of 1 lines with something wrong" in report([result])


def test_a_mutation_is_noticed() -> None:
    base = mutations.BASES.index(("linear binary, 5 tokens", 80))
    outcome = mutations.run(base, mutations.BY_KIND["all comparisons < to <="])
    assert outcome.tried == outcome.noticed == 1 and outcome.by["out of bounds"]
    assert "1 of 1 noticed" in report_mutations([outcome])
    assert not mutations.Outcome("barrier removed", tried=3, noticed=1).good


def test_a_name_that_no_case_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "nothing"])
    assert stopped.value.code == 2 and "no case has 'nothing' in its name" in capsys.readouterr().err


def test_all_is_as_before_afterwards() -> None:
    from triton.runtime import jit
    from triton.runtime.driver import driver

    def state() -> tuple:
        return driver._active, jit.JITFunction.run, configs.device_arch, torch.are_deterministic_algorithms_enabled()

    before = state()
    assert not before[-1]
    with pytest.raises(ZeroDivisionError), emulated(90) as log:
        assert configs.device_arch(torch.device("cpu")) == 90
        assert torch.empty(3).isnan().all()
        _ = 1 / 0
    assert state() == before and not log.launches and np.geterr()["invalid"] == "warn"
