"""The CPU kernels of `native/`, in C++ for AVX-512: compiled when first used, kept in the user's cache folder.

    amx     int8 matrix instructions (Sapphire Rapids and newer)
    vnni    int8 dot products (Cascade Lake, Zen 4 and newer)
    torch   none of these: other processors, no C++ compiler; the ops then run on torch's own int8 product

$LOWBIT_CPU names one of them; without, the first that runs here is taken. They take float32 and share torch's threads.
Where a processor that has the instructions does without these kernels, a warning says so when they are first asked for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import textwrap
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
_TIMEOUT = 300  # seconds of compiling, which takes about ten
_CAPTURED: Any = {"capture_output": True, "text": True, "errors": "replace", "check": True}
OTHER_FOLDER = "set LOWBIT_CACHE_DIR to a folder that you may write, others may not, and that is not mounted noexec"
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
        ("offset", _pointer),
        ("layout", _size),
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
        *(_pointer, _size, _size, _pointer, _size, _pointer, ctypes.POINTER(Product), _int),
        *(_pointer, _size),
    ],
    "dynamic_linears": [
        *(_pointer, _size, _size, _int, ctypes.c_bool, ctypes.POINTER(Product), _int, _pointer, _size),
    ],
    "attention": [ctypes.POINTER(Attention), _pointer, _size],
    "attention_half": [
        *(_pointer, _size, _pointer, _pointer, ctypes.POINTER(Product), _int),
        *(ctypes.POINTER(Attention), _pointer, _size),
    ],
    "rest": [ctypes.POINTER(Rest), _pointer, _pointer, _size, *[_pointer] * 4],
    "layers": [ctypes.POINTER(Layer), _int, ctypes.c_bool, ctypes.POINTER(Attention), _pointer, _size, *[_pointer] * 8],
}

logger = logging.getLogger("lowbit")


def cpp_compiler() -> tuple[str, list[str]]:
    """The C++ compiler: $CXX, else g++, as it was given; and as a command (empty: not there).

    $CXX may have several words, as in a shell and in make: "ccache g++", "clang++ -stdlib=libc++".
    """
    given = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    if path := shutil.which(given):  # first, for a path with spaces that has no quotes
        return given, [path]
    try:
        words = shlex.split(given)
    except ValueError:  # a quote that does not end
        words = []
    path = shutil.which(words[0]) if words else None
    return given, [path, *words[1:]] if path else []


@functools.cache
def _processor() -> frozenset[str]:
    """Instruction sets that the processor has and the system lets us use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


class Kernels(ctypes.CDLL):
    """A loaded library."""

    not_kept = ""  # why the cache folder does not hold it, for users


def _library(kind: str, compiler: list[str]) -> Kernels:
    """The shared library out of the cache folder, compiled unless it is there.

    Where that folder cannot be used, out of one that only this process knows, for as long as loading takes.
    """
    sources = sorted(_SOURCES.iterdir())
    version = subprocess.run([*compiler, "--version"], **_CAPTURED, timeout=60).stdout
    flags = [*compiler[1:], *_FLAGS, *_KIND_FLAGS[kind]]
    key = _digest("\0".join([version, *flags, *(path.read_text(encoding="utf-8") for path in sources)]).encode())
    folder, name = cache_dir(), f"cpu_{kind}_{key}"
    problem = ""
    try:
        _check_ours(folder)
        if kept := _kept(folder, name):
            return Kernels(str(kept))
    except OSError as error:
        problem = error.strerror or str(error)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as private:
        compiled = Path(private) / "library.so"
        units = [str(path) for path in sources if path.suffix == ".cpp"]
        command = [compiler[0], *flags, *units, "-o", str(compiled)]
        subprocess.run(command, **_CAPTURED, timeout=_TIMEOUT)
        if not problem:
            try:
                return Kernels(str(_keep(compiled, folder, name)))
            except OSError as error:
                problem = error.strerror or str(error)
        try:
            library = Kernels(str(compiled))
        except OSError as error:
            raise OSError(f"nowhere to load a library from ({OTHER_FOLDER}): {folder}: {problem}; {error}") from error
    library.not_kept = (
        f"lowbit's CPU kernels cannot be kept in {folder} ({problem}), so every process compiles them again, for some "
        f"seconds: {OTHER_FOLDER}"
    )
    return library


