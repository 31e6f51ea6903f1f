"""Time tiles of the linears on this machine's GPU and keep the fastest of each shape in a table (`configs`).

    python -m lowbit_kernels.tune [--layout ternary binary split] [--shapes N,K ..] [--tokens M ..]
                                  [--output FILE | --family NAME] [--minutes LIMIT] [--again]

By default: BERT-base and BERT-large, every bucket of M, into the user's table, which kernels consult first from the
next process on. Each candidate must first give the exact integers. The table is saved after every shape, and what it
holds already is skipped: the command can be stopped at any time and called again. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import configs
from ._triton import INTERPRET, triton
from .linear import gpu as linear
from .linear.gpu import LAYOUTS, Tile
from .packing import pack_codes

# (N, K) of BERT-base and BERT-large: attention output, query, key and value joined, the two of the feed-forward.
SHAPES = [(N * width, K * width) for width in (768, 1024) for N, K in ((1, 1), (3, 1), (4, 1), (1, 4))]


class Case(NamedTuple):
    """One line of the table to find."""

    layout: str
    N: int
    K: int
    M: int

    @property
    def op(self) -> str:
        return f"{self.layout}_linear"


# ------------------------------------------------------------------------------------------------------- candidates


def candidates(case: Case, shared: int) -> list[Tile]:
    """Tiles worth timing where a block has `shared` bytes of shared memory; some may still not launch."""
    planes = 8 if case.layout == "binary" else 4
    widest = max(16, 1 << (case.M - 1).bit_length())  # the smallest tile that holds all tokens
    heights = [m for m in (16, 32, 64, 128, 256) if min(64, widest) <= m <= widest]
    found = []
    for m, n, b, warps, stages in itertools.product(heights, (32, 64, 128, 256), (32, 64), (4, 8), (3, 4)):
        # 128 int32 sums a thread is about where they spill; with under 8, threads have too little to do.
        sums = m * n * (2 if case.layout == "split" else 1) / (32 * warps)
        # One stage may sit in registers.
        least = (stages - 1) * (n * b + m * b * planes)
        if 8 <= sums <= 128 and least <= shared and (b - 32) * planes < case.K:
            found.append(Tile(m, n, b, warps, stages))
    return found


# ----------------------------------------------------------------------------------------------------------- timing


class Inputs:
    """Random arguments of one case on the device, and what the sums must be."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        pair = (2,) if case.layout == "split" else ()
        codes = torch.randint(0, 2, (*pair, case.N, case.K), dtype=torch.int8, device=device) * 2 - 1
        if case.layout == "ternary":
            codes = torch.randint(-1, 2, codes.shape, dtype=torch.int8, device=device)
        self.x = torch.randint(-128, 128, (case.M, case.K), dtype=torch.int8, device=device)
        self.packed = pack_codes(codes, case.layout)
        self.w_sum = codes.sum(-1, dtype=torch.int32)
        self.scale = torch.rand(*pair, case.N, device=device) + 0.5
        self.bias = torch.randn(case.N, device=device)
        self.x_scale = torch.rand(case.M, device=device) + 0.5
        self.x_zero = torch.randint(-99, 99, (case.M,), dtype=torch.int32, device=device)
        planes = codes if pair else codes.unsqueeze(0)
        # GPUs have no int32 product; float64 holds the sums exactly, and the kernel's float32 rounds them as here.
        self.sums = [(self.x.double() @ plane.double().T).float() for plane in planes]

    def run(self, tile: Tile) -> torch.Tensor:
        """The launch that is timed: everything per row, zero points, bias, 16-bit output."""
        return linear.launch(
            self.x, self.packed, self.scale, self.bias, self.x_scale, self.x_zero, None, torch.bfloat16,
            self.case.layout, tile, self.w_sum,
        )  # fmt: skip

    def exact(self, tile: Tile) -> bool:
        """Whether the integers are right: with unit scales they are the result, one plane of a pair at a time."""
        one, layout = torch.ones(1, device=self.x.device), self.case.layout
        scales = torch.eye(2, device=self.x.device).unsqueeze(-1) if layout == "split" else [one]
        for scale, sums in zip(scales, self.sums, strict=True):
            got = linear.launch(self.x, self.packed, scale, None, one, None, None, torch.float32, layout, tile)
            if not torch.equal(got, sums):
                return False
        return True


def gpu_timer(case: Case) -> Callable[[Tile], float]:
    """A function that gives the median microseconds of a tile; infinity for one that does not launch or is wrong."""
    from triton.runtime.errors import TritonError
    from triton.testing import do_bench

    inputs = Inputs(case, "cuda")

    def microseconds(tile: Tile) -> float:
        try:
            if not inputs.exact(tile):
                print(f"{case.op} {tile} gives wrong integers at M={case.M}, N={case.N}, K={case.K}", file=sys.stderr)
                return math.inf
            return 1000 * do_bench(lambda: inputs.run(tile), warmup=5, rep=20, return_mode="median")
        except TritonError:  # more shared memory or registers than there are
            return math.inf

    return microseconds


def fastest(tiles: Iterable[Tile], untuned: Tile, microseconds: Callable[[Tile], float]) -> dict[str, Any]:
    """The part of an entry that was measured; `untuned`, which would be used otherwise, is timed too, and wins ties.

    Raises:
        RuntimeError: no tile works.
    """
    times = {tile: microseconds(tile) for tile in dict.fromkeys((untuned, *tiles))}
    best = min(times, key=lambda tile: times[tile])
    if math.isinf(times[best]):
        raise RuntimeError(f"none of {len(times)} tiles works; the first is {untuned}")
    before = times[untuned]
    return {
        "tile": dataclasses.asdict(best),
        "us": round(times[best], 2),
        "untuned_us": None if math.isinf(before) else round(before, 2),
    }


