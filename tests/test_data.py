"""Databases: what is written is what Caffe reads; what is damaged or half done is never taken for whole."""

import fcntl
import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
from numpy.typing import NDArray

from rebirth_caffe import data
from rebirth_caffe.data import (
    UNLABELLED,
    Images,
    Pixels,
    Recipe,
    by_class,
    choose,
    find_images,
    lmdb_info,
    open_lmdb,
    write_lmdb,
    write_lmdbs,
)
from rebirth_caffe.errors import RebirthError
from rebirth_caffe.schema.caffe_pb2 import BlobProto, Datum

READ = """
net = caffe.Net(path, 1)
images, labels = [], []
for _ in range(batches):
    net.forward()
    images += net.blobs["data"].data.tolist()
    labels += net.blobs["label"].data.astype(int).tolist()
result = [images, labels]
"""


def pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def png(image: NDArray[Any]) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def jpeg(image: Pixels) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


def save(path: Path, content: bytes | Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else png(content))
    return path


def some(count: int = 6, shape: tuple[int, ...] = (5, 7, 3), classes: int = 2) -> tuple[Pixels, Images]:
    """Images in memory: one array, and the source that hands it out."""
    array = pixels(count, *shape)
    labels = np.arange(count) % classes
    names = [f"{i}.png" for i in range(count)]
    return array, Images(names, labels, lambda i: png(array[i]), tuple(map(str, range(classes))))


def planes(image: NDArray[Any]) -> NDArray[Any]:
    return image[np.newaxis] if image.ndim == 2 else image.transpose(2, 0, 1)