def _check_ours(folder: Path) -> None:
    """Create the folder where there is none; OSError where others write, since what they write would be executed."""
    if folder.parts[:1] == ("~",):
        raise OSError("there is no home folder")
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid not in (0, os.getuid()):
        raise OSError("it belongs to another user")
    # A user's main group has nobody else in it, where umask 002 makes folders that the group may write.
    by_others = stat.S_IWOTH if found.st_gid == os.getgid() else stat.S_IWOTH | stat.S_IWGRP
    if found.st_mode & by_others:
        raise OSError("others may write there")


def _kept(folder: Path, name: str) -> Path | None:
    """A library of this name, which ends in a digest of its content: to load a truncated one would kill the process."""
    return next((p for p in folder.glob(f"{name}_*.so") if p.stem.endswith(_digest(p.read_bytes()))), None)


def _keep(library: Path, folder: Path, name: str) -> Path:
    """Copy a library into the folder: aside, then renamed."""
    target = folder / f"{name}_{_digest(library.read_bytes())}.so"
    with tempfile.TemporaryDirectory(prefix=".storing-", dir=folder) as aside:
        os.replace(shutil.copy(library, aside), target)
    return target


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def load(kind: str) -> Kernels:
    """The kernels of one kind.

    Raises:
        RuntimeError: this machine cannot build or run them; says why.
    """
    missing = sorted(_NEEDS[kind] - _processor())
    if missing:
        raise RuntimeError(f"the processor has no {', '.join(missing)}")
    name, compiler = cpp_compiler()
    if not compiler:
        raise RuntimeError(f"no C++ compiler {name!r} (install g++, or name another in CXX)")
    try:
        library = _library(kind, compiler)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip()[:2000] or f"exit code {error.returncode}"
        raise RuntimeError(f"{name} failed (mend what it says, or name another in CXX): {said}") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{name} took more than {error.timeout:.0f} s (try again on an idle machine)") from error
    except OSError as error:
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
    """(kind of the kernels that CPU tensors take, why no better one and what to do about it).

    What a user can mend is a warning too, once a process: slow products, a cache folder of no use.

    Raises:
        ValueError: $LOWBIT_CPU names no kind.
        RuntimeError: $LOWBIT_CPU names a kind that does not run here.
    """
    wanted = os.environ.get("LOWBIT_CPU", "")
    if wanted and wanted not in KINDS:
        raise ValueError(f"LOWBIT_CPU={wanted!r}, accepted: {', '.join(KINDS)}")
    reasons = {}
    for kind in KINDS[:-1]:
        if wanted in ("", kind):
            try:
                library = load(kind)
            except RuntimeError as error:
                if wanted:
                    raise RuntimeError(f"LOWBIT_CPU={wanted}: {error}") from error
                reasons[kind] = textwrap.shorten(str(error), 500)  # what a failing compiler says has many lines
            else:
                if library.not_kept:
                    _warn_once("not kept", library.not_kept)
                    return kind, "; ".join([*_named(reasons), library.not_kept])
                return kind, "; ".join(_named(reasons))
    if wanted:
        return "torch", "LOWBIT_CPU=torch"
    could = [reason for kind, reason in reasons.items() if _NEEDS[kind] <= _processor()]
    if not could:
        logger.info("CPU kernels fall back to torch's int8 product: %s", "; ".join(_named(reasons)))
        return "torch", "; ".join(_named(reasons))
    why = (
        "slow products: this processor has the instructions of lowbit's CPU kernels, but "
        f"{'; '.join(dict.fromkeys(could))}. Until that is mended (`lowbit doctor` tells) torch's int8 products run; "
        "LOWBIT_CPU=torch asks for them"
    )
    _warn_once("slow", why)
    return "torch", why


def _named(reasons: dict[str, str]) -> list[str]:
    return [f"{kind}: {reason}" for kind, reason in reasons.items()]


_warned: dict[str, str] = {}


def _warn_once(topic: str, words: str) -> None:
    """A warning that a process sees once, also where threads come to it together."""
    if _warned.setdefault(topic, words) is words:
        logger.warning(words)


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
