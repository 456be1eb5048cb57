"""Configs: YAML, by path or by name, plus dotted overrides to a frozen dataclass.

Unknown keys and wrong types are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.schema import convert, dump_yaml, parse_yaml, read_text
from featinv_diffusion.settings import flat_fields
from featinv_diffusion.trust import is_code_trusted, refuse_code

T = TypeVar("T")

_PACKAGE = Path(__file__).parent
CONFIGS = next(
    folder / "configs" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()
)
"""The configs that ship with the package; in a checkout they lie beside it."""
NAMED = ("controlnet", "evaluation", "inverters")
"""The folders of them that an installed package has."""


def list_configs() -> list[str]:
    """Returns the names of the configs that ship with the package, such as `controlnet/swin`."""
    return sorted(
        f"{folder}/{path.stem}" for folder in NAMED for path in (CONFIGS / folder).glob("*.yaml")
    )


def find_config(name: str | Path) -> Path:
    """Returns the file that a path or a name such as `controlnet/convnext` means.

    Raises:
        InputError: neither a file nor a name of `list_configs`, with or without `.yaml`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    key = str(name).removesuffix(".yaml")
    if key not in list_configs():
        raise InputError(
            f"A config must be a YAML file or a name, but there is no file at {str(name)!r}; "
            f"{choices_hint(key, list_configs())}"
        )
    return CONFIGS / f"{key}.yaml"


def load_config(cls: type[T], name: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, then a YAML file, then overrides such as `optim.lr=1e-4`.

    Args:
        name: a file or a name, see `find_config`.

    Raises:
        InputError: unknown key (the nearest is named), wrong type, a value out of range, unreadable
            file.
    """
    content: dict[str, Any] = {}
    if name is not None:
        path = find_config(name)
        content = _read_yaml(path)
        _check_keys(cls, content, f"config file {path}")
    for override in overrides:
        if "=" not in override:
            raise InputError(f"An override must read key=value, got {override!r}.")
        update = _read_override(override)
        _check_keys(cls, update, f"override {override!r}")
        content = _merge(content, update)
    content = _merge(_set_for_parts(cls), content)
    return convert(_fitted(cls, content), cls, "the settings")


def _set_for_parts(cls: type) -> dict[str, Any]:
    """Returns what the defaults of `cls` give a part otherwise than the part's own class does.

    They stay where other settings of that part are named.
    """
    found: dict[str, Any] = {}
    for part in fields(cls):  # pyright: ignore[reportArgumentType]
        made = part.default_factory() if part.default_factory is not MISSING else None
        if is_dataclass(made) and not isinstance(made, type):
            plain = {field.name: field.default for field in fields(made)}
            differ = {k: v for k, v in vars(made).items() if plain[k] not in (MISSING, v)}
            found |= {part.name: differ} if differ else {}
    return found


def load_flat(cls: type[T], name: str | Path | None, values: Mapping[str, Any]) -> T:
    """Builds settings of `featinv_diffusion.settings` from a YAML file, then values by name.

    Args:
        name: of a file or a packaged config, see `find_config`.

    Raises:
        InputError: unknown key, wrong type, unreadable file, or values that the class refuses.
    """
    content = {} if name is None else _nested(cls, _read_yaml(find_config(name)))
    content = _merge(content, _nested(cls, values))
    return convert(_fitted(cls, content), cls, "the settings")


def _nested(cls: type, values: Any) -> dict[str, Any]:
    """Puts values that stand side by side where the classes hold them."""
    known = flat_fields(cls)
    for name in values:
        if name not in known:
            raise InputError(f"No setting is named {name!r}; {choices_hint(name, list(known))}")
    nested: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            own = flat_fields(hint)  # pyright: ignore[reportArgumentType]
            nested[name] = _nested(hint, {n: v for n, v in values.items() if n in own})  # pyright: ignore[reportArgumentType]
        elif name in values:
            nested[name] = values[name]
    return nested


def read_setting(key: str, name: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """Returns one value of what `load_config` reads, before a class checks it; None where unset.

    Raises:
        InputError: unreadable file or override.
    """
    content: Any = {} if name is None else _read_yaml(find_config(name))
    for override in overrides:
        if "=" in override:  # `load_config` refuses what has none
            content = _merge(content, _read_override(override))
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def to_yaml(config: Any) -> str:
    """Returns the YAML that `load_config` reads back to an equal object."""
    return dump_yaml(asdict(config))


def _refuse_code(content: Any, path: Path) -> None:
    """Raises `InputError` where a config, which may be somebody else's, names code to run."""
    if isinstance(content, dict):
        for key, value in content.items():
            names = value if isinstance(value, list) else [value]
            for name in names if key in ("backbone", "evaluated_by") else ():
                if isinstance(name, str):
                    refuse_code(name, str(path))
            _refuse_code(value, path)


def _read_yaml(path: Path) -> dict[str, Any]:
    loaded = parse_yaml(read_text(path), str(path))
    if not isinstance(loaded, dict):
        raise InputError(f"{path} must hold `key: value` lines at its top level.")
    if not is_code_trusted():
        _refuse_code(loaded, path)
    return loaded


def _read_override(override: str) -> dict[str, Any]:
    key, _, text = override.partition("=")
    value = parse_yaml(text, f"The value of the override {override!r}")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(content: Any, update: Any) -> Any:
    """Puts values into those that are there; whole lists are replaced."""
    if not (isinstance(content, dict) and isinstance(update, dict)):
        return update
    return content | {key: _merge(content.get(key), value) for key, value in update.items()}


def _check_keys(cls: type, content: Mapping[Any, Any], source: str, above: str = "") -> None:
    """Raises `InputError` for a key that no class has, and names the nearest."""
    hints = get_type_hints(cls)
    for key, value in content.items():
        if key not in hints:
            hint = choices_hint(str(key), list(hints))
            raise InputError(f"In the {source}: no setting is named {above + str(key)!r}; {hint}")
        parts = {f"{above}{key}": value}
        if get_origin(hints[key]) is dict and isinstance(value, dict):
            parts = {f"{above}{key}.{name}": part for name, part in value.items()}
        for kind in (hints[key], *get_args(hints[key])):
            for path, part in parts.items():
                if is_dataclass(kind) and isinstance(part, dict):
                    _check_keys(kind, part, source, f"{path}.")  # pyright: ignore[reportArgumentType]


def _fitted(cls: type, content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns the values with text where text is wanted, although YAML reads 12 as a number.

    Raises:
        InputError: a value that is none of a field's choices.
    """
    hints, values = get_type_hints(cls), dict(content)
    for key, value in content.items():
        hint, path = hints[key], f"{above}{key}"
        if is_dataclass(hint) and isinstance(value, dict):
            values[key] = _fitted(hint, value, f"{path}.")  # pyright: ignore[reportArgumentType]
        elif hint in (str, str | None) and type(value) in (int, float):
            values[key] = str(value)
        choices = [c for part in (hint, *get_args(hint)) for c in _choices(part)]
        if choices and isinstance(value, str) and value not in choices:
            raise InputError(f"No {path} is named {value!r}; {choices_hint(value, choices)}")
    return values


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()