@pytest.fixture
def read_by_caffe(in_caffe, tmp_path):
    def read(database, count, transform="", batch=2):
        net = save(
            tmp_path / "data.prototxt",
            f"""layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ {transform} }}
            data_param {{ source: "{database}" backend: LMDB batch_size: {batch} }} }}""".encode(),
        )
        images, labels = in_caffe(READ, path=str(net), batches=count // batch)
        return np.array(images), labels

    return read


# ---------------------------------------------------------------------------------------- as Caffe reads it


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_caffe_reads_back_what_was_written(tmp_path, read_by_caffe, shape, encoded):
    array, images = some(12, shape, classes=3)
    order, _ = choose(images.labels, shuffle=True, seed=1)
    write_lmdb(tmp_path / "x.lmdb", images, Recipe(gray=len(shape) == 2, encoded=encoded), order)
    found, labels = read_by_caffe(tmp_path / "x.lmdb", 12)
    assert np.array_equal(found, [planes(array[i]) for i in order])
    assert labels == images.labels[order].tolist() != images.labels.tolist()


def test_caffe_decodes_jpeg_files_as_we_do(tmp_path, read_by_caffe):
    array, images = some(4, (16, 24, 3))
    files = Images(images.names, images.labels, lambda i: jpeg(array[i]), images.classes)
    write_lmdb(tmp_path / "encoded", files, Recipe(encoded=True))
    write_lmdb(tmp_path / "raw", files)
    raw = [image for image, _ in open_lmdb(tmp_path / "raw")]
    assert np.array_equal(raw, [image for image, _ in open_lmdb(tmp_path / "encoded")])
    assert np.array_equal(raw, read_by_caffe(tmp_path / "encoded", 4)[0])


def test_the_central_crop_of_a_padded_image_is_the_image(tmp_path, read_by_caffe):
    array, images = some(4, (6, 6, 3))
    write_lmdb(tmp_path / "x.lmdb", images, Recipe(pad=2))
    assert lmdb_info(tmp_path / "x.lmdb") == (4, 3, 10, 10)
    found, _ = read_by_caffe(tmp_path / "x.lmdb", 4, "crop_size: 6")
    assert np.array_equal(found, [planes(image) for image in array])


def test_caffe_subtracts_the_mean_image_and_the_mean_values(tmp_path, read_by_caffe):
    array, images = some(4)
    written = write_lmdb(tmp_path / "x.lmdb", images)
    assert written.mean_values == pytest.approx(array.mean((0, 1, 2)).tolist())
    wanted = np.array([planes(image) for image in array.astype(float)])
    found, _ = read_by_caffe(tmp_path / "x.lmdb", 4, f'mean_file: "{tmp_path}/x.lmdb/mean.binaryproto"')
    assert found == pytest.approx(wanted - wanted.mean(0), abs=1e-4)
    pasted = written.transform().partition("{")[2].partition("}")[0]
    found, _ = read_by_caffe(tmp_path / "x.lmdb", 4, pasted)
    assert found == pytest.approx(wanted - wanted.mean((0, 2, 3))[:, None, None], abs=1e-3)


# -------------------------------------------------------------------------------------------------- sources


def test_a_folder_per_class(tmp_path):
    cat, dog = pixels(4, 5, 3, seed=1), pixels(4, 5, 3, seed=2)
    for name, image in {"dog/b.png": dog, "cat/z.png": cat, "dog/a.png": cat}.items():
        save(tmp_path / "src" / name, image)
    for name in ("cat/.hidden", "README.md"):
        save(tmp_path / "src" / name, b"no image")
    images = find_images(str(tmp_path / "src"))
    assert images.classes == ("cat", "dog")
    assert images.notes == ("1 not in a class folder and so not used, like README.md",)
    written = write_lmdb(tmp_path / "x.lmdb", images)
    assert (written.count, written.shape) == (3, (3, 4, 5))
    records = list(open_lmdb(tmp_path / "x.lmdb"))
    assert [label for _, label in records] == [0, 1, 1]
    assert np.array_equal([image for image, _ in records], [planes(image) for image in (cat, cat, dog)])
    assert (tmp_path / "x.lmdb/list.txt").read_text() == "cat/z.png 0\ndog/a.png 1\ndog/b.png 1\n"
    assert (tmp_path / "x.lmdb/labels.txt").read_text() == "cat\ndog\n"
    again = find_images(str(tmp_path / "x.lmdb/list.txt"), tmp_path / "src")
    assert list(again.names) == list(images.names)


def test_numbered_folders_count_as_text_and_say_so(tmp_path):
    for name in ("1", "2", "10"):
        save(tmp_path / name / "a.png", pixels(2, 2))
    images = find_images(str(tmp_path))
    assert images.classes == ("1", "10", "2")
    assert "10 before 2" in images.notes[0]


def test_a_folder_of_images_without_labels(tmp_path):
    for name in ("b.png", "a.png", ".hidden"):
        save(tmp_path / name, pixels(2, 2))
    images = find_images(str(tmp_path))
    assert (list(images.names), images.labels.tolist(), images.classes) == (["a.png", "b.png"], [-1, -1], ())
    written = write_lmdb(tmp_path.with_suffix(".lmdb"), images)
    assert written.summary().endswith("2 images of 3x2x2, no labels")
    with open_lmdb(written.path) as found:
        assert [label for _, label in found] == [UNLABELLED] * 2


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([".hidden"], "src: is empty"),
        (["train/cat/a.png", "test/cat/a.png"], "src/test/cat: a folder inside the class folder test"),
        (["cat/a.png", "dog/.hidden"], "src/dog: the class folder is empty"),
        (["cat/a.png", "x.lmdb/data.mdb"], "src/x.lmdb: a database among the class folders"),
    ],
)
def test_folders_that_are_no_classes(tmp_path, files, complaint):
    for file in files:
        save(tmp_path / "src" / file, b"")
    with pytest.raises(RebirthError, match=complaint):
        find_images(str(tmp_path / "src"))


