"""Time tiles of the linears on this machine's GPU and keep the fastest of each shape in a table (`configs`).

    python -m lowbit_kernels.tune [--layout ternary binary split] [--shapes N,K ..] [--tokens M ..]
                                  [--output FILE | --family NAME] [--minutes LIMIT] [--again]

By default: BERT-base and BERT-large, every bucket of M, most tokens first, into the user's table, which kernels consult
first from the next process on. Tiles are compiled ahead in as many processes as there are cores; each must give the
right numbers, and is timed as a node of a CUDA graph (the CPU needs longer to launch a small one than the device to run
it). The table is saved after every shape, and what it holds already is skipped: the command can be stopped at any time
and called again. Exit code 2 without a GPU.
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

from . import ahead, configs
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
    """Random arguments of one case on the device, and what the result must be.

    Per-row scales, zero points, bias and 16-bit output, as models have them. Scales are powers of two and the bias is
    integers, so that float32 holds every result, and float16 rounds it once: it is known to the bit.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        pair = (2,) if case.layout == "split" else ()
        codes = torch.randint(0, 2, (*pair, case.N, case.K), dtype=torch.int8, device=device) * 2 - 1
        if case.layout == "ternary":
            codes = torch.randint(-1, 2, codes.shape, dtype=torch.int8, device=device)
        self.x = torch.randint(-128, 128, (case.M, case.K), dtype=torch.int8, device=device)
        self.packed = pack_codes(codes, case.layout)
        self.w_sum = codes.sum(-1, dtype=torch.int32)
        self.scale = 2.0 ** torch.randint(-1, 2, (*pair, case.N), device=device)
        self.bias = torch.randint(-99, 100, (case.N,), device=device).float()
        self.x_scale = 2.0 ** torch.randint(-7, -5, (case.M,), device=device)  # float16 ends at 65504
        self.x_zero = torch.randint(-99, 99, (case.M,), dtype=torch.int32, device=device)
        planes, scales = (x if pair else x.unsqueeze(0) for x in (codes, self.scale))
        # GPUs have no int32 product; float64 holds the sums exactly.
        centred = self.x.double() - self.x_zero.double().unsqueeze(1)
        product = sum(centred @ plane.double().T * scale.double() for plane, scale in zip(planes, scales, strict=True))
        self.expected = (product * self.x_scale.double().unsqueeze(1) + self.bias.double()).to(torch.float16)

    def run(self, tile: Tile) -> torch.Tensor:
        """The launch that is timed, and checked: one binary serves both."""
        return linear.launch(
            self.x, self.packed, self.scale, self.bias, self.x_scale, self.x_zero, None, torch.float16,
            self.case.layout, tile, self.w_sum,
        )  # fmt: skip

    def right(self, tile: Tile) -> bool:
        """Whether the tile gives every result to the bit."""
        return torch.equal(self.run(tile), self.expected)


def gpu_timer(case: Case, compilers: ahead.Compilers, tiles: list[Tile]) -> Callable[[Tile], float]:
    """A function that gives the median microseconds of one of the tiles, which are compiled meanwhile.

    Infinity, and a line on stderr that says why, for one that does not compile or launch, or is wrong.
    """
    from triton.testing import do_bench_cudagraph

    inputs = Inputs(case, "cuda")
    compiled = {}
    for tile in tiles:
        with ahead.recording(compilers.arch) as binaries:
            inputs.run(tile)
        compiled[tile] = compilers.submit(binaries[-1])

    def microseconds(tile: Tile) -> float:
        try:
            compiled[tile].result()
            if not inputs.right(tile):
                raise ValueError("wrong numbers")
            return 1000 * do_bench_cudagraph(lambda: inputs.run(tile), rep=5, return_mode="median")
        except Exception as error:  # more shared memory or registers than there are, say
            torch.cuda.synchronize()  # raises where no tile can be timed after this one
            print(f"{case}, {tile} is left out: {type(error).__name__}: {error}", file=sys.stderr)
            return math.inf

    return microseconds


class TimeUp(Exception):
    """The deadline passed while a case was measured."""


def fastest(
    tiles: Iterable[Tile], untuned: Tile, microseconds: Callable[[Tile], float], deadline: float = math.inf
) -> dict[str, Any]:
    """The part of an entry that was measured; `untuned`, which would be used otherwise, is timed too, and wins ties.

    Raises:
        RuntimeError: no tile works.
        TimeUp: the deadline (`time.monotonic()`) passed before all were timed.
    """
    times = {}
    for tile in dict.fromkeys((untuned, *tiles)):
        if time.monotonic() >= deadline:
            raise TimeUp
        times[tile] = microseconds(tile)
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
        measure: case -> {"tile", "us", ...}, what is known of it but its key; TimeUp ends the run.
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
        try:
            found = measure(case)
        except TimeUp:
            break
        table[_key(case)] = {**key, **found, "source": "tuned"}
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
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so many minutes")
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
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    versions = {"device": name, "torch": torch.__version__, "triton": triton.__version__}

    compilers, deadline = ahead.Compilers(arch), time.monotonic() + 60 * options.minutes

    def measure(case: Case) -> dict[str, Any]:
        untuned = configs.untuned(case.op, Tile, case.M, arch)
        tiles = [untuned, *candidates(case, shared)]
        return {**fastest(tiles, untuned, gpu_timer(case, compilers, tiles), deadline), **versions}

    cases = [
        Case(layout, N, K, M)
        for M, layout, (N, K) in itertools.product(
            sorted(set(options.tokens), reverse=True), options.layout, options.shapes
        )
    ]
    try:
        measured = tune(cases, measure, output, again=options.again, deadline=deadline, progress=_progress)
    except KeyboardInterrupt:
        print(f"interrupted; {output} has what was measured, and the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        compilers.close()
    print(report(cases, output))
    print(f"{measured} shapes measured now, all that are in {output} shown")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
