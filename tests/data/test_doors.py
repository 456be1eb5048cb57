"""Training, evaluation and sampling read the same pixels from whatever holds the pictures."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from featinv_diffusion.data.crops import CropDataset, DataConfig, open_training_images
from featinv_diffusion.data.sets import ImageSet, open_images, open_pictures, read_location
from featinv_diffusion.errors import InputError

SIDE = 12


def noise(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def colours(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(colours(), exif=exif)


def clear() -> bytes:
    image = colours().convert("RGBA")
    image.putalpha(Image.fromarray(noise(SIDE, SIDE).astype(np.uint8)))
    return encode(image)


def palette() -> bytes:
    image = Image.fromarray(noise(SIDE, SIDE, high=4).astype(np.uint8)).convert("P")
    return encode(image, transparency=0)


def sixteen() -> bytes:
    return encode(Image.fromarray(noise(SIDE, SIDE, high=65536).astype(np.uint16)))


def animated() -> bytes:
    return encode(colours(), "GIF", save_all=True, append_images=[colours(1)])


ODD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "rotated": ("png", rotated),
    "transparent": ("png", clear),
    "palette": ("png", palette),
    "16 bits": ("png", sixteen),
    "TIFF": ("tiff", lambda: encode(colours(), "TIFF")),
    "float TIFF": ("tiff", lambda: encode(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")),
    "CMYK": ("jpg", lambda: encode(colours().convert("CMYK"), "JPEG")),
    "animation": ("gif", animated),
}


def outcome(read: Callable[[], Image.Image]) -> str | np.ndarray:
    try:
        return np.asarray(read())
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_the_same_in_all_three(name: str, tmp_path: Path) -> None:
    suffix, make = ODD[name]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(make())
    config = DataConfig(
        root=str(tmp_path), size=SIDE, crop="center", on_bad_image="error", num_workers=0
    )
    training = CropDataset(open_training_images(config), [0], config, seed=0)

    def crop() -> Image.Image:
        return Image.fromarray(training[0]["pixels"].permute(1, 2, 0).numpy())

    expected = outcome(lambda: open_images(str(tmp_path), "train").read(0))
    for read in (crop, lambda: open_pictures([path]).read(0), lambda: read_location(str(path))):
        np.testing.assert_array_equal(outcome(read), expected)
    if name == "float TIFF":
        assert "32-bit pixels" in str(expected)
    else:
        assert isinstance(expected, np.ndarray)
        # By hand, from what the file holds.
        source = np.asarray(colours())
        known = {"rotated": np.rot90(source, -1), "TIFF": source}
        known["16 bits"] = np.repeat((noise(SIDE, SIDE, high=65536) // 257)[..., None], 3, 2)
        alpha = noise(SIDE, SIDE)[..., None] / 255
        known["transparent"] = source * alpha + 255 * (1 - alpha)
        if name in known:
            np.testing.assert_allclose(expected, known[name], atol=1)


# ---- whatever holds the pictures -----------------------------------------------------------------

N, LABELS = 6, [1, 0, 1, 0, 1, 0]
PICTURES = [encode(colours(i)) for i in range(N)]


def write_parquet(folder: str, kind: str) -> None:
    column: pa.Array = pa.array(PICTURES, pa.binary())
    if kind != "binary":
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        column = pa.array([{"bytes": x, "path": None} for x in PICTURES], struct)
    table = pa.table({"image": column, "label": LABELS})
    if kind == "huggingface":
        features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
        content = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": content})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, row_group_size=4)
    write(f"{folder}/data.parquet", buffer.getvalue())


def write_tar(path: str, members: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    write(path, buffer.getvalue())


def write(path: str, content: bytes) -> None:
    files, inner = fsspec.core.url_to_fs(path)
    files.makedirs(inner.rpartition("/")[0], exist_ok=True)
    files.pipe_file(inner, content)


def record(i: int, kind: str = "cls") -> dict[str, bytes]:
    label = {"cls": str(LABELS[i]), "json": json.dumps({"label": LABELS[i]})}[kind]
    return {f"{i:04d}.png": PICTURES[i], f"{i:04d}.{kind}": label.encode()}


def write_tars(folder: str, kind: str = "cls") -> None:
    for shard, rows in ((0, (0, 1, 2, 3)), (1, (4, 5))):
        members = {name: x for i in rows for name, x in record(i, kind).items()}
        write_tar(f"{folder}/shard-{shard:03d}.tar", {"._0000.png": b"Mac", **members})


WRITERS: dict[str, tuple[Callable[[str], None], str]] = {
    "binary column": (lambda f: write_parquet(f, "binary"), "data.parquet"),
    "plain structs": (lambda f: write_parquet(f, "structs"), "data.parquet"),
    "Hugging Face": (lambda f: write_parquet(f, "huggingface"), "data.parquet"),
    "folder of parquet": (lambda f: write_parquet(f, "structs"), ""),
    "tars by braces": (write_tars, "shard-{000..001}.tar"),
    "tars by glob": (write_tars, "shard-*.tar"),
    "folder of tars": (lambda f: write_tars(f, "json"), ""),
}


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("name", WRITERS)
def test_files_that_hold_many_are_read_as_a_folder_is(
    name: str, where: str, tmp_path: Path
) -> None:
    writer, data = WRITERS[name]
    folder = str(tmp_path) if where == "disk" else f"memory://{tmp_path.name}"
    writer(folder)
    root = f"{folder}/{data}".rstrip("/")
    images = open_images(root, "train")
    training = open_training_images(DataConfig(root=root))
    assert images.labels == training.labels == LABELS
    assert images.class_names == (["cat", "dog"] if name == "Hugging Face" else None)
    assert len(set(images.ids)) == N
    if "tar" in name:
        assert images.ids[4] == "shard-001:0004"
        assert images.notes == ("Left out 2 files: 2 hidden.",)
    else:
        assert images.ids[4] == "data:4"
    workers_copy: ImageSet = pickle.loads(pickle.dumps(training))
    for i in (5, 0, 3):
        expected = np.asarray(colours(i))
        for found in (images.read(i), workers_copy.read(i), read_location(images.locations[i])):
            np.testing.assert_array_equal(np.asarray(found), expected)
    assert open_images(root, "train").fingerprint == images.fingerprint


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    write_parquet(str(tmp_path), "binary")
    path = tmp_path / "data.parquet"
    open_images(str(path), "x").read(0)
    table = pa.table({"image": pa.array([PICTURES[3]], pa.binary())})
    parquet.write_table(table, path)
    np.testing.assert_array_equal(np.asarray(open_images(str(path), "x").read(0)), colours(3))


def test_a_folder_of_class_folders_behind_a_url(tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}"
    for i, name in enumerate(("val/b/1.png", "val/a/2.png", "train/a/3.png", "val/a/.x.png")):
        write(f"{root}/{name}", PICTURES[i])
    images = open_images(root, "validation")
    assert (images.ids, images.labels) == (["a/2.png", "b/1.png"], [0, 1])
    assert (images.class_names, images.split) == (["a", "b"], "val")
    np.testing.assert_array_equal(np.asarray(images.read(0)), colours(1))
    assert images.locations == [f"{root}/val/a/2.png", f"{root}/val/b/1.png"]


def test_pictures_beside_a_tar_are_taken(tmp_path: Path) -> None:
    write_tars(str(tmp_path))
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    assert open_images(str(tmp_path), "train").ids == ["a.png"]
    assert open_pictures([tmp_path]).ids == ["a.png"]


def test_tars_that_are_none_or_have_odd_labels(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("hello")
    with pytest.raises(InputError, match=r"a\.tar could not be opened as a data set"):
        open_images(str(tmp_path / "a.tar"), "x")
    with pytest.raises(InputError, match=r"tar file must exist at .*b-1\.tar"):
        open_images(str(tmp_path / "b-{1..2}.tar"), "x")
    write_tar(str(tmp_path / "c.tar"), {"0.png": PICTURES[0], "0.cls": b"cat"})
    with pytest.raises(InputError, match="must hold class numbers from 0"):
        open_images(str(tmp_path / "c.tar"), "x")
    write_tar(str(tmp_path / "d.tar"), {"0.txt": b"a"})
    with pytest.raises(InputError, match="must hold images"):
        open_images(str(tmp_path / "d.tar"), "x")


def test_the_hub_needs_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'featinv-diffusion\[data\]'"):
        open_images("nobody/nothing", "train")
    write_parquet(str(tmp_path), "huggingface")
    write_tars(str(tmp_path))
    assert len(open_images(str(tmp_path / "data.parquet"), "train")) == N
    assert len(open_images(str(tmp_path / "shard-000.tar"), "train")) == 4


# ---- what `featinv sample A B …` takes -----------------------------------------------------------


def test_any_mix_of_pictures_is_taken_once(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for i, name in enumerate(("b.png", "sub/a.png", "out/c.png", ".d.png", "notes.txt")):
        write(str(photos / name), PICTURES[i])
    (photos / "link.png").symlink_to(photos / "b.png")
    write_parquet(str(tmp_path), "binary")
    write(f"memory://{tmp_path.name}/u.png", PICTURES[5])
    given = [photos / "b.png", photos, tmp_path / "data.parquet", f"memory://{tmp_path.name}/u.png"]
    images = open_pictures(given, exclude=photos / "out")
    assert images.ids == ["b.png", "sub/a.png", *(f"data:{i}" for i in range(N)), "u.png"]
    assert images.labels is None
    (note,) = images.notes
    assert (
        note == "Left out 4 files: 1 hidden, 2 given more than once, 1 with another suffix (.txt)."
    )
    for i, location in enumerate(images.locations):
        np.testing.assert_array_equal(np.asarray(images.read(i)), read_location(location))
    np.testing.assert_array_equal(np.asarray(images.read(1)), colours(1))
    named = open_pictures([photos / "out/c.png"], exclude=photos / "out")
    assert named.ids == ["c.png"]
    with pytest.raises(InputError, match="nothing is there"):
        open_pictures([photos / "none.png"])


def test_pictures_of_a_pattern_of_tars(tmp_path: Path) -> None:
    write_tars(str(tmp_path))
    images = open_pictures([f"{tmp_path}/shard-{{000..001}}.tar"])
    assert images.ids == [f"shard-{i // 4:03d}:{i:04d}" for i in range(N)]
    assert images.notes == ("Left out 2 files: 2 hidden.",)
    assert open_pictures([tmp_path]).ids == images.ids


def test_names_in_the_working_directory_stay_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"broken")
    for images in (open_pictures(["."]), open_images(".", "x")):
        with pytest.raises(InputError, match=r"^a\.png is not a picture"):
            images.read(0)


def test_links_to_one_file_count_once_in_a_class(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        write(str(tmp_path / name), PICTURES[0])
    (tmp_path / "a/0.png").symlink_to(tmp_path / "a/1.png")
    (tmp_path / "b/1.png").symlink_to(tmp_path / "a/1.png")
    images = open_images(str(tmp_path), "train")
    assert images.ids == ["a/0.png", "b/1.png", "b/2.png"]
    assert images.notes == ("Left out 1 file: 1 given more than once.",)


def test_a_location_that_is_gone(tmp_path: Path) -> None:
    write_parquet(str(tmp_path), "binary")
    for location, words in (
        (tmp_path / "a.parquet:3", "must exist"),
        (tmp_path / "data.parquet:6", "must hold '6'"),
        (tmp_path / "a.png", "nothing at"),
    ):
        with pytest.raises(InputError, match=words):
            read_location(str(location))


# ---- images that cannot be read ------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    for i in range(12):
        (tmp_path / f"{i:02d}.png").write_bytes(PICTURES[i % N] if i % 3 else b"broken")
    return tmp_path


def make_dataset(folder: Path, **options) -> CropDataset:
    config = DataConfig(root=str(folder), size=SIDE, **options)
    return CropDataset(open_training_images(config), range(12), config, seed=3)


def test_a_broken_image_is_replaced_by_the_same_one_everywhere(broken: Path) -> None:
    dataset = make_dataset(broken)
    items = [dataset[i] for i in range(12)]
    assert [item["index"] for item in items] == list(range(12))
    assert [item["n_unreadable"] > 0 for item in items] == [i % 3 == 0 for i in range(12)]
    for i, item in enumerate(items):
        tried = dataset.unreadable(i, item["n_unreadable"])
        assert all(int(Path(location).stem) % 3 == 0 for location in tried)
        assert dataset.substitute(i, item["n_unreadable"]) % 3
    loader = torch.utils.data.DataLoader(make_dataset(broken), batch_size=12, num_workers=2)
    batch = next(iter(loader))
    for name in ("pixels", "index", "seed", "n_unreadable"):
        assert torch.equal(batch[name], torch.stack([torch.as_tensor(x[name]) for x in items]))


def test_a_broken_image_in_memory_is_replaced_alike(broken: Path) -> None:
    disk, memory = make_dataset(broken), make_dataset(broken, in_memory=True)
    for i in range(12):
        assert torch.equal(disk[i]["pixels"], memory[i]["pixels"])


def test_an_error_is_one_where_it_is_asked_for_or_nothing_can_be_read(broken: Path) -> None:
    with pytest.raises(InputError, match=r"00\.png is not a picture"):
        make_dataset(broken, on_bad_image="error")[0]
    for path in broken.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"Of 11 images none can be read.*05\.png"):
        make_dataset(broken)[5]


def test_a_stream_leaves_broken_images_out(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from featinv_diffusion.data.streams import StreamedCrops

    members = {name: x for i in range(N) for name, x in record(i).items()}
    write_tar(str(tmp_path / "a.tar"), {**members, "0003.png": b"broken"})
    config = DataConfig(root=str(tmp_path / "a.tar"), size=SIDE, streaming=True, crop="center")
    stream = StreamedCrops(config, seed=0, n_skipped=1)
    assert stream.held_back_images().shape == (1, 3, SIDE, SIDE)
    items = list(stream)
    assert len(items) == N - 2
    pixels = {item["pixels"].numpy().tobytes() for item in items}
    expected = [np.asarray(colours(i)).transpose(2, 0, 1) for i in (1, 2, 4, 5)]
    assert pixels == {x.tobytes() for x in expected}
    with pytest.raises(InputError, match="is not a picture"):
        list(StreamedCrops(DataConfig(**{**vars(config), "on_bad_image": "error"}), 0))


def test_what_runs_made_beside_pictures_is_left_out(tmp_path):
    for name in ("a.png", "b.png", "weight_0.png", "figure.png"):
        colours().save(tmp_path / name)
    content = {"version": "1", "command": "interpolate", "figure": "figure.png"}
    manifest = json.dumps({**content, "outputs": ["weight_0.png"]})
    (tmp_path / "manifest.json").write_text(manifest)
    parquet.write_table(pa.table({"weight": [0.0, 1.0]}), tmp_path / "interpolate.parquet")
    images = open_images(str(tmp_path), "validation")
    assert images.ids == ["a.png", "b.png"]
    assert "2 that runs of featinv made" in images.notes[-1]
    for name in images.ids:
        (tmp_path / name).unlink()
    # where nothing else is there, they are what is meant
    assert open_images(str(tmp_path), "validation").ids == ["figure.png", "weight_0.png"]


@pytest.mark.parametrize("content", ["[]", "{", '{"version": 1, "outputs": 3, "images": [1]}'])
def test_a_strange_manifest_beside_pictures_is_no_matter(tmp_path, content):
    colours().save(tmp_path / "a.png")
    (tmp_path / "manifest.json").write_text(content)
    assert open_images(str(tmp_path), "validation").ids == ["a.png"]
