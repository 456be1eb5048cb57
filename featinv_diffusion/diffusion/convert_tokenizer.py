"""The CLIP tokenizer, which no checkpoint holds: from a folder, the cache or the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CLIPTextModel, CLIPTokenizer

from featinv_diffusion.diffusion.pipeline_folder import TOKENIZER_FILES
from featinv_diffusion.errors import InputError

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
"""The one that the original code names."""

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def load_tokenizer(name: str, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    """Loads the CLIP tokenizer that belongs to a text encoder.

    Args:
        name: a folder or Hub repository with the tokenizer's files in it or in its `tokenizer`.

    Raises:
        InputError: no tokenizer there, or not the text encoder's.
    """
    folder = Path(name) if Path(name).is_dir() else _download(name)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    # Of a folder without these files transformers makes an empty tokenizer, and says nothing.
    if not any(all((folder / f).is_file() for f in files) for files in TOKENIZER_FILES):
        raise _not_found(name, "has no tokenizer.json, nor vocab.json with merges.txt")
    config = text_encoder.config
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"The tokenizer must have the {config.vocab_size} tokens of the checkpoint's text "
            f"encoder, but {name!r} has {len(tokenizer)}. Pass the one it was trained with as "
            "--tokenizer."
        )
    return tokenizer


def _download(name: str) -> Path:
    files = [*SETTINGS_FILES, *(file for group in TOKENIZER_FILES for file in group)]
    patterns = [f"{folder}{file}" for folder in ("", "tokenizer/") for file in files]
    try:
        try:
            folder = snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        except LocalEntryNotFoundError:
            folder = snapshot_download(name, allow_patterns=patterns)
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _not_found(name, f"cannot be had ({str(error).splitlines()[0]})") from error
    return Path(folder)


def _not_found(name: str, problem: str) -> InputError:
    return InputError(
        f"No checkpoint holds its tokenizer, and the folder or Hub repository {name!r} {problem}. "
        "Pass the tokenizer folder of any Stable Diffusion 1.x model as --tokenizer, or "
        "--no-tokenizer: the pipeline then takes prompt_embeds only."
    )
