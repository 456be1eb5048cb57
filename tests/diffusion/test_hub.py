"""Pipelines to folders and to a (fake) Hub, and back, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import CardInfo
from featinv_diffusion.diffusion.hub import export_pipeline, load_pipeline, origin_of, push_folder
from featinv_diffusion.errors import InputError
from tests import tiny
from tests.diffusion import probe
from tests.diffusion.probe import sample
from tests.fake_hub import COMMIT, TOKEN, FakeHub
from train.tiny_family.pack import write_bundled

ROOT = Path(__file__).parents[2]
INFO = CardInfo(command="featinv export out", license="apache-2.0")


def run_script(
    script: str, folder: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder`, isolated: neither the working directory nor PYTHONPATH is seen."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    clean |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(
        [sys.executable, "-I", "-c", Path(probe.__file__).read_text() + textwrap.dedent(script)],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# ---- the folder ----------------------------------------------------------------------------------


def test_folder_holds_safetensors_configs_and_its_own_code(saved_pipeline):
    assert names(saved_pipeline) == {
        "README.md",
        "model_index.json",
        "featinv_pipeline.py",
        "backbone/config.json",
        "backbone/model.safetensors",
        "controlnet/config.json",
        "controlnet/diffusion_pytorch_model.safetensors",
        "controlnet/featinv_controlnet.py",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    for name in ("featinv_pipeline.py", "controlnet/featinv_controlnet.py"):
        source = ROOT / "featinv_diffusion/diffusion" / Path(name).name
        assert (saved_pipeline / name).read_text() == source.read_text()
    index = json.loads((saved_pipeline / "model_index.json").read_text())
    assert index["_class_name"] == ["featinv_pipeline", "FeatInvPipeline"]
    assert index["controlnet"] == ["featinv_controlnet", "FeatureControlNet"]
    assert index["backbone"] == ["transformers", "TimmWrapperForImageClassification"]


def test_saving_writes_a_card_with_the_command_of_the_process(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/convert.py", "my file.ckpt"])
    pipeline.save_pretrained(tmp_path / "name")
    card = ModelCard.load(tmp_path / "name/README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.license == "other"
    assert "\nconvert.py 'my file.ckpt'\n" in card.text
    assert card.text.strip().startswith("# name")
    without = tiny.make_pipeline(backbone=None).make_model_card("name", "command")
    assert "encode_features" not in str(without)


def test_pickles_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="safetensors"):
        pipeline.save_pretrained(tmp_path / "out", safe_serialization=False)


def test_others_may_read_it_and_learn_no_path_of_this_machine(saved_pipeline, tmp_path):
    again = tmp_path / "again"
    FeatInvPipeline.from_pretrained(saved_pipeline).save_pretrained(again)
    plain = tmp_path / "plain"
    plain.touch()
    for path in (p for p in again.rglob("*") if p.is_file()):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode), path
        if path.suffix == ".json":
            assert "_name_or_path" not in path.read_text()
            assert str(tmp_path.parent) not in path.read_text()


def test_round_trip_keeps_every_weight_and_setting(pipeline, saved_pipeline):
    loaded = FeatInvPipeline.from_pretrained(saved_pipeline)
    for name in ("unet", "vae", "text_encoder", "controlnet", "backbone"):
        before, after = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before), name
    assert loaded.parameters == pipeline.parameters
    assert dict(loaded.backbone.config.id2label) == {i: f"class {i}" for i in range(10)}
    assert torch.equal(sample(loaded), sample(pipeline))


def test_optional_parts_stay_away(tmp_path):
    light = tiny.make_pipeline(text_encoder=None, tokenizer=None, backbone=None)
    light.save_pretrained(tmp_path / "light")
    assert not (tmp_path / "light/text_encoder").exists()
    loaded = load_pipeline(tmp_path / "light")
    assert loaded.text_encoder is None
    assert loaded.backbone is None


def test_loads_without_the_package(saved_pipeline, expected, tmp_path):
    """Plain diffusers, from a folder and from a Hub; and what it saves again is the same folder."""
    shutil.copytree(saved_pipeline, tmp_path / "hub/user/tiny-featinv")
    script = f"""
    import sys
    sys.modules["featinv_diffusion"] = None  # also where the package is installed
    try:
        import featinv_diffusion
    except ImportError:
        pass
    else:
        raise SystemExit("the package must not be importable here")
    from diffusers import DiffusionPipeline
    for i, source in enumerate([{str(saved_pipeline)!r}, "again0", "user/tiny-featinv"]):
        pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
        assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe).__module__
        assert type(pipe.controlnet).__module__.startswith("diffusers_modules.")
        torch.save(sample(pipe), f"sample{{i}}.pt")
        pipe.save_pretrained(f"again{{i}}")
    """
    with FakeHub(tmp_path / "hub") as server:
        done = run_script(script, tmp_path, {"HF_ENDPOINT": server.endpoint})
        fetched = {line.split()[1].partition("/resolve/")[2] for line in server.requests}
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    assert "main/featinv_pipeline.py" in fetched or f"{COMMIT}/featinv_pipeline.py" in fetched
    for i in range(3):
        assert torch.equal(torch.load(tmp_path / f"sample{i}.pt"), expected)
        again = tmp_path / f"again{i}"
        assert names(again) == names(saved_pipeline)
        for name in names(saved_pipeline) - {"README.md"}:
            assert (again / name).read_bytes() == (saved_pipeline / name).read_bytes(), name
    assert torch.equal(sample(load_pipeline(tmp_path / "again2")), expected)


def test_shipped_code_needs_trust_and_the_installed_class_does_not_run_it(copied, expected):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(copied)
    for path in (copied / "featinv_pipeline.py", copied / "controlnet/featinv_controlnet.py"):
        path.write_text("raise SystemExit('this code must not run')")
    assert torch.equal(sample(FeatInvPipeline.from_pretrained(copied)), expected)
    assert torch.equal(sample(load_pipeline(copied)), expected)


# ---- the Hub -------------------------------------------------------------------------------------


def test_pushes_to_a_hub_and_loads_from_there(copied, expected, tmp_path):
    (tmp_path / "hub").mkdir()
    (copied / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    script = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
    from featinv_diffusion.diffusion.hub import load_pipeline, push_folder
    from featinv_diffusion.errors import InputError

    def refused(call, *args):
        try:
            call(*args)
        except InputError as error:
            print(error)

    folder = {str(copied)!r}
    listed = push_folder(folder, "user/pushed", dry_run=True)
    refused(push_folder, folder, "stranger/pushed")
    assert push_folder(folder, "user/pushed", private=True) == listed
    torch.save(sample(load_pipeline("user/pushed")), "sample0.pt")
    torch.save(sample(FeatInvPipeline.from_pretrained("user/pushed")), "sample1.pt")
    refused(load_pipeline, "user/no-such-pipeline")
    pipe = FeatInvPipeline.from_pretrained(folder)
    pipe.save_pretrained("saved", push_to_hub=True, repo_id="user/saved", private=True)
    import os
    os.environ["HF_TOKEN"] = "hf_wrong"
    refused(push_folder, folder, "user/pushed")
    """
    with FakeHub(tmp_path / "hub") as server:
        env = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN}
        done = run_script(script, tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "hub/user/pushed") == names(copied)
    assert names(tmp_path / "hub/user/saved") == names(copied)
    assert not (tmp_path / "hub/stranger").exists()
    for name in ("sample0.pt", "sample1.pt"):
        assert torch.equal(torch.load(tmp_path / name), expected)
    forbidden, unknown, unauthorised = done.stdout.strip().splitlines()
    assert "stranger/pushed could not be written to" in forbidden
    assert "status 403" in forbidden
    assert "The Hub has no repository user/no-such-pipeline that you may see" in unknown
    assert "hf auth login" in unauthorised
    assert "status 401" in unauthorised


