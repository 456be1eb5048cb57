"""The comparison of encoders on backbones and inverters whose figures are known beforehand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipModel, ViTConfig, ViTModel
from typer.testing import CliRunner

from featinv_diffusion.backbones import Backbone, load_backbone, wrap_model
from featinv_diffusion.backbones.base import Preprocessing
from featinv_diffusion.data.selection import Item, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.features import MSE_FLOOR, psnr
from featinv_diffusion.metrics.statistics import holm, wilcoxon_signed_rank
from featinv_diffusion.studies.encoders import (
    BUNDLED_SCORERS,
    NULL,
    Encoder,
    Measured,
    Scorer,
    make_labels,
    measure_encoders,
    open_encoders,
    open_scorers,
    order_line,
    parse_inverter,
    pooled_embedding,
    select,
    summarise,
    to_markdown,
)
from featinv_diffusion.studies.settings import EncoderSettings
from featinv_diffusion.types import Features, FeatureSpec, Images
from tests.inverters import small
from tests.inverters.test_rae import make_rae
from tests.tiny import make_images


class PixelBackbone(Backbone):
    """Whose features are the pixels at its input size."""

    def __init__(self, name: str, size: int):
        preprocessing = Preprocessing((size, size), (0.0,) * 3, (1.0,) * 3, "bilinear")
        super().__init__(nn.Linear(1, 1), name=name, preprocessing=preprocessing)
        self.spec = FeatureSpec(name, "last", 3, (size, size))

    @property
    def has_head(self) -> bool:
        return False

    def _features(self, images: Images) -> Features:
        return self.preprocess(images)

    def features_and_logits(self, images: Images) -> tuple[Features, None]:
        return self.features(images), None

    def layers(self) -> list[FeatureSpec]:
        return [self.spec]

    def _run(self, pixels: Tensor) -> Tensor:
        return pixels

    def _class_names(self) -> None:
        return None


class Scaling(Inverter):
    """An inverter that darkens by a factor."""

    def __init__(self, backbone: Backbone, factor: float):
        self.backbone, self.factor, self.spec = backbone, factor, backbone.spec
        self.networks = {}

    def _invert(self, features: Features, generator: Any) -> Images:
        return features * self.factor


def encoder(label: str, size: int, factor: float) -> Encoder:
    backbone = PixelBackbone(label, size)
    return Encoder(label, f"folder/{label}", Scaling(backbone, factor))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of 32×32 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(make_images(5)):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{i}.png")
    return folder


def chosen(folder: Path) -> tuple[ImageSet, list[Item]]:
    images = open_images(str(folder), "validation")
    return images, select_items(images, select(EncoderSettings()))


def originals_of(images: ImageSet, items: list[Item]) -> Tensor:
    from featinv_diffusion.images import to_tensor

    return to_tensor([images.read(item.index) for item in items])


def test_figures_of_known_inverters(pictures: Path) -> None:
    images, items = chosen(pictures)
    encoders = [encoder("exact", 32, 1.0), encoder("dark", 32, 0.5), encoder("coarse", 16, 1.0)]
    scorer = Scorer(PixelBackbone("judge", 8))
    seen: list[float] = []
    result = measure_encoders(encoders, [scorer], images, items, 2, seen.append)
    assert sum(seen) == 15
    assert result.size == 32
    assert result.metrics == ["psnr", "ssim", "delta_e_2000", "similarity_judge"]
    originals = originals_of(images, items)

    exact, dark, coarse = (result.columns[e.label] for e in encoders)
    assert exact["psnr"].tolist() == pytest.approx([-10 * math.log10(MSE_FLOOR)] * 5)
    assert exact["delta_e_2000"].abs().max() < 1e-4
    assert exact["similarity_judge"].tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    halved = (originals * 0.5 * 255).round() / 255
    torch.testing.assert_close(dark["psnr"], psnr(halved, originals))
    small_ones = F.interpolate(originals, (16, 16), mode="bilinear", antialias=True)
    back = F.interpolate((small_ones * 255).round() / 255, (32, 32), mode="bilinear")
    torch.testing.assert_close(coarse["psnr"], psnr(back, originals), rtol=1e-4, atol=1e-3)

    vectors = F.interpolate(originals, (8, 8), mode="bilinear", antialias=True).mean((2, 3))
    partner = vectors[[1, 2, 3, 4, 0]]
    wanted = F.cosine_similarity(vectors, partner)
    torch.testing.assert_close(exact[NULL + "similarity_judge"], wanted)
    torch.testing.assert_close(result.original, originals)
    torch.testing.assert_close(result.examples["exact"], originals)
    assert result.examples["coarse"].shape == (5, 3, 16, 16)


def test_the_null_is_an_image_of_another_class(pictures: Path) -> None:
    images, items = chosen(pictures)
    labelled = [replace(item, label=i % 2) for i, item in enumerate(items[:4])]
    scorer = Scorer(PixelBackbone("judge", 8))

    def compare(chosen_items: list[Item]) -> dict[str, Tensor]:
        exact = encoder("exact", 32, 1.0)
        return measure_encoders([exact], [scorer], images, chosen_items, 4).columns["exact"]

    vectors = scorer.embed(originals_of(images, labelled))
    wanted = F.cosine_similarity(vectors, vectors[[1, 2, 3, 0]])
    torch.testing.assert_close(compare(labelled)[NULL + "similarity_judge"], wanted)
    assert NULL + "similarity_judge" not in compare(labelled[:1])


def test_samples_that_are_not_finite_are_refused(pictures: Path) -> None:
    images, items = chosen(pictures)
    broken = encoder("broken", 32, float("nan"))
    with pytest.raises(InputError, match="NaN"):
        measure_encoders([broken], [], images, items, 5)


def comparison(**factors: float) -> Measured:
    """Columns that are one draw per metric, times a factor per encoder."""
    draw = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.5
    names = ("psnr", "delta_e_2000", "similarity_judge", NULL + "similarity_judge")
    columns = {label: {name: draw * factor for name in names} for label, factor in factors.items()}
    encoders = [encoder(label, 32, 1.0) for label in factors]
    return Measured(encoders, 32, [str(i) for i in range(40)], columns)


def test_three_are_ranked_and_their_pairs_corrected() -> None:
    given = comparison(a=1.0, b=1.2, c=1.001)
    found = summarise(given)
    assert found["ranking"] == {
        "psnr": ["b", "c", "a"],
        "delta_e_2000": ["a", "c", "b"],
        "similarity_judge": ["b", "c", "a"],
    }
    pairs = found["pairs"]["psnr"]
    assert [(row["a"], row["b"]) for row in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    raw = [
        wilcoxon_signed_rank(given.columns[a]["psnr"], given.columns[b]["psnr"]).p_value
        for a, b in (("a", "b"), ("a", "c"), ("b", "c"))
    ]
    assert [row["wilcoxon"]["p_holm"] for row in pairs] == pytest.approx(holm(raw))
    assert [row["wilcoxon"]["effect"] for row in pairs] == [-1.0, -1.0, 1.0]
    assert pairs[0]["difference"]["high"] < 0 < pairs[2]["difference"]["low"]
    figure = found["encoders"][1]["figures"]["psnr"]
    assert figure["value"] == pytest.approx(float(given.columns["b"]["psnr"].double().mean()))


ROWS = ("| a", "| b", "| c")


def test_two_need_no_correction_and_the_page_says_which_is_best() -> None:
    found = summarise(comparison(a=1.0, b=1.2))
    row = found["pairs"]["psnr"][0]
    assert row["wilcoxon"]["p_holm"] == row["wilcoxon"]["p_value"]
    page = {"n_images": 40, "command": "featinv analyze", "settings": {"data": "x"}, **found}
    text = to_markdown(page)
    assert "Holm" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| b |")]
    assert line.count("**") == 4  # PSNR and similarity; ΔE is higher, and so worse
    three = summarise(comparison(a=1.0, b=1.2, c=0.9))
    assert "Holm" in to_markdown({**page, **three})


def test_an_order_is_strict_only_where_both_tests_are() -> None:
    found = summarise(comparison(a=1.0, b=1.2, c=1.2))
    assert order_line(found, "psnr") == "PSNR, dB: b ≈ c > a"
    assert order_line(found, "delta_e_2000") == "ΔE2000, lower is better: a < b ≈ c"
    page = {"n_images": 40, "command": "featinv analyze", "settings": {"data": "x"}, **found}
    text = to_markdown(page)
    assert "- PSNR, dB: b ≈ c > a" in text
    marked = {line[2]: line.count("**") for line in text.splitlines() if line[:3] in ROWS}
    assert marked == {"a": 2, "b": 4, "c": 4}
    found["pairs"]["psnr"][0]["bootstrap"]["p_holm"] = 0.05  # of a and b
    found["pairs"]["psnr"][1]["bootstrap"]["p_holm"] = 0.05  # of a and c
    assert order_line(found, "psnr") == "PSNR, dB: b ≈ c ≈ a"


def test_timm_is_scored_by_what_its_head_reads() -> None:
    backbone = load_backbone("tiny/convnext")
    images = make_images(2)
    model: Any = backbone.model
    head = model.get_classifier()
    torch.testing.assert_close(head(pooled_embedding(backbone, images)), backbone.classify(images))


def test_towers_are_scored_by_their_pooled_output() -> None:
    from train.tiny_family.contrastive import ContrastiveModelConfig, make_networks, normalise

    config = ContrastiveModelConfig(
        patch_size=16, hidden_size=32, depth=1, n_heads=2, text_hidden_size=16, text_depth=1
    )
    siglip: SiglipModel = make_networks(config, 64, ["one", "two"])[0].siglip.eval()
    images = make_images(2)
    wanted: Any = siglip.get_image_features(pixel_values=normalise(images))
    backbone = wrap_model(siglip.vision_model, name="siglip")
    torch.testing.assert_close(pooled_embedding(backbone, images), wanted.pooler_output)

    make_config: Any = ViTConfig
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    plain = ViTModel(
        make_config(image_size=64, num_attention_heads=2, **sizes), add_pooling_layer=False
    )
    unpooled = wrap_model(plain.eval(), name="vit")
    mean = unpooled.features(images).mean((2, 3))
    torch.testing.assert_close(pooled_embedding(unpooled, images), mean)


def test_a_grey_scorer_does_not_see_colour() -> None:
    images = make_images(2)
    luma = (images * torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]).sum(1, keepdim=True)
    backbone = PixelBackbone("judge", images.shape[-1])
    grey, colour = Scorer(backbone, grey=True), Scorer(backbone)
    assert (grey.column, colour.column) == ("grey_similarity_judge", "similarity_judge")
    torch.testing.assert_close(grey.embed(images), grey.embed(luma.expand(-1, 3, -1, -1)))
    assert not torch.allclose(grey.embed(images), colour.embed(images))
    torch.testing.assert_close(colour.embed(images).norm(dim=1), torch.ones(2))


def test_default_scorer_is_none_of_the_compared() -> None:
    (scorer,) = open_scorers((), ["tiny/siglip", "vit"], grey=False)
    assert scorer.backbone.name == "tiny/convnext"
    both = open_scorers((), ["tiny/convnext", "vit"], grey=True)
    assert [s.column for s in both] == ["similarity_tiny/resnet", "grey_similarity_tiny/resnet"]
    with pytest.raises(InputError, match="All bundled classifiers are compared"):
        open_scorers((), BUNDLED_SCORERS, grey=False)
    with pytest.raises(InputError, match="not be among the compared encoders, got 'tiny/vit'"):
        open_scorers(("tiny/vit",), ["vit"], grey=False)
    with pytest.raises(InputError, match="each backbone once, got tiny/swin, swin"):
        open_scorers(("tiny/swin", "swin"), [], grey=False)


def test_labels_tell_encoders_apart() -> None:
    assert make_labels([("siglip", "x/a/final"), ("vit", "vit")]) == ["siglip", "vit"]
    named = [("siglip", "/x/a/final"), ("siglip", "/x/b/final"), ("vit", "vit")]
    assert make_labels(named) == ["a/final", "b/final", "vit"]
    named = [("siglip", "/x/a/final/r"), ("siglip", "/x/b/final/r")]
    assert make_labels(named) == ["a/final/r", "b/final/r"]
    assert make_labels([("vit", "vit"), ("vit", "diffusion:tiny/vit")]) == [
        "vit",
        "diffusion:tiny/vit",
    ]
    named = [("tiny/vit", "x/y/z"), ("q", "p/tiny/vit"), ("q", "r/s")]
    assert make_labels(named) == ["y/z", "p/tiny/vit", "r/s"]
    named = [("a", "/f"), ("a", "/x/f"), ("a", "f")]
    assert make_labels(named) == ["/f", "x/f", "f"]
    with pytest.raises(InputError, match="got 'x/f' twice"):
        make_labels([("a", "x/f"), ("a", "x/f/")])


def test_an_inverter_may_name_a_stage_and_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a@b:c", "x"):
        (tmp_path / folder).mkdir()
    cases = {
        "vit": ("vit", None, None),
        "vit@blocks.3": ("vit", "blocks.3", None),
        "rae:owner/name": ("rae", None, "owner/name"),
        "rae@last:C:/x@y": ("rae", "last", "C:/x@y"),
        "a@b:c": ("a@b:c", None, None),
        "a@b:c@last": ("a@b:c", "last", None),
        "x/": ("x/", None, None),
    }
    for text, wanted in cases.items():
        found = parse_inverter(text)
        assert (found.inverter, found.stage, found.pipeline) == wanted
    for text in ("vit@", "rae:", "@last", ":p"):
        with pytest.raises(InputError, match="NAME@STAGE or NAME:PIPELINE"):
            parse_inverter(text)


def test_stages_and_autoencoders_can_be_ranked(tmp_path: Path) -> None:
    make_rae("mae").save_pretrained(tmp_path / "mae")
    rae = f"rae:{tmp_path / 'mae'}"
    names = ("vit", "vit@blocks.2", rae)
    encoders = open_encoders(names, "cpu")
    assert [e.label for e in encoders] == ["vit", "vit@blocks.2", "rae/mae"]
    assert encoders[1].inverter.spec.layer == "blocks.2"
    items = [Item(index=0, id="0", label=None, seed=0, has_null=False)]
    assert encoders[2].reconstruct(make_images(1), items).shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="takes no pipeline"):
        open_encoders(("vit:p", "siglip"), "cpu")


def test_one_encoder_is_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    (tmp_path / "link").symlink_to("f")
    one_folder = [("f", other) for other in ("f/", "./f", "link", str(tmp_path / "f"))]
    one_stage = [("f@x", "f/@x"), ("vit", "vit@encoder")]
    same_name = [("vit", "vit"), ("vit", "siglip", "vit")]
    for names in [(), ("vit",), *same_name, *one_folder, *one_stage]:
        with pytest.raises(InputError, match="at least two different inverters"):
            open_encoders(names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two inverters of one detector, of which the second has other weights."""
    folders = []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name)
        path = small.make_detr_path()
        inverses = small.make_detr_inverses(path)
        if name == "second":
            with torch.no_grad():
                for parameter in inverses.parameters():
                    parameter.mul_(0.5)
        path.model.save_pretrained(folder / "detector")
        inverses.save_pretrained(folder / "inverter")
        folders.append(folder / "inverter")
    return folders


