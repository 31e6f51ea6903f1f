"""Compile every Triton kernel of the package for four architectures and read the machine code; needs no GPU.

    python -m lowbit_kernels.aot [--arch 90] [--only linear]

One line a kernel and architecture: registers, spilled bytes, shared memory, instructions, products, and the mix of the
loop that holds them. Exit code 1 where a kernel spills, asks for more shared memory than the architecture has, or
multiplies without the instruction it should use: tensor cores for `tl.dot` (full float32 may do without), IDP for dp4a.
Spills that are known of one version of Triton (`KNOWN_SPILLS`) are shown and pass.
Each op file lists its kernels in `aot_cases(arch)`: (label, kernel, signature, constants, warps, stages), with Triton's
types; "i32:16" is an integer known to be a multiple of 16, which pointers always are.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MODULES = (
    "linear.gpu",
    "packing",
    "quantize.gpu",
    "weights.gpu",
    "split.gpu",
    "embedding.gpu",
    "layernorm.gpu",
    "fused_embedding.gpu",
    "varlen_attention.gpu",
    "varlen_attention.backward_gpu",
    "prune.gpu",
)

KIB = 1024
# Compute capability -> (shared memory of a block, SASS of its tensor-core products of int8 and of floats: any will do).
# On 100 Triton 3.6 and 3.7 make int8 products the warp-level IMMA of Ampere, later ones those of the fifth generation.
ARCHITECTURES = {
    80: (163 * KIB, ("IMMA",), ("HMMA",)),
    89: (99 * KIB, ("IMMA",), ("HMMA",)),
    90: (227 * KIB, ("IGMMA",), ("HGMMA",)),
    100: (227 * KIB, ("IMMA", "UTCIMMA"), ("UTCHMMA",)),
}

# Version of Triton -> kernel -> {compute capability: bytes that it spills}, as read by this gate. Slower there, not
# wrong, and not mended: tiles were chosen with Triton 3.7. More bytes, or another kernel or version, is a fault.
KNOWN_SPILLS: dict[str, dict[str, dict[int, int]]] = {
    "3.6": {
        "attention *fp32 D=64 up to 128, lse, bias": {80: 8},
        "attention *bf16 D=128 up to 512, lse, bias": {80: 8, 89: 16},
        "gradient of key *fp16 D=64 up to 128": {80: 16, 89: 16},
        "gradient of key *fp32 D=64 up to 128, 8 bits": {80: 200, 89: 168, 90: 168, 100: 216},
        "gradient of key *fp16 D=64 up to 128, bias": {80: 8},
        "gradient of query *fp32 D=128 up to 512, 4 bits asymmetric, bias": {80: 8},
        "gradient of key *fp32 D=128 up to 512, 4 bits asymmetric, bias": {80: 160, 89: 104, 90: 112, 100: 224},
        "gradient of query *fp16 D=64 up to 128, 8 bits": {100: 24},
    },
    "3.9": {
        "linear split 128x128x32 8w 3s": {100: 48},
        "linear split 128x128x32 8w 3s, odd N": {100: 40},
        "linear split 128x128x32 8w 3s to int8": {100: 40},
        "add_layernorm asymmetric *bf16 8192": {100: 8},
        "gradient of key *fp32 D=64 up to 128, 8 bits": {80: 8, 89: 128, 90: 248, 100: 840},
        "gradient of key *fp32 D=128 up to 512, bias": {80: 64},
        "gradient of query *fp16 D=16 up to 128, bias": {89: 8},
        "gradient of key *fp32 D=128 up to 512, 4 bits asymmetric, bias": {89: 56, 90: 184, 100: 720},
        "gradient of query *fp16 D=64 up to 128, 8 bits": {100: 8},
        "gradient of query *fp32 D=64 up to 128, 8 bits": {100: 8},
    },
}


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel on one architecture needs."""

    label: str
    arch: int
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int
    products: tuple[tuple[str, ...], ...]  # what each kind of product should become, any of them; none for full float32
    opcodes: dict[str, int]
    loop: dict[str, int]  # opcodes of the innermost loop with products
    known: int = 0  # bytes that it may spill with this Triton

    @property
    def multiplications(self) -> int:
        """Instructions that multiply."""
        return sum(self.opcodes.get(opcode, 0) for opcode in self.multiplying)

    @property
    def multiplying(self) -> tuple[str, ...]:
        """The opcodes of its products."""
        return tuple(opcode for either in self.products for opcode in either)

    def faults(self) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        limit = ARCHITECTURES[self.arch][0]
        found = []
        if self.spilled > self.known:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > limit:
            found.append(f"shared memory {self.shared} exceeds {limit}")
        missing = [either for either in self.products if not any(self.opcodes.get(opcode) for opcode in either)]
        return found + [f"no {' or '.join(either)} instruction" for either in missing]


def cases(archs: Iterable[int], only: str = "") -> list[tuple[str, int, int]]:
    """(module, index into its `aot_cases(arch)`, arch) of every kernel whose module name contains `only`."""
    names = [name for name in MODULES if only in name]
    return [(name, i, arch) for name in names for arch in archs for i in range(len(_aot_cases(name, arch)))]


