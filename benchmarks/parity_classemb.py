"""Compares the class-embedding measures with the published code on the same random tiny ViT.

    python benchmarks/parity_classemb.py CHECKOUT

CHECKOUT is a clone of https://github.com/martinagvilas/vit-cls_emb, whose modules are imported as
they are; it needs pandas, tqdm and scikit-learn. What has changed since 2023 is adapted from
outside: old timm names are supplied, its own copy of the ViT takes the place of pretrained models,
plain hooks that of traced feature extractors, and modules that the measures do not touch (cv2,
the DeiT ensemble) are empty. The data are random pictures in the folder layout that it expects.
"""

from __future__ import annotations

import argparse
import builtins
import copy
import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.class_embedding import measures
from featinv_diffusion.class_embedding.anatomy import Anatomy, make_random, read_anatomy, record
from featinv_diffusion.class_embedding.images import to_input
from featinv_diffusion.class_embedding.probes import fit_probes
from featinv_diffusion.class_embedding.reading import (
    Reading,
    attention_rollout_relevance,
    negative_probability,
    read_images,
    relevance_of,
)
from featinv_diffusion.class_embedding.removal import (
    order_by,
    read_ablated,
    read_tokens_alone,
    removal_curve,
)

NAME, DEPTH, GRID, CLASSES, PER_CLASS, N_CLASSES = "vit_b_32", 12, (7, 7), 1000, 5, 3
SIZE: dict[str, Any] = {"img_size": 56, "patch_size": 8, "embed_dim": 48, "num_heads": 4}
BLOCK, PROBED, PROBE_LAYER, KEPT = (
    11,
    (0, 7),
    "hs-5",
    (1, 9, 20, 34, 48),
)  # 12 blocks, 1000 classes and 50 tokens are fixed
PAGE_PART = Path("outputs/class-embedding/parity.md")  # for benchmarks/class_embedding.py


class Bench:
    """The published code on one side, ours on the other, and the same images for both."""

    def __init__(self, checkout: Path, folder: Path):
        self.folder = folder
        self.anatomy = make_anatomy()
        make_importable(checkout)
        self.vit: Any = importlib.import_module("src.models.vit_edited")
        write_dataset(folder)
        self.random = make_random(self.anatomy)
        self.adapt()
        torch.manual_seed(0)
        dataset = self.load("datasets.imagenet").ImagenetDatasetS(folder)
        self.table = dataset.stim_info
        self.labels = torch.tensor(self.table["index"].to_numpy())
        self.images = self.to_images([dataset[i]["img"] for i in range(len(dataset))])
        teach_classes(self.anatomy, self.images, self.labels)
        self.reading: Reading = read_images(self.anatomy, self.images, self.labels)

    def load(self, name: str) -> Any:
        return importlib.import_module(f"src.{name}")

    def to_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        return to_input(pictures, self.anatomy.backbone)

    def transform(self, pictures: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        batch = pictures if isinstance(pictures, list) else [pictures]
        return {"pixel_values": self.anatomy.backbone.preprocess(self.to_images(batch))}

    def make_theirs(self, anatomy: Anatomy | None = None, **options: Any) -> nn.Module:
        options = {key: options[key] for key in ("perturb_type", "block_perturb") if key in options}
        model = self.vit.VisionTransformer(**SIZE, depth=DEPTH, num_classes=CLASSES, **options)
        state = (anatomy or self.anatomy).backbone.model.state_dict()
        missing = model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        return model.eval()

    def load_vit(self, *_: Any, pretrained: bool = True, **__: Any) -> tuple[Any, ...]:
        model = self.make_theirs(None if pretrained else self.random)
        return model, 1 + GRID[0] * GRID[1], SIZE["embed_dim"], self.transform

    def adapt(self) -> None:
        """Replaces downloads and what the libraries no longer have."""
        processor = types.SimpleNamespace(from_pretrained=lambda _: self.transform)
        for name in ("extractor", "memories", "gradients", "linear_probing.prober"):
            self.load(name)
        parts = ("attn_perturbation", "tokens_perturbation", "explain_perturbation")
        perturbations = [self.load(f"perturbation.{name}") for name in parts]
        for module in (self.load("gradients"), *perturbations):
            module.vit_base_patch32_224 = lambda **options: self.make_theirs(**options)
            module.ViTImageProcessor = processor
            module.model = NAME  # read from the command line's scope
        for name in ("extractor", "memories"):
            self.load(name).load_vit = self.load_vit
        prober = self.load("linear_probing.prober")
        prober.AutoImageProcessor = processor
        prober.create_model = lambda *_, **__: self.make_theirs()
        prober.range = lambda n: list(PROBED) if n == 50 else builtins.range(n)
        prober.create_feature_extractor = Extractor
        self.load("extractor").create_feature_extractor = Extractor


class Extractor:
    """Stands in for a traced feature extractor: the outputs of nodes, by hooks."""

    def __init__(self, model: nn.Module, nodes: Any):
        self.model: Any = model
        self.nodes = nodes if isinstance(nodes, dict) else {node: node for node in nodes}

    def to(self, _device: Any) -> Extractor:
        return self

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(
                lambda _m, _x, output, name=name: outputs.__setitem__(name, output)
            )
            for name, module in self.model.named_modules()
        ]
        self.model(pixels)
        for handle in handles:
            handle.remove()
        return {alias: self.find(node, outputs) for node, alias in self.nodes.items()}

    def find(self, node: str, outputs: dict[str, Tensor]) -> Tensor:
        if node.endswith("add_1"):
            return outputs[node.removesuffix(".add_1")]
        block = node.partition(".attn.")[0]
        if node.endswith("softmax"):
            return self.model.get_submodule(f"{block}.attn").attn_probs
        if "getitem" in node:
            qkv = outputs[f"{block}.attn.qkv"]
            heads = qkv.unflatten(-1, (3, SIZE["num_heads"], -1)).permute(2, 0, 3, 1, 4)
            return heads[1 if node.endswith("4") else 2]
        return outputs[node]


