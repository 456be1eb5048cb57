"""Pipelines by name (bundled, a folder, a Hub repository), and back to a folder or to the Hub."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from featinv_diffusion.backbones.base import without_progress_bars
from featinv_diffusion.diffusion.featinv_pipeline import OWN_PATH, FeatInvPipeline, check_scheduler
from featinv_diffusion.diffusion.folders import (
    CARD,
    CERTAINTY_FILE,
    SCOPE_FILE,
    CardInfo,
    bundled_folder,
    check_backbone,
    check_pipeline_folder,
    feature_spec_of,
    list_bundled,
    load_bundled,
    load_folder,
    read_card_info,
    write_model_card,
)
from featinv_diffusion.errors import (
    UNREACHABLE,
    InputError,
    choices_hint,
    is_unreachable,
    reason_of,
    what_is_at,
)
from featinv_diffusion.files import new_folder
from featinv_diffusion.schema import read_text

BUNDLED_FAMILIES = ("tiny",)
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Neither code nor pickles: the installed classes read these files.
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "README.md"]
PICKLES = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"}
# What a failed request to the Hub raises: HTTP errors, no connection, offline mode, no cache.
HUB_ERRORS = (hub_errors.HTTPError, OSError)


def load_pipeline(
    name_or_path: str | Path, *, torch_dtype: torch.dtype | None = None
) -> FeatInvPipeline:
    """Loads a pipeline with the installed code; code in folders and repositories is not executed.

    Args:
        name_or_path: a name of `list_bundled`, a folder, or a Hub repository.
        torch_dtype: number format of all parts; None is float32, whatever the files hold.

    Raises:
        InputError: nothing by that name, a file missing or truncated, parts that do not fit.
    """
    name, dtype = str(name_or_path), torch_dtype or torch.float32
    with without_progress_bars():
        if name in list_bundled():
            pipeline = load_bundled(name, dtype)
        else:
            pipeline = load_folder(_find_folder(name), dtype)
    try:
        check_scheduler(pipeline.scheduler)
    except ValueError as error:
        raise InputError(f"The pipeline {name} cannot sample: {error}") from None
    spec = feature_spec_of(pipeline.controlnet)
    if spec is not None and hasattr(pipeline.backbone, "timm_model"):
        check_backbone(pipeline.backbone, spec)
    return pipeline


def find_scope_file(name_or_path: str | Path) -> Path | None:
    """Returns the statistics of natural maps that a pipeline comes with; None where it has none.

    Args:
        name_or_path: a pipeline that was loaded before; nothing is downloaded.
    """
    return _find_beside(name_or_path, SCOPE_FILE)


def find_certainty_file(name_or_path: str | Path) -> Path | None:
    """As `find_scope_file`, of the calibration of certainty."""
    return _find_beside(name_or_path, CERTAINTY_FILE)


def _find_beside(name_or_path: str | Path, file: str) -> Path | None:
    name = str(name_or_path)
    if name in list_bundled():
        folder = bundled_folder(name)
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        folder = Path(snapshot_download(name, local_files_only=True))
    path = folder / file
    return path if path.is_file() else None


def export_pipeline(
    pipeline: FeatInvPipeline, folder: str | Path, info: CardInfo, scope: Path | None = None
) -> Path:
    """Writes a pipeline folder with its code and a model card, whole or not at all.

    Args:
        scope: statistics of natural maps that go with it, see `find_scope_file`.

    Raises:
        InputError: the folder exists and is not empty, or the disk refuses (full, read-only).
    """
    folder = Path(folder)
    check_target(folder)
    if folder.is_dir():
        folder.rmdir()
    with new_folder(folder) as partial, without_progress_bars():
        pipeline.save_pretrained(partial)
        if scope is not None:
            shutil.copyfile(scope, partial / SCOPE_FILE)
        write_model_card(partial, pipeline, info, folder.name)
    return folder


def check_target(folder: Path) -> None:
    """Raises `InputError` unless the folder is empty or not there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} must be a new or empty folder, but something is there. Remove it, or name "
            "another folder."
        )


