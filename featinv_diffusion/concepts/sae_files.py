"""Reads the sparse autoencoders of overcomplete, saev and ViT-Prisma: tensors only, no code."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featinv_diffusion.backbones.names import ASSETS
from featinv_diffusion.concepts.base import FORMAT, ConceptDictionary
from featinv_diffusion.concepts.sae import SAEConcepts, SparseAutoencoder
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import expand_path
from featinv_diffusion.types import FeatureSpec

AUTO = "auto"
BUNDLED = {"tiny/convnext-sae": "tiny/convnext/sae.safetensors"}
"""Names of the bundled dictionaries, and their files below the assets."""

_SAYINGS = (
    *("relu", "top_k", "threshold", "hard", "soft", "pursuit", "tied"),
    *("dictionary", "delta", "normalise"),
)
"""What a format may say after its colon; the metadata of a safetensors file may say it too."""

_LARGEST = 100_000_000
"""Elements of any one tensor; the largest published SAEs of vision have about as many."""


def load_concepts(
    path: str | Path, spec: FeatureSpec | None = None, sae_format: str = AUTO
) -> ConceptDictionary:
    """Reads concepts that this package wrote, or a sparse autoencoder of another library.

    Args:
        path: a file, or `tiny/convnext-sae`.
        spec: the features that a file of another library is of; such files do not say.
        sae_format: `auto`, or `overcomplete`, `saev` or `prisma`, perhaps with what the file does
            not say: `overcomplete:top_k=8`. See `read_sae`.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else.
    """
    path = find_concepts_file(path)
    if sae_format == AUTO and is_own_file(path):
        return ConceptDictionary.load(path)
    return SAEConcepts.of(read_sae(path, sae_format), spec)


def find_concepts_file(path: str | Path) -> Path:
    """Returns the path of a file of concepts, also of a bundled name."""
    bundled = BUNDLED.get(str(path))
    return expand_path(path) if bundled is None else ASSETS / bundled


def is_own_file(path: Path) -> bool:
    """Whether this package wrote a file, or none is there; foreign SAEs have another header."""
    if not path.is_file() or path.suffix != ".safetensors":
        return not path.is_file()
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("format", "")
            return written.startswith(FORMAT.partition("/")[0]) or not _is_known(list(file.keys()))
    except (SafetensorError, OSError):
        return True  # its reader says what is wrong


def _is_known(names: Sequence[str]) -> bool:
    """Whether tensors have the names of an SAE of another library."""
    return "W_dec" in names or any(name.startswith("dictionary.") for name in names)


def read_sae(path: str | Path, sae_format: str = AUTO) -> SparseAutoencoder:
    """Reads the weights of a sparse autoencoder, and how they are used.

    Args:
        path: `.safetensors`, or what `torch.save` wrote of a state dict (`weights_only`); saev's
            checkpoints with their line of JSON; ViT-Prisma's with their config inside, or in a
            `config.json` beside them.
        sae_format: `auto`, or the library, and after a colon what its file does not say. Of
            overcomplete: `relu` (SAE), `top_k=K` (TopKSAE), `threshold=T` (BatchTopKSAE, its
            running_threshold), `hard` or `soft` (QSAE), `pursuit=K` (MpSAE), `tied`,
            `dictionary=l2|max_l2|l1|max_l1|identity` (l2 where not said) and `delta=D` (1). Of
            saev and prisma without their config: `relu`, `top_k=K`, `threshold=T`; of prisma also
            `normalise=layer_norm|norm|none`.

    Raises:
        InputError: no such file, one that needs code to be read, another layout, or a format that
            leaves open how codes are made.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There must be a file of a sparse autoencoder at {path}.")
    name, _, said = sae_format.partition(":")
    if name not in (AUTO, *READERS):
        raise InputError(
            f"The format must be one of {AUTO}, {', '.join(READERS)}, got {name!r}; "
            f"{choices_hint(name, [AUTO, *READERS])}"
        )
    held = _open(path)
    held.said.update(_options(said))
    found = _recognise(held) if name == AUTO else name
    sae = READERS[found](held)
    if extra := sorted(set(_options(said)) - held.used):
        raise InputError(
            f"The format of {path} must say what an SAE of {found} needs, "
            f"but {', '.join(extra)} is of no use there."
        )
    for key, tensor in sae.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{path} must hold finite weights, but {key} does not.")
    return sae