def _aot_cases(module: str, arch: int) -> list[tuple]:
    return importlib.import_module(f"lowbit_kernels.{module}").aot_cases(arch)


def compile_case(module: str, index: int, arch: int) -> Compiled:
    """Compile one case and disassemble it.

    Raises:
        RuntimeError: with TRITON_INTERPRET=1, under which Triton compiles nothing.
    """
    label, kernel, signature, constants, warps, stages = _aot_cases(module, arch)[index]
    return compile_kernel(label, kernel, signature, constants, warps, stages, arch)


def compile_kernel(
    label: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, stages: int, arch: int
) -> Compiled:
    """The same for a case that is in no table (to try a tile, say).

    Constants that are no arguments of the kernel are options of the compiler, as in a launch.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    # As every launch says, and not as Triton's default is: that of 3.10 is no fusion.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    options |= {name: value for name, value in constants.items() if name not in names}
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: "constexpr" if name in constants else signature[name].split(":")[0] for name in names}
    aligned = [name for name in signature if signature[name].startswith("*") or signature[name].endswith(":16")]
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, listing = _disassemble(built.asm["cubin"])
    opcodes = Counter(opcode for _, opcode, _ in listing)
    products = _products(built.asm["ttir"], arch)
    return Compiled(
        label=label,
        arch=arch,
        registers=usage["REG"],
        # STACK holds frames without spills too (none of our kernels has one); LDL and STL are the spills themselves.
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=built.metadata.shared,
        products=products,
        opcodes=dict(opcodes),
        loop=dict(_loop(listing, products)),
        known=known_spill(label, arch, triton.__version__),
    )


def known_spill(label: str, arch: int, version: str) -> int:
    """Bytes that a kernel may spill with a version of Triton."""
    return KNOWN_SPILLS.get(".".join(version.split(".")[:2]), {}).get(label, {}).get(arch, 0)


def _products(ttir: str, arch: int) -> tuple[tuple[str, ...], ...]:
    """The instructions that the products in Triton's intermediate code should become."""
    dots = re.findall(r"tt\.dot (.*) : tensor<(\d+)x\d+x(\w+)> \*", ttir)
    found = set()
    for attributes, rows, dtype in dots:
        _, int8, floats = ARCHITECTURES[arch if int(rows) >= 64 else 80]  # the later instructions take 64 rows
        if dtype != "f32" or "tf32" in attributes:
            found.add(int8 if dtype == "i8" else floats)
    return tuple(sorted(found | ({("IDP",)} if "dp4a" in ttir else set())))


Listing = list[tuple[int, str, int | None]]  # address, opcode, target where it is a branch


def _disassemble(cubin: bytes) -> tuple[dict[str, int], Listing]:
    """(resource usage, instructions) of a cubin, by the cuobjdump that Triton ships."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", texts[0])}
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)([^;]*);")
    listing: Listing = []
    for address, opcode, operands in instruction.findall(texts[1]):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode == "BRA" else None
        listing.append((int(address, 16), opcode, int(target[1], 16) if target else None))
    return usage, listing


def _loop(listing: Listing, products: tuple[tuple[str, ...], ...]) -> Counter[str]:
    """Opcodes between the nearest backward branch and its target that enclose a product."""
    bodies = [
        Counter(opcode for place, opcode, _ in listing if target <= place <= address)
        for address, _, target in listing
        if target is not None and target < address
    ]
    with_product = (body for body in bodies if any(body[opcode] for either in products for opcode in either))
    return min(with_product, key=Counter.total, default=Counter())


def report(results: list[Compiled]) -> str:
    """The results as a table, faults at the end of the line."""
    width = max((len(result.label) for result in results), default=0)
    lines = [f"{'kernel':{width}}  arch  registers  spilled  shared  instructions  products  loop"]
    for result in results:
        faults = "; ".join(result.faults())
        known = "  spills, as is known of this Triton" if result.spilled and result.spilled <= result.known else ""
        lines.append(
            f"{result.label:{width}}  {result.arch:4}  {result.registers:9}  {result.spilled:7}  {result.shared:6}  "
            f"{sum(result.opcodes.values()):12}  {result.multiplications:8}  {_mix(result)}{known}"
            f"{'  FAULT: ' + faults if faults else ''}"
        )
    return "\n".join(lines)


def _mix(result: Compiled) -> str:
    """The loop in words: its length, products, what decodes weights (SHF LOP3 IADD PRMT), loads and stores of tiles."""
    if not result.loop:
        return ""
    shown = (*result.multiplying, "SHF", "LOP3", "IADD", "VIADD", "PRMT", "LDSM", "LDS", "STS", "LDGSTS", "LDG")
    parts = [f"{result.loop[opcode]} {opcode}" for opcode in shown if opcode in result.loop]
    return f"{sum(result.loop.values())}: {', '.join(parts)}"


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lowbit_kernels.aot", description="Check every compiled kernel.")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="only modules with this in their name")
    options = parser.parse_args(arguments)
    work = cases(options.arch or ARCHITECTURES, options.only)
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_case, *zip(*work, strict=True))) if work else []
    print(report(results))
    return 1 if any(result.faults() for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
