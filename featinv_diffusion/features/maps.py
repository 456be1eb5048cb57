"""Files of feature maps: safetensors, NumPy or parquet, with the spec that they travel by."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import replacing, write_tensors, write_text
from featinv_diffusion.schema import parse_json, read_json
from featinv_diffusion.types import FeatureMaps, FeatureSpec, Source

logger = logging.getLogger(__name__)

FORMAT = "featinv feature maps 1"
SUFFIXES = (".safetensors", ".npy", ".npz", ".parquet")
KEY = b"featinv"
"""Of a parquet schema's metadata, where the header lies."""


@dataclass(frozen=True)
class MapsHeader:
    """What a file of maps says of them.

    Args:
        spec: fields of the `FeatureSpec`; None where it is not known.
        names: what the noise of each map depends on: the file names of the pictures.
        locations: where each picture is; None where it was given in memory.
    """

    spec: dict[str, Any] | None = None
    names: list[str] = field(default_factory=list)
    locations: list[str | None] = field(default_factory=list)


def is_maps_file(path: Any) -> bool:
    """Whether a path is a file of feature maps; a parquet of pictures is none."""
    if not isinstance(path, str | Path) or Path(path).suffix.lower() not in SUFFIXES:
        return False
    path = Path(path)
    if path.suffix.lower() != ".parquet":
        return True
    try:
        return path.is_file() and _parquet_header(path) is not None
    except OSError:
        return False


def check_maps_path(path: Path) -> None:
    """Raises `InputError` unless maps can be written under this name."""
    if path.suffix.lower() not in (".safetensors", ".npy", ".parquet"):
        raise InputError(
            f"Feature maps go to a file that ends in .safetensors, .npy or .parquet, got "
            f"{path.name!r}."
        )


def write_maps(path: Path, maps: FeatureMaps, spec: FeatureSpec) -> None:
    """Writes feature maps with their spec and the names of their pictures.

    The class scores of the pictures are kept too in .safetensors and .parquet. The header of a
    .npy file lies beside it, in `NAME.npy.json`.

    Raises:
        InputError: another suffix.
        OSError: the disk refuses.
    """
    check_maps_path(path)
    tensors = {"features": maps.as_subclass(Tensor).detach().cpu().float().contiguous()}
    logits = [source.logits for source in maps.sources]
    known = [row.float().cpu() for row in logits if row is not None]
    if known and len(known) == len(maps):
        tensors["logits"] = torch.stack(known)
    header = asdict(
        MapsHeader(asdict(spec), [s.name for s in maps.sources], [s.location for s in maps.sources])
    )
    if path.suffix.lower() == ".safetensors":
        write_tensors(path, tensors, header, FORMAT)
    elif path.suffix.lower() == ".npy":
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, tensors["features"].numpy())
        write_text(_beside(path), json.dumps({"format": FORMAT, **header}, indent=2) + "\n")
    else:
        _write_parquet(path, tensors, header)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_parquet(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"name": pa.array(header["names"])}
    for name, rows in tensors.items():
        flat = pa.array(rows.flatten().numpy())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, rows[0].numel())
    meta = {KEY: json.dumps({"format": FORMAT, **header}).encode()}
    with replacing(path) as partial:
        parquet.write_table(pa.table(columns).replace_schema_metadata(meta), partial)


