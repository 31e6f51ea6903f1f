"""Instructions that compute on registers alone, as functions on arrays of one value a thread.

`operation("add.f32")` tells the types of result and operands and the function. Values of packed types (f16x2) are
arrays [threads, 2]. Floats round as PTX says: fma once, half precision to nearest even. Approximate instructions
(ex2.approx, div.full, ...) return the correctly rounded value, which is one of those that the GPU may return.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # registers by their bytes
# Types as NumPy has them. bf16 is kept as the float32 of the same value.
DTYPES: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "bf16": np.float32, "f32": np.float32, "f64": np.float64,
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in BITS},
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "bu" for size in BITS},
    "f16x2": np.float16, "bf16x2": np.float32, "f32x2": np.float32, "s16x2": np.dtype("i2"), "u16x2": np.dtype("u2"),
}  # fmt: skip
SIZES = {name: 1 if name == "pred" else int(re.sub(r"\D+", "", name.split("x")[0])) // 8 for name in DTYPES}
SIZES |= {name: 2 * SIZES[name] for name in DTYPES if name.endswith("x2")}
_PLAIN = {name: dtype for name, dtype in DTYPES.items() if name not in ("pred", "bf16") and not name.endswith("x2")}


class Unknown(Exception):
    """An instruction that the emulator does not have."""


@dataclass(frozen=True)
class Operation:
    """result = function(*operands), all arrays of the named PTX types."""

    result: str
    operands: tuple[str, ...]
    function: Callable[..., Array]


# ------------------------------------------------------------------------------------------- registers to values


def decode(bits: Array, kind: str) -> Array:
    """Register bits (unsigned, or bool for predicates) as values of a PTX type, whose size they have at least."""
    size = SIZES[kind]
    if kind in _PLAIN and bits.itemsize == size:  # first, since it is nearly always so
        return bits.view(_PLAIN[kind])
    if kind == "pred":
        return bits
    if bits.itemsize > size:
        bits = bits.astype(BITS[size])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind.endswith("x2"):
        pair = bits.view(BITS[size // 2]).reshape(*bits.shape, 2)
        return decode(pair, kind[:-2])
    return bits.view(DTYPES[kind])


def encode(values: Array, kind: str, width: int) -> Array:
    """Values of a PTX type as bits of a register of `width` bytes (0: a predicate); narrower values are extended."""
    if kind in _PLAIN and values.itemsize == width:
        return values.view(BITS[width])
    if width == 0:
        return values.astype(np.bool_, copy=False)
    if kind.endswith("x2"):
        half = encode(values, kind[:-2], SIZES[kind] // 2)
        return np.ascontiguousarray(half).view(BITS[SIZES[kind]])[..., 0]
    if kind == "bf16":
        values = round_bf16(values)
    elif kind == "pred":
        values = values.astype(np.uint8)
    if values.itemsize == width:
        return values.view(BITS[width])
    if values.dtype.kind == "i":
        return values.astype(f"i{width}").view(BITS[width])
    return values.view(BITS[values.itemsize]).astype(BITS[width])


def round_bf16(x: Array) -> Array:
    """float32 -> uint16 bits of bfloat16, half to even; NaN is the canonical one."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


# ------------------------------------------------------------------------------------------------------- floats