# ---- Files ---------------------------------------------------------------------------------------


@dataclass
class _Held:
    """What a file holds: tensors, its config, and what the user says of it besides."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    saev: bool = False
    said: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def tell(self, name: str) -> str | None:
        self.used.add(name)
        return self.said.get(name)

    def number(self, name: str, kind: type[int] | type[float], least: float) -> Any:
        """Returns a number that was said; None if none was."""
        said = self.tell(name)
        if said is None:
            return None
        try:
            value = kind(said)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise InputError(
                f"{name} of {self.path} must be a number from {least:g}, got {said!r}."
            )
        return value

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """Returns a tensor, of any length where a shape has None.

        Raises:
            InputError: it is missing or has another shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise InputError(
                f"{self.path} must hold a tensor {name}, but it holds {_listed(self.tensors)}."
            )
        fits = tensor.ndim == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or not tensor.is_floating_point() or not tensor.numel():
            wanted = " × ".join("any" if size is None else str(size) for size in shape) or "one"
            raise InputError(
                f"{name} of {self.path} must hold {wanted} numbers, "
                f"got {list(tensor.shape)} of {tensor.dtype}."
            )
        if tensor.numel() > _LARGEST:
            raise InputError(
                f"{name} of {self.path} must have at most {_LARGEST} numbers, "
                f"got {list(tensor.shape)}."
            )
        return tensor.float().contiguous()


def _open(path: Path) -> _Held:
    if path.suffix == ".safetensors":
        held = _open_safetensors(path)
    else:
        with path.open("rb") as file:
            is_saev = file.read(1) == b"{"
        held = _open_saev(path) if is_saev else _open_torch(path)
    beside = path.parent / "config.json"
    if held.config is None and beside.is_file():
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{beside} must be a config in JSON: {error}.") from error
        if isinstance(content, dict) and "activation_fn_str" in content:
            held.config = content
    return held


def _open_safetensors(path: Path) -> _Held:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} must be a whole safetensors file: {error}.") from error
    said = {name: value for name, value in metadata.items() if name in _SAYINGS}
    return _Held(path, tensors, said=said)


def _open_saev(path: Path) -> _Held:
    with path.open("rb") as file:
        first, rest = file.readline(), file.read()
    try:
        header = json.loads(first)
    except ValueError as error:
        raise InputError(f"{path} must begin with a line of JSON: {error}.") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} must begin with a line of JSON that is an object.")
    return _Held(path, _tensors(path, _load(path, io.BytesIO(rest))), header, saev=True)


def _open_torch(path: Path) -> _Held:
    content = _load(path, path)
    config = None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        found = content.get("cfg", content.get("config"))
        config = found if isinstance(found, dict) else vars(found) if found is not None else None
        content = content["state_dict"]
    return _Held(path, _tensors(path, content), config)


def _load(path: Path, file: Any) -> Any:
    """Reads what `torch.save` wrote, without running code.

    ViT-Prisma pickles its config with the weights. An empty class stands in for each of its
    classes, so that their values can be read and nothing of the library runs.
    """
    try:
        with _stand_ins(file):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise InputError(
            f"{path} must hold tensors alone, but it cannot be read without running code, or is "
            "damaged. Save the state dict: torch.save(sae.state_dict(), FILE)."
        ) from error


