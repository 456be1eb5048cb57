"""Compares the converted pipeline with the original code on the same random weights.

    python benchmarks/parity_original.py CHECKOUT [--full-size]

CHECKOUT is a clone of https://github.com/AI4HealthUOL/FeatInv, whose modules are imported as they
are; it needs `pip install einops`. Modules that inference does not touch (pytorch_lightning,
open_clip) are replaced by empty ones where they are not installed. Every layer that is zero at
initialisation is randomised, else the control path would not matter.

The last lines are about the way back, from the pipeline to a checkpoint and a YAML.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import sys
import tempfile
import types
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from featinv_diffusion.diffusion.convert.config import (
    read_original_config,
    sd15_config,
    to_original_config,
)
from featinv_diffusion.diffusion.convert.weights import Parts, from_original, to_original
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.schema import dump_yaml, parse_yaml

PROMPT = "a high-quality, detailed, and professional image"
YAML = "code/models/cldm_featinv_convnext.yaml"
SMALL = {"model_channels": 32, "context_dim": 128, "hint_channels": 48}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with the original code.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument(
        "--full-size", action="store_true", help="the published sizes, 1.4 G parameters"
    )
    parser.add_argument("--steps", type=int, default=10, help="of the DDIM trajectory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_grad_enabled(False)
    make_importable(args.checkout / "code")
    with tempfile.TemporaryDirectory() as folder:
        config_path = write_config(args.checkout / YAML, Path(folder), args.full_size)
        original = create(config_path)
        randomise_zeros(original)
        tensors = published_names(original.state_dict())
        parts = from_original(tensors, read_original_config(config_path))
        tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "clip")
        pipeline = FeatInvPipeline(**vars(parts), tokenizer=tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        n_parameters = sum(p.numel() for p in original.parameters())
        print(f"{n_parameters / 1e6:.1f} M parameters, float32, torch {torch.__version__}")
        print(f"{'':34}{'max |difference|':>18}{'max |original|':>18}")
        compare(original, pipeline, args.steps)
        compare_written_back(original, tensors, parts, config_path)


def compare(original: Any, pipeline: FeatInvPipeline, n_steps: int) -> None:
    """Prints one line per quantity that the two codes compute from the same inputs."""
    generator = torch.Generator().manual_seed(1)
    channels = pipeline.controlnet.config["feature_channels"]
    features = torch.randn(2, channels, 9, 9, generator=generator)
    latents = torch.randn(2, 4, 32, 32, generator=generator)
    text = original.get_learned_conditioning([PROMPT, ""])
    report("text embedding", pipeline.encode_prompt([PROMPT, ""]), text)
    hint = original.control_model.input_hint_block(features, emb=None, context=None)
    report("hint block", pipeline.controlnet.encode_condition(features, (32, 32)), hint)
    for step in (1, 501, 981):
        t = torch.full((2,), step)
        theirs = original.apply_model(latents, t, condition(features, text))
        report(
            f"epsilon at t = {step}", predict_noise(pipeline, features, latents, t, text), theirs
        )
        blind = original.apply_model(latents, t, condition(None, text))
        report("  of which due to the control path", blind, theirs)
    pictures = original.decode_first_stage(latents)
    scale = pipeline.vae.config["scaling_factor"]
    report("decoded images", pipeline.vae.decode(latents / scale).sample, pictures)
    moments = original.first_stage_model.encode(pictures).parameters
    report("encoder moments", pipeline.vae.encode(pictures).latent_dist.parameters, moments)
    compare_sampling(original, pipeline, features, latents, n_steps)


def compare_sampling(
    original: Any, pipeline: FeatInvPipeline, features: Tensor, noise: Tensor, n_steps: int
) -> None:
    """Compares the DDIM schedule and, over a whole guided trajectory, the final latents."""
    sampler_class = importlib.import_module("cldm.ddim_hacked").DDIMSampler
    # The original moves every buffer to CUDA.
    sampler_class.register_buffer = lambda self, name, value: setattr(self, name, value)
    sampler = sampler_class(original)
    with redirect_stdout(io.StringIO()):
        theirs, _ = sampler.sample(
            n_steps,
            2,
            (4, 32, 32),
            condition(features, original.get_learned_conditioning([PROMPT] * 2)),
            verbose=False,
            x_T=noise,
            unconditional_guidance_scale=1.75,
            unconditional_conditioning=condition(
                features, original.get_learned_conditioning([""] * 2)
            ),
        )
    ours: Any = pipeline(
        features=features,
        prompt=PROMPT,
        num_inference_steps=n_steps,
        guidance_scale=1.75,
        guidance="text",
        latents=noise,
        output_type="latent",
        return_dict=False,
    )[0]
    scheduler = pipeline.scheduler
    t = scheduler.timesteps
    previous = [scheduler.alphas_cumprod[i] for i in t[1:]] + [scheduler.final_alpha_cumprod]
    their_t = torch.as_tensor(sampler.ddim_timesteps.copy()).flip(0)
    report("DDIM timesteps", t, their_t)
    report("DDIM alphas", scheduler.alphas_cumprod[t], torch.as_tensor(sampler.ddim_alphas).flip(0))
    their_previous = torch.as_tensor(sampler.ddim_alphas_prev).flip(0)
    report("DDIM previous alphas", torch.stack(previous), their_previous)
    report(f"latents after {n_steps} guided steps", ours, theirs)


def predict_noise(
    pipeline: FeatInvPipeline, features: Tensor, latents: Tensor, t: Tensor, text: Tensor
) -> Tensor:
    down, middle = pipeline.controlnet(latents, t, text, features, return_dict=False)
    return pipeline.unet(
        latents,
        t,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample


def condition(features: Tensor | None, text: Tensor) -> dict[str, Any]:
    return {"c_concat": None if features is None else [features], "c_crossattn": [text]}


def report(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = (ours.double() - theirs.double()).abs().max().item()
    print(f"{name:34}{difference:>18.3g}{theirs.abs().max().item():>18.3g}", flush=True)


def compare_written_back(
    original: Any, tensors: dict[str, Tensor], parts: Parts, config_path: Path
) -> None:
    """Prints how the checkpoint written back differs, and loads it into a model of its own YAML."""
    back, config = to_original(parts)
    only = sorted(tensors.keys() ^ back.keys())
    unequal = [name for name in tensors.keys() & back.keys() if not tensors[name].equal(back[name])]
    print(f"written back: {len(back)} tensors, {len(only)} names and {len(unequal)} values differ")
    for name in [*only, *unequal]:
        print(f"  {name}")
    tree = to_original_config(config)
    written = parse_yaml(config_path.read_text(), str(config_path))
    tree["model"]["params"]["cond_stage_config"] = written["model"]["params"]["cond_stage_config"]
    config_path.write_text(dump_yaml(tree))
    again = create(config_path)
    installed = dict(zip(published_names(again.state_dict()), again.state_dict(), strict=True))
    again.load_state_dict({installed[name]: tensor for name, tensor in back.items()}, strict=True)
    same = all(map(torch.equal, original.state_dict().values(), again.state_dict().values()))
    print(f"loaded with strict=True into a model built from the YAML written back: equal {same}")


def create(config_path: Path) -> Any:
    """Builds the original model, without the lines it prints for each block."""
    with redirect_stdout(io.StringIO()):
        return importlib.import_module("cldm.model").create_model(str(config_path)).eval()


def make_importable(code: Path) -> None:
    """Puts the original code on the path, and empty modules where inference needs none."""
    if not (code / "cldm" / "cldm.py").is_file():
        raise SystemExit(f"{code.parent} must be a checkout of the original FeatInv repository.")
    if importlib.util.find_spec("einops") is None:
        raise SystemExit("The original code needs einops: pip install einops")
    sys.path.insert(0, str(code))
    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = type(  # pyright: ignore[reportAttributeAccessIssue]
        "LightningModule", (nn.Module,), {"device": property(lambda self: self.betas.device)}
    )
    utilities = types.ModuleType("pytorch_lightning.utilities")
    distributed = types.ModuleType("pytorch_lightning.utilities.distributed")
    distributed.rank_zero_only = lambda function: function  # pyright: ignore[reportAttributeAccessIssue]
    for module in (lightning, utilities, distributed):
        sys.modules[module.__name__] = module  # today's Lightning has no `utilities.distributed`
    if importlib.util.find_spec("open_clip") is None:
        sys.modules["open_clip"] = types.ModuleType("open_clip")


def write_config(published: Path, folder: Path, full_size: bool) -> Path:
    """Writes the published YAML, reduced unless `full_size`, and a random CLIP beside it."""
    config = parse_yaml(published.read_text(), str(published))
    params = config["model"]["params"]
    if not full_size:
        for part in ("control_stage_config", "unet_config"):
            shrink(params[part]["params"], SMALL)
        shrink(params["first_stage_config"]["params"]["ddconfig"], {"ch": 32})
    width = params["unet_config"]["params"]["context_dim"]
    text_config: dict[str, Any] = sd15_config().text_encoder | {"vocab_size": 514}
    if not full_size:
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
        text_config |= {**sizes, "num_attention_heads": width // 64}
    CLIPTextModel(CLIPTextConfig(**text_config)).save_pretrained(folder / "clip")
    byte_tokenizer().save_pretrained(folder / "clip")
    params["cond_stage_config"]["params"] = {"version": str(folder / "clip"), "device": "cpu"}
    path = folder / "cldm.yaml"
    path.write_text(dump_yaml(config))
    return path


def shrink(params: dict[str, Any], sizes: dict[str, int]) -> None:
    params.update({name: value for name, value in sizes.items() if name in params})


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per character."""
    characters = [chr(i) for i in range(33, 289)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def randomise_zeros(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names the text encoder's tensors as the transformers release of the original code did."""
    outer, inner = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."
    return {
        inner + name.removeprefix(outer)
        if name.startswith(outer) and not name.startswith(inner)
        else name: tensor
        for name, tensor in state.items()
    }


if __name__ == "__main__":
    main()
