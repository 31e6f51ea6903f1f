"""What is beside a model in its folder: files of tokenizers, pipelines and people, copied with a model made from it."""

from __future__ import annotations

import logging
import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from .folders import part_of, sentence_modules

_log = logging.getLogger("lowbit")

_WRITTEN_ANEW = ("config.json", "README.md")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tf_model*", "flax_model*", "*.h5",
            "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.ckpt*", "openvino_*.xml",
            "openvino_*.bin")  # fmt: skip
_TRAINING = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin",
             "events.out.tfevents*")  # fmt: skip
_FOLDERS = ("checkpoint-*", "runs", "onnx", "openvino")
_NOBODYS = (".git*", ".cache", ".saving-*")


def files_beside(folder: Path, out: Path) -> list[Path]:
    """Paths inside `folder` of all that `copy` is to take along when a model made from it is saved in `out`.

    Not weights in any format, training state, exports for other runtimes, or folders that are checkpoints themselves;
    but what modules.json names is taken whole. Links are followed only where they stay in the folder (or in the Hub's
    cache that it is a part of); what they are else is named in a warning. Nothing is opened.

    Raises:
        ValueError: a modules.json that is damaged, or leads out of the folder.
    """
    own = Path(part_of(folder))
    modules = [path for path in map(Path, sentence_modules(folder)) if path not in (Path(), own)]
    found: list[Path] = []
    left: list[Path] = []
    for here, folders, files in os.walk(folder):
        inside = Path(here).relative_to(folder)
        whole = any(path == inside or path in inside.parents for path in modules)
        links = [name for name in folders if (Path(here) / name).is_symlink()]  # `walk` goes into none
        left += [inside / name for name in links if not _matches(name, (*_NOBODYS, *_FOLDERS))]
        folders[:] = [
            name
            for name in sorted(set(folders) - set(links))
            if not _matches(name, _NOBODYS)
            and (Path(here) / name).resolve() != out.resolve()
            and (whole or _wanted(folder, inside / name, [own, *modules]))
        ]
        for name in sorted(files):
            if _matches(name, _NOBODYS) or (not whole and _matches(name, (*_WEIGHTS, *_TRAINING))):
                continue
            if (inside == own and name in _WRITTEN_ANEW) or (inside == Path() and name == "README.md"):
                continue
            (found if _may_be_read(folder, Path(here) / name) else left).append(inside / name)
    if left:
        _log.warning(
            "not copied, since links lead out of %s or they are no files: %s", folder, ", ".join(map(str, left))
        )
    return found


def copy(folder: Path, files: list[Path], out: Path) -> None:
    """Copy these files of a folder, and its folders of modules, which may be empty."""
    for name in sentence_modules(folder):
        if (folder / name).is_dir():
            (out / name).mkdir(parents=True, exist_ok=True)
    for file in files:
        target = out / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink()
        shutil.copyfile(folder / file, target)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _wanted(root: Path, inside: Path, modules: list[Path]) -> bool:
    """Whether a folder is a module's, or on the way to one, or neither an export nor a checkpoint itself."""
    if any(inside == path or inside in path.parents for path in modules):
        return True
    folder = root / inside
    names = set(os.listdir(folder))
    a_checkpoint = "modules.json" in names or (
        "config.json" in names and any(_matches(name, _WEIGHTS) for name in names)
    )
    return not _matches(inside.name, _FOLDERS) and not a_checkpoint


def _may_be_read(root: Path, file: Path) -> bool:
    """Whether it is a file, and of this folder; the Hub's cache keeps the content of files in folders of its own."""
    # Unlike `resolve`, `realpath` takes links in a circle.
    root, target = root.resolve(), Path(os.path.realpath(file))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    return target.is_file() and any(target.is_relative_to(folder) for folder in allowed)