def test_a_list_file(tmp_path):
    for name in ("a.png", "b c.png", "schön.png"):
        save(tmp_path / "at" / name, pixels(2, 2))
    file = save(tmp_path / "list.txt", "a.png\t3\r\n\n  b c.png  0\nschön.png 2".encode())
    images = find_images(str(file), tmp_path / "at")
    assert list(images.names) == ["a.png", "b c.png", "schön.png"]
    assert images.labels.tolist() == [3, 0, 2]
    assert images.classes == ("0", "1", "2", "3")
    assert images.notes == ("no image has label 1 though labels go to 3",)
    assert write_lmdb(tmp_path / "x.lmdb", images).count == 3
    file.rename(tmp_path / "at/list.txt")  # without --root, paths start at the list
    assert write_lmdb(tmp_path / "y.lmdb", find_images(str(tmp_path / "at/list.txt"))).count == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a.png 0\nb.png cat\n", "list.txt:2: 'b.png cat' is not PATH LABEL"),
        (b"a.png --1\n", "list.txt:1: 'a.png --1' is not PATH LABEL"),
        (b"a.png\n", "list.txt:1: 'a.png' is not PATH LABEL"),
        (b"a.png -1\n", "list.txt:1: label -1 is not from 0 to 999999"),
        (b"a.png 1000000\n", "list.txt:1: label 1000000 is not"),
        (b"\n \n", "list.txt: lists no image"),
        (b"PK\0\1\2", "list.txt: not a list file"),
    ],
)
def test_lists_that_are_none(tmp_path, content, complaint):
    with pytest.raises(RebirthError, match=complaint):
        find_images(str(save(tmp_path / "list.txt", content)))


def idx(array: Pixels) -> bytes:
    magic = 0x800 + array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_idx_pair(tmp_path, pack):
    array, labels = pixels(7, 4, 5), np.array([3, 1, 0, 2, 3, 3, 1], np.uint8)
    pair = [save(tmp_path / "i", pack(idx(array))), save(tmp_path / "l", pack(idx(labels)))]
    images = find_images(",".join(map(str, pair)))
    write_lmdb(tmp_path / "x.lmdb", images)
    records = list(open_lmdb(tmp_path / "x.lmdb"))
    assert np.array_equal([image for image, _ in records], array[:, np.newaxis])
    assert [label for _, label in records] == labels.tolist()
    assert (tmp_path / "x.lmdb/list.txt").read_text().splitlines()[1] == "i[1] 1"


