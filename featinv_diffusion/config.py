"""Configs: YAML, by path or by name, plus dotted overrides to a frozen dataclass.

Unknown keys and wrong types are refused.
"""

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
        InputError: unknown key (the nearest is named), wrong type, unreadable file.
    """
    config = OmegaConf.structured(cls)
    if name is not None:
        path = find_config(name)
        config = _merge(config, _read_yaml(path), f"config file {path}")
    for override in overrides:
        if "=" not in override:
            raise InputError(f"An override must read key=value, got {override!r}.")
        config = _merge(config, _read_override(override), f"override {override!r}")
    try:
        return OmegaConf.to_object(config)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise InputError(f"The configuration is incomplete: {_first_line(error)}") from error


def load_flat(cls: type[T], name: str | Path | None, values: Mapping[str, Any]) -> T:
    """Builds settings of `featinv_diffusion.settings` from a YAML file, then values by name.

    Args:
        name: of a file or a packaged config, see `find_config`.

    Raises:
        InputError: unknown key, wrong type, unreadable file, or values that the class refuses.
    """
    config = OmegaConf.structured(cls)
    if name is not None:
        path = find_config(name)
        content = OmegaConf.to_container(_read_yaml(path), resolve=False)
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


def read_setting(key: str, name: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """Returns one value of what `load_config` reads, before a class checks it; None where unset.

    Raises:
        InputError: unreadable file, override or value.
    """
    config = OmegaConf.create() if name is None else _read_yaml(find_config(name))
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
