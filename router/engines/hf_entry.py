"""Keys of entries for models in safetensors: the folder, or the repository in the Hugging Face cache.

The kinds of engine that load such models share this.
"""

from __future__ import annotations

from pathlib import Path

from router.config.draft import Draft
from router.config.paths import wrong_with_anything
from router.config.problems import KeyPath
from router.config.schema import OfHfModel, System
from router.formats import hf_cache, hf_model
from router.formats.hf_model import HfModel, Unreadable
from router.memory.measurements import files_of
from router.memory.plan import Unusable

_SETTINGS = (hf_model.CONFIG, hf_model.TOKENIZER_CONFIG, *hf_model.TEMPLATES, "generation_config.json")
"""Files beside the weights that decide how a model is loaded and asked."""


def folder_of(draft: Draft, path: KeyPath, entry: OfHfModel, system: System) -> Path | None:
    """Return the folder of an entry's model. Notes what is wrong with it; None if there is none."""
    if (entry.model_path is None) == (entry.repo is None):
        draft.problem(path, "needs either model_path (a folder) or repo (USER/REPO in the Hugging Face cache)")
        return None
    if entry.model_path is not None:
        folder = draft.resolve(entry.model_path, Path(system.base_models_path))
        draft.check_file((*path, "model_path"), folder, _wrong_with_folder)
        return folder
    assert entry.repo is not None
    cache = cache_of(draft, entry)
    found = hf_cache.snapshot(cache, entry.repo) if cache is not None else None
    if found is None and draft.check_files:
        advice = f"`llama-router pull {entry.repo}` downloads it"
        draft.problem((*path, "repo"), f"{entry.repo} is not in the Hugging Face cache: {advice}")
    return found


def cache_of(draft: Draft, entry: OfHfModel) -> Path | None:
    """Return the Hugging Face cache that an entry's engine uses; None if there is none, or it is elsewhere."""
    return hf_cache.folder({**draft.environ, **entry.env}) if draft.is_for_here else None


def opened(folder: Path) -> HfModel | None:
    """Return the model of a folder; None if it cannot be read, which is reported when it is loaded."""
    try:
        return hf_model.read(folder)
    except (Unreadable, OSError):
        return None


def usable(folder: Path) -> HfModel:
    """Return the model of a folder for an engine that is to load it. Raises Unusable."""
    try:
        return hf_model.read(folder)
    except Unreadable as error:
        raise Unusable(str(error), "its files cannot be used") from error
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise Unusable(f"{error.filename or folder} {what}", f"its folder {what}") from error


def stamps(model: HfModel) -> tuple[tuple[str, int, int], ...]:
    """Return stamps of the files that decide how a model is loaded; none if they are gone."""
    settings = (model.folder / name for name in _SETTINGS)
    try:
        return files_of(*(file for file in settings if file.is_file()), *model.files)
    except OSError:
        return ()


def _wrong_with_folder(folder: Path) -> str:
    """Return why a folder holds no model in safetensors; empty if it may. Raises OSError."""
    if wrong := wrong_with_anything(folder):
        return wrong
    if not folder.is_dir():
        return f"{folder} is a file; name the folder with {hf_model.CONFIG} and the safetensors files"
    return "" if (folder / hf_model.CONFIG).exists() else f"{folder} has no {hf_model.CONFIG}"
