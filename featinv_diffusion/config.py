"""YAML plus dotted overrides to a frozen dataclass; unknown keys and wrong types are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.settings import flat_fields

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, then the YAML file, then overrides such as `optim.lr=1e-4`.

    Raises:
        InputError: unknown key (the nearest is named), wrong type, unreadable file.
    """
    config = OmegaConf.structured(cls)
    if path is not None:
        config = _merge(config, _read_yaml(Path(path)), f"config file {path}")
    for override in overrides:
        if "=" not in override:
            raise InputError(f"An override must read key=value, but {override!r} came.")
        config = _merge(config, _read_override(override), f"override {override!r}")
    try:
        return OmegaConf.to_object(config)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise InputError(f"The configuration is incomplete: {_first_line(error)}") from error


def load_flat(cls: type[T], path: str | Path | None, values: Mapping[str, Any]) -> T:
    """Builds settings of `featinv_diffusion.settings` from a YAML file, then values by name.

    Raises:
        InputError: unknown key, wrong type, unreadable file, or values that the class refuses.
    """
    config = OmegaConf.structured(cls)
    if path is not None:
        content = OmegaConf.to_container(_read_yaml(Path(path)), resolve=False)
        config = _merge(config, _nested(cls, content), f"config file {path}")
    config = _merge(config, _nested(cls, values), "options")
    try:
        return OmegaConf.to_object(config)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise InputError(f"The settings are incomplete: {_first_line(error)}") from error


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


def read_setting(key: str, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """Returns one value of what `load_config` reads, before any class checks it; None without it.

    Raises:
        InputError: unreadable file, override or value.
    """
    config = OmegaConf.create() if path is None else _read_yaml(Path(path))
    for override in overrides:
        if "=" in override:  # `load_config` refuses what has none
            config = _merge(config, _read_override(override), f"override {override!r}")
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise InputError(f"The setting {key} cannot be read: {_first_line(error)}") from error


def to_yaml(config: Any) -> str:
    """Returns the YAML that `load_config` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"A config file must exist at {path}, but nothing is there.") from None
    except Exception as error:
        raise InputError(f"{path} must be valid YAML: {_first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise InputError(f"{path} must hold `key: value` lines at its top level.")
    return loaded


def _read_override(override: str) -> Any:
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # whatever the YAML of the value can raise
        raise InputError(
            f"The value of an override must be YAML, but {override!r} is not: {_first_line(error)}"
        ) from error


def _merge(config: Any, update: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        raise InputError(f"In the {source}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key" in line), None)
    return lines[0] + (f" (key: {key})" if key else "")