def _stand_ins(file: Any) -> AbstractContextManager[Any]:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if not isinstance(file, Path):
        file.seek(0)
    known = [name for name in names if name.startswith("vit_prisma.")]
    if not known:
        return nullcontext()
    classes = [(type(name.rpartition(".")[2], (), {}), name) for name in known]
    return torch.serialization.safe_globals(classes)  # pyright: ignore[reportArgumentType]


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    tensors = (
        {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise InputError(
            f"{path} must hold the state dict of an SAE, but holds {type(content).__name__}."
        )
    return tensors


def _options(said: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in said.split(",") if part.strip())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _listed(tensors: Mapping[str, Tensor]) -> str:
    names = [f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())[:8]]
    return ", ".join(names) + (", …" if len(tensors) > len(names) else "")


def _recognise(held: _Held) -> str:
    if held.saev:
        return "saev"
    if any(name.startswith("dictionary.") for name in held.tensors):
        return "overcomplete"
    if held.config is not None and "W_dec" in held.tensors:
        return "prisma"
    raise InputError(
        f"{held.path} must be an SAE of overcomplete, saev or ViT-Prisma with its config, but it "
        f"holds {_listed(held.tensors)}. Say which with --sae-format (sae_format=…), or give the "
        "callables to SAEConcepts."
    )


# ---- overcomplete: a state dict, which does not say its class ------------------------------------


def _read_overcomplete(held: _Held) -> SparseAutoencoder:
    decoder = _archetypes(held) if "dictionary.C" in held.tensors else _atoms(held)
    if "dictionary.multiplier" in held.tensors:
        decoder = decoder * held.tensor("dictionary.multiplier").exp()
    layers, n_layers = _encoder(held, decoder)
    settings: dict[str, Any] = {"layers": n_layers}
    tensors = {**layers, "decoder": decoder}
    n_latents = len(decoder)
    if "thresholds" in held.tensors:
        tensors["threshold"] = held.tensor("thresholds", n_latents).exp()
        settings["activation"] = "threshold"
    elif "Q" in held.tensors:
        tensors["levels"] = held.tensor("Q", None)
        hard, soft = (held.tell(name) is not None for name in ("hard", "soft"))
        if hard == soft:
            raise InputError(
                f"{held.path} does not say whether its QSAE is hard. Say one of the formats "
                "overcomplete:soft (the library's default) and overcomplete:hard."
            )
        settings |= {"activation": "levels", "hard": hard}
    elif (k := held.number("pursuit", int, 1)) is not None:
        settings |= {"activation": "pursuit", "k": k}
    else:
        _said_activation(held, "overcomplete", settings, tensors)
    return SparseAutoencoder(tensors, settings)


_LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda rows: rows.norm(dim=1, keepdim=True) + 1e-8,
    "max_l2": lambda rows: rows.norm(dim=1).amax(),
    "l1": lambda rows: rows.abs().sum(dim=1, keepdim=True) + 1e-8,
    "max_l1": lambda rows: rows.abs().sum(dim=1).amax(),
    "identity": lambda rows: rows.new_ones(()),
}


def _atoms(held: _Held) -> Tensor:
    """Returns the rows as the library's evaluation makes them: normalised once more.

    An optimiser leaves rows that are almost normalised; others were trained with another rule.
    """
    rows = held.tensor("dictionary._weights", None, None)
    said = held.tell("dictionary")
    if said is not None and said not in _LENGTHS:
        raise InputError(f"dictionary must be one of {', '.join(_LENGTHS)}, got {said!r}.")
    lengths = _LENGTHS[said or "l2"](rows)
    if said is None and not bool(((lengths - 1).abs() < 0.1).all()):
        low, high = lengths.min().item(), lengths.max().item()
        raise InputError(
            f"The rows of the dictionary in {held.path} must have about unit length, got "
            f"{low:.3g} … {high:.3g}. Say how it was normalised: "
            "overcomplete:dictionary=identity (or l2, max_l2, l1, max_l1)."
        )
    return rows / lengths


def _archetypes(held: _Held) -> Tensor:
    """Returns the relaxed archetypes: convex combinations of points, plus short vectors."""
    points = held.tensor("dictionary.C", None, None)
    weights = held.tensor("dictionary.W", None, len(points)).relu()
    shifts = held.tensor("dictionary.Relax", len(weights), points.shape[1])
    delta = held.number("delta", float, 0)
    lengths = shifts.norm(dim=1, keepdim=True)
    shifts = shifts * ((1.0 if delta is None else delta) / lengths).clamp(max=1)
    return weights / (weights.sum(dim=1, keepdim=True) + 1e-8) @ points + shifts.nan_to_num()


