"""The images of an evaluation: which there are, their ids and labels, decoded one by one."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featinv_diffusion.data.sets import open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import decode_image, read_image


def picture(shade: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new("RGB", size, (shade, 0, 255 - shade))


def encode(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def write_table(path: Path, images, labels=None, *, names=None, struct: bool = True) -> Path:
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    values = [{"bytes": b, "path": None} if struct else b for b in images]
    columns = {"image": pa.array(values, image_type)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return path


def shade_of(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


@pytest.mark.parametrize("struct", [True, False])
def test_a_parquet_file_with_labels(tmp_path: Path, struct: bool):
    shades = [10 * i for i in range(12)]
    path = write_table(
        tmp_path / "val.parquet", [encode(picture(s)) for s in shades], [0, 1] * 6, struct=struct
    )
    images = open_images(str(path), "validation")
    assert images.ids[0] == "val:00"
    assert images.ids[11] == "val:11"
    assert images.ids == sorted(images.ids)
    assert images.labels == [0, 1] * 6
    assert images.class_names is None
    assert [shade_of(images.read(i)) for i in range(12)] == shades


def test_class_names_come_from_the_metadata_of_the_schema(tmp_path: Path):
    content = [encode(picture(0)), encode(picture(1))]
    path = write_table(tmp_path / "a.parquet", content, [1, 0], names=["cat", "dog"])
    images = open_images(str(path), "validation")
    assert (images.labels, images.class_names) == ([1, 0], ["cat", "dog"])


def test_a_table_without_labels_or_with_none_known(tmp_path: Path):
    content = [encode(picture(0)), encode(picture(1))]
    assert open_images(str(write_table(tmp_path / "a.parquet", content)), "x").labels is None
    hidden = write_table(tmp_path / "b.parquet", content, [-1, -1])
    assert open_images(str(hidden), "x").labels is None


def test_a_broken_picture_is_an_error_only_when_it_is_read(tmp_path: Path):
    path = write_table(tmp_path / "a.parquet", [b"no picture", encode(picture(7))], [0, 0])
    images = open_images(str(path), "x")
    assert shade_of(images.read(1)) == 7
    with pytest.raises(InputError, match=r"a\.parquet, a:0 is not a picture"):
        images.read(0)


def test_pictures_of_a_table_are_converted_as_those_of_files(tmp_path: Path):
    rotated = picture(200, (20, 10))
    rotated.putpixel((0, 0), (0, 255, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(encode(rotated))
    buffer = BytesIO()
    rotated.save(buffer, format="PNG", exif=exif)
    upright = decode_image(buffer.getvalue(), "a")
    assert upright.size == (10, 20)
    assert decode_image(encode(picture(9).convert("CMYK"), "JPEG"), "a").mode == "RGB"
    same = decode_image((tmp_path / "a.png").read_bytes(), "a")
    assert np.array_equal(np.asarray(same), np.asarray(read_image(tmp_path / "a.png")))


def test_a_class_folder(tmp_path: Path):
    for name in ("b/2.png", "a/deep/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(ord(name[0])).save(tmp_path / name)
    images = open_images(str(tmp_path), "validation")
    assert images.ids == ["a/deep/1.png", "b/1.png", "b/2.png"]
    assert (images.labels, images.class_names) == ([0, 1, 1], ["a", "b"])
    assert [shade_of(images.read(i)) for i in range(3)] == [97, 98, 98]


def test_a_split_folder_and_listed_classes(tmp_path: Path):
    for name in ("train/n1/a.png", "train/n2/b.png", "train/n3/c.png", "val/n1/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(int(name.split("/n")[1][0])).save(tmp_path / name)
    listed = tmp_path / "classes.txt"
    listed.write_text("# id, name\nn3 zebra fish\nn1\n")
    images = open_images(str(tmp_path), "train", str(listed))
    assert images.ids == ["n1/a.png", "n3/c.png"]
    assert (images.labels, images.class_names) == ([1, 0], ["zebra fish", "n1"])
    assert [shade_of(images.read(i)) for i in range(2)] == [1, 3]
    listed.write_text("n1\nn9\n")
    with pytest.raises(InputError, match=r"but 1 are missing, e\.g\. 'n9'"):
        open_images(str(tmp_path), "train", str(listed))


def test_a_flat_folder_has_no_classes_and_its_own_output_is_left_out(tmp_path: Path):
    for name in ("b.png", "a.png", "sub/c.png", "out/images/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / name)
    images = open_images(str(tmp_path), "validation", exclude=tmp_path / "out")
    assert images.ids == ["a.png", "b.png", "sub/c.png"]
    assert images.labels is None
    (note,) = images.notes
    assert note.startswith("2 pictures lie in")
    assert open_images(str(tmp_path / "sub"), "validation").notes == ()


def test_a_folder_of_parquet_files_and_its_split(tmp_path: Path):
    for part, shade in (("train-0", 1), ("validation-0", 2), ("validation-1", 3)):
        write_table(tmp_path / f"{part}.parquet", [encode(picture(shade))], [0])
    images = open_images(str(tmp_path), "validation")
    assert [shade_of(images.read(i)) for i in range(len(images))] == [2, 3]
    assert images.split == "validation"
    assert len(open_images(str(tmp_path), "train")) == 1
    with pytest.raises(InputError, match="but holds train, validation"):
        open_images(str(tmp_path), "test")
    assert open_images(str(tmp_path / "train-0.parquet"), "validation").split is None


def test_the_fingerprint_tells_of_files_that_were_replaced(tmp_path: Path):
    (tmp_path / "a").mkdir()
    file = write_table(tmp_path / "a.parquet", [encode(picture(1))])
    picture(1).save(tmp_path / "a" / "a.png")
    for path in (file, tmp_path / "a" / "a.png"):
        data = str(path if path == file else path.parent)
        before = open_images(data, "x").fingerprint
        assert open_images(data, "x").fingerprint == before
        os.utime(path, ns=(1, 1))
        assert open_images(data, "x").fingerprint != before


def test_what_is_no_data_is_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(InputError, match=r"must be named, e\.g\. --data"):
        open_images(None, "x")
    with pytest.raises(InputError, match=r"parquet file must exist at .*none\.parquet"):
        open_images(str(tmp_path / "none.parquet"), "x")
    with pytest.raises(InputError, match="holds no picture"):
        open_images(str(tmp_path), "x")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="must be a parquet file, a tar, a folder or a Hub name"):
        open_images(str(tmp_path / "notes.txt"), "x")
    (tmp_path / "bad.parquet").write_text("hello")
    with pytest.raises(InputError, match=r"bad\.parquet could not be opened as a data set"):
        open_images(str(tmp_path / "bad.parquet"), "x")
    with pytest.raises(InputError, match="'nobody/nothing', split 'test', could not be opened"):
        open_images("nobody/nothing", "test")


def test_tables_without_usable_columns_are_refused(tmp_path: Path):
    pq.write_table(pa.table({"pixels": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a column of encoded pictures .* has pixels \(int64\)"):
        open_images(str(tmp_path / "a.parquet"), "x")
    content = [encode(picture(0))]
    path = write_table(tmp_path / "b.parquet", content, [None])
    with pytest.raises(InputError, match="must hold class numbers from 0"):
        open_images(str(path), "x")
    (tmp_path / "classes.txt").write_text("n1\n")
    table = write_table(tmp_path / "c.parquet", content)
    with pytest.raises(InputError, match="--classes selects folders"):
        open_images(str(table), "x", str(tmp_path / "classes.txt"))