def make_anatomy() -> Anatomy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch32_224", pretrained=False, **SIZE)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return read_anatomy(wrap_model(model, name="random ViT", input_size=SIZE["img_size"]))


def teach_classes(anatomy: Anatomy, images: Tensor, labels: Tensor) -> None:
    """Sets the embeddings of the classes in use so that some images are classified right."""
    tokens = anatomy.norm(record(anatomy, images).states[-1])[:, 0]
    for label in labels.unique().tolist():
        direction = tokens[labels == label].mean(0) - tokens.mean(0)
        anatomy.head.weight.data[label] = 3 * direction / direction.square().sum()
        anatomy.head.bias.data[label] = -anatomy.head.weight.data[label] @ tokens.mean(0)


def make_importable(checkout: Path) -> None:
    if not (checkout / "src" / "extractor.py").is_file():
        sys.exit(f"Error: CHECKOUT must be a clone of vit-cls_emb, but {checkout} is not.")
    sys.path.insert(0, str(checkout))
    layers: Any = importlib.import_module("timm.models.layers")
    for name in ("PatchEmbed", "Mlp", "DropPath", "trunc_normal_", "lecun_normal_"):
        setattr(layers, name, getattr(importlib.import_module("timm.layers"), name))
    helpers: Any = importlib.import_module("timm.models.helpers")
    for name in ("build_model_with_cfg", "resolve_pretrained_cfg"):
        setattr(helpers, name, getattr(importlib.import_module("timm.models._builder"), name))
    for name in ("named_apply", "adapt_input_conv", "checkpoint_seq"):
        setattr(helpers, name, getattr(importlib.import_module("timm.models._manipulate"), name))
    registry: Any = importlib.import_module("timm.models.registry")
    registry.register_model = lambda function: function  # else timm's own names are replaced
    sys.modules["cv2"] = types.ModuleType("cv2")
    ensemble: Any = types.ModuleType("src.models.deit_ensemble")
    ensemble.base_patch16_224_hierarchical = None
    sys.modules["src.models.deit_ensemble"] = ensemble


def write_dataset(folder: Path) -> None:
    root = folder / "ImageNetS919"
    ids = [f"n{i:08d}" for i in range(CLASSES)]
    root.mkdir(parents=True)
    (root / "LOC_synset_mapping.txt").write_text("\n".join(f"{x} class {x}" for x in ids) + "\n")
    generator = np.random.default_rng(0)
    for part, count in (("validation", PER_CLASS), ("test", 10)):
        for number in range(N_CLASSES):
            place = root / part / ids[300 * number + 7]
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
                pixels[..., number] //= 3  # what tells the classes apart
                picture = Image.fromarray(pixels).resize((56, 56), Image.Resampling.BICUBIC)
                picture.save(place / f"{i}.JPEG", quality=95)


