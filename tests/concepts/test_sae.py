"""SAEs of any callables: the verbs of all dictionaries, with the SAE's own codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featinv_diffusion.concepts import ConceptDictionary, SAEConcepts, SparseAutoencoder, make_head
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import scale_part
from featinv_diffusion.types import FeatureSpec
from tests.concepts.planted import make_generator, to_cells, to_map
from train.sae import train_sae

SPEC = FeatureSpec("tiny/convnext", "last", 10, (4, 4))
FEATURES = to_map(torch.randn(32, 10, generator=make_generator()), side=4)
WEIGHT = torch.randn(24, 10, generator=make_generator(1))
DECODER = torch.randn(24, 10, generator=make_generator(2))
BIAS = torch.randn(10, generator=make_generator(3))


def encode(cells):
    return (cells @ WEIGHT.to(cells).T - 1).relu()


def decode(codes):
    return codes @ DECODER.to(codes) + BIAS.to(codes)


def decode_bent(codes):
    return (codes @ DECODER.to(codes) + BIAS.to(codes)).tanh()


BUILDERS = {
    "linear": lambda: SAEConcepts(encode=encode, decode=decode, spec=SPEC),
    "bent": lambda: SAEConcepts(encode=encode, decode=decode_bent, spec=SPEC),
    "chosen": lambda: SAEConcepts(encode=encode, decode=decode, spec=SPEC).reorder([5, 3, 11]),
    "bent chosen": lambda: SAEConcepts(encode=encode, decode=decode_bent, spec=SPEC).reorder(
        [7, 3]
    ),
}


@pytest.fixture(params=BUILDERS)
def concepts(request) -> SAEConcepts:
    return BUILDERS[request.param]()


def test_codes_are_those_of_the_callable(concepts):
    expected = encode(to_cells(FEATURES))[:, concepts.latents]
    assert torch.equal(to_cells(concepts.encode(FEATURES)), expected)
    assert concepts.n_concepts == len(concepts.latents)


def test_parts_and_remainder_sum_to_the_features(concepts):
    parts = concepts.parts(FEATURES)
    assert parts.shape == (2, concepts.n_concepts, 10, 4, 4)
    total = parts.sum(dim=1) + concepts.remainder(FEATURES)
    torch.testing.assert_close(total, FEATURES, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.norm(dim=2), concepts.activations(FEATURES, "none"))


def test_an_edit_keeps_the_error_of_the_sae(concepts):
    codes = concepts.encode(FEATURES)
    assert torch.equal(concepts.edit(FEATURES, codes), FEATURES)
    changed = codes.clone()
    changed[:, 1] = 2.5
    full = encode(to_cells(FEATURES))
    wanted = full.clone()
    wanted[:, concepts.latents[1]] = 2.5
    decoder = decode if concepts.is_linear else decode_bent
    error = to_cells(FEATURES) - decoder(full)
    found = concepts.edit(FEATURES, changed)
    torch.testing.assert_close(to_cells(found), decoder(wanted) + error, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, concepts.set_code(FEATURES, 1, 2.5))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    local = concepts.set_code(FEATURES, 1, 2.5, mask)
    assert torch.equal(local[..., 1, 2], found[..., 1, 2])
    assert torch.equal(local[..., ~mask], FEATURES[..., ~mask])


def test_a_part_is_what_leaves_when_the_code_becomes_zero(concepts):
    without = concepts.set_code(FEATURES, 0, 0.0)
    part = concepts.part(FEATURES, 0)
    assert part.any()
    torch.testing.assert_close(scale_part(FEATURES, part, 0), without, atol=1e-6, rtol=1e-5)


def test_a_linear_edit_is_the_change_of_the_code_along_the_direction():
    concepts = BUILDERS["linear"]()
    change = to_cells(concepts.set_code(FEATURES, 3, 2.0) - FEATURES)
    expected = (2.0 - encode(to_cells(FEATURES))[:, 3:4]) * DECODER[3]
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(concepts.directions, DECODER, atol=1e-5, rtol=1e-5)


def test_a_logit_is_the_sum_of_local_relevances_and_the_bias(concepts):
    torch.manual_seed(0)
    head = make_head(nn.Linear(10, 3), nn.LayerNorm(10))
    relevance = concepts.local_relevance(FEATURES, head, 2)
    logits = relevance.mean(dim=(2, 3)).sum(dim=1) + head.bias[2]
    torch.testing.assert_close(logits, head.logits(FEATURES)[:, 2], atol=1e-4, rtol=1e-4)


def test_a_decoder_that_is_not_linear_has_no_directions():
    concepts = BUILDERS["bent"]()
    assert not concepts.is_linear
    assert BUILDERS["linear"]().is_linear
    with pytest.raises(InputError, match="must be linear"):
        concepts.global_relevance(torch.ones(10))


def test_callables_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="which features"):
        SAEConcepts(encode, decode)
    with pytest.raises(InputError, match="Return the codes alone"):
        SAEConcepts(lambda cells: (cells, encode(cells)), decode, SPEC)
    with pytest.raises(InputError, match="Return the cells alone"):
        SAEConcepts(encode, lambda codes: codes, SPEC)
    with pytest.raises(InputError, match="each cell by itself"):
        SAEConcepts(lambda cells: encode(cells - cells.mean(dim=0)), decode, SPEC)
    with pytest.raises(InputError, match=r"must take float32 cells \[n, 10\]"):
        SAEConcepts(nn.Linear(7, 3), decode, SPEC)
    with pytest.raises(InputError, match="finite"):
        SAEConcepts(lambda cells: encode(cells) / 0, decode, SPEC)
    with pytest.raises(InputError, match="cannot be saved"):
        BUILDERS["linear"]().save(tmp_path / "sae.safetensors")
    with pytest.raises(InputError, match="shape"):
        BUILDERS["linear"]().edit(FEATURES, torch.zeros(2, 3, 4, 4))


def make_sae(**settings: object) -> SparseAutoencoder:
    tensors = {"encoder.0.weight": WEIGHT, "decoder": DECODER, "post_bias": BIAS}
    return SparseAutoencoder(tensors, {"activation": "top_k", "k": 4, **settings})


@pytest.mark.parametrize("normalise", [None, "layer_norm"])
def test_save_and_load(tmp_path, normalise):
    concepts = SAEConcepts.of(make_sae(normalise=normalise), SPEC).fit(FEATURES)
    concepts.reorder([3, 0, 20])
    concepts.save(tmp_path / "sae.safetensors")
    loaded = ConceptDictionary.load(tmp_path / "sae.safetensors")
    assert isinstance(loaded, SAEConcepts)
    assert loaded.latents == [3, 0, 20]
    assert (loaded.spec, loaded.report) == (SPEC, concepts.report)
    assert torch.equal(loaded.encode(FEATURES), concepts.encode(FEATURES))
    assert torch.equal(loaded.parts(FEATURES), concepts.parts(FEATURES))


def test_the_report_is_how_much_comes_back():
    concepts = SAEConcepts.of(make_sae(), SPEC).fit(FEATURES)
    cells = to_cells(FEATURES)
    codes = make_sae().encode(cells)
    lost = (cells - codes @ DECODER - BIAS).square().sum() / cells.square().sum()
    assert concepts.report["energy"] == pytest.approx(1 - lost.item(), rel=1e-6)
    assert concepts.report["codes_per_cell"] == pytest.approx(4, abs=0.5)


def test_another_width_is_refused():
    with pytest.raises(InputError, match=r"must read cells of 12 channels .* reads 10"):
        SAEConcepts.of(make_sae(), FeatureSpec("tiny/vit", "last", 12, (4, 4)))


def test_planted_directions_are_recovered():
    """Sparse combinations of 48 directions in 24 dimensions; each is found by some latent."""
    generator = make_generator(5)
    planted = nn.functional.normalize(torch.randn(48, 24, generator=generator), dim=1)
    places = torch.rand(20_000, 48, generator=generator).argsort(dim=1)[:, :3]
    values = 1 + torch.rand(20_000, 3, generator=generator)
    cells = torch.zeros(20_000, 48).scatter(1, places, values) @ planted
    sae = train_sae(cells, n_latents=64, k=3, n_steps=900, batch_size=256, learning_rate=3e-3)
    cosine = nn.functional.normalize(sae.decoder, dim=1) @ planted.T
    best = cosine.amax(dim=0)
    assert (best > 0.95).double().mean() >= 0.9, best.sort().values
    random = nn.functional.normalize(torch.randn(64, 24, generator=generator), dim=1) @ planted.T
    assert (random.amax(dim=0) > 0.95).double().mean() == 0
