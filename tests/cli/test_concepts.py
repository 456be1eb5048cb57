"""`featinv concepts`: what it writes, prints and refuses; replay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

import featinv_diffusion as fi
from featinv_diffusion.backbones import load_backbone, names
from featinv_diffusion.concepts import MCD, ConceptDictionary, read_head
from featinv_diffusion.images import center_square, read_image, to_tensor
from featinv_diffusion.studies.concepts import active_cells
from tests.cli.conftest import Featinv, Outcome

NAMES = ["a.png", "b.jpg", "more/c.png"]
FILES = {"c.safetensors", "c.png", "c.json", "c.parquet", "c.manifest.json"}


@pytest.fixture(autouse=True)
def _bundled(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone `convnext` is that of the test's own family, too."""
    monkeypatch.setattr(names, "ASSETS", family)


def run(featinv: Featinv, photos: Path, *arguments: object) -> Outcome:
    return featinv("concepts", photos, *arguments, "-o", "out/c.safetensors")


def load(name: str) -> dict:
    return json.loads(Path("out", name).read_text())


def features_of(photos: Path, layer: str = "last") -> torch.Tensor:
    squares = [center_square(read_image(photos / name), 64) for name in NAMES]
    return load_backbone("tiny/convnext", layer).features(to_tensor(squares))


def test_what_it_writes(featinv: Featinv, photos: Path):
    done = run(featinv, photos, "--n-concepts", 2, "--class", "class 4")
    assert (done.code, done.err) == (0, "")
    assert {path.name for path in Path("out").iterdir()} == FILES
    concepts = ConceptDictionary.load("out/c.safetensors")
    assert isinstance(concepts, MCD)
    assert concepts.n_concepts == 2
    assert concepts.origin["class_index"] == 4
    manifest = load("c.manifest.json")
    assert manifest["images"] == NAMES
    assert (manifest["backbone"], manifest["device"]) == ("tiny/convnext", "cpu")
    features = features_of(photos)
    direction = read_head(load_backbone("tiny/convnext")).direction(4)
    numbers = load("c.json")
    rows = numbers["concepts"]
    expected = concepts.global_relevance(direction).tolist()
    assert [row["relevance"] for row in rows] == pytest.approx(expected[:-1], abs=1e-5)
    assert rows[0]["energy"] >= rows[1]["energy"]
    assert (numbers["basis"], concepts.report["basis"]) == ("uncentred", "uncentred")
    assert "The uncentred basis is used; the published one is centred." in done.out
    assert numbers["relevance_of_rest"] == pytest.approx(expected[-1], abs=1e-5)
    for k, row in enumerate(rows):
        part = concepts.part(features, k)
        share = part.square().sum() / features.square().sum()
        assert row["energy"] == pytest.approx(share.item(), rel=1e-4)
        frame = torch.linalg.qr(concepts.basis(k).T).Q
        held = (frame.T @ direction).norm() / direction.norm()
        assert row["completeness"] == pytest.approx(held.item(), rel=1e-4)
        assert f"{row['relevance']:.3f}" in done.out
    table = parquet.read_table("out/c.parquet").to_pylist()
    assert [(row["image"], row["concept"]) for row in table] == [
        (name, k) for name in NAMES for k in range(2)
    ]
    strongest = concepts.activations(features).amax(dim=(2, 3)).flatten()
    np.testing.assert_allclose([row["activation_max"] for row in table], strongest, rtol=1e-4)
    logits = load_backbone("tiny/convnext").logits(features)[:, 4]
    head = read_head(load_backbone("tiny/convnext"))
    rest = concepts.local_relevance(features, head, 4)[:, -1].mean(dim=(1, 2))
    by_image = np.reshape([row["relevance"] for row in table], (3, 2)).sum(axis=1)
    np.testing.assert_allclose(by_image + rest.numpy() + head.bias[4].item(), logits, rtol=1e-3)


def test_a_script_gives_what_the_command_gives(featinv: Featinv, photos: Path):
    assert run(featinv, photos, "--n-concepts", 2, "--class", 4).code == 0
    found = fi.find_concepts(fi.load_backbone("tiny/convnext"), photos, n_concepts=2, target=4)
    assert found.save("script/c.safetensors") == Path("script/c.safetensors")
    for name in FILES - {"c.safetensors", "c.parquet"}:
        assert Path("script", name).read_bytes() == Path("out", name).read_bytes(), name
    assert found.rows() == parquet.read_table("out/c.parquet").to_pylist()
    earlier = ConceptDictionary.load("out/c.safetensors").directions
    assert torch.equal(found.concepts.directions, earlier)