def flush(x: Array) -> Array:
    """Subnormal float32 to zero of the same sign (`.ftz`)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float16 or float32, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd, from where rounding to a type of at most 51 bits
    gives what one rounding would (Boldo & Melquiond 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    inexact = np.isfinite(error) & (error != 0) & ((total.view(np.int64) & 1) == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, (total.view(np.int64) + step).view(np.float64), total).astype(a.dtype)


def _fused64(a: Array, b: Array, c: Array) -> Array:
    """The same of float64, by fractions, one value after the other."""
    out = a * b + c
    for i in np.flatnonzero(np.isfinite(out) & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        out[i] = float(exact) if exact else out[i]  # which has the sign of 0
    return out


def _double(function: Callable[..., Array]) -> Callable[..., Array]:
    """A float32 function through float64."""
    return lambda *values: function(*(value.astype(np.float64) for value in values)).astype(np.float32)


def _flushing(function: Callable[..., Array], result: str, operands: tuple[str, ...]) -> Callable[..., Array]:
    def flushed(*values: Array) -> Array:
        values = tuple(flush(v) if kind == "f32" else v for v, kind in zip(values, operands, strict=True))
        out = function(*values)
        return flush(out) if result == "f32" else out

    return flushed


_FLOAT_BINARY: dict[str, Callable[..., Array]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "min": np.fmin, "max": np.fmax,
}  # fmt: skip
_FLOAT_UNARY: dict[str, Callable[..., Array]] = {
    "neg": operator.neg, "abs": np.abs, "ex2": _double(np.exp2), "lg2": _double(np.log2), "sqrt": np.sqrt,
    "rcp": lambda x: np.float32(1) / x, "rsqrt": _double(lambda x: 1 / np.sqrt(x)), "tanh": _double(np.tanh),
}  # fmt: skip


def _float(parts: list[str]) -> Operation:
    name, kind = parts[0], parts[-1]
    if {"rz", "rm", "rp", "sat", "relu", "xorsign"} & set(parts):
        raise Unknown(".".join(parts))
    if name == "fma":
        if kind not in ("f16", "f16x2", "f32", "f32x2", "f64"):
            raise Unknown(".".join(parts))
        if kind == "f64":
            return Operation(kind, (kind,) * 3, _fused64)
        return Operation(kind, (kind,) * 3, fused)
    if name in _FLOAT_UNARY:
        return Operation(kind, (kind,), _FLOAT_UNARY[name])
    function = _FLOAT_BINARY[name]
    if "NaN" in parts:
        function = {"min": np.minimum, "max": np.maximum}[name]
    if name == "div" and kind == "f32":
        function = _double(operator.truediv)  # 53 bits are more than twice 24: rounded as once
    return Operation(kind, (kind, kind), function)


# ----------------------------------------------------------------------------------------------------- integers


def _truncated(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient toward zero and remainder with the sign of a; all ones and a where b is 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    remainder = a - quotient * safe
    return np.where(b == 0, ~b.dtype.type(0), quotient), np.where(b == 0, a, remainder)


def _shift_left(a: Array, n: Array) -> Array:
    width = 8 * a.itemsize
    return np.where(n < width, a << np.minimum(n, width - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, n: Array) -> Array:
    width = 8 * a.itemsize
    shifted = a >> np.minimum(n, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < width, shifted, a.dtype.type(0))


def _funnel(parts: list[str]) -> Operation:
    _, direction, mode, _ = parts

    def function(low: Array, high: Array, n: Array) -> Array:
        n = np.minimum(n, 32) if mode == "clamp" else n & np.uint32(31)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        if direction == "r":
            return (both >> n.astype(np.uint64)).astype(np.uint32)
        return (both >> (np.uint64(32) - n.astype(np.uint64))).astype(np.uint32)

    return Operation("b32", ("b32", "b32", "u32"), function)


def _field(parts: list[str]) -> Operation:
    kind = parts[-1]
    width = 8 * SIZES[kind]

    def function(a: Array, position: Array, length: Array) -> Array:
        """`length` bits from `position`, extended by the highest of them (if signed) or by 0."""
        position, length = (value.astype(np.int64) & 255 for value in (position, length))
        kept = np.clip(length, 0, np.maximum(width - position, 0))
        up, down = (np.clip(n, 0, width - 1).astype(a.dtype) for n in (width - kept - position, width - kept))
        nothing = np.where(length > 0, a >> a.dtype.type(width - 1), 0) if kind[0] == "s" else 0
        return np.where(kept > 0, (a << up) >> down, nothing).astype(a.dtype)

    return Operation(kind, (kind, "u32", "u32"), function)


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit i of the table is the result where the bits of a, b and c read i."""
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Byte i of the result is the one that nibble i names among the eight of a and b; bit 3: its sign eight times."""
    source = np.stack([a, b], 1).view(np.uint8)
    nibbles = np.stack([(selector >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)], 1).astype(np.int64)
    chosen = np.take_along_axis(source, nibbles & 7, 1)
    chosen = np.where(nibbles & 8, np.where(chosen & 0x80, np.uint8(0xFF), np.uint8(0)), chosen)
    return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]


def _dot4(parts: list[str]) -> Operation:
    def function(a: Array, b: Array, c: Array) -> Array:
        x, y = (
            value.view("i1" if kind == "s32" else "u1").reshape(-1, 4).astype(np.int64)
            for value, kind in ((a, parts[1]), (b, parts[2]))
        )
        return ((x * y).sum(1) + c).astype(np.int32)

    return Operation("s32", ("b32", "b32", "s32"), function)


_BINARY: dict[str, Callable[..., Array]] = {
    "add": operator.add, "sub": operator.sub, "min": np.minimum, "max": np.maximum,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "div": lambda a, b: _truncated(a, b)[0], "rem": lambda a, b: _truncated(a, b)[1],
}  # fmt: skip


def _integer(parts: list[str]) -> Operation:
    name, kind = parts[0], parts[-1]
    if "sat" in parts or "cc" in parts:
        raise Unknown(".".join(parts))
    if name in _BINARY:
        return Operation(kind, (kind, kind), _BINARY[name])
    return Operation(kind, (kind,), {"not": operator.invert, "neg": operator.neg, "abs": np.abs}[name])


def _product(parts: list[str]) -> Operation:
    """mul and mad of integers: lo, hi or wide."""
    name, part, kind = parts[0], parts[1], parts[-1]
    bits = 8 * SIZES[kind]
    if part != "lo" and bits == 64:
        raise Unknown(".".join(parts))
    result = f"{kind[0]}{2 * bits}" if part == "wide" else kind
    wide = DTYPES[f"{kind[0]}{min(64, 2 * bits)}"]

    def multiply(a: Array, b: Array) -> Array:
        if part == "lo":
            return a * b
        product = a.astype(wide) * b.astype(wide)
        return product if part == "wide" else (product >> wide.type(bits)).astype(a.dtype)

    if name == "mul":
        return Operation(result, (kind, kind), multiply)
    return Operation(result, (kind, kind, result), lambda a, b, c: multiply(a, b) + c)


# ------------------------------------------------------------------------------------ comparisons and conversions

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


def comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    """`setp`'s comparison; for floats the ordered ones are false where a value is NaN, the unordered ones true."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if not kind.startswith(("f", "bf")):
        return _COMPARE[name]
    if name.endswith("u"):
        return lambda a, b: _COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return _COMPARE[name]


