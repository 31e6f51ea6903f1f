"""Folders for others: to the Hub, and with a modeling file that loads lowbit itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import card

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
MODULE = "modeling_lowbit"


def upload(
    folder: Path,
    files: set[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Commit these files of a folder to the Hub; not a model card where the repository has one.

    transformers' own upload would put an empty card in place of ours.

    Args:
        **options: of `HfApi.create_commit`: commit_message, commit_description, create_pr.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils.hub import hf_api

    api = hf_api()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    try:
        api.hf_hub_download(repo_id, card.FILE, revision=revision, token=token)
        files = files - {card.FILE}
    except EntryNotFoundError:
        pass
    options = {"commit_message": "Upload model", **{name: value for name, value in options.items() if value}}
    operations = [CommitOperationAdd(name, folder / name) for name in sorted(files) if (folder / name).is_file()]
    return api.create_commit(repo_id, operations, revision=revision, token=token, **options)


def add_modeling_file(model: PreTrainedModel, folder: Path) -> None:
    """Let a saved model load with `trust_remote_code=True` in programs that do not import lowbit."""
    (folder / f"{MODULE}.py").write_text(_modeling_file(model))
    path = folder / "config.json"
    auto_map = {auto: f"{MODULE}.{kind.__name__}" for auto, kind in _auto_classes(model).items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}, indent=2) + "\n")


def _auto_classes(model: PreTrainedModel) -> dict[str, type]:
    """Names of transformers' Auto classes -> the classes that they have for this architecture."""
    from transformers.models.auto import modeling_auto

    found: dict[str, type] = {}
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and type(model.config) in getattr(auto, "_model_mapping", {}):
            found[name] = auto._model_mapping[type(model.config)]
    if _home(type(model.config)) != "transformers":  # else AutoConfig knows it without us
        found["AutoConfig"] = type(model.config)
    return found


def _home(kind: type) -> str:
    """Where a class, or the one that it was made of by such a file, can be imported from."""
    modules = (base.__module__ for base in kind.__mro__ if base.__name__ == kind.__name__)
    module = next((each for each in modules if each.split(".")[0] != "transformers_modules"), kind.__module__)
    return "transformers" if module.startswith("transformers.") else module


def _modeling_file(model: PreTrainedModel) -> str:
    """Python source of classes that are transformers' own, but cannot be imported without registering lowbit."""
    homes = {kind.__name__: _home(kind) for kind in _auto_classes(model).values()}
    lines = ['"""Loads lowbit with the model (trust_remote_code=True); the classes are those of transformers."""', ""]
    lines += ["import lowbit  # noqa: F401", *(f"import {home}" for home in sorted({*homes.values()})), ""]
    for name in sorted(homes):
        lines += ["", f"class {name}({homes[name]}.{name}):", "    pass", ""]
    return "\n".join(lines)