IMAGES, LABELS = idx(pixels(2, 3, 4)), idx(np.array([0, 1], np.uint8))


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (LABELS, IMAGES, "i: not an idx file of images: it starts with 00000801; give IMAGES,LABELS in this"),
        (IMAGES, b"what", "l: not an idx file of labels: it starts with 77686174"),
        (IMAGES, b"", "l: not an idx file of labels"),
        (IMAGES[:9], LABELS, "i: 0 bytes of images cannot be"),
        (IMAGES[:-1], LABELS, "i: 23 bytes of images cannot be 2x3x4"),
        (IMAGES + b"\0", LABELS, "i: 25 bytes of images cannot be 2x3x4"),
        (gzip.compress(IMAGES, mtime=0)[:-12], LABELS, "i: damaged or cut short"),
        (gzip.compress(IMAGES, mtime=0)[:20] + b"\xff" * 20, LABELS, "i: damaged or cut short"),
        (IMAGES, idx(np.zeros(3, np.uint8)), "i: 2 images, but 3 labels in"),
        (idx(pixels(0, 3, 4)), idx(pixels(0)), "i: holds no images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_idx_files_that_are_wrong(tmp_path, images, labels, complaint):
    pair = [save(tmp_path / "i", images), save(tmp_path / "l", labels)]
    with pytest.raises(RebirthError, match=complaint):
        find_images(",".join(map(str, pair)))


@pytest.mark.parametrize("source", ["nowhere", "nowhere,", "a,b,c"])
def test_a_source_that_is_none(source):
    with pytest.raises(RebirthError, match=f"{source}: no such folder or list file"):
        find_images(source)


# ------------------------------------------------------------------------------------------ choice and order


def test_shuffling_is_a_permutation_of_its_seed():
    labels = np.repeat([0, 1, 2], 20)
    order, held = choose(labels, shuffle=True, seed=3)
    assert sorted(order) == list(range(60))
    assert not len(held)
    assert np.array_equal(order, choose(labels, shuffle=True, seed=3)[0])
    assert not np.array_equal(order, choose(labels, shuffle=True, seed=4)[0])
    assert choose(labels, limit=7)[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.array_equal(choose(labels, shuffle=True, seed=3, limit=7)[0], order[:7])


@pytest.mark.parametrize("shuffle", [False, True])
def test_holding_out_takes_the_same_part_of_each_class(shuffle):
    labels = np.array([0] * 10 + [5] * 40 + [2] * 20)
    order, held = choose(labels, shuffle=shuffle, seed=1, hold_out=0.2)
    assert sorted([*order, *held]) == list(range(70))
    assert np.bincount(labels[held]).tolist() == [2, 0, 4, 0, 0, 8]
    assert np.array_equal(held, choose(labels, shuffle=shuffle, seed=1, hold_out=0.2)[1])
    assert set(held) != set(choose(labels, shuffle=shuffle, seed=2, hold_out=0.2)[1])
    assert (order.tolist() == sorted(order)) is not shuffle
    assert (held.tolist() == sorted(held)) is not shuffle


def test_holding_out_none_or_all_is_refused():
    for fraction in (0.1, 0.9):
        with pytest.raises(RebirthError, match="leaves one side without any"):
            choose(np.array([0, 0, 1]), hold_out=fraction)


def test_order_by_class_is_noticed():
    assert by_class(np.array([0, 0, 1, 1, 4]))
    assert not by_class(np.array([0, 1, 0]))
    assert not by_class(np.array([2, 2, 2]))
    assert not by_class(np.array([], int))


@pytest.mark.parametrize(("shape", "encoded"), [((5, 7, 3), False), ((5, 7), False), ((5, 7, 3), True)])
def test_a_database_is_a_source(tmp_path, shape, encoded):
    array = pixels(6, *shape)
    labels = np.arange(6) % 2
    recipe = Recipe(gray=len(shape) == 2, encoded=encoded)
    write_lmdb(tmp_path / "x.lmdb", Images([*"abcdef"], labels, lambda i: array[i], ("cat", "dog")), recipe)
    found = find_images(str(tmp_path / "x.lmdb"))
    assert found.classes == ("cat", "dog")
    assert found.names[5] == "x.lmdb[5]"
    write_lmdb(tmp_path / "y.lmdb", found, order=np.array([4, 1]))
    for (image, label), i in zip(open_lmdb(tmp_path / "y.lmdb"), (4, 1), strict=True):
        assert np.array_equal(image, planes(array[i]))
        assert label == labels[i]
    written = write_lmdb(tmp_path / "z.lmdb", found, Recipe(gray=True))
    assert written.shape == (1, 5, 7)


def test_a_database_without_labels_or_names_is_a_source(tmp_path):
    array, images = some()
    for labels, classes in ((np.full(6, UNLABELLED), ()), (np.array([0, 2] * 3), ("0", "1", "2"))):
        unnamed = Images(images.names, labels, images.load, ())
        write_lmdb(tmp_path / "x.lmdb", unnamed, force=True)
        found = find_images(str(tmp_path / "x.lmdb"))
        assert found.classes == classes
        assert found.labels.tolist() == labels.tolist()
        assert np.array_equal(found.load(3), array[3])


# -------------------------------------------------------------------------------------------------- recipes


def test_resize_gray_and_pad(tmp_path):
    array, images = some(3, (8, 6, 3))
    recipe = Recipe(resize=(4, 5), pad=2, gray=True)
    written = write_lmdb(tmp_path / "x.lmdb", images, recipe)
    for (image, _), original in zip(open_lmdb(tmp_path / "x.lmdb"), array, strict=True):
        small = cv2.resize(cv2.cvtColor(original, cv2.COLOR_BGR2GRAY), (5, 4))
        inner = image[0, 2:-2, 2:-2]
        assert inner.astype(int) == pytest.approx(small.astype(int), abs=1)  # PNG's gray rounds otherwise
        assert np.array_equal(image[0], np.pad(inner, 2, mode="reflect"))
    means = [image[:, 2:-2, 2:-2].mean() for image, _ in open_lmdb(tmp_path / "x.lmdb")]
    assert written.mean_values == pytest.approx([np.mean(means)])
    about = json.loads((tmp_path / "x.lmdb/about.json").read_text())
    assert about == {
        "images": 3, "channels": 1, "height": 8, "width": 9, "mean_value": [round(written.mean_values[0], 4)],
        "skipped": 0, "resize": [4, 5], "pad": 2, "gray": True, "encoded": False,
    }  # fmt: skip


def rotated(image: Pixels) -> bytes:
    """A JPEG file that asks its reader to turn it."""
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    segment = b"Exif\0\0" + tiff
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg(image)[2:]


def test_encoded_files_stay_as_they_are_only_where_caffe_sees_the_same_in_them(tmp_path):
    square = pixels(8, 8, 3)
    files = {
        "plain.jpg": jpeg(square),
        "plain.png": png(square),
        "gray.png": png(square[..., 0]),
        "alpha.png": png(np.dstack([square, square[..., 0]])),
        "deep.png": png(square.astype(np.uint16) * 257),
        "turned.jpg": rotated(square),
        "bitmap.bmp": cv2.imencode(".bmp", square)[1].tobytes(),
    }
    for name, content in files.items():
        save(tmp_path / "src/a" / name, content)
    images = find_images(str(tmp_path / "src"))
    write_lmdb(tmp_path / "raw", images)
    write_lmdb(tmp_path / "encoded", images, Recipe(encoded=True))
    raw, encoded = (list(open_lmdb(tmp_path / name)) for name in ("raw", "encoded"))
    assert np.array_equal([image for image, _ in raw], [image for image, _ in encoded])
    with lmdb.open(str(tmp_path / "encoded"), readonly=True, lock=False) as env, env.begin() as transaction:
        kept = [
            name
            for (_, value), name in zip(transaction.cursor(), images.names, strict=True)
            if Datum.FromString(value).data == files[Path(name).name]
        ]
    assert kept == ["a/plain.jpg", "a/plain.png"]


def test_a_resized_image_is_encoded_anew(tmp_path):
    _, images = some(2)
    write_lmdb(tmp_path / "raw", images, Recipe(resize=(3, 4)))
    write_lmdb(tmp_path / "encoded", images, Recipe(resize=(3, 4), encoded=True))
    raw, encoded = (list(open_lmdb(tmp_path / name)) for name in ("raw", "encoded"))
    assert np.array_equal([image for image, _ in raw], [image for image, _ in encoded])


def test_the_mean_image_has_the_shape_caffe_wants(tmp_path):
    array, images = some(4)
    write_lmdb(tmp_path / "x.lmdb", images)
    blob = BlobProto.FromString((tmp_path / "x.lmdb/mean.binaryproto").read_bytes())
    assert (blob.num, blob.channels, blob.height, blob.width) == (1, 3, 5, 7)
    wanted = planes(array.mean(0)).ravel()
    assert list(blob.data) == pytest.approx(wanted.tolist(), rel=1e-6)


# -------------------------------------------------------------------------------------------- what is wrong


def test_images_of_two_sizes_are_named(tmp_path):
    shapes = [(4, 4, 3), (4, 4, 3), (4, 5, 3)]
    images = Images(["a", "b", "c"], np.array([0, 1, 0]), lambda i: png(pixels(*shapes[i])), ("x", "y"))
    with pytest.raises(RebirthError, match="a is 3x4x4 and c is 3x4x5; Caffe needs one size, give --resize"):
        write_lmdb(tmp_path / "x.lmdb", images)
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_listed_and_counted(tmp_path):
    good = pixels(6, 6, 3)
    contents = {
        "0.png": png(good),
        "1.txt": b"no image",
        "2.png": b"",
        "3.jpg": jpeg(pixels(40, 40, 3))[:-30],
        "4.png": png(good)[:-20],
        "5.png": png(good),
    }
    for name, content in contents.items():
        save(tmp_path / "src/a" / name, content)
    images = find_images(str(tmp_path / "src"))
    (tmp_path / "src/a/5.png").unlink()
    written = write_lmdb(tmp_path / "x.lmdb", images)
    assert written.count == len(open_lmdb(tmp_path / "x.lmdb")) == 1
    assert [Path(name).name for name, _ in written.skipped] == list(contents)[1:]
    lines = (tmp_path / "x.lmdb/skipped.txt").read_text().splitlines()
    assert lines[0] == "a/1.txt: damaged, cut short or not an image"
    assert lines[1] == "a/2.png: the file is empty"
    assert lines[4] == "a/5.png: No such file or directory"
    assert "left out 5 that cannot be read: a/1.txt (damaged" in written.summary()
    assert f"all in {tmp_path}/x.lmdb/skipped.txt" in written.summary()
    with pytest.raises(RebirthError, match=r"a/1.txt: damaged.*; 5 of 6 images cannot be read and nothing"):
        write_lmdb(tmp_path / "y.lmdb", images, strict=True)
    none = Images(images.names[1:3], images.labels[1:3], lambda i: images.load(i + 1), images.classes)
    with pytest.raises(RebirthError, match=r"none of 2 images can be read; the first, a/1.txt: damaged"):
        write_lmdb(tmp_path / "y.lmdb", none)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src", "x.lmdb"]


def test_all_databases_or_none(tmp_path):
    _, images = some()
    bad = Images(images.names, images.labels, lambda i: images.load(i) if i < 4 else b"", images.classes)
    parts = {tmp_path / "a.lmdb": np.arange(4), tmp_path / "b.lmdb": np.arange(4, 6)}
    with pytest.raises(RebirthError, match="none of 2 images"):
        write_lmdbs(parts, bad)
    assert not list(tmp_path.iterdir())
    heard = []
    write_lmdbs(parts, images, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(i, 6) for i in range(1, 7)]
    assert [len(open_lmdb(path)) for path in parts] == [4, 2]


def test_the_map_grows_and_the_file_stays_as_small_as_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_BYTES", 1 << 15)
    array, images = some(300, (32, 32, 3))
    write_lmdb(tmp_path / "x.lmdb", images)
    assert all(
        np.array_equal(image, planes(original))
        for (image, _), original in zip(open_lmdb(tmp_path / "x.lmdb"), array, strict=True)
    )
    assert (tmp_path / "x.lmdb/data.mdb").stat().st_size < 1.06 * 300 * 4096  # a page each
    assert not (tmp_path / "x.lmdb/lock.mdb").exists()


def test_what_is_there_is_replaced_only_by_force(tmp_path):
    _, images = some()
    out = tmp_path / "deep/er/x.lmdb"
    write_lmdb(out, images)
    (out / "lock.mdb").touch()  # as Caffe leaves it
    with pytest.raises(RebirthError, match=r"x.lmdb: exists already; choose another name, or --force"):
        write_lmdb(out, images, order=np.arange(2))
    assert len(open_lmdb(out)) == 6
    write_lmdb(out, images, order=np.arange(2), force=True)
    assert len(open_lmdb(out)) == 2
    assert [path.name for path in out.parent.iterdir()] == ["x.lmdb"]


def test_force_does_not_delete_what_is_no_database(tmp_path):
    _, images = some()
    (photos := tmp_path / "photos").mkdir()
    save(photos / "a.png", pixels(2, 2))
    with pytest.raises(RebirthError, match=r"photos: holds a.png, so it is not just a database"):
        write_lmdb(photos, images, force=True)
    with pytest.raises(RebirthError, match=r"a.png: is a file, not a database"):
        write_lmdb(photos / "a.png", images, force=True)
    photos.rename(tmp_path / "x.lmdb.part")
    with pytest.raises(RebirthError, match=r"x.lmdb.part: holds a.png"):
        write_lmdb(tmp_path / "x.lmdb", images)
    assert (tmp_path / "x.lmdb.part/a.png").exists()


def test_a_run_killed_between_its_renames_loses_nothing(tmp_path):
    _, images = some()
    out = tmp_path / "x.lmdb"
    write_lmdb(out, images)
    out.rename(tmp_path / "x.lmdb.old")
    with pytest.raises(RebirthError, match="exists already"):
        write_lmdb(out, images)
    assert len(open_lmdb(out)) == 6


def test_one_writer_at_a_time(tmp_path):
    _, images = some()
    (part := tmp_path / "x.lmdb.part").mkdir()
    save(part / "data.mdb", b"half")
    lock = os.open(part, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RebirthError, match=r"x.lmdb: another process is writing it"):
        write_lmdb(tmp_path / "x.lmdb", images)
    assert (part / "data.mdb").read_bytes() == b"half"
    os.close(lock)
    write_lmdb(tmp_path / "x.lmdb", images)
    assert not part.exists()


# --------------------------------------------------------------------------------------------- reading back


def test_a_database_is_a_sequence(tmp_path):
    array, images = some()
    write_lmdb(tmp_path / "x.lmdb", images)
    with open_lmdb(tmp_path / "x.lmdb") as first, open_lmdb(tmp_path / "x.lmdb") as second:
        assert len(first) == 6
        assert first.info == (6, 3, 5, 7)
        for i in (3, 0, -1):
            image, label = second[i]
            assert image.dtype == np.uint8
            assert np.array_equal(image, planes(array[i]))
            assert label == images.labels[i]
        assert [label for _, label in first[1:6:2]] == [1, 1, 1]
        with pytest.raises(IndexError):
            first[6]
    assert lmdb_info(tmp_path / "x.lmdb") == (6, 3, 5, 7)


def put(path: Path, records: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    return path


def test_other_programs_databases_are_read_in_caffes_order(tmp_path):
    datums = [Datum(channels=1, height=2, width=2, data=bytes([i] * 4), label=i) for i in range(3)]
    names = [b"00000000_cat.jpg", b"00000001_a b.jpg", b"00000002_x"]
    path = put(
        tmp_path / "x", {k: d.SerializeToString() for k, d in reversed([*zip(names, datums, strict=True)])}
    )
    assert [label for _, label in open_lmdb(path)] == [0, 1, 2]
    assert open_lmdb(path)[1][0].tolist() == [[[1, 1], [1, 1]]]


def test_databases_that_are_none(tmp_path):
    def complaint(path: Path) -> str:
        with pytest.raises(RebirthError) as caught:
            open_lmdb(path)
        return str(caught.value).removeprefix(f"{path}: ")

    assert complaint(tmp_path / "none").startswith("no such database; tools/make_lmdb.py makes one")
    none = "holds no data.mdb, so it is not an LMDB; tools/make_lmdb.py makes one"
    assert complaint(tmp_path) == none
    assert complaint(save(tmp_path / "file", b"x")) == none
    assert "data.mdb is empty" in complaint(save(tmp_path / "zero/data.mdb", b"").parent)
    assert "cannot be opened as an LMDB" in complaint(save(tmp_path / "text/data.mdb", b"x" * 9999).parent)
    assert complaint(put(tmp_path / "empty", {})) == "the database is empty"
    assert "record a: not an image's Datum" in complaint(put(tmp_path / "other", {b"a": b"\xff\xff"}))
    wrong = Datum(channels=3, height=2, width=2, data=b"1234")
    complaint_of = {
        wrong.SerializeToString(): "4 bytes are not an image of 3x2x2",
        b"": "0 bytes are not an image of 0x0x0",
        Datum(
            channels=1, height=1, width=1, float_data=[1]
        ).SerializeToString(): "holds numbers (float_data)",
        Datum(encoded=True, data=b"1234").SerializeToString(): "not an image's Datum (damaged",
    }
    for i, (value, wanted) in enumerate(complaint_of.items()):
        assert wanted in complaint(put(tmp_path / f"wrong{i}", {b"a": value}))
    _, images = some(100)
    write_lmdb(tmp_path / "cut", images)
    os.truncate(tmp_path / "cut/data.mdb", 16384)
    assert complaint(tmp_path / "cut") == "data.mdb is cut short; copy or make it again"
