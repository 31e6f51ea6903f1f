"""Launches of the Triton linears: kernel and tile, the workspace of sliced products, what is kept beside weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .. import configs
from .._derived import Derived, outlives_capture
from .._triton import INTERPRET, triton
from ..packing import unpacked
from .gpu_kernels import BINARY, SPLIT, TERNARY, _linear_kernel, _small_kernel
from .gpu_uniform import launch_uniform

LAYOUTS = {"ternary": TERNARY, "binary": BINARY, "split": SPLIT}

ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}


@dataclass(frozen=True)
class Tile:
    """A tile configuration: tokens, weight rows and packed bytes per step, Triton's warps and stages, slices of K."""

    block_m: int
    block_n: int
    block_b: int
    num_warps: int
    num_stages: int
    split_k: int = 0  # programs that share a tile, each a slice of K; 0: as `choose_split_k` says

    def __post_init__(self) -> None:
        for name, least in (("block_m", 16), ("block_n", 16), ("block_b", 32), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}={value}, accepted: powers of two from {least}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages}, accepted: 1 and more")
        if self.split_k < 0:
            raise ValueError(f"split_k={self.split_k}, accepted: 0 and more")

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_b} {self.num_warps}w {self.num_stages}s"


def choose_tile(layout: str, M: int, N: int, K: int, arch: int | None) -> Tile:
    """The tile for x [M, K] and a weight [N, K] on a device of compute capability `arch` (`configs.lookup`)."""
    return configs.lookup(f"{layout}_linear", Tile, M, N, K, arch)


def shipped_tiles(layout: str, arch: int) -> list[Tile]:
    """Every tile that the package's tables have for a layout on a compute capability."""
    return configs.shipped(f"{layout}_linear", Tile, arch)


LEAST_ARCH = 80  # compute capability of the devices that the kernels compile for

MAX_GRID = 65_535  # programs along axis y

SMALL_M = 8  # up to this M a tile of 16 tokens is at least half empty

SMALL_W = 64  # words a step: two a lane, so that x and the weights are read in one layout, without an exchange


def choose_split_k(M: int, N: int, K: int, tile: Tile, per_byte: int, processors: int) -> int:
    """Slices of K, so that a product of few tiles and a long K fills the device; each has at least 256 values."""
    tiles = triton.cdiv(N, tile.block_n) * triton.cdiv(M, tile.block_m)
    if K < 1024 or 2 * tiles > processors:
        return 1
    steps = triton.cdiv(K, per_byte * tile.block_b)
    most = min(processors // tiles, K // 256, steps)
    return triton.cdiv(steps, triton.cdiv(steps, most))  # no slice stays empty


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}