def _encoder(held: _Held, decoder: Tensor) -> tuple[dict[str, Tensor], int]:
    """Returns the linear layers of the encoder, under the names of `SparseAutoencoder`."""
    names = [name for name in held.tensors if name.startswith("encoder.")]
    n_latents, width = decoder.shape
    if "encoder.weight" in names or not [n for n in names if n != "encoder.bias"]:
        tied = "encoder.weight" not in names
        if tied and held.tell("tied") is None:
            if "pursuit" in held.said:
                return {}, 0
            raise InputError(
                f"{held.path} holds no encoder. Say overcomplete:tied,… where it is the "
                "dictionary's, or overcomplete:pursuit=K of an MpSAE."
            )
        weight = decoder if tied else held.tensor("encoder.weight", n_latents, width)
        return _with_bias(held, "encoder.bias", {"encoder.0.weight": weight}, 0), 1
    blocks = sorted({int(n.split(".")[2]) for n in names if n.startswith("encoder.mlp_blocks.")})
    others = [n for n in names if not n.startswith(("encoder.mlp_blocks.", "encoder.final_block."))]
    if others or blocks != list(range(len(blocks))):
        raise InputError(
            f"The encoder in {held.path} must be linear or an MLP of single cells, but it has "
            f"{(others or names)[0]}. Give its callables to SAEConcepts."
        )
    layers: dict[str, Tensor] = {}
    for i, block in enumerate(
        [*(f"encoder.mlp_blocks.{b}" for b in blocks), "encoder.final_block"]
    ):
        out = None if i < len(blocks) else n_latents
        weight = held.tensor(f"{block}.0.weight", out, width)
        layers[f"encoder.{i}.weight"] = weight
        width = len(weight)
        layers = _with_bias(held, f"{block}.0.bias", layers, i)
        if f"{block}.1.weight" in names:
            norm = f"encoder.{i}.norm"
            layers[f"{norm}.weight"] = held.tensor(f"{block}.1.weight", width)
            layers[f"{norm}.bias"] = held.tensor(f"{block}.1.bias", width)
            if f"{block}.1.running_mean" in names:
                layers[f"{norm}.mean"] = held.tensor(f"{block}.1.running_mean", width)
                layers[f"{norm}.var"] = held.tensor(f"{block}.1.running_var", width)
    return layers, len(blocks) + 1