def run(*arguments: object) -> Any:
    from featinv_diffusion.cli import app

    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def test_the_command_writes_tables_and_figures(
    saved: list[Path], pictures: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "encoders.yaml"
    settings.write_text(f"data: {pictures}\nn_images: 3\ngrey: true\n")
    output = tmp_path / "out"
    inverters = ",".join(map(str, saved))
    arguments = ["--config", settings, "--inverter", inverters, "--n-images", 4]
    done = run("encoders", *arguments, "--output", output)
    assert done.exit_code == 0, done.output
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["n_images"] == 4
    columns = ["psnr", "ssim", "delta_e_2000"]
    columns += ["similarity_tiny/convnext", "grey_similarity_tiny/convnext"]
    assert list(metrics["ranking"]) == columns
    table = parquet.read_table(output / "per_image.parquet").to_pydict()
    assert sorted(table["id"]) == sorted(set(table["id"]))
    for one in metrics["encoders"]:
        values = table[f"{one['label']}/psnr"]
        assert one["figures"]["psnr"]["value"] == pytest.approx(sum(values) / 4)
    assert (output / "metrics.md").read_text().count("| PSNR, dB |") == 2
    (order,) = [line for line in done.output.splitlines() if line.startswith("ΔE2000")]
    figures = {e["label"]: e["figures"]["delta_e_2000"]["value"] for e in metrics["encoders"]}
    best, worst = sorted(figures, key=lambda label: figures[label])
    assert order.startswith(f"ΔE2000, lower is better: {best} ")
    assert order.endswith(f" {worst}")
    whole = tmp_path / "all"  # of a small folder, where no number is given
    done = run("encoders", "--inverter", inverters, "--data", pictures, "--output", whole)
    assert done.exit_code == 0, done.exception
    assert json.loads((whole / "metrics.json").read_text())["n_images"] == len(
        list(pictures.rglob("*.png"))
    )
    done = run("encoders", *arguments, "--n-images", 1, "--output", tmp_path / "none")
    assert isinstance(done.exception, InputError)
    assert "at least 2 images" in str(done.exception)
    for name in ("encoders.png", "reconstructions.png"):
        assert (output / name).stat().st_size > 1000


def test_the_published_protocol_is_read() -> None:
    from featinv_diffusion.config import load_flat

    path = Path(__file__).parents[2] / "configs/evaluation/siglip-coco.yaml"
    settings = load_flat(EncoderSettings, path, {})
    assert (settings.pictures.n_images, settings.grey, len(settings.scorers)) == (4000, True, 2)


def test_reconstructors_are_trained_on_the_squares_that_are_compared() -> None:
    from featinv_diffusion.config import load_config
    from featinv_diffusion.training.reconstructor import ReconstructorConfig

    for name in ("siglip", "siglip2"):
        path = Path(__file__).parents[2] / f"configs/inverters/{name}.yaml"
        assert load_config(ReconstructorConfig, path).data.crop == "center"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encoders", "--inverter", "vit", "--data", "."], "at least two different inverters"),
        (["encoders", "--inverter", "vit,detr"], "must be named"),
        (["stages", "--inverter", "vit", "--data", ".", "--grey"], "--grey is for `analyze"),
        (["stages", "--data", "."], "needs --inverter"),
        (["encodes", "--data", "."], "No analysis is named 'encodes'"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], message: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    done = run(*arguments, *(["--n-images", "2"] if arguments[0] == "encoders" else []))
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