def _workspace(device: torch.device, size: int) -> torch.Tensor:
    """At least `size` int32 zeros, which the launch leaves zeros.

    One is kept for each device and stream, since launches on one stream follow each other; a larger one takes its
    place when needed, and the caching allocator gives the memory of the old one to later work of that stream only.
    Not kept: what is allocated while a graph is captured (its zeros do not exist before a replay, and graphs captured
    on one stream may be replayed on two), and what comes from a private memory pool (the warm-up of torch.compile's
    CUDA graphs: the pool takes its memory back unasked). Such launches get zeros of their own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    workspace = _workspaces.get(key)
    if workspace is None or workspace.numel() < size:
        workspace = torch.zeros(max(size, 2**18), dtype=torch.int32, device=device)
        if device.type != "cuda" or outlives_capture(workspace):
            _workspaces[key] = workspace
    return workspace


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
    tile: Tile | None = None,
    w_sum: torch.Tensor | None = None,
    concat: bool | None = None,
    *,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a Triton kernel; arguments as the op's, already validated.

    `w_sum`, the sums of the weight codes over K (int32 [N] or [2, N]), is found out where zero points need it. With a
    `tile` the tensor-core kernel runs, however few the tokens. `concat` chooses between one product of all planes and
    one a plane; default: what suits the device.
    """
    if layout not in LAYOUTS:
        more = {"residual": residual, "out_scale": out_scale}
        return launch_uniform(x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype, layout, **more)
    M, K = x.shape
    N, row_bytes = packed.shape
    out = torch.empty(M, N, dtype=out_dtype, device=x.device)
    if M == 0 or N == 0:
        return out
    if K >= 2**18:
        raise ValueError(f"x has K={K} columns, the GPU kernels take less than {2**18}")
    arch = configs.device_arch(x.device)
    _check_arch(arch, x.device)
    if x_zero_point is not None:
        x_zero_point, w_sum = x_zero_point.contiguous(), _w_sum(packed, K, layout) if w_sum is None else w_sum
    x, packed = _aligned(x), _aligned(packed)
    bias = None if bias is None else bias.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    arguments = (
        x, packed, scale.contiguous(), bias, x_scale.contiguous(), x_zero_point, w_sum, residual, out_scale, out,
        M, N, x.shape[1], row_bytes,
        x.stride(0), packed.stride(0), out.stride(0), 0 if residual is None else residual.stride(0),
        int(scale.shape[-1] > 1), int(x_scale.numel() > 1), scale.shape[-1],
    )  # fmt: skip
    constants = {
        "LAYOUT": LAYOUTS[layout], "ACTIVATION": ACTIVATIONS[activation], "HAS_BIAS": bias is not None,
        "HAS_ZERO": x_zero_point is not None, "HAS_RESIDUAL": residual is not None,
        "HAS_OUT_SCALE": out_scale is not None, "INTERPRET": INTERPRET, "enable_fp_fusion": True,
    }  # fmt: skip
    if tile is None and M <= SMALL_M:
        block_m = triton.next_power_of_2(M)
        _small_kernel[(N,)](*arguments, **constants, BLOCK_M=block_m, BLOCK_W=SMALL_W, num_warps=1)
        return out
    planes = 8 if layout == "binary" else 4
    tile = tile or choose_tile(layout, M, N, K, arch)
    split_k = tile.split_k or choose_split_k(M, N, K, tile, planes, _processors(x.device))
    tiles = triton.cdiv(N, tile.block_n), triton.cdiv(M, tile.block_m)
    if tiles[1] > MAX_GRID:
        raise ValueError(f"x has M={M} rows, the GPU kernels take up to {MAX_GRID * tile.block_m} of them")
    workspace, slice_bytes = None, row_bytes
    if split_k > 1:
        sums = tile.block_n * tile.block_m * (2 if layout == "split" else 1)
        workspace = _workspace(x.device, tiles[0] * tiles[1] * (sums + 1))
        slice_bytes = triton.cdiv(triton.cdiv(row_bytes, tile.block_b), split_k) * tile.block_b
    _linear_kernel[(*tiles, split_k)](
        *arguments, workspace, slice_bytes, **constants,
        CONCAT=_concat(arch) if concat is None else concat, SLICED=split_k > 1,
        EVEN_K=row_bytes % tile.block_b == 0 and row_bytes * planes == x.shape[1],
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_B=tile.block_b,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _check_arch(arch: int | None, device: torch.device) -> None:
    """Raise RuntimeError for a GPU without the int8 tensor cores that the kernels use, or not of NVIDIA."""
    if arch is None or (arch >= LEAST_ARCH and torch.version.hip is None):
        return
    raise RuntimeError(
        f"the GPU kernels of lowbit take NVIDIA GPUs of compute capability 8.0 (Ampere) and later, {device} is "
        f"{torch.cuda.get_device_name(device)} ({'ROCm' if torch.version.hip else f'{arch // 10}.{arch % 10}'}); "
        "move the model and its inputs to the CPU, or train and run it in float"
    )


def _concat(arch: int | None) -> bool:
    """One product of all planes on Hopper, whose wgmma takes the joined tile from registers; elsewhere it costs."""
    return arch is not None and arch // 10 == 9


w_sums = Derived()


def _w_sum(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    return w_sums.get([packed], (K, layout), lambda: unpacked(packed, K, layout).sum(-1, dtype=torch.int32))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that begin and end at multiples of 16 bytes, zeros after K: what the kernels load in one go."""
    K = x.shape[1]
    if K % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -K % 16)).contiguous()


def _work(tile: Tile) -> float:
    """Values of the result that a warp computes."""
    return tile.block_m * tile.block_n / tile.num_warps


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    pointers = {"x_ptr": "*i8", "w_ptr": "*u8", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "x_scale_ptr": "*fp32"}
    pointers |= {"x_zero_ptr": "*i32", "w_sum_ptr": "*i32", "residual_ptr": "*bf16", "out_scale_ptr": "*fp32"}
    others = dict.fromkeys(("M", "stride_scale", "stride_xs"), "i32")
    others |= dict.fromkeys(("x_columns", "row_bytes", "stride_xm", "stride_wn"), "i32:16")
    sizes = "N", "stride_om", "stride_rm", "stride_plane"
    cases = []
    for name, layout in LAYOUTS.items():
        tiles = shipped_tiles(name, arch)
        smallest, largest = (pick(tiles, key=_work) for pick in (min, max))
        # (label, tile, activation, what is known of N and K, sliced, residual and int8 output)
        variants = [(str(tile), tile, "gelu", ":16", False, False) for tile in tiles]
        variants += [
            (f"{largest}, odd N", largest, "gelu_tanh", "", False, False),
            (f"{largest} to int8", largest, "gelu", ":16", False, True),
            (f"{smallest}, sliced", smallest, "gelu", ":16", True, True),
            (f"{largest}, sliced", largest, "gelu", ":16", True, True),
        ]
        constants = {"LAYOUT": layout, "HAS_BIAS": True, "HAS_ZERO": True, "INTERPRET": False}
        for label, tile, activation, size, sliced, to_int8 in variants:
            signature = {**pointers, "out_ptr": "*i8" if to_int8 else "*fp32", **others}
            signature |= {**dict.fromkeys(sizes, "i32" + size), "workspace_ptr": "*i32", "slice_bytes": "i32:16"}
            own = {"ACTIVATION": ACTIVATIONS[activation], "HAS_RESIDUAL": to_int8, "HAS_OUT_SCALE": to_int8}
            own |= {"CONCAT": _concat(arch), "EVEN_K": size == ":16", "SLICED": sliced}
            own |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_B": tile.block_b}
            warps, stages = tile.num_warps, tile.num_stages
            cases.append((f"linear {name} {label}", _linear_kernel, signature, {**constants, **own}, warps, stages))
        for tokens in (1, SMALL_M):
            signature = {**pointers, "out_ptr": "*fp32", **others, **dict.fromkeys(sizes, "i32:16")}
            own = {"ACTIVATION": ACTIVATIONS["gelu"], "HAS_RESIDUAL": True, "HAS_OUT_SCALE": False}
            own |= {"BLOCK_M": tokens, "BLOCK_W": SMALL_W}
            label = f"linear {name} small, {tokens} tokens"
            cases.append((label, _small_kernel, signature, {**constants, **own}, 1, 3))
    return cases