# ---------------------------------------------------------------------------------------------------------- the run


def tune(
    cases: list[Case],
    measure: Callable[[Case], dict[str, Any]],
    output: Path,
    *,
    again: bool = False,
    deadline: float = math.inf,
    progress: Callable[[list[Case]], Iterable[Case]] = iter,
) -> int:
    """Measure what `output` lacks and save it after each case; entries for other cases stay in the file.

    Args:
        cases: what to measure.
        measure: case -> {"tile", "us", ...}, what is known of it but its key.
        output: the table.
        again: measure what is there, too.
        deadline: `time.monotonic()` after which no case is begun.
        progress: wraps the list of cases, as tqdm does.

    Returns:
        The number of cases measured.
    """
    table = configs.read(output)
    todo = [case for case in cases if again or table.get(_key(case), {}).get("source") != "tuned"]
    measured = 0
    for case in progress(todo):
        if time.monotonic() >= deadline:
            break
        key = {"op": case.op, "M": case.M, "N": case.N, "K": case.K}
        table[_key(case)] = {**key, **measure(case), "source": "tuned"}
        configs.save(output, table.values())
        measured += 1
    return measured


def _key(case: Case) -> configs.Key:
    return case.op, case.M, case.N, case.K


def report(cases: list[Case], output: Path) -> str:
    """What `output` holds of the cases, as a table."""
    table = configs.read(output)
    entries = [table[_key(case)] for case in cases if table.get(_key(case), {}).get("source") == "tuned"]
    lines = [f"{'op':14}  {'M':>5}  {'N':>5}  {'K':>5}  {'us':>9}  {'untuned us':>10}  tile"]
    for entry in entries:
        tile, before = configs.tile(Tile, entry), entry.get("untuned_us")
        lines.append(
            f"{entry['op']:14}  {entry['M']:5}  {entry['N']:5}  {entry['K']:5}  {entry['us']:9.2f}  "
            f"{'-' if before is None else f'{before:.2f}':>10}  {tile}"
        )
    return "\n".join(lines)


def _shape(text: str) -> tuple[int, int]:
    N, _, K = text.partition(",")
    if not (N.isdecimal() and K.isdecimal() and int(N) and int(K)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected N,K such as 3072,768")
    return int(N), int(K)


def _progress(cases: list[Case]) -> Iterable[Case]:
    try:
        return importlib.import_module("tqdm").tqdm(cases, unit="shape")
    except ImportError:
        return cases


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lowbit_kernels.tune", description="Time the linears' tiles on this GPU and keep the fastest."
    )
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=SHAPES, metavar="N,K", help="default: BERT-base and BERT-large"
    )
    # Fewer tokens take a kernel without tiles.
    tiled = [M for M in configs.BUCKETS if linear.SMALL_M < M]
    parser.add_argument("--tokens", nargs="+", type=int, choices=tiled, default=tiled, help="M; default: all")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--output", type=Path, help="table to write; default: the user's, which kernels consult first")
    families = sorted(path.stem for path in configs.SHIPPED.glob("*.json"))
    target.add_argument("--family", choices=families, help="write the package's own table of this name")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no shape after so many minutes")
    parser.add_argument("--again", action="store_true", help="measure what the table holds already, too")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Tune, print the table, return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if INTERPRET or not torch.cuda.is_available():
        reason = "TRITON_INTERPRET=1 runs kernels without one" if INTERPRET else "torch sees none"
        print(f"lowbit_kernels.tune times kernels on a CUDA device, and {reason}; nothing was tuned", file=sys.stderr)
        return 2
    device = torch.cuda.current_device()
    arch = configs.device_arch(torch.device("cuda", device))
    assert arch is not None  # it is a CUDA device
    name = torch.cuda.get_device_name(device)
    served = [path.stem for path in configs.shipped_tables(arch)]
    if options.family and options.family not in served:
        parser.error(f"--family {options.family}: {name} takes its tiles from {' and '.join(served)}")
    output = (
        configs.SHIPPED / f"{options.family}.json" if options.family else options.output or configs.user_table(arch)
    )
    try:
        configs.read(output)
    except (OSError, ValueError) as error:
        parser.error(f"{output} cannot be continued: {error}; delete it or name another with --output")
    shared = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    versions = {"device": name, "torch": torch.__version__, "triton": triton.__version__}

    def measure(case: Case) -> dict[str, Any]:
        untuned = configs.untuned(case.op, Tile, case.M, arch)
        return {**fastest(candidates(case, shared), untuned, gpu_timer(case)), **versions}

    cases = [
        Case(layout, N, K, M)
        for layout, (N, K), M in itertools.product(options.layout, options.shapes, sorted(set(options.tokens)))
    ]
    deadline = time.monotonic() + 60 * options.minutes
    try:
        measured = tune(cases, measure, output, again=options.again, deadline=deadline, progress=_progress)
    except KeyboardInterrupt:
        print(f"interrupted; {output} has what was measured, and the same command goes on from there", file=sys.stderr)
        return 130
    print(report(cases, output))
    print(f"{measured} shapes measured now, all that are in {output} shown")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
