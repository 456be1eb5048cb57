from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from featinv_diffusion.data.crops import (
    Crop,
    CropDataset,
    DataConfig,
    draw_crop,
    open_training_images,
    split_held_back,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.seeds import make_generator


def write_images(root: Path, n: int = 4, size: tuple[int, int] = (40, 30)) -> None:
    random = np.random.default_rng(0)
    for label in ("b", "a"):
        (root / label / "images").mkdir(parents=True)
        for i in range(n):
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / "images" / f"{i}.png")


def test_folder_classes_are_sorted_or_in_the_order_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = open_training_images(DataConfig(root=str(tmp_path)))
    assert images.class_names == ["a", "b"]
    assert images.ids[0] == "a/images/0.png"
    listed = tmp_path / "classes.txt"
    listed.write_text("b\na\n")
    chosen = open_training_images(DataConfig(root=str(tmp_path), classes=str(listed)))
    assert chosen.class_names == ["b", "a"]
    assert (chosen.labels, chosen.ids[0]) == ([1] * 4 + [0] * 4, "a/images/0.png")
    listed.write_text("a\nc\n")
    with pytest.raises(InputError, match="'c'"):
        open_training_images(DataConfig(root=str(tmp_path), classes=str(listed)))


def test_parquet_and_webdataset_read_as_a_folder_does(tmp_path: Path) -> None:
    import tarfile

    from datasets import Dataset

    write_images(tmp_path / "folder")
    folder = open_training_images(DataConfig(root=str(tmp_path / "folder")))
    assert folder.labels == [0] * 4 + [1] * 4
    table = {"image": [folder.read(i) for i in range(8)], "label": folder.labels}
    Dataset.from_dict(table).to_parquet(tmp_path / "images.parquet")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(8):
            (tmp_path / f"{i}.cls").write_text(str(folder.labels[i]))
            tar.add(tmp_path / "folder" / folder.ids[i], f"{i:04d}.png")
            tar.add(tmp_path / f"{i}.cls", f"{i:04d}.cls")
    for name in ("images.parquet", "shard.tar"):
        records = open_training_images(DataConfig(root=str(tmp_path / name)))
        assert records.labels == folder.labels
        for i in range(8):
            assert np.array_equal(np.asarray(records.read(i)), np.asarray(folder.read(i)))


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "a/images/0.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match=r"a/images/0\.png"):
        open_training_images(DataConfig(root=str(tmp_path))).read(0)


@pytest.mark.parametrize("root", [None, "no/such/folder.parquet"])
def test_missing_data_is_refused(root: str | None) -> None:
    with pytest.raises(InputError, match=r"data\.root"):
        open_training_images(DataConfig(root=root))


def test_in_memory_is_the_same_pixels_and_refuses_mixed_sizes(tmp_path: Path) -> None:
    write_images(tmp_path)
    disk = open_training_images(DataConfig(root=str(tmp_path)))
    memory = open_training_images(DataConfig(root=str(tmp_path), in_memory=True))
    assert np.array_equal(np.asarray(disk.read(5)), np.asarray(memory.read(5)))
    Image.new("RGB", (8, 8)).save(tmp_path / "b/images/9.png")
    with pytest.raises(InputError, match="8×8"):
        open_training_images(DataConfig(root=str(tmp_path), in_memory=True))


def test_split_holds_back_the_last_of_each_class() -> None:
    assert split_held_back([0, 1, 0, 1, 0, 1], 1) == ([0, 1, 2, 3], [4, 5])
    assert split_held_back([0, 1], 0) == ([0, 1], [])
    assert split_held_back([0, 0, 0, 1, 1, 0], 1, train_per_class=2) == ([0, 1, 3], [4, 5])
    with pytest.raises(InputError, match="train_per_class"):
        DataConfig(streaming=True, train_per_class=2)


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    write_images(tmp_path)
    records = open_training_images(DataConfig(root=str(tmp_path)))
    config = DataConfig(size=16)
    whole = CropDataset(records, range(8), config, seed=1)
    part = CropDataset(records, [3], config, seed=1)
    assert torch.equal(whole[3]["pixels"], part[0]["pixels"])
    assert whole[3]["seed"] == part[0]["seed"]
    before = whole[3]["pixels"]
    torch.manual_seed(123)
    assert torch.equal(whole[3]["pixels"], before)
    whole.set_epoch(1)
    assert not torch.equal(whole[3]["pixels"], before)
    assert whole[3]["seed"] != part[0]["seed"]


def test_drawing_a_crop_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw_crop(DataConfig(), 50, 40, make_generator(1))
    assert torch.equal(torch.rand(3), expected)


def test_center_crop_is_the_largest_square_without_flips() -> None:
    assert draw_crop(DataConfig(crop="center"), 50, 40, make_generator(0)) == Crop(
        (0, 5, 40, 40), False, False
    )


def test_flips_and_reflected_shift_by_hand() -> None:
    pixels = np.arange(9, dtype=np.uint8).reshape(3, 3).repeat(3).reshape(3, 3, 3)
    image = Image.fromarray(pixels)
    shifted = Crop((-1, 0, 3, 3), True, False).apply(image, 3)
    expected = [[5, 4, 3], [2, 1, 0], [5, 4, 3]]
    assert pil_to_tensor(shifted)[0].tolist() == expected


def test_flip_frequency_is_one_half() -> None:
    crops = [draw_crop(DataConfig(vflip=True), 40, 40, make_generator(i)) for i in range(400)]
    for flips in ([c.hflip for c in crops], [c.vflip for c in crops]):
        assert 150 < sum(flips) < 250  # five standard deviations of a fair coin
