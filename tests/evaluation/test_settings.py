"""Settings hold those of the samples; files see them side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.settings import SampleSettings, changed, from_flat

KEYS = """
attention backbone baselines_from batch_size capture classes data device dtype evaluated_by
fd_dinov2 fid guidance guidance_scale held_back_per_class inception_weights inverter layer lpips
lpips_weights n_baseline_images n_gallery_images n_images n_null_images n_optimised_images
parametrise per_class pipeline quality reference refine refine_at save_images scheduler seed
selection shard_size split stage steps strength
"""


def test_the_keys_of_files_stay():
    assert sorted(EvaluationSettings().content()) == KEYS.split()


def test_one_sample_of_each_image():
    assert EvaluationSettings().sampling.n_samples == 1
    assert from_flat(EvaluationSettings, {"steps": 3}).sampling == SampleSettings(
        n_samples=1, steps=3
    )
    with pytest.raises(InputError, match="takes one sample of each image, got 3"):
        from_flat(EvaluationSettings, {"n_samples": 3})


def test_a_run_may_go_on_on_another_gpu_and_be_summarised_with_another_reference():
    settings = EvaluationSettings(sampling=SampleSettings(device="cuda:0"), fid="clean")
    same = replace(changed(settings, device="cuda:3"), reference="photos")
    assert same.identity() == settings.identity()
    assert changed(settings, device="cpu").identity() != settings.identity()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"n_images": 0}, "n_images must be at least 1, got 0"),
        ({"held_back_per_class": -1}, "held_back_per_class must be at least 0, got -1"),
        ({"shard_size": 1}, "shard_size must be at least 2, got 1"),
        ({"shard_size": 513}, "shard_size must be at most 512, got 513"),
        ({"lpips": "resnet"}, "No lpips is named 'resnet'"),
        ({"fid": "cleann"}, "did you mean 'clean'"),
        ({"evaluated_by": ("vit", "vit")}, "names a backbone twice: vit, vit"),
        ({"reference": "a"}, "--reference does nothing without --fid or --fd-dinov2"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_values_are_refused(values, sentence: str):
    with pytest.raises(InputError, match=sentence):
        from_flat(EvaluationSettings, values)