def test_dry_run_lists_all_files_with_their_sizes_and_needs_no_network(copied):
    (copied / ".git").mkdir()
    (copied / ".git/config").write_text("hidden")
    listed = dict(push_folder(copied, "user/name", dry_run=True))
    assert set(listed) == names(copied) - {".git/config"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert listed[weights] == (copied / weights).stat().st_size


@pytest.mark.parametrize("repo", ["no-user", "user/na me", "a/b/c", "user/x--y", ""])
def test_push_needs_a_repository_name(copied, repo):
    with pytest.raises(InputError, match="must be named user/name"):
        push_folder(copied, repo, dry_run=True)


def test_push_refuses_pickles_and_folders_that_do_not_load(copied):
    (copied / "unet/old.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"safetensors only, but has unet/old\.bin"):
        push_folder(copied, "user/name", dry_run=True)
    (copied / "unet/old.bin").unlink()
    (copied / "vae/config.json").unlink()
    with pytest.raises(InputError, match=r"vae/config\.json is missing"):
        push_folder(copied, "user/name", dry_run=True)


def test_push_without_a_network_says_so(copied):
    words = r"user/name could not be written to: .*cannot be reached. .*HF_HUB_OFFLINE\.$"
    with pytest.raises(InputError, match=words):
        push_folder(copied, "user/name")


# ---- names and damage ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "there is nothing at './no/such/folder'"),
        ("/no/such/folder", "there is nothing at"),
        ("tiny/convnexxt", "No bundled pipeline is named 'tiny/convnexxt'; did you mean 'tiny/c"),
        ("convnext", "did you mean 'tiny/convnext'"),
        ("user/pipeline", "user/pipeline could not be downloaded: .*HF_HUB_OFFLINE"),
        (__file__, "there is a file at"),
    ],
)
def test_names_that_mean_nothing(family, pipeline, name, message):
    write_bundled(pipeline, family, "convnext", INFO)
    with pytest.raises(InputError, match=message):
        load_pipeline(name)


