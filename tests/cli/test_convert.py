"""`featinv convert`: both ways through the command line, and what it says to bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from featinv_diffusion.diffusion.convert.folder import write_original
from featinv_diffusion.diffusion.convert.weights import to_original
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.hub import load_pipeline
from tests import tiny
from tests.diffusion.original import assert_same_weights, make_parts

WITH_YAML = ["{made}/control.ckpt", "out", "--original-config", "{made}/control.yaml"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny original checkpoint, its YAML and its tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    tiny.make_tokenizer().save_pretrained(folder / "clip")
    write_original(FeatInvPipeline(**vars(make_parts()), tokenizer=None), folder / "control.ckpt")
    return folder


def test_both_ways(featinv, made, tmp_path):
    outcome = featinv(
        "convert",
        made / "control.ckpt",
        tmp_path / "pipeline",
        "--original-config",
        made / "control.yaml",
        "--tokenizer",
        made / "clip",
        "--no-backbone",
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        f"Wrote {tmp_path / 'pipeline'}, without backbone. "
        "It inverts layer 'last' of test_vit, 64×10×10.\n"
    )
    pipeline = load_pipeline(tmp_path / "pipeline")
    assert_same_weights(pipeline, make_parts())
    assert len(pipeline.tokenizer) == 514
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "featinv convert " in card
    assert str(made) not in card  # a card tells nothing of the machine
    back = featinv("convert", tmp_path / "pipeline", tmp_path / "back.safetensors", "--reverse")
    assert back.code == 0
    expected = f"Wrote {tmp_path / 'back.safetensors'} and {tmp_path / 'back.yaml'}.\n"
    assert back.out == expected
    assert back.err.startswith("Note: Some sizes are fixed in the original code")
    assert yaml.safe_load((tmp_path / "back.yaml").read_text()) == yaml.safe_load(
        (made / "control.yaml").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent.ckpt", "out"], "Error: A checkpoint must be a file, but absent.ckpt is not one."),
        (["{made}/control.ckpt", "{made}"], "must be a new or empty folder"),
        (["{made}/control.ckpt", "out"], "Pass the backbone it was trained on as --backbone"),
        (["{made}/control.ckpt", "out", "--backbone", "test_vit"], "as --original-config"),
        (WITH_YAML, "'openai/clip-vit-large-patch14' cannot be loaded"),
        (
            [*WITH_YAML, "--no-tokenizer", "--backbone", "resnet50.tv_in1k"],
            "64 channels, but the features are a map of resnet50.tv_in1k at layer 'last', 2048×7×7",
        ),
        (
            ["{made}/control.ckpt", "out", "--no-tokenizer", "--backbone", "convnect"],
            "did you mean 'convnext'",
        ),
        (["x", "out", "--tokenizer", "a", "--no-tokenizer"], "not both"),
        (["x", "out.ckpt", "--reverse", "--backbone", "convnext"], "leave --backbone out"),
        (["tiny/convnext", "out.ckpt", "--reverse"], "cannot be written to the original layout"),
        (["tiny/convnext", "out", "--reverse"], "must end in one of .safetensors, .ckpt, .pt"),
        (["absent", "out.ckpt", "--reverse"], "nothing at 'absent'"),
    ],
)
def test_bad_input(featinv, made, arguments, sentence):
    outcome = featinv("convert", *(argument.format(made=made) for argument in arguments))
    assert outcome.code == 2
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("out").exists()
    assert not Path("out.ckpt").exists()


def test_a_pickled_object_is_refused(featinv, tmp_path):
    torch.save({"state_dict": to_original(make_parts())[0], "run": Path("x")}, tmp_path / "m.ckpt")
    outcome = featinv("convert", tmp_path / "m.ckpt", "out")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "holds a pickled object (pathlib." in outcome.err


def test_half_of_a_checkpoint_is_refused(featinv, tmp_path):
    save_file(to_original(make_parts())[0], tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(content[: len(content) // 2])
    outcome = featinv("convert", tmp_path / "m.safetensors", "out")
    assert outcome.code == 2
    assert "is truncated or no safetensors file" in outcome.err
