"""Every public op of lowbit_kernels on the CPU with inputs that nobody would choose, compared with its definition.

A case is drawn by one function `integer(low, high)`, so Python's random numbers, hypothesis and atheris draw the same
cases: shapes with empty dimensions, dtypes, strides, NaN and infinity, gradients asked for; and, half of the time, one
argument spoiled: another dtype, rank, size or device, no tensor at all, an option that is none. Then

    valid       the result equals `lowbit_kernels.reference` (float64, int64), or another independent computation
    spoiled     TypeError, ValueError (or IndexError for an id outside of its table) with a message; or a result, if the
                definition has one and it is equal
    always      inputs are left as they were; no other exception
    on meta     the shape and dtype of the result are those that the CPU gives
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import lowbit_kernels
from lowbit_kernels import reference
from lowbit_kernels.varlen_attention.cpu import SITES

Integer = Callable[[int, int], int]  # a whole number from low to high, both included
Tensor = torch.Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SINGLE = FLOATS[:3]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


@dataclass
class Case:
    """One call, what it should give, and how closely."""

    op: Callable[..., Any]
    arguments: dict[str, Any]
    definition: Callable[..., Any]
    compare: Callable[[Any, Any], None]
    spoilable: bool = True  # False where the docstring says that arguments are not checked
    on_meta: bool = True  # False where the result depends on values
    errors: tuple[type[Exception], ...] = ()  # besides TypeError and ValueError
    spoiled: str = field(default="", init=False)


# ------------------------------------------------------------------------------------------------------------ inputs


def choose(integer: Integer, options: Sequence[Any]) -> Any:
    return options[integer(0, len(options) - 1)]


def generator(integer: Integer) -> torch.Generator:
    return torch.Generator().manual_seed(integer(0, 2**31 - 1))


def size(integer: Integer, largest: int = 40) -> int:
    return integer(0, largest) if integer(0, 7) else choose(integer, (0, 1, 2, 31, 32, 33))


def length(integer: Integer) -> int:
    """A K: often at the border of a packing block."""
    return integer(0, 300) if integer(0, 2) else choose(integer, (0, 1, 4, 5, 31, 127, 128, 129, 255, 256, 257))


def floats(integer: Integer, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, nasty: bool = True) -> Tensor:
    """Normal values of some size; with `nasty`, at times some NaN, infinity, zeros, denormals."""
    x = torch.randn(shape, generator=generator(integer)) * 10.0 ** integer(-3, 3)
    if nasty and x.numel() and integer(0, 3) == 0:
        for _ in range(integer(1, 3)):
            x.view(-1)[integer(0, x.numel() - 1)] = choose(integer, (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42))
    return x.to(dtype)


def whole(integer: Integer, shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator(integer)).to(dtype)


def signs(integer: Integer, shape: tuple[int, ...]) -> Tensor:
    return whole(integer, shape, 0, 1) * 2 - 1


def positive(integer: Integer, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=generator(integer)) + 0.1


def restrided(integer: Integer, x: Tensor) -> Tensor:
    """The same values in another layout of memory."""
    how = integer(0, 4)
    if how == 1 and x.dim() > 1:
        one, other = integer(0, x.dim() - 1), integer(0, x.dim() - 1)
        return x.transpose(one, other).contiguous().transpose(one, other)
    if how == 2:
        return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x
    if how == 3:
        wide = torch.zeros((*x.shape[:-1], x.shape[-1] + 3), dtype=x.dtype) if x.dim() else x
        if x.dim():
            wide[..., 2:-1] = x
            return wide[..., 2:-1]
    if how == 4 and x.dim():
        return torch.cat([x[:1], x])[1:]  # an offset
    return x


# ------------------------------------------------------------------------------------------------------- comparisons


def equal(got: Any, expected: Any) -> None:
    """Bit for bit, but for the sign and payload of NaN."""
    if isinstance(expected, tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            equal(one, other)
    elif expected is None:
        assert got is None
    else:
        assert got.dtype == expected.dtype and got.shape == expected.shape, (got.dtype, got.shape, expected.shape)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def quantized_alike(got: Any, expected: Any) -> None:
    """(codes, scale, zero point) bit for bit; where the scale is NaN the others are arbitrary."""
    bad = expected[1].isnan()
    assert torch.equal(got[1].isnan(), bad)
    assert got[0].shape == expected[0].shape and got[0].dtype == torch.int8

    def good(parts: Any) -> Any:
        codes, scale, zero = parts
        if bad.numel() == 1 and codes.shape[:-1] != bad.shape:
            return () if bool(bad) else parts
        return codes[~bad], scale[~bad], None if zero is None else zero[~bad]

    equal(good(got), good(expected))


def close(got: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Within `bound` of a float64 definition, NaN and infinity where that has them."""
    wide = got.double()
    assert got.shape == expected.shape, (got.shape, expected.shape)
    finite = expected.isfinite()
    assert torch.equal(wide.isnan(), expected.isnan()), "NaN elsewhere than the definition"
    other = ~finite & ~expected.isnan()
    assert torch.equal(wide[other], expected[other]), "infinity elsewhere than the definition"
    limit = bound if isinstance(bound, float) else bound.expand(expected.shape)[finite]
    error = (wide[finite] - expected[finite]).abs()
    assert bool((error <= limit).all()), f"off by {float((error - limit).max()):g}"


# ------------------------------------------------------------------------------------------------------------- cases


def packing_case(integer: Integer) -> Case:
    layout = choose(integer, ("ternary", "binary", "split", "trits"))
    shape = size(integer), length(integer)
    ternary = layout in ("ternary", "trits")
    codes = whole(integer, shape, -1, 1) if ternary else signs(integer, shape)
    arguments = {"codes": restrided(integer, codes)}
    if layout == "split":
        arguments = {"codes1": arguments["codes"], "codes2": restrided(integer, signs(integer, shape))}
    definition = {
        "ternary": reference.pack_ternary, "binary": reference.pack_binary, "split": reference.pack_split,
        "trits": trits,
    }[layout]  # fmt: skip

    def checked(**given: Tensor) -> Tensor:
        accepted = {-1, 0, 1} if ternary else {-1, 1}
        for one in given.values():
            assert one.dim() == 2 and one.dtype == torch.int8 and set(one.unique().tolist()) <= accepted
        return definition(*given.values())

    return Case(getattr(lowbit_kernels, f"pack_{layout}"), arguments, checked, equal)


