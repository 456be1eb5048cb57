"""Checkpoints of overcomplete, saev and ViT-Prisma, against formulas and the libraries."""

from __future__ import annotations

import io
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.concepts import SAEConcepts, load_concepts
from featinv_diffusion.concepts.sae_files import find_concepts_file, read_sae
from featinv_diffusion.errors import InputError
from featinv_diffusion.studies.concepts import check_concepts
from tests.concepts.planted import make_generator

WIDTH, N_LATENTS = 12, 40
NOISE = make_generator(3)
CELLS = torch.randn(30, WIDTH, generator=NOISE)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=NOISE)


def kept_top(values: np.ndarray, k: int) -> np.ndarray:
    """Keeps the k greatest of each row, by sorting."""
    places = np.argsort(-values, axis=1)[:, :k]
    kept = np.zeros_like(values)
    np.put_along_axis(kept, places, np.take_along_axis(values, places, axis=1), axis=1)
    return kept


def close(found: torch.Tensor, expected: np.ndarray | torch.Tensor) -> None:
    expected = torch.as_tensor(expected).to(found)
    assert expected.any(), "codes of nothing would show nothing"
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


# ---- Formulas ------------------------------------------------------------------------------------


def overcomplete_state(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = rand(N_LATENTS, WIDTH)
    return {
        "encoder.final_block.0.weight": rand(N_LATENTS, WIDTH) * 0.3,
        "encoder.final_block.0.bias": rand(N_LATENTS) * 0.1,
        "dictionary._weights": rows / rows.norm(dim=1, keepdim=True) * 1.02,
        "dictionary.multiplier": torch.tensor(0.5),
        **more,
    }


def pre_codes(state: dict[str, torch.Tensor], cells: torch.Tensor = CELLS) -> np.ndarray:
    weight = state["encoder.final_block.0.weight"].double().numpy()
    bias = state["encoder.final_block.0.bias"].double().numpy()
    return cells.double().numpy() @ weight.T + bias


def of_relu(state):
    return np.maximum(pre_codes(state), 0)


def of_top_k(state):
    return kept_top(of_relu(state), 5)


def of_threshold(state):
    return np.where(of_relu(state) >= 0.4, of_relu(state), 0)


def of_jump(state):
    threshold = np.exp(state["thresholds"].double().numpy())
    return np.where(of_relu(state) >= threshold, of_relu(state), 0)


def of_hard(state):
    levels = state["Q"].double().numpy()
    return levels[np.abs(pre_codes(state)[:, :, None] - levels).argmin(axis=2)].clip(min=0)


def of_soft(state):
    levels = state["Q"].double().numpy()
    weights = np.exp(-np.square(pre_codes(state)[:, :, None] - levels))
    return (weights * levels).sum(axis=2) / weights.sum(axis=2)


JUMP = {"thresholds": torch.linspace(-3, 0, N_LATENTS)}
QUANTISED = {"Q": torch.tensor([0.0, 0.4, 0.9])}
OVERCOMPLETE = [
    ("relu", {}, of_relu),
    ("top_k=5", {}, of_top_k),
    ("threshold=0.4", {}, of_threshold),
    ("", JUMP, of_jump),
    ("hard", QUANTISED, of_hard),
    ("soft", QUANTISED, of_soft),
]


@pytest.mark.parametrize(("said", "more", "formula"), OVERCOMPLETE)
def test_codes_of_overcomplete(tmp_path, said, more, formula):
    state = overcomplete_state(**more)
    torch.save(state, tmp_path / "sae.pt")
    sae = read_sae(tmp_path / "sae.pt", f"overcomplete:{said}")
    close(sae.encode(CELLS), formula(state))
    rows = state["dictionary._weights"].double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    close(sae.decoder, (unit * np.exp(0.5)).float())


def test_a_tied_encoder_and_matching_pursuit(tmp_path):
    state = {k: v for k, v in overcomplete_state().items() if k.startswith("dictionary.")}
    torch.save(state, tmp_path / "sae.pt")
    tied = read_sae(tmp_path / "sae.pt", "overcomplete:tied,relu")
    close(tied.encode(CELLS), (CELLS @ tied.decoder.T).relu())
    pursuit = read_sae(tmp_path / "sae.pt", "overcomplete:pursuit=2")
    rows = pursuit.decoder.double().numpy()
    expected = np.zeros((len(CELLS), N_LATENTS))
    for n, cell in enumerate(CELLS.double().numpy()):
        for _ in range(2):
            best = int((rows @ cell).argmax())
            expected[n, best] += rows[best] @ cell
            cell = cell - rows[best] * (rows[best] @ cell)
    close(pursuit.encode(CELLS), expected)


def test_an_encoder_with_hidden_layers(tmp_path):
    state = overcomplete_state()
    for block, out in (("mlp_blocks.0", WIDTH), ("final_block", N_LATENTS)):
        state[f"encoder.{block}.0.weight"] = rand(out, WIDTH)
        state[f"encoder.{block}.0.bias"] = rand(out)
        state[f"encoder.{block}.1.weight"] = rand(out)
        state[f"encoder.{block}.1.bias"] = rand(out)
    state["encoder.final_block.1.running_mean"] = rand(N_LATENTS)
    state["encoder.final_block.1.running_var"] = rand(N_LATENTS).abs() + 0.1
    torch.save(state, tmp_path / "sae.pt")
    block = {k: v.double() for k, v in state.items()}
    hidden = CELLS.double() @ block["encoder.mlp_blocks.0.0.weight"].T
    hidden = hidden + block["encoder.mlp_blocks.0.0.bias"]
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (
        hidden.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    hidden = hidden * block["encoder.mlp_blocks.0.1.weight"] + block["encoder.mlp_blocks.0.1.bias"]
    found = hidden.relu() @ block["encoder.final_block.0.weight"].T
    found = found + block["encoder.final_block.0.bias"]
    found = (found - block["encoder.final_block.1.running_mean"]) / (
        block["encoder.final_block.1.running_var"] + 1e-5
    ).sqrt()
    found = found * block["encoder.final_block.1.weight"] + block["encoder.final_block.1.bias"]
    close(read_sae(tmp_path / "sae.pt", "overcomplete:relu").encode(CELLS), found.relu())


def plain_state(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "W_enc": rand(WIDTH, N_LATENTS) * 0.3,
        "b_enc": rand(N_LATENTS) * 0.1,
        "W_dec": rand(N_LATENTS, WIDTH),
        "b_dec": rand(WIDTH),
        **more,
    }


def write_saev(path, state, header) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())


def saev_header(name: str, **params: object) -> dict[str, object]:
    activation = {"cls": name, "params": {**params, "aux": {"cls": "NoAux", "params": {}}}}
    return {"schema": 5, "cfg": {"d_model": WIDTH, "d_sae": N_LATENTS, "activation": activation}}


def of_saev(state) -> np.ndarray:
    return CELLS.double().numpy() @ state["W_enc"].double().numpy() + state["b_enc"].numpy()


def test_codes_of_saev(tmp_path):
    state, path = plain_state(), tmp_path / "sae.pt"
    found = of_saev(state)
    write_saev(path, state, saev_header("Relu"))
    close(read_sae(path).encode(CELLS), found.clip(min=0))
    write_saev(path, state, {"d_vit": WIDTH, "exp_factor": 2, "l1_coeff": 1e-4})
    close(read_sae(path).encode(CELLS), found.clip(min=0))
    write_saev(path, state, {"schema": 1, "cls": "TopK", "cfg": {"top_k": 3}})
    close(read_sae(path).encode(CELLS), kept_top(found, 3))
    write_saev(path, state, saev_header("TopK", top_k=35))  # negative values are kept too
    close(read_sae(path).encode(CELLS), kept_top(found, 35))
    assert (read_sae(path).encode(CELLS) < 0).any()
    state["activation.threshold"] = torch.tensor(0.6)
    write_saev(path, state, saev_header("BatchTopK", top_k=3))
    close(read_sae(path).encode(CELLS), np.where(found > 0.6, found, 0))
    close(read_sae(path).decode(torch.eye(N_LATENTS)), state["W_dec"] + state["b_dec"])


def prisma_input(normalise: str, state) -> tuple[np.ndarray, np.ndarray]:
    cells = CELLS.double().numpy()
    if normalise == "layer_norm":
        centred = cells - cells.mean(axis=1, keepdims=True)
        scale = cells.std(axis=1, ddof=1, keepdims=True)
        return centred / (scale + 1e-5) - state["b_dec"].numpy(), scale
    if normalise == "constant_norm_rescale":
        scale = np.linalg.norm(cells, axis=1, keepdims=True) / WIDTH**0.5
        return cells / scale - state["b_dec"].numpy(), scale
    return cells - state["b_dec"].numpy(), np.ones((len(cells), 1))


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale", "none"])
@pytest.mark.parametrize("activation", ["relu", "topk", "tanh-relu", "gated"])
def test_codes_of_prisma(tmp_path, normalise, activation):
    state = plain_state()
    config = {
        "normalize_activations": normalise,
        "activation_fn_str": "relu" if activation == "gated" else activation,
        "activation_fn_kwargs": {"k": 4} if activation == "topk" else {},
    }
    inputs, _ = prisma_input(normalise, state)
    found = inputs @ state["W_enc"].double().numpy() + state["b_enc"].numpy()
    expected = {"relu": found.clip(min=0), "topk": kept_top(found, 4).clip(min=0)}
    expected["tanh-relu"] = np.tanh(expected["relu"])
    if activation == "gated":
        state |= {"b_gate": rand(N_LATENTS), "r_mag": rand(N_LATENTS) * 0.2}
        state |= {"b_mag": rand(N_LATENTS)}
        config["architecture"] = "gated"
        plain = found - state["b_enc"].numpy()
        magnitude = plain * np.exp(state["r_mag"].double().numpy()) + state["b_mag"].numpy()
        expected["gated"] = (plain + state["b_gate"].numpy() > 0) * magnitude.clip(min=0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "weights.pt")
    close(read_sae(tmp_path / "weights.pt").encode(CELLS), expected[activation])


def test_cells_get_their_own_size_back(tmp_path):
    """Of normalised cells: reconstruction, part and edit are those of the formula."""
    state = plain_state()
    config = {"normalize_activations": "layer_norm", "activation_fn_str": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "weights.pt")
    concepts = load_concepts(tmp_path / "weights.pt")
    maps = CELLS[:16].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    _, scale = prisma_input("layer_norm", state)
    codes = concepts.encode(maps)
    rows = codes[0].flatten(1).T.double().numpy()
    decoded = rows @ state["W_dec"].double().numpy() + state["b_dec"].numpy()
    decoded = decoded * scale[:16] + CELLS[:16].mean(dim=1, keepdim=True).numpy()
    close(concepts.decode(codes, like=maps)[0].flatten(1).T, decoded)
    part = rows[:, 7:8] * state["W_dec"][7].numpy() * scale[:16]
    close(concepts.part(maps, 7)[0].flatten(1).T, part)
    changed = codes.clone()
    changed[:, 7] = 0
    close(concepts.edit(maps, changed), maps - concepts.part(maps, 7))
    with pytest.raises(InputError, match="like=features"):
        concepts.decode(codes)


# ---- The libraries themselves, where they are installed ------------------------------------------


@pytest.mark.parametrize("name", ["SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "QSAE", "MpSAE"])
@pytest.mark.parametrize("encoder", ["linear", "mlp_bn_3"])
def test_codes_are_those_of_overcomplete(tmp_path, name, encoder):
    library = pytest.importorskip("overcomplete.sae")
    torch.manual_seed(0)
    more = {"TopKSAE": {"top_k": 5}, "BatchTopKSAE": {"top_k": 400}, "MpSAE": {"k": 3}}
    kind = {} if name == "MpSAE" else {"encoder_module": encoder}
    sae = getattr(library, name)(WIDTH, N_LATENTS, **kind, **more.get(name, {}))
    for _ in range(3):
        sae(CELLS)  # in training: statistics of the norms, and the running threshold
    state = sae.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "sae.safetensors")
    sae.eval()
    said = {
        "SAE": "relu",
        "TopKSAE": "top_k=5",
        "BatchTopKSAE": f"threshold={float(getattr(sae, 'running_threshold', None) or 0)!r}",
        "JumpSAE": "",
        "QSAE": "soft",
        "MpSAE": "pursuit=3",
    }[name]
    ours = read_sae(tmp_path / "sae.safetensors", f"overcomplete:{said}")
    codes = sae.encode(CELLS)[1].detach()
    close(ours.encode(CELLS), codes)
    close(ours.decode(codes), sae.decode(codes).detach())


def test_archetypes_are_those_of_overcomplete(tmp_path):
    library = pytest.importorskip("overcomplete.sae")
    torch.manual_seed(0)
    sae = library.RATopKSAE(WIDTH, N_LATENTS, points=rand(60, WIDTH), top_k=5)
    with torch.no_grad():
        sae.dictionary.W.add_(torch.rand_like(sae.dictionary.W))
        sae.dictionary.Relax.add_(torch.randn_like(sae.dictionary.Relax))
    torch.save(sae.state_dict(), tmp_path / "sae.pt")
    sae.eval()
    ours = read_sae(tmp_path / "sae.pt", "overcomplete:top_k=5")
    close(ours.decoder, sae.get_dictionary().detach())
    close(ours.encode(CELLS), sae.encode(CELLS)[1].detach())


@pytest.mark.parametrize("name", ["Relu", "TopK", "BatchTopK"])
def test_codes_are_those_of_saev(tmp_path, name):
    library = pytest.importorskip("saev.nn.modeling")
    torch.manual_seed(0)
    activation = getattr(library, name)(**({} if name == "Relu" else {"top_k": 5}))
    config = library.SparseAutoencoderConfig(d_model=WIDTH, d_sae=N_LATENTS, activation=activation)
    sae = library.SparseAutoencoder(config)
    for tensor in (sae.b_enc, sae.b_dec):
        torch.nn.init.normal_(tensor, std=0.2)
    sae(CELLS)  # in training: the running threshold
    sae.eval()
    library.dump(tmp_path / "sae.pt", sae)
    ours, codes = read_sae(tmp_path / "sae.pt"), sae.encode(CELLS).f_x.detach()
    close(ours.encode(CELLS), codes)
    close(ours.decode(codes), sae.decode(codes)[:, -1].detach())


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale", "none"])
@pytest.mark.parametrize("kind", ["relu", "topk", "tanh-relu", "gated"])
def test_codes_are_those_of_prisma(tmp_path, kind, normalise):
    library = pytest.importorskip("vit_prisma.sae.sae")
    torch.manual_seed(0)
    config = library.VisionModelSAERunnerConfig(
        d_in=WIDTH,
        expansion_factor=3,
        architecture="gated" if kind == "gated" else "standard",
        activation_fn_str="relu" if kind == "gated" else kind,
        activation_fn_kwargs={"k": 4} if kind == "topk" else {},
        normalize_activations=normalise,
        _device="cpu",
    )
    classes = (library.StandardSparseAutoencoder, library.GatedSparseAutoencoder)
    sae = classes[kind == "gated"](config)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sae.save_model(str(tmp_path / "run" / "sae.pt"))  # with the config pickled beside the weights
    concepts = load_concepts(tmp_path / "run" / "sae.pt")
    assert isinstance(concepts, SAEConcepts)
    assert concepts.sae is not None
    codes = sae.encode(CELLS)[1].detach()
    close(concepts.sae.encode(CELLS), codes)
    maps = CELLS[:16].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    sae.encode(CELLS[:16])
    decoded = sae.decode(codes[:16]).detach()
    own = concepts.decode(concepts.encode(maps), like=maps)
    close(own[0].flatten(1).T, decoded)


# ---- Files that are refused ----------------------------------------------------------------------


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    ran = []
    module = ModuleType("vit_prisma.sae.evil")
    module.Evil = type("Evil", (), {"__reduce__": lambda self: (ran.append, (1,))})
    monkeypatch.setitem(sys.modules, "vit_prisma.sae.evil", module)
    torch.save({"state_dict": plain_state(), "cfg": module.Evil()}, tmp_path / "sae.pt")
    with pytest.raises(InputError, match="without running code"):
        read_sae(tmp_path / "sae.pt")
    assert not ran


def test_a_pickled_config_of_prisma_is_read_without_its_class(tmp_path, monkeypatch):
    module = ModuleType("vit_prisma.sae.config")
    config = type("VisionModelSAERunnerConfig", (), {"__module__": "vit_prisma.sae.config"})
    module.VisionModelSAERunnerConfig = config
    for name in ("vit_prisma", "vit_prisma.sae"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vit_prisma.sae.config", module)
    made = config()
    vars(made).update(activation_fn_str="relu", normalize_activations="none")
    state = plain_state()
    torch.save({"state_dict": state, "cfg": made}, tmp_path / "sae.pt")
    monkeypatch.undo()
    found = (CELLS - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    close(read_sae(tmp_path / "sae.pt").encode(CELLS), found.relu())


def save(path, **changes: torch.Tensor | None):
    state = {**overcomplete_state(), **changes}
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    return path


def test_what_a_file_leaves_open_is_asked_for(tmp_path):
    path = save(tmp_path / "sae.pt")
    with pytest.raises(InputError, match="overcomplete:top_k=K"):
        read_sae(path)
    with pytest.raises(InputError, match=r"top_k .* must be a number from 1, got '0'"):
        read_sae(path, "overcomplete:top_k=0")
    with pytest.raises(InputError, match="but hard is of no use"):
        read_sae(path, "overcomplete:relu,hard")
    with pytest.raises(InputError, match="one of auto, overcomplete, saev, prisma"):
        read_sae(path, "saelens")
    save(path, Q=torch.rand(3))
    with pytest.raises(InputError, match="overcomplete:soft"):
        read_sae(path)


def test_other_layouts_are_refused(tmp_path):
    path = tmp_path / "sae.pt"
    with pytest.raises(InputError, match="must be a file"):
        read_sae(path)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="must hold tensors alone"):
        read_sae(path)
    torch.save({"weight": torch.rand(3, 3)}, path)
    with pytest.raises(InputError, match=r"weight \[3, 3\]. Say which"):
        read_sae(path)
    bad = {"encoder.final_block.0.bias": torch.rand(3)}
    with pytest.raises(InputError, match=r"must hold 40 numbers, got \[3\]"):
        read_sae(save(path, **bad), "overcomplete:relu")
    with pytest.raises(InputError, match="about unit length"):
        read_sae(save(path, **{"dictionary._weights": rand(4, WIDTH) * 9}), "overcomplete:relu")
    bad = {"encoder.final_block.0.bias": torch.full((N_LATENTS,), torch.nan)}
    with pytest.raises(InputError, match="finite weights"):
        read_sae(save(path, **bad), "overcomplete:relu")
    write_saev(path, plain_state(), {"schema": 9, "cfg": {}})
    with pytest.raises(InputError, match="schema 1 … 5"):
        read_sae(path)
    config = {"activation_fn_str": "topk", "is_transcoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(plain_state(), path)
    with pytest.raises(InputError, match="transcoder"):
        read_sae(path)


def test_the_bundled_sae_is_of_the_bundled_backbone():
    concepts = load_concepts("tiny/convnext-sae")
    assert isinstance(concepts, SAEConcepts)
    assert concepts.n_concepts == 512
    assert concepts.report["energy"] > 0.7
    backbone = load_backbone("tiny/convnext")
    assert check_concepts("tiny/convnext-sae", backbone).spec == backbone.spec
    path = find_concepts_file("tiny/convnext-sae")
    assert path.stat().st_size < 1_000_000
