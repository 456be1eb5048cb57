"""Chains, sets and their files; wiring a wrong stage is an error."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_diffusion.backbones import load_backbone, wrap_model
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.blocks import ConvInverse
from featinv_diffusion.inverters.chain import Chain, MapChain
from featinv_diffusion.inverters.detr import EncoderInverse
from featinv_diffusion.inverters.modular import (
    INDEX,
    InverseSet,
    PathInfo,
    classifier_path,
    load_modular,
)
from featinv_diffusion.inverters.swin import SwinPath
from featinv_diffusion.inverters.vit import AnalyticPatchInverse, VitPath
from tests.inverters import small
from tests.tiny import make_images


@pytest.fixture(scope="module")
def detr():
    return small.make_detr_path()


@pytest.fixture(scope="module")
def vit():
    return small.make_vit_path()


@pytest.fixture
def inverses(detr):
    return small.make_detr_inverses(detr)


@pytest.mark.parametrize("stage", ["backbone", "encoder", "decoder", "prediction", "detection"])
def test_every_stage_of_detr_leads_to_an_image(detr, inverses, stage: str) -> None:
    chain = inverses.chain(stage, detr)
    embedding = detr.embeddings(make_images(2), [stage])[stage]
    images = chain.invert(embedding)
    assert images.shape == (2, 3, 64, 64)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert isinstance(MapChain(chain), Inverter)


def test_a_chain_is_the_composition_of_its_modules(detr, inverses) -> None:
    queries = torch.randn(2, 5, 16)
    inverses.eval()
    with torch.no_grad():
        by_hand = inverses["backbone"](inverses["encoder"](inverses["decoder"](queries)))
    assert torch.equal(inverses.chain("decoder").invert(queries), by_hand)


@pytest.mark.parametrize("stage", ["patches", "blocks.1", "encoder", "last"])
def test_every_stage_of_vit_leads_to_an_image(vit, stage: str) -> None:
    chain = small.make_vit_inverses(vit).chain(stage, vit)
    embedding = vit.embeddings(make_images(2), [stage])[stage]
    assert chain.invert(embedding).shape == (2, 3, 64, 64)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["patches", "layers.1", "encoder", "last"])
def test_every_stage_of_swin_leads_to_an_image_and_has_scores_beside_it(stage: str) -> None:
    swin, images = small.make_swin_path(), make_images(2)
    chain = small.make_swin_inverses(swin).chain(stage, swin)
    assert chain.invert(swin.embeddings(images, [stage])[stage]).shape == (2, 3, 64, 64)
    features, scores = chain.backbone.features_and_logits(images)
    assert features.shape[1:] == (swin.spec(stage).channels, *swin.spec(stage).grid)
    assert torch.equal(scores, swin.model(swin.preprocess(images)))


def test_a_set_of_a_swin_comes_back_from_its_folder_with_its_model(tmp_path) -> None:
    """By the family in the index; tiny/swin is a Swin, tiny/vit is none."""
    backbone = load_backbone("tiny/swin")
    path = classifier_path(backbone, "swin")
    module = ConvInverse(
        **small.ends(path, "patches", "image"), channels=[8], kernels=[2, 2], strides=[2, 2]
    )
    InverseSet({"patches": module}, PathInfo("swin", "tiny/swin")).save_pretrained(tmp_path)
    again = load_modular(str(tmp_path))
    assert isinstance(again.path, SwinPath)
    assert again.chain("patches").invert(torch.zeros(1, 64, 16, 16)).shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="must be a timm SwinTransformer"):
        classifier_path(load_backbone("tiny/vit"), "swin")


def test_states_within_a_stage_can_be_inverted(detr, inverses) -> None:
    chain = inverses.chain("encoder", detr)
    states = detr.embeddings(make_images(1), ["encoder.1", "encoder.2", "encoder"])
    assert torch.equal(chain.invert(states["encoder.2"]), chain.invert(states["encoder"]))
    assert not torch.equal(chain.invert(states["encoder.1"]), chain.invert(states["encoder"]))


def test_the_backbone_embedding_is_not_taken_for_the_encoders(detr, inverses) -> None:
    """The public trainers of decoder⁻¹ make this mistake; both have one shape."""
    wrong = EncoderInverse(**small.ends(detr, "backbone", "backbone"), depth=1, n_heads=2)
    words = r"layer 'backbone'.*but the one before it writes.*layer 'encoder'"
    with pytest.raises(InputError, match=words):
        Chain([inverses["decoder"], wrong, inverses["backbone"]])


def test_chains_of_two_models_do_not_mix(detr, inverses) -> None:
    other = small.make_detr_path(d_model=32)
    with pytest.raises(InputError, match="must fit"):
        inverses.chain("encoder", other)


def test_a_chain_must_end_at_the_image(inverses) -> None:
    with pytest.raises(InputError, match="must end at the image"):
        Chain([inverses["decoder"], inverses["encoder"]])


def test_features_of_another_shape_are_refused(inverses) -> None:
    with pytest.raises(InputError, match="Features must have shape"):
        inverses.chain("decoder").invert(torch.randn(1, 6, 16))


def test_an_unknown_stage_names_those_there_are(inverses) -> None:
    with pytest.raises(InputError, match="did you mean 'decoder'"):
        inverses.chain("decodr")


def test_a_set_whose_stages_disagree_is_refused(detr, inverses) -> None:
    other = small.make_detr_inverses(small.make_detr_path(d_model=32))
    mixed = {"backbone": other["backbone"], "encoder": inverses["encoder"]}
    with pytest.raises(InputError, match="must fit"):
        InverseSet(mixed, PathInfo("detr", "small/detr"))


def test_a_set_comes_back_from_its_folder(detr, inverses, tmp_path) -> None:
    with torch.no_grad():
        for buffer in inverses.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2)
    inverses.eval().save_pretrained(tmp_path)
    again = InverseSet.from_pretrained(tmp_path)
    assert again.info == inverses.info
    assert again.stages == inverses.stages
    for key, value in inverses.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    queries = torch.randn(2, 5, 16)
    assert torch.equal(
        again.chain("decoder").invert(queries), inverses.chain("decoder").invert(queries)
    )


def test_an_analytic_inverse_comes_back_with_its_condition_number(vit, tmp_path) -> None:
    module = AnalyticPatchInverse.from_path(vit)
    InverseSet({"patches": module}, PathInfo("vit", vit.name)).save_pretrained(tmp_path)
    again = InverseSet.from_pretrained(tmp_path)["patches"]
    assert isinstance(again, AnalyticPatchInverse)
    assert again.condition_number == module.condition_number


def test_a_folder_that_lacks_a_module_is_an_input_error(inverses, tmp_path) -> None:
    inverses.save_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({**index, "stages": ["nothing"]}))
    with pytest.raises(InputError, match="must hold a modular inverter"):
        InverseSet.from_pretrained(tmp_path)
    del index["model"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="must hold a modular inverter"):
        InverseSet.from_pretrained(tmp_path)


def test_a_module_that_lacks_weights_is_an_input_error(inverses, tmp_path) -> None:
    inverses.save_pretrained(tmp_path)
    (path,) = (tmp_path / inverses.stages[0]).glob("*.safetensors")
    weights = load_file(path)
    weights.pop(next(key for key in weights if key.endswith("weight")))
    save_file(weights, path)
    with pytest.raises(InputError, match="1 are missing"):
        InverseSet.from_pretrained(tmp_path)


def test_tokens_are_maps_of_one_column_for_metrics(vit) -> None:
    chain = small.make_vit_inverses(vit).chain("encoder", vit)
    inverter = MapChain(chain)
    images = make_images(2)
    features, logits = inverter.backbone.features_and_logits(images)
    tokens = vit.embeddings(images, ["encoder"])["encoder"]
    assert features.shape == (2, 192, 65, 1)
    assert inverter.spec.kind == "map"
    inverter.spec.check_features(features)
    assert torch.equal(features[:, :, 3, 0], tokens[:, 3])
    assert torch.equal(inverter.invert(features), chain.invert(tokens))
    assert logits is not None
    assert torch.equal(logits, vit.model(vit.preprocess(images)))


def test_the_last_stage_of_vit_is_the_backbones_last_layer() -> None:
    backbone = wrap_model(small.make_vit_path().model, name="small/vit")
    path = VitPath(backbone.model, name="small/vit", preprocessing=backbone.preprocessing)
    inverter = MapChain(small.make_vit_inverses(path).chain("last", path))
    images = make_images(2)
    assert inverter.spec == backbone.spec
    assert torch.equal(inverter.backbone.features(images), backbone.features(images))


def test_an_unknown_inverter_names_the_bundled_ones(tmp_path) -> None:
    with pytest.raises(InputError, match="A modular inverter must be a name"):
        load_modular(str(tmp_path))