def uniform_packing_case(integer: Integer) -> Case:
    """Codes of evenly spaced levels, to and fro; any bytes are codes."""
    layout, shape = choose(integer, tuple(UNIFORM)), (size(integer), length(integer))
    codes = whole(integer, shape, *UNIFORM[layout])

    def packed(codes: Tensor, layout: str) -> Tensor:
        least, most = UNIFORM[layout]
        assert codes.dim() == 2 and codes.dtype == torch.int8
        assert not codes.numel() or (codes.min() >= least and codes.max() <= most)
        return reference.pack_uniform(codes, layout)

    def codes_of(packed: Tensor, K: int, layout: str) -> Tensor:
        per_byte = {"uniform2": 4, "uniform4": 2}.get(layout)
        width = K if per_byte is None else -(-K // (32 * per_byte)) * 32
        assert packed.dim() == 2 and packed.shape[1] == width and not isinstance(K, bool)
        assert packed.dtype == (torch.int8 if per_byte is None else torch.uint8)
        return reference.unpack_uniform(packed, K, layout)

    if integer(0, 1):
        return Case(lowbit_kernels.pack_uniform, {"codes": restrided(integer, codes), "layout": layout}, packed, equal)
    given = restrided(integer, reference.pack_uniform(codes, layout))
    if given.dtype == torch.uint8:
        given = restrided(integer, whole(integer, tuple(given.shape), 0, 255, torch.uint8))
    arguments = {"packed": given, "K": shape[1], "layout": layout}
    return Case(lowbit_kernels.unpack_uniform, arguments, codes_of, equal)


def trits(codes: Tensor) -> Tensor:
    """Layout b3 by its definition: byte t of a row of C holds the values t, t+C, .., t+4C as digits in base 3."""
    rows, K = codes.shape
    C = -(-K // 5)
    packed = torch.zeros(rows, C, dtype=torch.int64)
    for k in range(5 * C):
        digit = codes[:, k].long() + 1 if k < K else torch.ones(rows, dtype=torch.int64)
        packed[:, k % C] += digit * 3 ** (k // C)
    return packed.to(torch.uint8)


def untrits(packed: Tensor, K: int) -> Tensor:
    assert packed.dtype == torch.uint8 and packed.dim() == 2 and packed.shape[1] == -(-K // 5)
    digits = torch.stack([packed.long() // 3**place % 3 for place in range(5)], 1).flatten(1)
    assert not packed.numel() or packed.max() < 243
    return (digits[:, :K] - 1).to(torch.int8)


def unpacking_case(integer: Integer) -> Case:
    """Any bytes, also those that no packing gives."""
    layout = choose(integer, ("ternary", "binary", "split", "trits"))
    K = length(integer)
    block = {"ternary": 128, "binary": 256, "split": 128, "trits": 5}[layout]
    width = -(-K // block) * (1 if layout == "trits" else 32)
    packed = whole(integer, (size(integer), width), 0, 242 if layout == "trits" else 255, torch.uint8)

    definition = untrits if layout == "trits" else getattr(reference, f"unpack_{layout}")

    def checked(packed: Tensor, K: int) -> Any:
        assert packed.dtype == torch.uint8 and packed.shape[1] == -(-K // block) * (1 if layout == "trits" else 32)
        return definition(packed, K)

    arguments = {"packed": restrided(integer, packed), "K": K}
    return Case(getattr(lowbit_kernels, f"unpack_{layout}"), arguments, checked, equal)


def archive_case(integer: Integer) -> Case:
    """Rows as files hold them, to and fro."""
    layout, K = choose(integer, ("ternary", "binary", "split")), length(integer)
    per_byte, shape = {"ternary": 5, "binary": 8, "split": 4}, (size(integer, 9), K)
    codes = [whole(integer, shape, -1, 1) if layout == "ternary" else signs(integer, shape)]
    if layout == "split":
        codes.append(signs(integer, shape))
    packed = getattr(reference, f"pack_{layout}")(*codes)

    def row_bytes(K: int, layout: str) -> int:
        assert type(K) is int and K >= 0
        return -(-K // per_byte[layout])

    def stored(packed: Tensor, K: int, layout: str) -> Tensor:
        block = {"ternary": 128, "binary": 256, "split": 128}[layout]
        assert packed.dtype == torch.uint8 and packed.shape[1] == -(-K // block) * 32
        return archived(getattr(reference, f"unpack_{layout}")(packed, K), layout)

    def restored(stored: Tensor, K: int, layout: str) -> Tensor:
        assert stored.dtype == torch.uint8 and stored.shape[1] == row_bytes(K, layout)
        if layout == "ternary":
            return reference.pack_ternary(untrits(stored, K))
        fields = unarchived(stored, K, per_byte[layout])
        codes = (fields // 2 * 2 - 1, fields % 2 * 2 - 1) if layout == "split" else fields * 2 - 1
        equal(archived(codes, layout), stored)  # no bit past K
        return getattr(reference, f"pack_{layout}")(*(codes if layout == "split" else (codes,)))

    same: dict[str, Any] = {"K": K, "layout": layout}
    which = integer(0, 4)
    if which == 0:
        return Case(lowbit_kernels.archive_bytes, same, row_bytes, _same, on_meta=False)
    if which < 3:
        return Case(lowbit_kernels.to_archive, {"packed": restrided(integer, packed), **same}, stored, equal)
    given = archived(codes if layout == "split" else codes[0], layout)
    return Case(lowbit_kernels.from_archive, {"stored": restrided(integer, given), **same}, restored, equal)


def archived(codes: Any, layout: str) -> Tensor:
    """Rows as files hold them by their definition: byte t of a block of C holds the values t, t + C, t + 2C, ..."""
    if layout == "ternary":
        return trits(codes)
    fields = (codes[0] + 1) + (codes[1] + 1) // 2 if layout == "split" else (codes + 1) // 2
    per_byte, (rows, K) = 4 if layout == "split" else 8, fields.shape
    packed = torch.zeros(rows, -(-K // per_byte), dtype=torch.int64)
    for k in range(K):
        byte, shift = place(k, packed.shape[1], per_byte)
        packed[:, byte] += fields[:, k].long() << shift
    return packed.to(torch.uint8)


def unarchived(stored: Tensor, K: int, per_byte: int) -> Tensor:
    """The fields int8 [N, K] that `archived` put there."""
    fields = torch.zeros(len(stored), K, dtype=torch.int8)
    for k in range(K):
        byte, shift = place(k, stored.shape[1], per_byte)
        fields[:, k] = stored[:, byte].long() >> shift & (1 if per_byte == 8 else 3)
    return fields


def place(k: int, row_bytes: int, per_byte: int) -> tuple[int, int]:
    """(byte, bit) of value k in a row of a file."""
    start = k // (32 * per_byte) * 32
    plane, t = divmod(k - start * per_byte, min(32, row_bytes - start))
    return start + t, plane if per_byte == 8 else 6 - 2 * plane


def _same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected) and got == expected


def tokens_shape(integer: Integer) -> tuple[int, ...]:
    return choose(integer, ((size(integer, 9),), (size(integer, 4), size(integer, 4)), ()))


def quantize_case(integer: Integer) -> Case:
    x = restrided(integer, floats(integer, (*tokens_shape(integer), length(integer)), choose(integer, FLOATS)))
    arguments = {"x": x, "bits": choose(integer, (8, 4)), "symmetric": bool(integer(0, 1))}
    if integer(0, 2) == 0:

        def fake(x: Tensor, bits: int, symmetric: bool) -> Tensor:
            q, scale, zero = reference.quantize_per_token(x, bits, symmetric)
            shifted = q.float() if zero is None else q.float() - zero.unsqueeze(-1)
            return (shifted * scale.unsqueeze(-1)).to(x.dtype)

        return Case(lowbit_kernels.fake_quantize_per_token, arguments, fake, equal)
    return Case(lowbit_kernels.quantize_per_token, arguments, reference.quantize_per_token, quantized_alike)


def per_tensor_case(integer: Integer) -> Case:
    x = restrided(integer, floats(integer, (*tokens_shape(integer), length(integer)), choose(integer, FLOATS)))
    symmetric = bool(integer(0, 1))
    arguments: dict[str, Any] = {"x": x, "bits": choose(integer, (8, 4)), "symmetric": symmetric}
    if integer(0, 1):
        arguments["scale"] = torch.tensor([choose(integer, (1.0, 0.03, 0.0, 1e-39, 1e30, math.nan))])
        if not symmetric:
            arguments["zero_point"] = torch.tensor([integer(-300, 300)], dtype=torch.int32)
    return Case(lowbit_kernels.quantize_per_tensor, arguments, reference.quantize_per_tensor, quantized_alike)


def weight_case(integer: Integer) -> Case:
    """Ternary and binary codes. A weight next to the threshold may get either code: float32 sums move it."""
    w = restrided(integer, floats(integer, (size(integer), length(integer)), choose(integer, FLOATS)))
    granularity = choose(integer, ("per_row", "per_tensor"))
    arguments: dict[str, Any] = {"w": w, "granularity": granularity}
    ternary = bool(integer(0, 1))

    op = "ternarize" if ternary else "binarize"

    def wide(w: Tensor, granularity: str) -> Any:
        assert granularity in ("per_row", "per_tensor") and w.dim() == 2 and w.is_floating_point()
        return *getattr(reference, op)(w, granularity=granularity), w, granularity

    def compare(got: Any, expected: Any) -> None:
        *expected, w, granularity = expected
        bad = expected[1].isnan()
        assert torch.equal(got[1].isnan(), bad) and got[1].dtype == torch.float32 and got[0].dtype == torch.int8
        torch.testing.assert_close(got[1][~bad], expected[1][~bad], rtol=1e-5, atol=1e-37)
        rows = ~bad.expand(w.shape[0]).unsqueeze(1).expand(w.shape)
        if ternary:
            size = w.double().abs()
            mean = size.mean(1, keepdim=True) if granularity == "per_row" else size.mean()
            rows = rows & ((size - 0.7 * mean).abs() > 1e-5 * mean)
        assert torch.equal(got[0][rows], expected[0][rows])

    return Case(getattr(lowbit_kernels, op), arguments, wide, compare)


def loss_aware_case(integer: Integer) -> Case:
    """Checked by what the published update must leave: the scale is the best one for the codes."""
    shape = size(integer), length(integer)
    w = floats(integer, shape, nasty=False)
    v = positive(integer, shape) ** 4
    arguments = {
        "w": restrided(integer, w), "granularity": choose(integer, ("per_row", "per_tensor")),
        "curvature": restrided(integer, v), "iterations": integer(0, 8),
    }  # fmt: skip

    def best(w: Tensor, granularity: str, curvature: Tensor, iterations: int) -> Any:
        assert isinstance(granularity, str) and granularity in ("per_row", "per_tensor")
        if curvature is None:  # without it the threshold of TWN, of which the scale is the plain mean
            curvature = torch.ones_like(w)
        assert curvature.shape == w.shape and isinstance(iterations, int) and iterations >= 0
        return w.double(), curvature.double(), granularity

    def compare(got: Any, expected: Any) -> None:
        codes, scale = got
        w, v, granularity = expected
        assert set(codes.unique().tolist()) <= {-1, 0, 1} and bool((codes.double() * w >= 0).all())
        kept = v * codes.abs()
        top, bottom = kept * w.abs(), kept
        if granularity == "per_row":
            top, bottom = top.sum(1), bottom.sum(1)
        else:
            top, bottom = top.sum().reshape(1), bottom.sum().reshape(1)
        wanted = torch.where(bottom > 0, top / bottom.clamp(min=1e-300), 0.0)
        torch.testing.assert_close(scale.double(), wanted, rtol=1e-4, atol=1e-30)

    return Case(lowbit_kernels.ternarize, arguments, best, compare)


def split_case(integer: Integer) -> Case:
    """Checked by what splitting promises: latent and quantized sums are those of the ternary weight."""
    w = floats(integer, (size(integer), length(integer)), choose(integer, FLOATS), nasty=integer(0, 3) == 0)
    granularity = choose(integer, ("per_row", "per_tensor"))

    def compare(got: Any, expected: Any) -> None:
        w1, w2 = (half.double() for half in got)
        *expected, w, granularity = expected
        codes, scale = (part.double() for part in expected)
        assert all(half.dtype == torch.float32 and half.shape == w.shape for half in got)
        rows = scale.isfinite().expand(w.shape[0])
        broken = ~(w1.isfinite() & w2.isfinite()).all(1)
        assert bool((broken <= ~rows).all()) and bool((broken | rows).any()) >= bool((~rows).any()), "NaN is lost"
        if not bool(rows.any()) or not w.numel():
            return
        size = w1.abs() + w2.abs()
        assert bool(((w1 + w2 - w.double()).abs() <= 2.0**-23 * size)[rows].all()), "latent sum"
        groups = (w1[rows], w2[rows]) if granularity == "per_row" else (w1.reshape(1, -1), w2.reshape(1, -1))
        values = sum(torch.where(half >= 0, 1.0, -1.0) * half.abs().mean(1, keepdim=True) for half in groups)
        wanted = codes * scale.unsqueeze(1)
        wanted = wanted[rows] if granularity == "per_row" else wanted.reshape(1, -1)
        largest = (groups[0].abs() + groups[1].abs()).amax(1, keepdim=True)
        assert bool(((values - wanted).abs() <= 1e-5 * largest + 1e-37).all()), "quantized sum"

    def ternary(w: Tensor, granularity: str) -> Any:
        assert w.dim() == 2 and w.is_floating_point()
        return *lowbit_kernels.ternarize(w.contiguous(), granularity=granularity), w, granularity

    arguments = {"w": restrided(integer, w), "granularity": granularity}
    return Case(lowbit_kernels.split_ternary, arguments, ternary, compare)


def packed_weight(integer: Integer, layout: str, N: int, K: int) -> tuple[Tensor, list[Tensor]]:
    if layout in UNIFORM:
        codes = whole(integer, (N, K), *UNIFORM[layout])
        return reference.pack_uniform(codes, layout), [codes]
    planes = [whole(integer, (N, K), -1, 1)] if layout == "ternary" else [signs(integer, (N, K))]
    if layout == "split":
        planes.append(signs(integer, (N, K)))
    return getattr(reference, f"pack_{layout}")(*planes), planes


# Layout -> least and largest code.
UNIFORM = {"int8": (-127, 127), "uniform2": (-1, 2), "uniform4": (-8, 7), "uniform8": (-128, 127)}


def linear_arguments(integer: Integer, layout: str) -> dict[str, Any]:
    N, K, tokens = size(integer), length(integer), tokens_shape(integer)
    packed, _ = packed_weight(integer, layout, N, K)
    pairs = layout == "split" or layout.startswith("uniform")
    scale = positive(integer, (*((2,) if pairs else ()), choose(integer, (N, 1))))
    arguments: dict[str, Any] = {"packed": restrided(integer, packed), "scale": restrided(integer, scale)}
    if layout.startswith("uniform"):
        arguments["bits"] = int(layout[-1])
    if integer(0, 1):
        arguments["bias"] = restrided(integer, floats(integer, (N,), choose(integer, FLOATS)))
    if integer(0, 1):
        arguments["x"] = restrided(integer, floats(integer, (*tokens, K), choose(integer, FLOATS)))
    else:
        arguments["x"] = restrided(integer, whole(integer, (*tokens, K), -128, 127))
        shape = choose(integer, (tokens, (1,)))
        arguments["x_scale"] = positive(integer, shape)
        if arguments["x_scale"].numel() and integer(0, 5) == 0:
            arguments["x_scale"].view(-1)[0] = choose(integer, (math.nan, 0.0))
        if integer(0, 1):
            arguments["x_zero_point"] = whole(integer, shape, -300, 300, torch.int32)
    arguments["activation"] = choose(integer, (None, "gelu", "gelu_tanh"))
    if integer(0, 2) == 0:
        arguments["residual"] = restrided(integer, floats(integer, (*tokens, N), choose(integer, FLOATS)))
    if integer(0, 3) == 0:
        arguments["out_scale"] = torch.tensor([choose(integer, (0.1, 30.0, 0.0, math.nan))])
    elif integer(0, 1):
        arguments["out_dtype"] = choose(integer, FLOATS)
    return arguments


def linear_case(integer: Integer) -> Case:
    layout = choose(integer, ("ternary", "binary", "split", *UNIFORM))
    arguments = linear_arguments(integer, layout)
    name = f"{layout.rstrip('248') if layout.startswith('uniform') else layout}_linear"
    op, definition = getattr(lowbit_kernels, name), getattr(reference, name)

    def wide(**given: Any) -> Any:
        """(result in float64 or as codes, bound of the rounding errors, dtype)."""
        x, bias, residual, out_scale = (given.get(name) for name in ("x", "bias", "residual", "out_scale"))
        dtype = given.get("out_dtype") or (torch.float32 if x.dtype == torch.int8 else x.dtype)
        for name in ("x_scale", "x_zero_point"):
            if given.get(name) is not None:
                given[name] = given[name].expand(x.shape[:-1]) if x.dim() > 1 else given[name].reshape(x.shape[:-1])
        assert given["scale"].dtype == torch.float32
        expected = definition(**{**given, "out_dtype": torch.float64, "out_scale": None})
        codes = x
        scale, zero = given.get("x_scale"), given.get("x_zero_point")
        if x.dtype != torch.int8:
            codes, scale, zero = reference.quantize_per_token(x)
        shift = torch.zeros_like(scale) if zero is None else zero
        terms = (codes.double().abs() + shift.double().abs().unsqueeze(-1)).sum(-1) * scale.double().abs()
        planes = given["scale"].double()
        if layout == "split":
            planes = planes.sum(0)
        elif layout in UNIFORM:  # of all groups the largest: codes are many times a scale
            step = planes if layout == "int8" else planes[0]
            most = -UNIFORM[layout][0] if layout != "uniform2" else 2
            planes = 4 * (most * step.max() + (0 if layout == "int8" else planes[1].max())) if step.numel() else step
        rounding = 12 * 2.0**-24 * terms.unsqueeze(-1) * planes
        for part in (bias, residual):
            if part is not None:
                rounding = rounding + 4 * 2.0**-24 * part.double().abs()
        # The result is rounded once, and before the activation too, as it is where that is a module of its own.
        before = definition(**{**given, "out_dtype": torch.float64, "out_scale": None, "activation": None})
        ulps = EPS.get(dtype, 0) * (expected.abs() + (0 if given["activation"] is None else before.abs()))
        bound = 1.2 * rounding + 2 * ulps + 1e-6
        # torch's GELU of an infinity is NaN or infinite, and what the dtype cannot hold is one of the two.
        certain = torch.ones_like(expected, dtype=torch.bool)
        if given["activation"] is not None:
            certain = before.abs() + bound.nan_to_num(0.0) <= torch.finfo(dtype).max
        return (
            expected,
            bound.nan_to_num(0.0),
            dtype,
            out_scale,
            certain & ~(torch.maximum(before.abs(), expected.abs()) > 1e37),
        )

    def compare(got: Tensor, parts: Any) -> None:
        expected, bound, dtype, out_scale, certain = parts
        if out_scale is None:
            assert got.dtype == dtype
            limit = torch.finfo(dtype).max
            # Half precision overflows where float64 does not.
            inside = certain & (~(expected.abs() + bound > limit) | ~expected.isfinite())
            close(got[inside], expected[inside], bound.expand(expected.shape)[inside])
            return
        assert got.dtype == torch.int8 and got.shape == expected.shape
        scale = float(out_scale)
        if scale < 2.0**-126 or math.isnan(scale):
            assert not got.any()
            return
        wanted = (expected / scale).nan_to_num(0.0, 1e9, -1e9).clamp(-127, 127)
        slack = 0.5 + bound.expand(expected.shape) / scale + 1e-4 + 1e-6 * wanted.abs()
        assert bool(((got.double() - wanted).abs() <= slack)[certain].all())

    return Case(op, arguments, wide, compare)


def trained_linear_case(integer: Integer) -> Case:
    """codes_linear and joint_linear give the bits of the packed linears. Their arguments are not checked."""
    layout = choose(integer, ("ternary", "binary", "split"))
    K, tokens = length(integer), tokens_shape(integer)
    x, x_scale = whole(integer, (*tokens, K), -128, 127), positive(integer, tokens)
    zero = choose(integer, (None, whole(integer, tokens, -300, 300, torch.int32)))
    dtype = choose(integer, FLOATS)
    op = getattr(lowbit_kernels, f"{layout}_linear")
    options = {"x_scale": x_scale, "x_zero_point": zero, "out_dtype": dtype}
    lead = (2,) if layout == "split" else ()
    shared = {"x": restrided(integer, x), "x_scale": x_scale, "x_zero_point": zero, "layout": layout,
              "out_dtype": dtype}  # fmt: skip
    if integer(0, 1):
        N = size(integer)
        packed, planes = packed_weight(integer, layout, N, K)
        scale, bias = positive(integer, (*lead, N)), choose(integer, (None, floats(integer, (N,))))
        arguments = {**shared, "codes": torch.stack(planes) if layout == "split" else planes[0], "scale": scale,
                     "bias": bias}  # fmt: skip
        return Case(
            lowbit_kernels.codes_linear, arguments, lambda **_: op(x, packed, scale, bias, **options), equal, False
        )
    sizes = [size(integer) for _ in range(integer(1, 3))]
    weights = [packed_weight(integer, layout, N, K)[0] for N in sizes]
    scales = [positive(integer, (*lead, choose(integer, (N, 1)))) for N in sizes]
    biases = [choose(integer, (None, floats(integer, (N,)))) for N in sizes]
    activation = choose(integer, (None, "gelu"))
    arguments = {**shared, "packed": weights, "scale": scales, "bias": biases, "activation": activation}

    def one_by_one(**_: Any) -> Tensor:
        parts = zip(weights, scales, biases, strict=True)
        return torch.cat([op(x, *part, activation=activation, **options) for part in parts], -1)

    return Case(lowbit_kernels.joint_linear, arguments, one_by_one, equal, False)


def dynamic_linear_case(integer: Integer) -> Case:
    """joint_dynamic_linear gives the bits of quantize_per_token and joint_linear. Its arguments are not checked."""
    layout, bits, symmetric = (
        choose(integer, ("ternary", "binary", "split")),
        choose(integer, (8, 4)),
        bool(integer(0, 1)),
    )
    K, tokens = length(integer), tokens_shape(integer)
    x = floats(integer, (*tokens, K), choose(integer, FLOATS))
    sizes = [size(integer) for _ in range(integer(1, 3))]
    lead = (2,) if layout == "split" else ()
    packed = [packed_weight(integer, layout, N, K)[0] for N in sizes]
    scale = [positive(integer, (*lead, choose(integer, (N, 1)))) for N in sizes]
    bias = [choose(integer, (None, floats(integer, (N,)))) for N in sizes]
    activation = choose(integer, (None, "gelu"))
    arguments = {"x": restrided(integer, x), "packed": packed, "scale": scale, "bias": bias, "bits": bits,
                 "symmetric": symmetric, "layout": layout, "activation": activation}  # fmt: skip

    def one_by_one(**_: Any) -> Tensor:
        codes, x_scale, zero = lowbit_kernels.quantize_per_token(x, bits, symmetric)
        return lowbit_kernels.joint_linear(codes, packed, scale, bias, x_scale, zero, layout, activation, x.dtype)

    return Case(lowbit_kernels.joint_dynamic_linear, arguments, one_by_one, equal, False)


def expansion_case(integer: Integer) -> Case:
    """With and without int8 expansions, and after an edit in place, the same bits."""
    layout = choose(integer, ("ternary", "binary", "split"))
    arguments = linear_arguments(integer, layout)
    op = getattr(lowbit_kernels, f"{layout}_linear")

    def without(**given: Any) -> Tensor:
        lowbit_kernels.keep_expanded(False)
        try:
            assert lowbit_kernels.expanded_bytes() == 0
            return op(**given)
        finally:
            lowbit_kernels.keep_expanded(True)

    def edited(**given: Any) -> Tensor:
        packed = given["packed"]
        kept = packed.clone()
        op(**given)
        packed.zero_()
        op(**given)
        packed.copy_(kept)
        result = op(**given)
        assert lowbit_kernels.expanded_bytes() >= 0
        return result

    return Case(edited, arguments, without, equal, spoilable=False, on_meta=False)


def table(integer: Integer, V: int, D: int) -> dict[str, Any]:
    layout = choose(integer, ("ternary", "binary", "split", "int8"))
    if layout == "int8":
        packed, bits = whole(integer, (V, D), -128, 127), 8
    else:
        packed, bits = packed_weight(integer, layout, V, D)[0], 1 if layout == "binary" else 2
    scale = positive(integer, (*((2,) if layout == "split" else ()), choose(integer, (V, 1))))
    return {"packed": restrided(integer, packed), "scale": restrided(integer, scale), "bits": bits}


def ids_of(integer: Integer, shape: tuple[int, ...], rows: int) -> Tensor:
    return restrided(integer, whole(integer, shape, 0, rows - 1, choose(integer, (torch.int64, torch.int32))))


def embedding_case(integer: Integer) -> Case:
    V, D = integer(1, 20), length(integer)
    dtype = choose(integer, FLOATS)
    arguments = {
        "ids": ids_of(integer, tokens_shape(integer), V), **table(integer, V, D), "embedding_dim": D, "out_dtype": dtype
    }  # fmt: skip

    def wide(**given: Any) -> Any:
        ids = given["ids"]
        assert ids.dtype in (torch.int32, torch.int64) and (not ids.numel() or (ids.min() >= 0 and ids.max() < V))
        assert given["scale"].dtype == torch.float32
        return reference.quantized_embedding(**{**given, "out_dtype": torch.float64}), given["out_dtype"]

    def compare(got: Tensor, expected: Any) -> None:
        value, dtype = expected
        assert got.dtype == dtype
        close(got, value, value.abs() * (2 * EPS[dtype] + 2.0**-22) + 1e-7)

    return Case(lowbit_kernels.quantized_embedding, arguments, wide, compare, errors=(IndexError,))


def layernorm_compare(dtype: torch.dtype, slack: float) -> Callable[[Any, Any], None]:
    def compare(got: Any, parts: Any) -> None:
        expected, bits, symmetric = parts
        y = got if bits is None else got[0]
        assert y.dtype == dtype
        rows = expected.isfinite().all(-1)
        assert torch.equal(y.isfinite().all(-1), rows) or dtype == torch.float16  # which overflows earlier
        good = rows & y.isfinite().all(-1)
        bound = (2 * EPS[dtype] + 1e-5) * expected[good].abs() + slack
        close(y[good], expected[good], bound)
        if bits is not None:
            quantized_alike(got[1:], reference.quantize_per_token(y, bits, symmetric))

    return compare


def layernorm_case(integer: Integer) -> Case:
    dtype, K = choose(integer, SINGLE), length(integer)
    shape = (*tokens_shape(integer), K)
    bits, symmetric = choose(integer, (None, 8, 4)), bool(integer(0, 1))
    # Rows whose values are nearly all alike have no stable definition: their variance is rounding error.
    x = floats(integer, shape, dtype)
    residual = choose(integer, (None, restrided(integer, floats(integer, shape, dtype))))
    weight, bias = floats(integer, (K,), choose(integer, FLOATS), False), floats(integer, (K,), nasty=False)
    arguments = {
        "x": restrided(integer, x), "residual": residual, "weight": restrided(integer, weight),
        "bias": restrided(integer, bias), "eps": choose(integer, (1e-12, 1e-5)), "bits": bits, "symmetric": symmetric,
    }  # fmt: skip

    def wide(**given: Any) -> Tensor:
        x, residual = given["x"], given["residual"]
        assert x.dtype in SINGLE and (residual is None or (residual.dtype, residual.shape) == (x.dtype, x.shape))
        assert all(given[name].shape == x.shape[-1:] and given[name].is_floating_point() for name in ("weight", "bias"))
        assert given["bits"] in (None, 8, 4) and 0 <= given["eps"] < math.inf
        return reference.add_layernorm(
            x.double(), residual, given["weight"], given["bias"], float(given["eps"])
        ), given["bits"], given["symmetric"]  # fmt: skip

    largest = float(weight.double().abs().amax()) if K else 0.0
    slack = 3e-4 * largest + 1e-5
    return Case(lowbit_kernels.add_layernorm, arguments, wide, layernorm_compare(dtype, slack))


def embedding_layernorm_case(integer: Integer) -> Case:
    V, K, dtype = integer(1, 20), length(integer), choose(integer, SINGLE)
    shape = tokens_shape(integer)
    bits, symmetric = choose(integer, (None, 8, 4)), bool(integer(0, 1))
    words = table(integer, V, K)
    words["embedding_bits"] = words.pop("bits")
    weight = floats(integer, (K,), nasty=False)
    arguments = {
        "ids": ids_of(integer, shape, V), **words,
        "token_type_ids": ids_of(integer, shape, 3),
        "token_type_table": floats(integer, (3, K), choose(integer, FLOATS), False),
        "position_ids": ids_of(integer, shape, 7),
        "position_table": floats(integer, (7, K), choose(integer, FLOATS), False),
        "weight": weight, "bias": floats(integer, (K,), nasty=False), "eps": 1e-5, "bits": bits, "symmetric": symmetric,
        "out_dtype": dtype,
    }  # fmt: skip

    def wide(**given: Any) -> Tensor:
        for name, rows in (("ids", V), ("token_type_ids", 3), ("position_ids", 7)):
            ids = given[name]
            while ids.dim() and ids.shape[0] == 1:
                ids = ids[0]
            ids = given[name] = ids.expand(given["ids"].shape)
            assert ids.dtype in (torch.int32, torch.int64) and (
                not ids.numel() or (ids.min() >= 0 and ids.max() < rows)
            )
        assert given["bits"] in (None, 8, 4) and given["scale"].dtype == torch.float32 and 0 <= given["eps"] < math.inf
        dtype = given["out_dtype"]
        v = reference.quantized_embedding(
            given["ids"], given["packed"], given["scale"], given["embedding_bits"], embedding_dim=K, out_dtype=dtype
        )
        for name in ("token_type", "position"):
            rows = given[f"{name}_table"][given[f"{name}_ids"].long()]
            v = (v.double() + rows.to(dtype).double()).to(dtype)
        y = reference.add_layernorm(v.double(), None, given["weight"], given["bias"], float(given["eps"]))
        return y, given["bits"], given["symmetric"]

    largest = float(weight.abs().amax()) if K else 0.0
    compare = layernorm_compare(dtype, 3e-4 * largest + 1e-5)
    if dtype != torch.float32:
        # A word rounded to half precision may fall to either side of a tie, which the norm of few values makes large.

        def compare(got: Any, parts: Any) -> None:
            expected, bits, symmetric = parts
            y = got if bits is None else got[0]
            assert y.shape == expected.shape and y.dtype == dtype
            good = expected.isfinite().all(-1) & y.isfinite().all(-1)
            error = (y.double() - expected).abs()[good]
            near = error <= (2 * EPS[dtype] + 1e-5) * expected[good].abs() + 30 * EPS[dtype] * largest + 1e-5
            assert near.double().mean() > 0.9 if near.numel() > 20 else True
            if bits is not None:
                quantized_alike(got[1:], reference.quantize_per_token(y, bits, symmetric))

    return Case(lowbit_kernels.embedding_layernorm, arguments, wide, compare, errors=(IndexError,))


def cu_seqlens_of(integer: Integer) -> tuple[Tensor, list[int]]:
    lengths = [choose(integer, (0, 1, integer(0, 12))) for _ in range(integer(0, 4))]
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), lengths


def attention_case(integer: Integer) -> Case:
    eager = bool(integer(0, 1))
    cu_seqlens, lengths = cu_seqlens_of(integer)
    T, H, D = sum(lengths), integer(1, 3), integer(1, 20)
    dtype = choose(integer, FLOATS if eager else SINGLE)
    bits = choose(integer, (None, 8, 4))
    arguments: dict[str, Any] = {
        name: restrided(integer, floats(integer, (T, H, D), dtype, nasty) * (1 if name == "value" else 0.01))
        for name, nasty in (("query", True), ("key", True), ("value", False))
    }
    arguments |= {
        "cu_seqlens": cu_seqlens, "max_seqlen": max(lengths, default=0) + integer(0, 2), "bits": bits,
        "asymmetric": tuple(site for site in SITES if integer(0, 1)),
        "importance": choose(integer, (None, "all", "cls")),
        "scaling": choose(integer, (None, 0.3, 0.0)),
    }  # fmt: skip
    if integer(0, 2) == 0:
        S = arguments["max_seqlen"]
        arguments["bias"] = restrided(integer, floats(integer, (choose(integer, (H, 1)), S, S), nasty=False))
    if not eager:
        arguments["return_lse"] = bool(integer(0, 1))

    def wide(**given: Any) -> Any:
        query, ends = given["query"], given["cu_seqlens"].tolist()
        assert query.dim() == 3 and query.is_floating_point() and query.shape[2] > 0
        assert all((given[name].shape, given[name].dtype) == (query.shape, query.dtype) for name in ("key", "value"))
        assert ends[0] == 0 and ends[-1] <= len(query) and all(a <= b for a, b in itertools.pairwise(ends))
        assert given["bits"] in (None, 8, 4) and set(given["asymmetric"]) <= set(SITES)
        assert given["importance"] in (None, "all", "cls")
        bias = given.get("bias")
        assert bias is None or (bias.shape[0] in (1, query.shape[1]) and bias.is_floating_point() and bias.dim() == 3)
        options = {**given, **{name: given[name].double() for name in ("query", "key", "value")}, "return_lse": True}
        options["scaling"] = None if given["scaling"] is None else float(given["scaling"])
        return reference.attention(**options), given

    def compare(got: Any, parts: Any) -> None:
        (out, lse, received), given = parts
        wants = given.get("return_lse", False), given["importance"] is not None
        y = got if isinstance(got, torch.Tensor) else got.output
        assert y.dtype == given["query"].dtype and y.shape == out.shape
        finite = out.isfinite()
        assert torch.equal(y.isfinite(), finite) or given["query"].dtype == torch.float16
        both = finite & y.isfinite()
        span = float(given["value"].double().abs().amax()) if out.numel() else 1.0
        rounding = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}.get(y.dtype, 3e-5)
        step = 0 if given["bits"] is None else 3 / (2 ** (given["bits"] - 1) - 1)
        assert bool(((y.double() - out).abs()[both] <= (rounding + step) * span + 1e-6).all())
        if isinstance(got, torch.Tensor):
            assert not eager and not any(wants)
            return
        if wants[0]:
            rows = lse.isfinite()
            # Tokens in no sequence have no log-sum-exp.
            inside = torch.arange(lse.shape[1]) < given["cu_seqlens"][-1]
            rows = rows & inside
            torch.testing.assert_close(got.lse[rows].double(), lse[rows], rtol=1e-4, atol=1e-4)
        if wants[1]:
            rows = received.isfinite() & got.importance.isfinite()
            torch.testing.assert_close(got.importance[rows].double(), received[rows], rtol=1e-3, atol=1e-4)

    op = lowbit_kernels.attention_eager if eager else lowbit_kernels.attention
    return Case(op, arguments, wide, compare, on_meta=not eager)


def select_case(integer: Integer) -> Case:
    cu_seqlens, lengths = cu_seqlens_of(integer)
    T = sum(lengths)
    importance = floats(integer, (T,), choose(integer, FLOATS))
    if T and integer(0, 2) == 0:
        importance = importance.sign()  # ties
    unit = choose(integer, ("ratio", "tokens", "threshold"))
    keep: Any = {"ratio": integer(1, 10) / 10, "tokens": integer(1, 8), "threshold": integer(-3, 3) / 2}[unit]
    if integer(0, 3) == 0:
        keep = torch.tensor([0, *itertools.accumulate(integer(0, n) for n in lengths)], dtype=torch.int32)
    arguments = {
        "importance": restrided(integer, importance), "cu_seqlens": cu_seqlens, "keep": keep, "unit": unit,
        "min_tokens": integer(1, 4),
        "protected": restrided(integer, whole(integer, (T,), 0, 1, torch.bool)) if integer(0, 1) else None,
    }  # fmt: skip

    def checked(**given: Any) -> Any:
        ends = given["cu_seqlens"].tolist()
        assert ends[0] == 0 and ends[-1] <= T and all(a <= b for a, b in itertools.pairwise(ends))
        protected = given["protected"]
        assert protected is None or (protected.dtype == torch.bool and protected.shape == given["importance"].shape)
        if not isinstance(given["keep"], Tensor):  # with it the two play no part
            assert given["min_tokens"] >= 1 and given["unit"] in ("ratio", "tokens", "threshold")
        return reference.select_tokens(**given)

    return Case(lowbit_kernels.select_tokens, arguments, checked, equal, on_meta=False)


def kept_case(integer: Integer) -> Case:
    cu_seqlens, _ = cu_seqlens_of(integer)
    unit = choose(integer, ("ratio", "tokens"))
    keep = integer(1, 100) / 100 if unit == "ratio" else integer(1, 20)
    arguments = {"cu_seqlens": cu_seqlens, "keep": keep, "unit": unit, "min_tokens": integer(1, 4)}

    def checked(**given: Any) -> Tensor:
        assert (
            given["min_tokens"] >= 1
            and given["unit"] in ("ratio", "tokens")
            and given["cu_seqlens"].dtype == torch.int32
        )
        assert given["keep"] > 0 and (given["keep"] <= 1 if given["unit"] == "ratio" else given["keep"] % 1 == 0)
        cu_seqlens = given.pop("cu_seqlens")
        rows = [reference.kept_cu_seqlens(row, **given) for row in cu_seqlens.reshape(-1, cu_seqlens.shape[-1])]
        return torch.stack(rows).reshape(cu_seqlens.shape)

    return Case(lowbit_kernels.kept_cu_seqlens, arguments, checked, equal)


def gather_case(integer: Integer) -> Case:
    rows = integer(1, 20)
    x = restrided(integer, floats(integer, (rows, *tokens_shape(integer)), choose(integer, FLOATS)))
    index = ids_of(integer, (size(integer),), rows)

    def rows_of(x: Tensor, index: Tensor) -> Tensor:
        assert index.dim() == 1 and (not index.numel() or index.min() >= 0)
        parts = [x[int(i)] for i in index]
        return torch.stack(parts) if parts else x[:0]

    return Case(lowbit_kernels.gather_tokens, {"x": x, "index": index}, rows_of, equal, errors=(IndexError,))


CASES: dict[str, Callable[[Integer], Case]] = {
    "pack_ternary, pack_binary, pack_split, pack_trits": packing_case,
    "unpack_ternary, unpack_binary, unpack_split, unpack_trits": unpacking_case,
    "pack_uniform, unpack_uniform": uniform_packing_case,
    "to_archive, from_archive, archive_bytes": archive_case,
    "quantize_per_token, fake_quantize_per_token": quantize_case,
    "quantize_per_tensor": per_tensor_case,
    "ternarize, binarize": weight_case,
    "ternarize, loss-aware": loss_aware_case,
    "split_ternary": split_case,
    "ternary_linear, binary_linear, split_linear, int8_linear, uniform_linear": linear_case,
    "codes_linear, joint_linear": trained_linear_case,
    "joint_dynamic_linear": dynamic_linear_case,
    "keep_expanded, expanded_bytes": expansion_case,
    "quantized_embedding": embedding_case,
    "add_layernorm": layernorm_case,
    "embedding_layernorm": embedding_layernorm_case,
    "attention, attention_eager": attention_case,
    "select_tokens": select_case,
    "kept_cu_seqlens": kept_case,
    "gather_tokens": gather_case,
}

# ----------------------------------------------------------------------------------------------------------- judging

STRANGE: tuple[Any, ...] = (None, "x", -1, 0, 3, 1.5, math.nan, math.inf, 2**70, [], [1], torch.tensor(1.0), object())


def spoil(integer: Integer, case: Case) -> None:
    """Change one argument to what it should not be; at times that leaves the call valid."""
    name = choose(integer, sorted(case.arguments))
    value = case.arguments[name]
    case.spoiled = name
    if not isinstance(value, torch.Tensor) or integer(0, 5) == 0:
        case.arguments[name] = choose(integer, STRANGE)
        return
    how = integer(0, 7)
    dtypes = (
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.int8,
        torch.bool,
        torch.float32,
        torch.float64,
        torch.complex64,
    )
    if how == 0:
        value = (
            value.nan_to_num().to(choose(integer, dtypes))
            if value.is_floating_point()
            else value.to(choose(integer, dtypes))
        )
    elif how == 1:
        value = value.unsqueeze(integer(0, value.dim()))
    elif how == 2 and value.dim():
        value = value.select(integer(0, value.dim() - 1), 0) if value.numel() else value.reshape(-1)
    elif how == 3 and value.dim():
        value = torch.cat([value, value[:1]]) if value.numel() else value.new_zeros(3)
    elif how == 4 and value.dim():
        value = value[..., :-1]
    elif how == 5:
        value = value.to("meta")
    elif how == 6 and value.numel() and not value.dtype.is_floating_point:
        value = value.clone(memory_format=torch.contiguous_format)
        value.reshape(-1)[integer(0, value.numel() - 1)] = choose(integer, (0, 1, 2, 100, 127))
    elif how == 7 and value.dim() > 1:
        value = value.transpose(0, 1)
    case.arguments[name] = value


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for name, value in arguments.items():
        if isinstance(value, list):
            found |= {f"{name}[{i}]": one for i, one in enumerate(value) if isinstance(one, torch.Tensor)}
    return found


def bits_of(x: Tensor) -> Tensor | tuple[int, ...]:
    if x.is_meta:
        return tuple(x.shape)
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1)).view(torch.uint8)


def unchanged(before: dict[str, Any], arguments: dict[str, Any]) -> None:
    for name, x in tensors_of(arguments).items():
        now = bits_of(x)
        same = now == before[name] if isinstance(now, tuple) else torch.equal(now, before[name])
        assert same, f"{name} was changed in place"


def run(name: str, integer: Integer) -> str:
    """One case: "equal", "refused" or "on meta"; AssertionError, or whatever the op raises, where it fails."""
    case = CASES[name](integer)
    if case.spoilable and integer(0, 1):
        spoil(integer, case)
    elif case.on_meta and integer(0, 7) == 0:
        return _on_meta(case)
    before = {name: bits_of(x) for name, x in tensors_of(case.arguments).items()}
    given = dict(case.arguments)
    if integer(0, 3) == 0:
        for key, x in given.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.is_meta and key != "bias":
                given[key] = x.detach().requires_grad_()
    try:
        got = case.op(**given)
    except (TypeError, ValueError, *case.errors) as error:
        unchanged(before, case.arguments)
        assert case.spoiled, f"refused valid arguments: {error}"
        assert str(error).strip(), "no message"
        return "refused"
    unchanged(before, case.arguments)
    if any(x.is_meta for x in tensors_of(case.arguments).values()):
        assert all(x.is_meta for x in tensors_of(case.arguments).values()), f"{case.spoiled} on meta was accepted"
        return "on meta"
    try:
        expected = case.definition(**{key: _plain(value) for key, value in case.arguments.items()})
    except Exception as error:
        raise AssertionError(
            f"accepted {case.spoiled}={case.arguments.get(case.spoiled)!r}, which has no definition: {error!r}"
        ) from error
    case.compare(_plain(got), expected)
    return "equal"


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_plain, value))
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _on_meta(case: Case) -> str:
    def meta(value: Any) -> Any:
        if isinstance(value, list):
            return [meta(one) for one in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else copy.copy(value)

    got = case.op(**{name: meta(value) for name, value in case.arguments.items()})
    expected = case.op(**case.arguments)
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
    for one, other in pairs:
        assert (one is None) == (other is None)
        if other is not None:
            assert one.is_meta and (one.shape, one.dtype) == (other.shape, other.dtype), "another shape on meta"
    return "on meta"


def by_hypothesis(name: str, count: int) -> list[str]:
    """Failures of one kind of op in `count` examples, the smallest that hypothesis finds."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(st.data())
    def check(data: st.DataObject) -> None:
        run(name, lambda low, high: data.draw(st.integers(low, high)))

    try:
        check()
    except Exception as error:
        return [f"{name}, by hypothesis: {type(error).__name__}: {str(error)[:200]}"]
    return []