def test_the_class_is_that_of_most_pictures(featinv: Featinv, photos: Path):
    assert run(featinv, photos, "--n-concepts", 1).code == 0
    logits = load_backbone("tiny/convnext").logits(features_of(photos))
    counts = logits.argmax(dim=1).bincount()
    assert load("c.json")["class_index"] == counts.argmax()
    assert load("c.json")["n_predicted"] == counts.max()


@pytest.mark.parametrize("method", ["pca", "kmeans"])
def test_energy_or_relevance_decides_what_comes_first(featinv: Featinv, photos: Path, method):
    both = {}
    for order in ("energy", "relevance"):
        assert run(featinv, photos, "--method", method, "--order", order).code == 0
        found = load("c.json")
        assert found["kind"] == method
        both[order] = [(row[order], row["completeness"]) for row in found["concepts"]]
        assert both[order] == sorted(both[order], reverse=True)
        pictures = parquet.read_table("out/c.parquet").to_pylist()
        assert pictures[0]["energy"] == pytest.approx(
            energy_in(photos, ConceptDictionary.load("out/c.safetensors")), rel=1e-4
        )
    assert {share for _, share in both["energy"]} == {share for _, share in both["relevance"]}


def energy_in(photos: Path, concepts: ConceptDictionary) -> float:
    """Share of the first picture's squared length that the part of the first concept has."""
    features = features_of(photos)[:1]
    return (concepts.part(features, 0).square().sum() / features.square().sum()).item()


def test_the_published_basis_and_few_pictures_are_named(featinv: Featinv, photos: Path):
    done = run(featinv, photos, "--basis", "centred", "--n-concepts", 2, "--figure", "f.svg")
    assert load("c.json")["basis"] == "centred"
    assert "need at least 10 pictures of it" in done.out
    assert "centred basis, as published" in Path("out/f.svg").read_text()


def test_one_threshold_outlines_the_active_cells_of_all_pictures(photos: Path):
    found = fi.find_concepts(fi.load_backbone("tiny/convnext"), photos, n_concepts=2, target=4)
    for k in range(2):
        values = found.activations[:, k].numpy()
        threshold = np.quantile(values, 0.99) / 2
        marked = [active_cells(found.concepts, k, torch.tensor(each))[0] for each in values]
        np.testing.assert_array_equal(torch.stack(marked), values >= threshold)
    rest = found.concepts.reorder([1])
    assert active_cells(rest, 0, torch.tensor(values[0]))[0].equal(marked[0])


def test_directions_of_a_file(featinv: Featinv, photos: Path):
    rows = np.eye(32, dtype=np.float32)[:5]
    np.save("d.npy", rows)
    assert run(featinv, photos, "--directions", "d.npy", "--n-concepts", 2, "--class", 0).code == 0
    direction = read_head(load_backbone("tiny/convnext")).direction(0)
    greatest = direction[:5].abs().argsort(descending=True)[:2]
    kept = ConceptDictionary.load("out/c.safetensors").directions
    np.testing.assert_array_equal(kept, rows[greatest])
    assert run(featinv, photos, "--directions", "d.npy").code == 0
    assert ConceptDictionary.load("out/c.safetensors").n_concepts == 5


def test_at_an_earlier_layer_there_is_no_relevance(featinv: Featinv, photos: Path):
    done = run(featinv, photos, "--layer", "stages.2", "--n-concepts", 2)
    assert done.code == 0
    assert "Relevance to the class is not defined here" in done.out
    assert load("c.json")["completeness"] is None
    assert ConceptDictionary.load("out/c.safetensors").spec.layer == "stages.2"
    assert {row["relevance"] for row in parquet.read_table("out/c.parquet").to_pylist()} == {None}


def test_a_picture_that_cannot_be_read_is_left_out(featinv: Featinv, photos: Path):
    (photos / "aa.png").write_text("hello")
    done = run(featinv, photos, "--n-concepts", 1)
    assert done.code == 0
    assert "Note: A picture is left out" in done.err
    assert load("c.json")["n_images"] == 3


