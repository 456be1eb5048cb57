"""Files that travel are data: read as JSON or YAML, held against a schema, and never evaluated.

A schema is a dataclass, a `TypedDict` or any other type that msgspec converts to; limits stand in
its annotations (`Annotated[int, Meta(ge=1)]`) or are checked by its `__post_init__`. A union of a
number with limits and a tuple of fixed length crashes msgspec 0.22; take a list with limits there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from featinv_diffusion.errors import InputError, what_is_at

T = TypeVar("T")

MAX_TEXT = 64 << 20
"""Bytes of a file of JSON or YAML; a larger one holds something else."""


def read_json(path: Path, kind: Any = Any, advice: str = "") -> Any:
    """Reads a JSON file and holds it against a schema.

    Args:
        kind: what it must hold.
        advice: what to do about a file that does not, a sentence.

    Raises:
        InputError: no such file, no JSON, or a value that the schema refuses; says which field,
            what must hold, and what was found.
    """
    return parse_json(read_text(path, advice), kind, str(path), advice)


def parse_json(text: str | bytes, kind: Any, source: str, advice: str = "") -> Any:
    """Reads JSON text; see `read_json`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(_join(f"{source} must hold JSON, but {reason}.", advice)) from None
    return convert(content, kind, source, advice)


def parse_yaml(text: str | bytes, source: str, advice: str = "") -> Any:
    """Reads YAML text of plain values.

    Raises:
        InputError: no YAML, tags of other programs, or aliases that repeat what they stand for.
    """
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):  # a few lines of them fill any memory
                raise InputError(_join(f"{source} must hold YAML without aliases (*).", advice))
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            _join(f"{source} must hold YAML, but does not: {reason}.", advice)
        ) from None


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, which YAML 1.1 does not, and leaves dates as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(content: Any) -> str:
    """Returns plain values as YAML, in their order and without aliases."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def convert(content: Any, kind: type[T] | Any, source: str, advice: str = "") -> T:
    """Holds plain values against a schema and returns them as it says.

    Raises:
        InputError: a value that it refuses.
    """
    try:
        return msgspec.convert(content, kind, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(_join(f"In {source}: {_explain(error, content)}.", advice)) from None


_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a group of named values",
    "str": "text",
}


def _explain(error: Exception, content: Any) -> str:
    """Returns which field must hold what, and what it holds."""
    if isinstance(error.__cause__, InputError):
        return str(error.__cause__).removesuffix(".")
    reason, _, path = str(error).partition(" - at `$")
    path = path.strip(".`")
    wanted = re.match(r"Expected `(.*?)`([^,]*)", reason)
    if wanted is None or " " in path:  # the key of a dict
        return str(error).replace("$.", "").replace(" - at `$`", "")
    kinds = (_WORDS.get(kind, kind) for kind in wanted[1].split(" | "))
    sentence = f"{path or 'the content'} must be {' or '.join(kinds)}{wanted[2]}"
    value: Any = content
    for part in re.findall(r"[^.\[\]]+", path):
        if part.isdigit() and isinstance(value, list | tuple):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:  # msgspec does not say which value of a dict
            return sentence
    got = repr(value)
    got = got if len(got) <= 80 else f"{got[:80]}…"
    return f"{sentence}, got {got}"


def read_text(path: Path, advice: str = "") -> str:
    """Reads a text file.

    Raises:
        InputError: no such file, one that cannot be read, or no text.
    """
    try:
        if not path.is_file():
            found = what_is_at(path)
            raise InputError(_join(f"{path} must be a file, but {found} is there.", advice))
        if path.stat().st_size > MAX_TEXT:
            raise InputError(_join(f"{path} must be a text file, but has over 64 MiB.", advice))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(_join(f"{path} cannot be read as text: {error}.", advice)) from None


def _join(sentence: str, advice: str) -> str:
    return f"{sentence} {advice}" if advice else sentence