Row = tuple[str, str, str]


def compare(name: str, theirs: Any, ours: Any, note: str = "") -> Row:
    a = torch.as_tensor(np.asarray(theirs)).double()
    b = torch.as_tensor(np.asarray(ours)).double()
    assert a.shape == b.shape, (name, a.shape, b.shape)
    difference = f"{(a - b).abs().max().item():.3g} ({a.abs().max().item():.3g})"
    return name, difference, note


def projections(bench: Bench) -> list[Row]:
    """Runs the extractor; the other measures read its files."""
    extractor = bench.load("extractor").ViTExtractor(NAME, bench.folder, bench.folder)
    extractor.extract_hidden_states()
    found = bench.load("identifiability")
    path, states = bench.folder / "results", bench.reading.states
    assert states is not None
    rows = []
    for label, part in (("states", "hs"), ("attention", "hs-attn"), ("mlp", "hs-mlp")):
        points: Any = getattr(bench.reading, label)
        shift = 1 if label == "states" else 0
        for kind, ours in (("probs", points.score), ("pos", points.rank)):
            theirs = [
                found.get_class_embed(path, bench.folder, NAME, f"{part}_{b}", kind)
                for b in range(DEPTH)
            ]
            name = "score" if kind == "probs" else "rank"
            rows.append(compare(f"{label}: {name}", torch.stack(theirs, 1), ours[:, shift:]))
    frame = found.get_ident_mean_evolution(NAME, bench.folder, path)
    ours = measures.class_identifiability(states.rank[:, 1:], CLASSES).double()
    for token, mean in (("[CLS]", ours[:, :, 0]), ("image", ours[:, :, 1:].mean(2))):
        column = frame.loc[frame["token type"] == token, "class identifiability"]
        values = np.array([float(x) for x in column])
        rows.append(compare(f"identifiability by block, {token}", values, mean.mean(0)))
    return rows


def changes(bench: Bench) -> list[Row]:
    found, path, reading = bench.load("identifiability"), bench.folder / "results", bench.reading
    assert reading.states is not None
    frame = found.get_ident_change_rate(NAME, bench.folder, path)
    ours = measures.block_change_rate(reading.states, 1).mean(0)[1:]
    rows = [compare("block change rate, blocks 2 to 12", frame["change rate"], ours)]
    for layer, short in (("attention", "attn"), ("mlp", "mlp")):
        differences = [
            found.compute_class_similarity_change(NAME, b, short, bench.folder, path)
            for b in range(1, DEPTH)
        ]
        theirs = torch.stack([(d[:, 1:] > 0).float().mean() for d in differences])
        rate = measures.layer_change_rate(getattr(reading, layer), reading.states, slice(1, None))
        rows.append(compare(f"layer change rate, {layer}", theirs, rate.mean(0)[1:]))
    # The source files are read as `topk`, a kind that get_class_embed takes as it is.
    frame = found.compute_residual_match(NAME, bench.folder, path)
    assert reading.attention is not None
    assert reading.mlp is not None
    shares = measures.residual_composition(reading.states, reading.attention, reading.mlp)
    for source, short in (("previous", "prev"), ("attention", "attn"), ("mlp", "mlp")):
        theirs = frame.loc[frame["Source"] == short, "match"].to_numpy() / 100
        rows.append(compare(f"composition: {source}", theirs, shares[source].mean(0)[1:]))
    theirs = frame.loc[frame["Source"] == "comp", "match"].to_numpy() / 100
    top = reading.states.top[:, 1:]
    is_new = (top != reading.states.top[:, :-1]) & (top != reading.attention.top)
    note = "theirs tests attention twice and never the MLP"
    rows.append(compare("composition: none", theirs, shares["composition"].mean(0)[1:], note))
    repeated = is_new.float().mean(2).mean(0)[1:]
    rows.append(compare("composition: none, with their mistake", theirs, repeated))
    return rows