_TO_INTEGRAL = {"n": np.rint, "z": np.trunc, "m": np.floor, "p": np.ceil}  # .rni, .rzi, .rmi, .rpi


def _convert(parts: list[str]) -> Operation:
    target, source = parts[-2], parts[-1]
    modifiers = parts[1:-2]
    if target.endswith("x2"):  # the first operand is the upper half
        if modifiers != ["rn"] or source != "f32":
            raise Unknown(".".join(parts))
        half = DTYPES[target]
        return Operation(target, ("f32", "f32"), lambda high, low: np.stack([low, high], 1).astype(half))
    if parts[1:] == ["rna", "tf32", "f32"]:
        return Operation("b32", ("f32",), _to_tf32)
    integral = next((m[1] for m in modifiers if m in ("rni", "rzi", "rmi", "rpi")), None)
    dtype = np.dtype(DTYPES[target])
    if set(modifiers) - {"rn", "rni", "rzi", "rmi", "rpi", "sat", "ftz"}:
        raise Unknown(".".join(parts))

    def function(x: Array) -> Array:
        if x.dtype.kind == "f":
            if integral:
                x = _TO_INTEGRAL[integral](x)
            if dtype.kind != "f":
                return _saturated(x, dtype)
            if "sat" in modifiers:
                x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
        elif "sat" in modifiers and dtype.kind != "f":
            limits = np.iinfo(dtype)
            return np.array([min(max(int(v), limits.min), limits.max) for v in x], dtype)
        return x.astype(dtype)

    return Operation(target, (source,), function)


def _to_tf32(x: Array) -> Array:
    """float32 with 10 bits of fraction, half away from zero."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, x.view(np.uint32))


def _saturated(x: Array, dtype: np.dtype) -> Array:
    """Integral floats to integers: clamped, NaN to 0."""
    limits = np.iinfo(dtype)
    wide = x.astype(np.float64)
    inside = (wide > limits.min) & (wide < limits.max)
    clamped = np.where(wide > 0, dtype.type(limits.max), dtype.type(limits.min))
    clamped = np.where(np.isnan(wide), dtype.type(0), clamped)
    return np.where(inside, np.where(inside, wide, 0).astype(dtype), clamped)


# --------------------------------------------------------------------------------------------------------- table

_INTEGER_TYPES = re.compile(r"^([bsu](8|16|32|64)|[su]16x2|pred)$")


def operation(opcode: str) -> Operation:
    """The operation of an opcode.

    Raises:
        Unknown: there is none.
    """
    parts = opcode.split(".")
    name, kind = parts[0], parts[-1]
    try:
        if name == "cvt":
            found = _convert(parts)
        elif name in ("mul", "mad") and _INTEGER_TYPES.match(kind):
            found = _product(parts)
        elif name == "shl":
            found = Operation(kind, (kind, "u32"), _shift_left)
        elif name == "shr":
            found = Operation(kind, (kind, "u32"), _shift_right)
        elif name == "shf":
            found = _funnel(parts)
        elif name == "bfe":
            found = _field(parts)
        elif name == "lop3":
            found = Operation("b32", ("b32",) * 4, _logic)
        elif name == "prmt" and kind == "b32" and len(parts) == 2:
            found = Operation("b32", ("b32",) * 3, _permute)
        elif name == "dp4a":
            found = _dot4(parts)
        elif name == "popc" and kind == "b32":
            found = Operation("u32", ("b32",), lambda a: np.bitwise_count(a).astype(np.uint32))
        elif name == "selp":
            found = Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))
        elif name == "mov":
            found = Operation(kind, (kind,), lambda a: a)
        elif _INTEGER_TYPES.match(kind):
            found = _integer(parts)
        else:
            found = _float(parts)
    except (KeyError, ValueError) as error:
        raise Unknown(opcode) from error
    if kind not in DTYPES:
        raise Unknown(opcode)
    if "ftz" in parts:
        return Operation(found.result, found.operands, _flushing(found.function, found.result, found.operands))
    return found
