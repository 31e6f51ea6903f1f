"""Checkpoints that a stage goes on from: the last one that was written to its end."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from . import log


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of `Trainer` in a folder, None where there is none.

    One that a killed process left half written is passed over, and said to be.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if (fault := _fault(path)) is None:
            return path
        log.warning("%s is damaged (%s): going on from the one before it, or from the stage's beginning", path, fault)
    return None


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; its last file to be written is trainer_state.json."""
    tensors = [*checkpoint.glob("*.safetensors")]
    if not any(path.name.startswith("model") for path in tensors):
        return "no model.safetensors"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in tensors:
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return " ".join(str(error).split())
    broken = [path.name for path in checkpoint.glob("*.pt") if not zipfile.is_zipfile(path)]
    return f"{broken[0]} is no whole file" if broken else None