def replace_class(path: Path) -> None:
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model_index.json", Path.unlink, "model_index.json is missing"),
        ("model_index.json", lambda p: p.write_text("{"), "must hold JSON"),
        ("model_index.json", lambda p: p.write_text("[]"), "group of named values"),
        ("model_index.json", replace_class, "must hold a FeatInvPipeline, but .*StableDiffusion"),
        ("unet/config.json", Path.unlink, "unet/config.json is missing"),
        ("unet/diffusion_pytorch_model.safetensors", Path.unlink, "unet/diff.* is missing"),
        ("controlnet/diffusion_pytorch_model.safetensors", truncate, "controlnet/.*is truncated"),
        ("backbone/model.safetensors", truncate, "backbone/model.safetensors .*is truncated"),
        ("text_encoder/model.safetensors", lambda p: p.write_bytes(b""), "is truncated"),
        ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json is missing"),
        ("tokenizer/tokenizer.json", Path.unlink, "tokenizer.json is missing"),
    ],
)
def test_a_damaged_folder_is_named_with_its_file(copied, file, damage, message):
    damage(copied / file)
    with pytest.raises(InputError, match=message):
        load_pipeline(copied)


def test_weights_of_another_size_are_refused(copied):
    path = copied / "controlnet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["feature_encoder.conv1.weight"] = tensors["feature_encoder.conv1.weight"][:, :5].clone()
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"must fit their config\.json, but do not load"):
        load_pipeline(copied)


def test_a_backbone_of_another_pipeline_is_refused(copied):
    tiny.make_backbone(dims=(8, 16, 24, 40)).save_pretrained(copied / "backbone")
    with pytest.raises(InputError, match=r"32×8×8, but the features are .*40×8×8"):
        load_pipeline(copied)


def test_loads_as_float32_unless_told_otherwise(tmp_path):
    parts = {k: v.half() for k, v in tiny.make_components().items() if hasattr(v, "half")}
    tiny.make_pipeline(**parts).save_pretrained(tmp_path / "half")
    for dtype, kwargs in ((torch.float32, {}), (torch.bfloat16, {"torch_dtype": torch.bfloat16})):
        pipeline = load_pipeline(tmp_path / "half", **kwargs)
        assert {getattr(pipeline, name).dtype for name in parts} == {dtype}


# ---- export --------------------------------------------------------------------------------------