def memory_measures(bench: Bench) -> list[Row]:
    module, rows, reading = bench.load("memories"), [], bench.reading
    memory = module.Memory(bench.folder, bench.folder, NAME)
    before = copy.deepcopy(memory.model.state_dict())
    for layer, short in (("attention", "attn"), ("mlp", "mlp")):
        activated: Any = getattr(reading, f"{layer}_memories")
        points: Any = getattr(reading, layer)
        for b in range(DEPTH):
            memory.compute_key_value_agreement(b, short)
        frame = module.compute_key_value_agr_rate(NAME, short, bench.folder / "results")
        theirs = frame["agreement rate"].to_numpy().reshape(DEPTH, -1).mean(1) / 100
        agreed = measures.key_value_agreement(
            activated, measures.class_memories(bench.anatomy, layer), reading.labels
        )
        ours = measures.mean_over_classes(agreed.float().mean(2), reading.labels)
        rows.append(compare(f"key–value agreement, {layer}", theirs, ours))
        memory.compute_composition(BLOCK, short)
        file = bench.folder / f"results/memories/{NAME}/{short}_{BLOCK}_top5_pred-match.pt"
        matched = torch.load(file).flatten(0, 1).any(-1)
        composed = measures.memory_compositionality(
            activated, measures.memory_classes(bench.anatomy, layer), points.top
        )
        rows.append(
            compare(
                f"memory compositionality, {layer}", matched.float(), composed[:, BLOCK].float()
            )
        )
    for layer, short in (("attention", "attn"), ("mlp", "mlp")):
        frame, p_values, random = memory.compute_class_value_agr(short)
        ours = measures.class_value_agreement(bench.anatomy, layer)
        null = measures.class_value_agreement(bench.random, layer)
        theirs = frame["top-1 logits"].to_numpy().reshape(DEPTH, -1)
        rows.append(compare(f"class–value agreement, {layer}", theirs, ours))
        rows.append(compare(f"its random model, {layer}", random, null.mean(1)))
        rows.append(
            compare(f"its p-values, {layer}", p_values, measures.agreement_p_values(ours, null))
        )
    changed = sum(not torch.equal(before[k], v) for k, v in memory.model.state_dict().items())
    rows.append(("weights that were changed by it", f"{changed} tensors; ours: 0", "in place"))
    return rows


def double_softmax(scores: Tensor, labels: Tensor) -> Tensor:
    """The published objective: cross-entropy of probabilities taken for scores."""
    return nn.functional.cross_entropy(scores.softmax(dim=-1), labels, reduction="none")