def load_maps(path: str | Path, spec: FeatureSpec | None = None) -> FeatureMaps:
    """Reads the feature maps of a file.

    Args:
        path: what `write_maps` wrote, or any .npy or .npz array or safetensors tensor called
            `features` (or the only one) of the shape `[b, c, h, w]` or `[c, h, w]`.
        spec: the features that are wanted.

    Raises:
        InputError: no such file, no maps in it, or maps of another spec.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Feature maps must be a file, but none is at {path}.")
    header = _read_header(path)
    found = _READERS[path.suffix.lower()](path, header)
    features = found["features"].float()
    features = features[None] if features.ndim == 3 else features
    if features.ndim != 4:
        raise InputError(
            f"{path} must hold maps [b, c, h, w] or one map [c, h, w], but holds an array of the "
            f"shape {list(features.shape)}. Convert tokens with Layout.to_map first."
        )
    if spec is not None:
        _check_spec(path, features, header, spec)
    names = header.names or [f"{path.stem}-{i}" for i in range(len(features))]
    locations = header.locations or [None] * len(names)
    logits: Any = found.get("logits", [None] * len(names))
    if not len(names) == len(locations) == len(logits) == len(features):
        raise InputError(
            f"{path} must tell as many names as it holds maps, got {len(names)} for "
            f"{len(features)}."
        )
    sources = zip(names, locations, logits, strict=True)
    return FeatureMaps.of(features, [Source(n, at, logits=row) for n, at, row in sources])


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Reads all arrays of a .safetensors, .npy or .npz file.

    Raises:
        InputError: no such file, or one of another kind.
    """
    if path.suffix.lower() not in (".safetensors", ".npy", ".npz") or not path.is_file():
        raise InputError(f"Arrays must be in a .safetensors, .npy or .npz file, got {path}.")
    if path.suffix.lower() != ".safetensors":
        return _numpy_arrays(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise InputError(f"{path} must be a whole safetensors file.") from None


def spec_of(path: str | Path) -> FeatureSpec | None:
    """Returns the spec that a file of maps declares, without reading the maps; None without one."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Feature maps must be a file, but none is at {path}.")
    header = _read_header(path)
    return None if header.spec is None else _to_spec(path, header.spec)


def _to_spec(path: Path, fields: Mapping[str, Any]) -> FeatureSpec:
    return read_spec(fields, f"the spec in {path}")


def _check_spec(path: Path, features: Tensor, header: MapsHeader, spec: FeatureSpec) -> None:
    if header.spec is None:
        spec.check_features(features)
        logger.warning("%s does not say where its maps come from; read as a %s.", path, spec)
        return
    own = _to_spec(path, header.spec)
    if own != spec:
        raise InputError(
            f"{path} holds a {own}, but the inverter reads a {spec}. Use the inverter of that "
            "backbone and layer."
        )
    spec.check_features(features)


# ---- Readers -------------------------------------------------------------------------------------


def _read_header(path: Path) -> MapsHeader:
    """Returns what a file says of its maps; arrays of other programs say nothing."""
    suffix, source = path.suffix.lower(), f"the header of {path}"
    if suffix in (".npy", ".npz"):
        beside = _beside(path)
        return read_json(beside, MapsHeader) if beside.is_file() else MapsHeader()
    try:
        if suffix == ".parquet":
            text = _parquet_header(path)
        else:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            text = metadata.get("header") if metadata.get("format") == FORMAT else None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} must be a whole file of feature maps: {error}.") from None
    return MapsHeader() if text is None else parse_json(text, MapsHeader, source)


def _parquet_header(path: Path) -> bytes | None:
    """Raises `OSError` where the file is no whole parquet file."""
    import pyarrow as pa  # slow to import, and most files of maps are not parquet
    from pyarrow import parquet

    try:
        return (parquet.read_schema(path).metadata or {}).get(KEY)
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _read_safetensors(path: Path, header: MapsHeader) -> dict[str, Tensor]:
    return _one_of(path, read_arrays(path))


def _numpy_arrays(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else {}
        arrays = arrays or {"features": loaded}
        return {name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} must hold arrays of numbers: {error}.") from None


def _read_numpy(path: Path, header: MapsHeader) -> dict[str, Tensor]:
    return _one_of(path, _numpy_arrays(path))


def _read_parquet(path: Path, header: MapsHeader) -> dict[str, Tensor]:
    if header.spec is None:
        raise InputError(f"{path} must be written by `featinv encode`, but declares no spec.")
    import pyarrow as pa
    from pyarrow import parquet

    spec = _to_spec(path, header.spec)
    try:
        table = parquet.read_table(path)
        tensors = {}
        for name in set(table.column_names) - {"name"}:
            rows = table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            tensors[name] = torch.from_numpy(rows.copy())
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(f"{path} must be a whole parquet file of maps: {error}.") from None
    found = _one_of(path, tensors)
    try:
        found["features"] = found["features"].unflatten(1, (spec.channels, *spec.grid))
    except RuntimeError:
        raise InputError(f"{path} must hold a {spec} in each row, but does not.") from None
    return found


_READERS = {
    ".safetensors": _read_safetensors,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".parquet": _read_parquet,
}


def _one_of(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of which one is called `features`."""
    if "features" not in tensors and len(tensors) == 1:
        tensors = {"features": next(iter(tensors.values()))}
    if "features" not in tensors or tensors["features"].is_complex():
        raise InputError(
            f"{path} must hold one array, or one called 'features', but holds "
            f"{', '.join(sorted(tensors)[:5]) or 'none'}."
        )
    return tensors