def test_replay_finds_the_same_concepts_of_the_same_pictures(featinv: Featinv, photos: Path):
    assert run(featinv, photos, "--n-concepts", 2).code == 0
    read_image(photos / "a.png").save(photos / "another.png")
    done = featinv("replay", "out/c.manifest.json", "-o", "again")
    assert (done.code, done.err) == (0, "")
    assert "The concepts are identical to those beside the manifest." in done.out
    for name in ("c.json", "c.png", "c.manifest.json"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes(), name
    content = load("c.manifest.json") | {"seed": "many"}
    Path("out/c.manifest.json").write_text(json.dumps(content))
    assert featinv("replay", "out/c.manifest.json").code == 2
    del content["method"]
    Path("out/c.manifest.json").write_text(json.dumps(content))
    assert "lacks method" in featinv("replay", "out/c.manifest.json").err
    content |= {"method": "mcd", "seed": 42, "folder": None}
    Path("out/c.manifest.json").write_text(json.dumps(content))
    assert "given in memory" in featinv("replay", "out/c.manifest.json").err


@pytest.mark.parametrize(
    "options",
    [["--n-concepts", "auto"], ["--max-cells", 0, "--n-concepts", 1], ["--directions", "d.npy"]],
)
def test_replay_of_what_is_none_in_a_manifest(featinv: Featinv, photos: Path, options):
    np.save("d.npy", np.eye(32, dtype=np.float32)[:2])
    assert run(featinv, photos, *options, "--class", 4).code == 0
    done = featinv("replay", "out/c.manifest.json", "-o", "again")
    assert "The concepts are identical" in done.out, done.err
    assert Path("again/c.manifest.json").read_bytes() == Path("out/c.manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n-concepts", "some"], "a number or auto"),
        (["--n-concepts", "0"], "from 1 to 4096"),
        (["--method", "pca", "--n-concepts", "auto"], "only mcd chooses"),
        (["--method", "mdc"], "did you mean 'mcd'"),
        (["--method", "directions"], "go together"),
        (["--method", "pca", "--directions", "d.npy"], "go together"),
        (["--directions", "d.npy"], "must be a file of directions"),
        (["--class", "class 99"], "No class is named"),
        (["--layer", "stages.9"], "not a layer"),
        (["--figure", "f.jpg"], "'f.jpg'"),
        (["--method", "nmf"], "nowhere below zero"),
    ],
)
def test_what_it_refuses(featinv: Featinv, photos: Path, options, words):
    done = run(featinv, photos, *options)
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert words in done.err
    assert "Traceback" not in done.err
    assert not Path("out").exists()


def test_places_that_cannot_be(featinv: Featinv, photos: Path):
    assert "ends in .safetensors" in featinv("concepts", photos, "-o", "out").err
    assert "no picture" in featinv("concepts", ".", "-o", "c.safetensors").err
    assert "there is nothing" in featinv("concepts", "none", "-o", "c.safetensors").err


# ---- sparse autoencoders -------------------------------------------------------------------------


def save_sae(name: str = "sae.pt") -> dict[str, torch.Tensor]:
    """Writes the state dict of a TopKSAE of overcomplete for the 32 channels of the backbone."""
    noise = torch.Generator().manual_seed(0)
    state = {
        "encoder.final_block.0.weight": torch.randn(48, 32, generator=noise),
        "encoder.final_block.0.bias": torch.zeros(48),
        "dictionary._weights": torch.nn.functional.normalize(
            torch.randn(48, 32, generator=noise), dim=1
        ),
    }
    torch.save(state, name)
    return state


def test_latents_of_an_sae_that_add_most_to_the_class(featinv: Featinv, photos: Path):
    state = save_sae()
    given = ["--sae", "sae.pt", "--sae-format", "overcomplete:top_k=5"]
    done = run(featinv, photos, *given, "--class", 4, "--n-concepts", 3)
    assert (done.code, done.err) == (0, "")
    concepts = ConceptDictionary.load("out/c.safetensors")
    features = features_of(photos)
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)
    codes = (cells @ state["encoder.final_block.0.weight"].T).relu()
    kept = torch.zeros_like(codes).scatter(1, codes.topk(5).indices, codes.topk(5).values)
    direction = read_head(load_backbone("tiny/convnext")).direction(4)
    gain = kept * (state["dictionary._weights"] @ direction)
    head = read_head(load_backbone("tiny/convnext"))
    scale = head.scale(features).repeat_interleave(64)[:, None]
    strongest = (gain * scale).sum(dim=0).topk(3).indices
    energy = kept.square().sum(dim=0) * state["dictionary._weights"].square().sum(dim=1)
    order = energy[strongest].argsort(descending=True)
    assert concepts.latents == strongest[order].tolist()
    assert [row["latent"] for row in load("c.json")["concepts"]] == concepts.latents
    assert torch.allclose(concepts.directions, state["dictionary._weights"][concepts.latents])
    again = featinv("replay", "out/c.manifest.json", "-o", "again")
    assert "The concepts are identical to" in again.out


def test_an_sae_is_refused(featinv: Featinv, photos: Path):
    save_sae()
    done = run(featinv, photos, "--sae", "sae.pt")
    assert done.code == 2
    assert "overcomplete:top_k=K" in done.err
    done = run(featinv, photos, "--sae", "sae.pt", "--method", "pca", "--n-concepts", 2)
    assert done.code == 2
    assert "go together" in done.err
    given = ["--sae", "sae.pt", "--sae-format", "overcomplete:relu"]
    done = run(featinv, photos, *given, "--layer", "stages.0")
    assert done.code == 2
    assert "reads 32" in done.err
    assert not Path("out").exists()
