"""Classes by name, directions from files, and concepts that are bound to their features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from featinv_diffusion.backbones import Backbone, wrap_model
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.concepts import ConceptDictionary, DirectionConcepts
from featinv_diffusion.concepts.base import read_directions, write_concepts
from featinv_diffusion.errors import InputError
from featinv_diffusion.studies.concepts import check_concepts, find_concepts, find_target
from tests import tiny
from tests.studies.painting import save_pictures

LABELS = ("goldfish, Carassius auratus", "Crane", "crane", *map(str, range(100, 107)))


@pytest.fixture
def backbone(timm_wrapper) -> Backbone:
    return wrap_model(timm_wrapper, name="tiny/convnext")


def scores(*classes: int) -> torch.Tensor:
    return torch.eye(10)[list(classes)]


# ---- the class -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["GOLDFISH", "carassius auratus", "0", LABELS[0]])
def test_a_class_by_any_of_its_names(backbone, given):
    backbone.labels = LABELS
    target = find_target(backbone, given, scores(0, 1, 0))
    assert (target.index, target.name, target.n_predicted) == (0, LABELS[0], 2)


def test_the_majority_and_its_direction(backbone):
    target = find_target(backbone, None, scores(7, 4, 4, 7, 9))
    assert (target.index, target.name, target.n_predicted) == (4, "class 4", 2)
    linear, norm = backbone.model.get_classifier(), backbone.model.head.norm
    weight = linear.weight[4] * norm.weight
    torch.testing.assert_close(target.direction, weight - weight.mean())
    assert target.note is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("crane", "classes 1, 2 of .* are all named 'crane'"),
        ("goldfsh", "did you mean 'goldfish'"),
        ("10", "indices 0 to 9, got 10"),
        ("-1", "No class is named '-1'"),
    ],
)
def test_a_class_that_there_is_not(backbone, given, words):
    backbone.labels = LABELS
    with pytest.raises(InputError, match=words):
        find_target(backbone, given, scores(0))


def test_without_a_head_there_is_no_class(backbone):
    assert find_target(backbone, None, None) is None
    with pytest.raises(InputError, match="has no head"):
        find_target(backbone, "goldfish", None)


def test_at_an_earlier_layer_there_is_a_class_but_no_relevance(timm_wrapper):
    backbone = wrap_model(timm_wrapper, name="tiny/convnext", layer="stages.2")
    target = find_target(backbone, None, scores(3))
    assert target.index == 3
    assert target.direction is None
    assert "not defined here" in target.note


# ---- directions from files -----------------------------------------------------------------------


def test_directions_of_each_format(tmp_path):
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", rows.double().numpy())
    save_file({"W_dec": rows, "b": torch.ones(5)}, tmp_path / "b.safetensors")
    both = {"directions": rows, "W_enc": rows.T.contiguous(), "offset": torch.ones(5).half()}
    save_file(both, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.safetensors"):
        found, offset = read_directions(tmp_path / name)
        assert torch.equal(found, rows)
        assert offset is None
    found, offset = read_directions(tmp_path / "c.safetensors")
    assert torch.equal(found, rows)
    assert torch.equal(offset, torch.ones(5))


def test_files_without_directions(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "vector.npy", np.ones(3))
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "two.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    (tmp_path / "d.pt").write_bytes(b"abc")
    for name, words in [
        ("none.npy", "must be a file of directions"),
        ("object.npy", "cannot be read"),
        ("two.safetensors", r"holds a \[2, 2\], b \[2, 2\]"),
        ("cut.safetensors", "cannot be read"),
        ("d.pt", ".npy or .safetensors"),
        ("vector.npy", r"single matrix, but it holds directions \[3\]"),
    ]:
        with pytest.raises(InputError, match=words):
            read_directions(tmp_path / name)


# ---- concepts and their features -----------------------------------------------------------------


def save(path, backbone: Backbone, **origin) -> ConceptDictionary:
    concepts = DirectionConcepts(torch.eye(32)[:2], spec=backbone.spec)
    concepts.origin = origin
    concepts.save(path)
    return concepts


def test_what_is_known_of_a_fit_is_saved(tmp_path, backbone):
    digest = weights_sha256({"backbone": backbone.model})
    concepts = save(tmp_path / "c.safetensors", backbone, class_index=3, weights_sha256=digest)
    loaded = check_concepts(tmp_path / "c.safetensors", backbone)
    assert loaded.origin == concepts.origin
    assert loaded.spec == backbone.spec
    assert torch.equal(loaded.directions, concepts.directions)


def test_concepts_of_the_same_weights_fit_whatever_the_backbone_is_called(tmp_path, timm_wrapper):
    one, other = (wrap_model(timm_wrapper, name=name) for name in ("mine", "tiny/convnext"))
    path = tmp_path / "c.safetensors"
    save(path, one, weights_sha256=weights_sha256({"backbone": one.model}))
    assert check_concepts(path, other).n_concepts == 2
    save(path, one)
    assert check_concepts(path, one).n_concepts == 2
    with pytest.raises(InputError, match=r"those of a map of mine.*reads a map of tiny/"):
        check_concepts(path, other)


def test_concepts_of_other_features_are_refused_and_both_are_named(tmp_path, timm_wrapper):
    path = tmp_path / "c.safetensors"
    last = wrap_model(timm_wrapper, name="tiny/convnext")
    save(path, last, weights_sha256=weights_sha256({"backbone": last.model}))
    earlier = wrap_model(timm_wrapper, name="tiny/convnext", layer="stages.2")
    words = r"layer 'last', 32×8×8, but .* layer 'stages.2', 24×8×8.*--layer stages.2"
    with pytest.raises(InputError, match=words):
        check_concepts(path, earlier)


def test_concepts_of_other_weights_are_refused(tmp_path, backbone):
    path = tmp_path / "c.safetensors"
    save(path, backbone, weights_sha256="0" * 64)
    with pytest.raises(InputError, match="other weights"):
        check_concepts(path, backbone)


def test_concepts_of_unknown_features_are_refused(tmp_path, backbone):
    path = tmp_path / "c.safetensors"
    DirectionConcepts(torch.eye(32)[:2]).save(path)
    with pytest.raises(InputError, match="which features they are of"):
        check_concepts(path, backbone)


# ---- finding them in Python ----------------------------------------------------------------------


def test_folders_paths_pictures_and_tensors_give_the_same_concepts(tmp_path, backbone):
    paths = save_pictures(tmp_path, 3)
    images = tiny.make_images(3)
    images = (images * 255).byte().float() / 255
    given = [tmp_path, paths, [Image.open(path) for path in paths], images, list(images)]
    found = [find_concepts(backbone, each, method="pca", n_concepts=2) for each in given]
    for other in found[1:]:
        assert torch.equal(other.concepts.directions, found[0].concepts.directions)
        assert other.numbers() == found[0].numbers()
        assert torch.equal(other.activations, found[0].activations)
        assert other._repr_png_().startswith(b"\x89PNG")
    assert [row["image"] for row in found[0].rows()][::2] == ["a.png", "b.png", "c.png"]
    assert [row["image"] for row in found[3].rows()][::2] == ["0", "1", "2"]
    assert repr(found[0]).startswith("FoundConcepts: Class ")


def test_they_are_saved_in_a_folder_or_under_a_name(tmp_path, backbone):
    save_pictures(tmp_path, 2)
    found = find_concepts(backbone, tmp_path, method="pca", n_concepts=1)
    assert found.save(tmp_path / "out") == tmp_path / "out/concepts.safetensors"
    path = found.save(tmp_path / "out/d.safetensors", figure="seen.svg")
    assert torch.equal(ConceptDictionary.load(path).directions, found.concepts.directions)
    beside = {"d.safetensors", "seen.svg", "d.json", "d.parquet", "d.manifest.json"}
    assert beside < {file.name for file in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"f\.jpg"):
        found.save(path, figure="f.jpg")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "mdc"}, "did you mean 'mcd'"),
        ({"n_concepts": 0}, "from 1 to 4096"),
        ({"n_concepts": "some"}, "a number or auto"),
        ({"method": "pca", "n_concepts": "auto"}, "only mcd chooses"),
        ({"method": "directions"}, "go together"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"target": 10}, "indices 0 to 9, got 10"),
    ],
)
def test_what_cannot_be_found(backbone, arguments, words):
    with pytest.raises(InputError, match=words):
        find_concepts(backbone, tiny.make_images(2), **arguments)


def test_no_pictures(tmp_path, backbone, caplog):
    with pytest.raises(InputError, match="there is nothing"):
        find_concepts(backbone, tmp_path / "none")
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(InputError, match="a picture that can be read, but holds none"):
        find_concepts(backbone, tmp_path)
    assert "A picture is left out" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: header.pop("kind"),
        lambda header: header.update(kind=3),
        lambda header: header.update(kind="nothing"),
        lambda header: header.update(sizes=[5]),
        lambda header: header.update(sizes="many"),
        lambda header: header.update(settings={"nosuch": 1}),
        lambda header: header.update(spec={"backbone": "x"}),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    header = {"kind": "directions", "sizes": [1, 1], "settings": {}, "spec": None, "report": {}}
    header["origin"] = {}
    write_concepts(path, {"directions": torch.eye(2, 4)}, header)
    assert ConceptDictionary.load(path).n_concepts == 2
    damage(header)
    write_concepts(path, {"directions": torch.eye(2, 4)}, header)
    with pytest.raises(InputError, match=r"c\.safetensors|description of the features"):
        ConceptDictionary.load(path)