def origin_of(source: str | Path, command: str, pipeline: FeatInvPipeline) -> CardInfo:
    """Returns what a model card says of a pipeline made from `source`: license, base models, notes.

    Args:
        source: a name of `list_bundled`, a folder (its own card is read), or a Hub repository.
    """
    folder = bundled_folder(str(source)) if source in list_bundled() else Path(source)
    if not folder.is_dir():
        info = CardInfo(command, base_models=[str(source)])
    else:
        info = read_card_info(folder, command)
    config = getattr(getattr(pipeline.backbone, "config", None), "pretrained_cfg", None) or {}
    models = [*info.base_models, *([config["hf_hub_id"]] if config.get("hf_hub_id") else [])]
    return replace(info, base_models=list(dict.fromkeys(models)))


def push_folder(
    folder: str | Path, repo: str, *, private: bool = False, dry_run: bool = False
) -> list[tuple[str, int]]:
    """Uploads a pipeline folder that loads, and returns its files with their sizes in bytes.

    Args:
        repo: `user/name`; it is created where it does not exist.
        dry_run: check everything that needs no network, and upload nothing.

    Raises:
        InputError: the folder does not load or holds pickles, no such user, no right, no network.
    """
    folder = Path(folder)
    _check_repo_name(repo)
    check_pipeline_folder(folder)
    files = _list_files(folder)
    _check_card(folder)
    load_pipeline(folder.absolute())
    if not dry_run:
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[name for name, _ in files],
                commit_message="Upload FeatInvPipeline",
            )
        except HUB_ERRORS as error:
            raise InputError(_explain(error, repo, "be written to")) from error
    return files


def _find_folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    bundled = choices_hint(name, list_bundled())
    if name.partition("/")[0] in BUNDLED_FAMILIES:
        raise InputError(f"No bundled pipeline is named {name!r}; {bundled}")
    if path.exists() or not REPO.fullmatch(name):
        what = what_is_at(name)
        raise InputError(
            "A pipeline must be a bundled name, a folder or a Hub repository user/name, but there "
            f"is {what} at {name!r}; {bundled}"
        )
    return _download(name)


def _download(repo: str) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=DOWNLOADED))
    except HUB_ERRORS as error:
        raise InputError(_explain(error, repo, "be downloaded")) from error


def _check_repo_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except hub_errors.HFValidationError as error:
        raise InputError(f"A Hub repository must be named user/name: {error}") from None
    if "/" not in repo:
        raise InputError(f"A Hub repository must be named user/name, got {repo!r}.")


def _list_files(folder: Path) -> list[tuple[str, int]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder) for path in found]
    pickles = [str(name) for name in names if name.suffix in PICKLES]
    if pickles:
        raise InputError(
            f"A pipeline folder must hold safetensors only, but has {', '.join(pickles)}. "
            "Pickles can run code when they are loaded; remove them."
        )
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [(name.as_posix(), (folder / name).stat().st_size) for name in shown]


def _check_card(folder: Path) -> None:
    """Raises `InputError` for a card with broken metadata, code, or paths of this machine."""
    read_card_info(folder, "")
    text = read_text(folder / CARD) if (folder / CARD).is_file() else ""
    if path := OWN_PATH.search(text):
        raise InputError(
            f"{folder / CARD} must hold no paths of this machine, but names {path[0]!r}. Remove "
            "it, or export the pipeline again."
        )
    if found := re.search(r"<\s*[A-Za-z/!][^>]*>", re.sub(r"(?s)```.*?```|`[^`\n]*`", "", text)):
        raise InputError(
            f"{folder / CARD} must hold no HTML, but has {found[0][:80]!r}. Remove it, or export "
            "the pipeline again."
        )


def _explain(error: Exception, repo: str, purpose: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.GatedRepoError):
        return f"The Hub repository {repo} is gated: accept its terms on its page, then log in."
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f"The Hub has no repository {repo} that you may see. Check the name; if it is private, "
            "log in with `hf auth login`."
        )
    if status in (401, 403):
        return (
            f"The Hub repository {repo} could not {purpose}: the Hub refused (status {status}). "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may do this."
        )
    reason = UNREACHABLE if is_unreachable(error) else reason_of(error)
    return f"The Hub repository {repo} could not {purpose}: {reason}."
