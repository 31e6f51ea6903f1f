"""The CPU kernels of `native/`, in C++ for AVX-512: compiled when first used, kept in the user's cache folder.

    amx     int8 matrix instructions (Sapphire Rapids and newer)
    vnni    int8 dot products (Cascade Lake, Zen 4 and newer)
    torch   none of these: other processors, no C++ compiler; the ops then run on torch's own int8 product

$LOWBIT_CPU names one of them; without, the first that runs here is taken. They take float32 and share torch's threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .configs import cache_dir

KINDS = ("amx", "vnni", "torch")

_SOURCES = Path(__file__).parent / "native"
_FLAGS = [
    # Hidden: what api.cpp does not export is inlined where that pays, and called directly.
    *("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    # Every rounding is as written: codes have to be the same bytes as the other backends'.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mprefer-vector-width=512"),
]
_KIND_FLAGS = {"amx": ["-mamx-tile", "-mamx-int8"], "vnni": []}
_NEEDS = {
    "vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"},
    "amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "amx_tile", "amx_int8"},
}
_pointer, _size, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Product(ctypes.Structure):
    """`Product` of native/linear.h."""

    _fields_ = (
        ("packed", _pointer),
        ("row_bytes", _size),
        ("N", _size),
        ("scale", _pointer),
        ("w_sum", _pointer),
        ("bias", _pointer),
    )


class Norm(ctypes.Structure):
    """`Norm` of native/tokens.h."""

    _fields_ = (("weight", _pointer), ("bias", _pointer), ("eps", ctypes.c_float))


class Ids(ctypes.Structure):
    """`Ids` of native/embedding.h."""

    _fields_ = (("ids", _pointer), ("count", _size), ("rows", _size))


class Embeddings(ctypes.Structure):
    """`Embeddings` of native/embedding.h."""

    _fields_ = (
        ("words", Ids),
        ("types", Ids),
        ("positions", Ids),
        ("packed", _pointer),
        ("row_bytes", _size),
        ("K", _size),
        ("bits", _int),
        ("scale", _pointer),
        ("second", _pointer),
        ("scale_stride", _size),
        ("type_table", _pointer),
        ("position_table", _pointer),
    )


class Attention(ctypes.Structure):
    """`Attention` of native/attention.h."""

    _fields_ = (
        ("query", _pointer),
        ("key", _pointer),
        ("value", _pointer),
        ("query_stride", _size),
        ("key_stride", _size),
        ("value_stride", _size),
        ("T", _size),
        ("H", _size),
        ("D", _size),
        ("queries", _size),
        ("scaling", ctypes.c_float),
        ("bits", _int),
        ("probs_symmetric", ctypes.c_bool),
        ("bias", _pointer),
        ("bias_head", _size),
        ("bias_query", _size),
        ("bias_key", _size),
        ("out", _pointer),
        ("lse", _pointer),
        ("importance", _pointer),
        ("first_query_only", ctypes.c_bool),
    )


class Rest(ctypes.Structure):
    """`Rest` of native/layer.h."""

    _fields_ = (
        ("H", _size),
        ("C", _size),
        ("attention_output", Product),
        ("ffn_input", Product),
        ("ffn_output", Product),
        ("attention_norm", Norm),
        ("ffn_norm", Norm),
        ("layout", _int),
        ("activation", _int),
        ("bits", _int),
        ("ffn_symmetric", ctypes.c_bool),
    )


class Layer(ctypes.Structure):
    """`Layer` of native/layer.h."""

    _fields_ = (("projections", Product * 3), ("rest", Rest))


_ARGUMENTS = {
    "quantize": [_pointer, _size, _size, _int, *[_pointer] * 3],
    "add_layernorm": [_pointer, _pointer, _size, _size, ctypes.POINTER(Norm), _int, *[_pointer] * 4],
    "embedding_layernorm": [ctypes.POINTER(Embeddings), _size, ctypes.POINTER(Norm), _int, *[_pointer] * 4],
    "linears": [
        *(_pointer, _size, _size, _pointer, _size, _pointer, ctypes.POINTER(Product), _int, _int),
        *(_pointer, _size),
    ],
    "dynamic_linears": [
        *(_pointer, _size, _size, _int, ctypes.c_bool, ctypes.POINTER(Product), _int, _int, _pointer, _size),
    ],
    "attention": [ctypes.POINTER(Attention), _pointer, _size],
    "attention_half": [
        *(_pointer, _size, _pointer, _pointer, ctypes.POINTER(Product), _int, _int),
        *(ctypes.POINTER(Attention), _pointer, _size),
    ],
    "rest": [ctypes.POINTER(Rest), _pointer, _pointer, _size, *[_pointer] * 4],
    "layers": [ctypes.POINTER(Layer), _int, ctypes.c_bool, ctypes.POINTER(Attention), _pointer, _size, *[_pointer] * 8],
}

logger = logging.getLogger("lowbit")


def cpp_compiler() -> tuple[str, str | None]:
    """The C++ compiler, the one that Inductor takes: $CXX, else g++; and its path (None: not there)."""
    name = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    return name, shutil.which(name)


@functools.cache
def _processor() -> frozenset[str]:
    """Instruction sets that the processor has and the system lets us use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _build(kind: str, compiler: str) -> Path:
    """The shared library, compiled unless the cache folder has it.

    Its name ends in a digest of its content: to load a truncated one would kill the process.
    """
    sources = sorted(_SOURCES.iterdir())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    flags = [*_FLAGS, *_KIND_FLAGS[kind]]
    key = _digest("\0".join([version, *flags, *(path.read_text() for path in sources)]).encode())
    folder = cache_dir()
    for path in folder.glob(f"cpu_{kind}_{key}_*.so"):
        if path.stem.endswith(_digest(path.read_bytes())):
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=folder) as aside:
        library = Path(aside) / "library.so"
        units = [str(path) for path in sources if path.suffix == ".cpp"]
        command = [compiler, *flags, *units, "-o", str(library)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        target = folder / f"cpu_{kind}_{key}_{_digest(library.read_bytes())}.so"
        os.replace(library, target)
    return target


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def load(kind: str) -> ctypes.CDLL:
    """The kernels of one kind.

    Raises:
        RuntimeError: this machine cannot build or run them; says why.
    """
    missing = sorted(_NEEDS[kind] - _processor())
    if missing:
        raise RuntimeError(f"the processor has no {', '.join(missing)}")
    name, compiler = cpp_compiler()
    if compiler is None:
        raise RuntimeError(f"no C++ compiler {name!r} (install g++, or name another in CXX)")
    try:
        library = ctypes.CDLL(str(_build(kind, compiler)))
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{name} failed: {error.stderr[-2000:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from error
    for function, arguments in _ARGUMENTS.items():
        getattr(library, f"lowbit_{function}").argtypes = arguments
        getattr(library, f"lowbit_{function}").restype = None
    library.lowbit_embedding_layernorm.restype = _int
    if library.lowbit_start() != 0:
        raise RuntimeError("the system does not let this process use the matrix instructions")
    return library


@functools.cache
def chosen() -> tuple[str, str]:
    """(kind of the kernels that CPU tensors take, why no better one).

    Raises:
        ValueError: $LOWBIT_CPU names no kind.
        RuntimeError: $LOWBIT_CPU names a kind that does not run here.
    """
    wanted = os.environ.get("LOWBIT_CPU", "")
    if wanted and wanted not in KINDS:
        raise ValueError(f"LOWBIT_CPU={wanted!r}, accepted: {', '.join(KINDS)}")
    reasons = []
    for kind in KINDS[:-1]:
        if wanted in ("", kind):
            try:
                load(kind)
            except RuntimeError as error:
                if wanted:
                    raise RuntimeError(f"LOWBIT_CPU={wanted}: {error}") from error
                reasons.append(f"{kind}: {error}")
            else:
                return kind, "; ".join(reasons)
    if not wanted:
        logger.info("CPU kernels fall back to torch's int8 product: %s", "; ".join(reasons))
    return "torch", "; ".join(reasons) or "LOWBIT_CPU=torch"


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether CPU tensors take the kernels of this module."""
    return chosen()[0] != "torch"


def function(name: str) -> Callable[..., Any]:
    """A kernel of the chosen kind; only where `available()`."""
    torch.get_num_threads()  # hands `torch.set_num_threads` on to OpenMP in a Python thread that is new to torch
    return getattr(load(chosen()[0]), f"lowbit_{name}")


def norm(weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
    """Parameters float32 [K], contiguous, of a LayerNorm."""
    return Norm(weight.data_ptr(), bias.data_ptr(), eps)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """What a kernel takes for a tensor, contiguous or with its strides; None for one without elements."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None