def _with_bias(held: _Held, name: str, layers: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    if name not in held.tensors:
        return layers
    width = len(layers[f"encoder.{i}.weight"])
    return {**layers, f"encoder.{i}.bias": held.tensor(name, width)}


def _said_activation(
    held: _Held, library: str, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Sets the activation that the user says, which is exactly one."""
    relu = held.tell("relu") is not None
    k, threshold = held.number("top_k", int, 1), held.number("threshold", float, 0)
    if relu + (k is not None) + (threshold is not None) != 1:
        raise InputError(
            f"{held.path} does not say how codes are made. Say one of the formats {library}:relu, "
            f"{library}:top_k=K, and {library}:threshold=T (the running threshold of BatchTopK)."
        )
    if threshold is not None:
        tensors["threshold"] = torch.tensor(threshold)
    name = "relu" if relu else "top_k" if k is not None else "threshold"
    settings |= {"activation": name, **({} if k is None else {"k": k})}


# ---- saev: a line of JSON, then a state dict -----------------------------------------------------

_SCHEMAS = (None, 1, 2, 3, 4, 5)


def _read_saev(held: _Held) -> SparseAutoencoder:
    """As saev reads its own schemas today: no bias is subtracted before the encoder, which early
    versions did with one that was about zero."""
    tensors = _plain(held)
    settings: dict[str, Any] = {}
    if held.config is None:
        _said_activation(held, "saev", settings, tensors)
    else:
        name, k = _saev_activation(held, held.config)
        if name == "Relu":
            settings["activation"] = "relu"
        elif name == "TopK":
            settings |= {"activation": "top_k", "k": k}
        else:
            threshold = held.tensor("activation.threshold")
            tensors["threshold"] = threshold.clamp(min=0)
            settings |= {"activation": "threshold"}
    settings |= {"top_k": {"positive": False}, "threshold": {"strict": True}}.get(
        settings["activation"], {}
    )
    return SparseAutoencoder(tensors, settings)


def _saev_activation(held: _Held, header: Mapping[str, Any]) -> tuple[str, int]:
    schema, config = header.get("schema"), header.get("cfg", header)
    if schema not in _SCHEMAS or not isinstance(config, Mapping):
        raise InputError(
            f"{held.path} must be a saev checkpoint of schema 1 … 5 or without one, got {schema!r}."
        )
    if schema is None:
        return "Relu", 0
    name, params = header.get("cls", ""), config
    if schema > 1 or name not in ("Relu", "TopK", "BatchTopK"):
        activation = config.get("activation", {"cls": "TopK", "params": {}})
        name, params = activation.get("cls"), activation.get("params", {})
    k = params.get("top_k", 32)
    if name not in ("Relu", "TopK", "BatchTopK") or not isinstance(k, int) or k < 1:
        raise InputError(
            f"The activation of {held.path} must be Relu, TopK or BatchTopK with a top_k of at "
            f"least 1, got {name!r} and {k!r}."
        )
    return name, k


def _plain(held: _Held) -> dict[str, Tensor]:
    """Returns the weights that saev and ViT-Prisma name alike."""
    decoder = held.tensor("W_dec", None, None)
    n_latents, width = decoder.shape
    return {
        "decoder": decoder,
        "post_bias": held.tensor("b_dec", width),
        "encoder.0.weight": held.tensor("W_enc", width, n_latents).T.contiguous(),
        "encoder.0.bias": held.tensor("b_enc", n_latents),
    }


# ---- ViT-Prisma: a state dict with its config inside or beside it --------------------------------

_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "norm"}


def _read_prisma(held: _Held) -> SparseAutoencoder:
    config = held.config
    tensors = _plain(held)
    tensors["pre_bias"] = tensors["post_bias"]
    settings: dict[str, Any] = {}
    if config is None:
        _said_activation(held, "prisma", settings, tensors)
        normalise = held.tell("normalise")
        if normalise not in ("layer_norm", "norm", "none"):
            raise InputError(
                f"{held.path} does not say how cells are normalised. Put its config.json beside "
                "it, or say prisma:normalise=layer_norm (or norm, none)."
            )
        normalise = None if normalise == "none" else normalise
    else:
        settings = _prisma_activation(held, config)
        normalise = _NORMS.get(config.get("normalize_activations", "layer_norm"))
    if "b_gate" in tensors or "b_gate" in held.tensors:
        n_latents = len(tensors["decoder"])
        tensors.pop("encoder.0.bias")  # the gated SAE has one and never adds it
        tensors["gate_bias"] = held.tensor("b_gate", n_latents)
        tensors["magnitude"] = held.tensor("r_mag", n_latents).exp()
        tensors["magnitude_bias"] = held.tensor("b_mag", n_latents)
    return SparseAutoencoder(tensors, {**settings, "normalise": normalise})


def _prisma_activation(held: _Held, config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("is_transcoder") or config.get("architecture", "standard") not in (
        "standard",
        "gated",
    ):
        what = "transcoder" if config.get("is_transcoder") else config["architecture"]
        raise InputError(
            f"{held.path} must be a standard or a gated SAE, got the architecture {what!r}. "
            "Give its callables to SAEConcepts."
        )
    name, given = config.get("activation_fn_str", "topk"), config.get("activation_fn_kwargs") or {}
    if name in ("relu", "tanh-relu"):
        return {"activation": "relu" if name == "relu" else "tanh"}
    k = given.get("k")
    if name != "topk" or not isinstance(k, int) or k < 1 or "postact_fn" in given:
        raise InputError(
            f"The activation of {held.path} must be relu, tanh-relu, or topk with its k alone, "
            f"got {name!r} with {dict(given)!r}. Give the callables to SAEConcepts."
        )
    return {"activation": "top_k", "k": k}


READERS: dict[str, Callable[[_Held], SparseAutoencoder]] = {
    "overcomplete": _read_overcomplete,
    "saev": _read_saev,
    "prisma": _read_prisma,
}
