"""`featinv export` and `featinv push`."""

from __future__ import annotations

import sys
from unittest.mock import ANY

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from typer.testing import CliRunner

from featinv_diffusion.cli.export import export, push
from featinv_diffusion.diffusion.folders import SCOPE_FILE, CardInfo
from featinv_diffusion.diffusion.hub import find_scope_file, load_pipeline
from featinv_diffusion.errors import InputError
from tests.diffusion.probe import sample
from train.tiny_family.pack import write_bundled

INFO = CardInfo(command="python -m train.tiny_family", license="apache-2.0")


def run_command(*arguments: str) -> tuple[int, str]:
    """Runs `featinv …` in this process; returns what it printed, or what it says is wrong."""
    app = typer.Typer()
    app.command("export")(export)
    app.command("push")(push)
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, InputError):
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_export_and_push_commands(family, pipeline, tmp_path, monkeypatch):
    write_bundled(pipeline, family, "convnext", INFO)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["featinv", "export", "my out"])
    code, output = run_command("export", str(out))
    assert code == 0
    assert f"Wrote {out}: 17 files" in " ".join(output.split())
    card = ModelCard.load(out / "README.md")
    assert "featinv export 'my out'" in card.text
    assert card.data.license == "apache-2.0"
    code, output = run_command("push", str(out), "user/name", "--dry-run")
    assert code == 0
    assert "featinv_pipeline.py" in output
    assert "Would upload 17 files" in output
    code, output = run_command("export", str(tmp_path / "second"), "--pipeline", str(out))
    assert code == 0
    assert torch.equal(sample(load_pipeline(tmp_path / "second")), sample(load_pipeline(out)))


def test_statistics_of_natural_maps_go_with_the_pipeline(family, pipeline, tmp_path):
    member = write_bundled(pipeline, family, "convnext", INFO)
    save_file({"a": torch.zeros(1)}, member / SCOPE_FILE)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_command("export", str(first)) == (0, ANY)
    assert run_command("export", str(second), "--pipeline", str(first)) == (0, ANY)
    assert (second / SCOPE_FILE).read_bytes() == (member / SCOPE_FILE).read_bytes()
    assert find_scope_file(second) == second / SCOPE_FILE
    assert SCOPE_FILE in run_command("push", str(second), "user/name", "--dry-run")[1]
    (second / SCOPE_FILE).write_bytes(b"cut")
    with pytest.raises(InputError, match="must be a whole safetensors file"):
        load_pipeline(second)


def test_export_command_assembles(family, pipeline, base, backbone_name, tmp_path, expected):
    pipeline.controlnet.save_pretrained(tmp_path / "net")
    options = ["--controlnet", str(tmp_path / "net"), "--base", str(base)]
    code, _ = run_command("export", str(tmp_path / "out"), *options, "--backbone", backbone_name)
    assert code == 0
    assert torch.equal(sample(load_pipeline(tmp_path / "out")), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "convnexxt"], "did you mean 'convnext'"),
        (["--controlnet", "x"], "--controlnet and --base go together"),
        (["--base", "x"], "--controlnet and --base go together"),
        (["--pipeline", "x", "--backbone", "y"], "--pipeline names a whole pipeline"),
        (["--pipeline", "x", "--controlnet", "y", "--base", "z"], "names a whole pipeline"),
        (["--pipeline", "no/such/folder"], "there is nothing at"),
    ],
)
def test_export_command_says_what_is_wrong(family, pipeline, tmp_path, options, message):
    write_bundled(pipeline, family, "convnext", INFO)
    code, output = run_command("export", str(tmp_path / "out"), *options)
    assert code == 2
    assert message in output
    assert not (tmp_path / "out").exists()