def test_export_writes_a_folder_with_a_card(pipeline, tmp_path, capfd):
    command = "featinv export out --backbone convnext"
    info = CardInfo(command=command, license="mit", base_models=["user/base", "timm/some"])
    folder = export_pipeline(pipeline, tmp_path / "deep/out", info)
    assert torch.equal(sample(load_pipeline(folder)), sample(pipeline))
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.license == "mit"
    assert card.data.base_model == ["user/base", "timm/some"]
    assert "feature-inversion" in card.data.tags
    assert command in card.text
    assert "32×8×8, layer `last` of `tiny/convnext`" in card.text
    assert "64 × 64 pixels" in card.text
    assert not [p for p in folder.parent.iterdir() if p != folder]
    assert capfd.readouterr().err == ""
    assert stat.S_IMODE(folder.stat().st_mode) & 0o055 == 0o055 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_code_of_the_card_runs(pipeline, tmp_path, monkeypatch):
    folder = export_pipeline(pipeline, tmp_path / "out", INFO)
    card = ModelCard.load(folder / "README.md").text
    first, second = (block.split("```")[0] for block in card.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    tiny_photo = torch.zeros(3, 70, 90).permute(1, 2, 0).byte().numpy()

    PIL.Image.fromarray(tiny_photo).save("photo.jpg")
    scope: dict = {}
    exec(
        first.replace("num_images_per_prompt=4", "num_images_per_prompt=2, num_inference_steps=1"),
        scope,
    )
    assert len(scope["images"]) == 2
    exec(second, scope)
    assert isinstance(scope["pipe"], FeatInvPipeline)


def test_export_keeps_what_is_there(pipeline, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="must be a new or empty folder"):
        export_pipeline(pipeline, out, INFO)
    assert names(tmp_path) == {"out/mine.txt"}
    with pytest.raises(InputError, match="must be a new or empty folder"):
        export_pipeline(pipeline, out / "mine.txt", INFO)
    empty = tmp_path / "empty"
    empty.mkdir()
    export_pipeline(pipeline, empty, INFO)
    assert (empty / "model_index.json").is_file()


def test_a_full_disk_leaves_nothing(pipeline, tmp_path, monkeypatch):
    save = pipeline.vae.save_pretrained

    def fail(folder, **kwargs):
        save(folder, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline.vae, "save_pretrained", fail)
    with pytest.raises(InputError, match=r"out could not be written: .*No space left on device"):
        export_pipeline(pipeline, tmp_path / "out", INFO)
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_system_cuts_off_leaves_nothing(pipeline, tmp_path):
    """As a full disk does it: the write itself fails, deep inside safetensors."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        with pytest.raises(InputError, match="out could not be written"):
            export_pipeline(pipeline, tmp_path / "out", INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_origin_names_license_base_models_and_notes(pipeline, tmp_path):
    info = CardInfo("first", "mit", ["user/base"], "## Figures\n\nNone.")
    folder = export_pipeline(pipeline, tmp_path / "out", info)
    assert origin_of(folder, "second", pipeline) == replace(info, command="second")
    assert origin_of("user/repo", "c", pipeline) == CardInfo("c", None, ["user/repo"])
    pipeline.backbone.config.pretrained_cfg["hf_hub_id"] = "timm/model"
    assert origin_of("user/repo", "c", pipeline).base_models == ["user/repo", "timm/model"]
    (folder / "README.md").write_text("---\nbase_model: user/one\n---\n# Somebody else's\n")
    assert origin_of(folder, "c", tiny.make_pipeline()) == CardInfo("c", None, ["user/one"])
    (folder / "README.md").unlink()
    assert origin_of(folder, "c", tiny.make_pipeline()) == CardInfo("c")


# ---- what users of diffusers expect --------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_pipeline():
    pipeline = load_pipeline("tiny/convnext")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_variant_loads_and_is_pushed_with_the_scope(tiny_pipeline, tmp_path: Path):
    folder = tmp_path / "half"
    tiny_pipeline.save_pretrained(folder, variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert (folder / "scope.safetensors").is_file()
    loaded = load_pipeline(folder)
    ours, theirs = tiny_pipeline.unet.state_dict(), loaded.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.scope_file == folder / "scope.safetensors"
    assert "scope.safetensors" in dict(push_folder(folder, "user/name", dry_run=True))


def test_a_card_is_pushed_without_paths_and_html(tiny_pipeline, tmp_path: Path):
    card = str(
        tiny_pipeline.make_model_card("a <b>\n---", "featinv export /home/alice/x --base=~/y")
    )
    assert "alice" not in card
    assert "featinv export x --base=y" in card
    assert "# a &lt;b> ---" in card


def test_numbers_and_arrays_of_numpy_are_those_of_python(tiny_pipeline):
    features = tiny_pipeline.encode_features(torch.rand(1, 3, 64, 64))

    def call(features, one, half):
        generator = torch.Generator().manual_seed(0)
        return tiny_pipeline(
            features=features, num_inference_steps=one, controlnet_conditioning_scale=half,
            num_images_per_prompt=one, generator=generator, output_type="pt",
        ).images  # fmt: skip

    plain = call(features, 1, 0.5)
    assert torch.equal(plain, call(features.numpy(), np.int64(1), np.float32(0.5)))


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "IPNDMScheduler"]
)
def test_a_scheduler_of_another_kind_is_refused(tiny_pipeline, name: str, monkeypatch):
    other = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config)
    monkeypatch.setattr(tiny_pipeline, "scheduler", other)
    with pytest.raises(ValueError, match=f"{name} does not. Use DDIMScheduler"):
        tiny_pipeline(features=torch.zeros(1, 256, 8, 8))


def test_the_stock_callback_cuts_the_guidance_off(tiny_pipeline):
    features = tiny_pipeline.encode_features(torch.rand(2, 3, 64, 64))
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    images = tiny_pipeline(
        features=features, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
        callback_on_step_end=cutoff,
    ).images  # fmt: skip
    assert images.isfinite().all()
    assert tiny_pipeline.guidance_scale == 1