def relevance(bench: Bench) -> list[Row]:
    theirs_of = bench.load("gradients").ViTGradients(NAME, bench.folder, bench.folder)
    chefer_of = bench.load("gradients").CheferGradients(NAME, bench.folder, bench.folder)
    theirs, chefer = [], []
    for index in (0, PER_CLASS):
        row = bench.table.iloc[index]
        picked = (row["imagenet_id"], int(row["img_index"]), int(row["index"]))
        gradients, _ = theirs_of.compute(*picked)
        theirs.append(torch.stack([-gradients[b][:, 0] for b in range(DEPTH)]))
        chefer.append(chefer_of.compute(*picked))
    rows = [0, PER_CLASS]
    labels = bench.labels[rows]
    trace = record(bench.anatomy, bench.images[rows])

    def ours(objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        found = [
            relevance_of(bench.anatomy, b, trace.mixed[b], trace.values[b], labels, objective)[0]
            for b in range(DEPTH)
        ]
        return torch.stack(found, dim=1)

    published, probability = torch.stack(theirs).detach(), ours(negative_probability)
    correlation = torch.corrcoef(torch.stack([published.flatten(), probability.flatten()]))[0, 1]
    rolled = attention_rollout_relevance(bench.anatomy, bench.images[rows], labels)[:, 1:]
    return [
        compare("relevance, softmax taken twice", published, ours(double_softmax)),
        (
            "its correlation with −∂p/∂a",
            f"{correlation:.6f}",
            "what the double softmax amounts to; scale "
            f"{(probability.norm() / published.norm()).item():.4f}",
        ),
        compare("Chefer's relevance", torch.stack(chefer).detach(), rolled),
    ]


def ablations(bench: Bench) -> list[Row]:
    rows = []
    module = bench.load("perturbation.attn_perturbation")
    for kind in ("self_only", "no_cls"):
        module.ViTPerturbAttn("32", bench.folder, bench.folder, perturb_type=kind).compute()
        file = bench.folder / f"results/perturbation/{NAME}/attn-{kind}_dec.pt"
        states = read_ablated(bench.anatomy, bench.images, bench.labels, kind).states
        assert states is not None
        rows.append(compare(f"{kind}: rank of all tokens", torch.load(file), states.rank[:, -1]))
    return rows + contexts(bench)


def contexts(bench: Bench) -> list[Row]:
    """Kept tokens alone; theirs counts the class token too, so it is taken out of their files."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(len(bench.labels), *GRID, generator=generator) < 0.4
    number = {(r.imagenet_id, r.img_index): i for i, r in enumerate(bench.table.itertuples())}
    module, rows = bench.load("perturbation.tokens_perturbation"), []

    class Masks:
        def __init__(self, *_: Any):
            pass

        def get_segmentation(self, concept: str, idx: int) -> np.ndarray:
            return masks[number[concept, idx]].numpy().astype(int)

    module.Vis = Masks
    for kind, kept in (("context", masks), ("class_label", ~masks)):
        module.ViTPerturbTokens("32", bench.folder, bench.folder).compute(kind)
        file = bench.folder / f"results/perturbation/{NAME}/no_{kind}_tokens_dec.pt"
        ranks = torch.load(file, weights_only=False)[f"hs_{BLOCK}"]
        rate = torch.stack([(rank[1:] == 0).float().mean() for rank in ranks])
        ours = read_tokens_alone(bench.anatomy, bench.images, bench.labels, kept.flatten(1))
        rows.append(compare(f"without {kind.replace('_', ' ')} tokens: rate", rate, ours.rate))
    return rows


def removal(bench: Bench) -> list[Row]:
    assert bench.reading.relevance is not None
    order = order_by(bench.reading.relevance.sum(1)[:, 1:])
    module, rows = bench.load("perturbation.explain_perturbation"), []
    module.range = lambda *ends: KEPT if ends == (1, 49) else builtins.range(*ends)
    for direction in ("negative", "positive"):
        test = module.ViTPerturb(NAME, bench.folder, bench.folder)
        torch.save(order + 1, test.perturb_path / "masks" / "grads.pt")
        test.compute(direction, "grads")
        accuracy = torch.load(test.perturb_path / f"{direction}_grads.pt") * 4550
        ours = removal_curve(bench.anatomy, bench.images, bench.labels, order, direction)
        rows.append(
            compare(
                f"perturbation, {direction}: images right with {', '.join(map(str, KEPT))} tokens",
                accuracy,
                ours.correct.sum(0)[[count - 1 for count in KEPT]],
                "theirs divides by 4,550 whatever the data, and leaves out all 49",
            )
        )
    return rows


def probes(bench: Bench) -> list[Row]:
    prober = bench.load("linear_probing.prober").LinearProber(
        NAME, PROBE_LAYER, bench.folder, bench.folder, "cpu"
    )
    prober.compute()
    train = bench.load("datasets.imagenet").ImagenetDatasetS(bench.folder, partition="test", n=10)
    pictures = [train[i]["img"] for i in range(len(train))]
    labels = torch.tensor(train.stim_info["index"].to_numpy())
    block = int(PROBE_LAYER.partition("-")[2]) + 1
    seen = record(bench.anatomy, bench.to_images(pictures)).states[block][:, list(PROBED)]
    tested = record(bench.anatomy, bench.images).states[block][:, list(PROBED)]
    ours = fit_probes(seen, labels, CLASSES)
    scores = ours.predict(tested)
    folder, rows = bench.folder / "results/linear_probing" / PROBE_LAYER, []
    accuracies = np.load(folder / "acc.npy")
    right = (scores.argmax(-1) == bench.labels[:, None]).double().mean(0)
    rows.append(compare("linear probes: accuracy at two tokens", accuracies, right))
    theirs = np.stack([np.load(folder / f"pos_t{t}.npy") for t in PROBED], axis=1)
    same = (theirs == ours.rank(tested, bench.labels).numpy()).mean()
    note = "theirs solves by lsqr, to 1e-4"
    return [*rows, ("linear probes: share of equal ranks", f"{same:.2f}", note)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with the published code.")
    parser.add_argument("checkout", type=Path)
    checkout = parser.parse_args().checkout.resolve()
    parts = (projections, changes, memory_measures, relevance, ablations, removal, probes)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(checkout, Path(folder))
        table = [row for part in parts for row in part(bench)]
    lines = ["| measure | max abs difference (largest value of theirs) | |", "|---|---|---|"]
    text = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table)])
    PAGE_PART.parent.mkdir(parents=True, exist_ok=True)
    PAGE_PART.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
