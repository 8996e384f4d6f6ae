"""The commands that make databases: what a person types, sees, and may interrupt at any moment."""

import gzip
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rebirth_caffe.data import open_lmdb

TOOLS = Path(__file__).parent.parent / "tools"


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(TOOLS / tool), *map(str, arguments)]


def run(tool: str, *arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(tool, *arguments), capture_output=True, text=True, check=False, **options)
    assert done.returncode == code, done.stderr
    return done


def refused(tool: str, *arguments: object, **options: Any) -> str:
    said = run(tool, *arguments, code=2, **options).stderr.splitlines()
    assert said[-1].startswith("error: ")
    assert all(line.startswith("note: ") for line in said[:-1])
    return said[-1]


def picture(seed: int, *shape: int) -> bytes:
    return cv2.imencode(".png", np.random.default_rng(seed).integers(0, 256, shape, np.uint8))[1].tobytes()


@pytest.fixture
def folders(tmp_path):
    """Two classes of ten images."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "src" / name / f"{i}.png").write_bytes(picture(10 * label + i, 6, 8, 3))
    return tmp_path / "src"


@pytest.fixture
def long_list(tmp_path):
    """More images than anybody waits for."""
    (tmp_path / "a.png").write_bytes(picture(0, 64, 64, 3))
    (tmp_path / "long.txt").write_text("a.png 0\na.png 1\n" * 100_000)
    return tmp_path / "long.txt"


def labels(path: Path) -> list[int]:
    return [label for _, label in open_lmdb(path)]


# ------------------------------------------------------------------------------------------------ make_lmdb


def test_what_a_person_sees(tmp_path, folders):
    out = tmp_path / "x.lmdb"
    done = run("make_lmdb.py", folders, out, "--shuffle", "--seed", 1)
    means = json.loads((out / "about.json").read_text())["mean_value"]
    pasted = " ".join(f"mean_value: {value:.4f}" for value in means)
    assert done.stdout.splitlines() == [
        f"{out}: 20 images of 3x6x8, 2 classes",
        f'transform_param {{ {pasted} }}  # or {{ mean_file: "{out}/mean.binaryproto" }}',
    ]
    assert done.stderr == ""
    assert sorted(labels(out)) == [0] * 10 + [1] * 10 != labels(out)
    run("make_lmdb.py", folders, tmp_path / "y.lmdb", "--shuffle", "--seed", 1)
    assert (tmp_path / "y.lmdb/data.mdb").read_bytes() == (out / "data.mdb").read_bytes()


def test_images_in_the_order_of_their_classes_get_a_note(tmp_path, folders):
    done = run("make_lmdb.py", folders, tmp_path / "x.lmdb")
    assert done.stderr == "note: the images come class by class; training needs --shuffle, testing does not\n"
    assert labels(tmp_path / "x.lmdb") == [0] * 10 + [1] * 10
    class_a = sorted(folders.iterdir())[0]
    done = run("make_lmdb.py", class_a, tmp_path / "y.lmdb")
    assert (
        done.stderr
        == f"note: the images come in the order of {class_a}; training needs --shuffle, testing does not\n"
    )
    assert labels(tmp_path / "y.lmdb") == [-1] * 10
    assert run("make_lmdb.py", class_a, tmp_path / "z.lmdb", "--shuffle").stderr == ""


def test_a_validation_split(tmp_path, folders):
    held = tmp_path / "val.lmdb"
    done = run("make_lmdb.py", folders, tmp_path / "x.lmdb", "--shuffle", "--hold-out", 0.3, held)
    assert f"{held}: 6 images of 3x6x8" in done.stdout
    listed = [(path / "list.txt").read_text().splitlines() for path in (tmp_path / "x.lmdb", held)]
    assert [len(lines) for lines in listed] == [14, 6]
    assert len({line for lines in listed for line in lines}) == 20
    assert sorted(labels(held)) == [0, 0, 0, 1, 1, 1]


def test_many_images_are_made_of_few(tmp_path, folders):
    run("make_lmdb.py", folders, tmp_path / "few.lmdb", "--shuffle", "--limit", 4)
    out = tmp_path / "many.lmdb"
    done = run("make_lmdb.py", tmp_path / "few.lmdb", out, "--mix", 50, "--pad", 2)
    assert f"{out}: 50 images of 3x10x12, no labels" in done.stdout
    assert done.stderr == ""
    assert labels(out) == [-1] * 50
    assert len({image.tobytes() for image, _ in open_lmdb(out)}) == 50
    assert json.loads((out / "about.json").read_text())["mix"] == 50
    assert "few.lmdb[3]" in (out / "list.txt").read_text()


def test_all_the_options_of_an_image(tmp_path, folders):
    options = ["--resize", "4x5", "--gray", "--pad", "1", "--encoded", "--limit", "3", "--strict"]
    done = run("make_lmdb.py", folders, tmp_path / "x.lmdb", *options)
    assert "3 images of 1x6x7, 2 classes" in done.stdout
    assert done.stderr == "note: only 1 of 2 classes are among these images\n"
    about = json.loads((tmp_path / "x.lmdb/about.json").read_text())
    assert about["resize"] == [4, 5]
    assert about["pad"] == 1
    assert about["gray"] is about["encoded"] is True
    assert about["limit"] == 3


def test_unreadable_images_are_said_and_only_strict_fails(tmp_path, folders):
    (folders / "cat/5.png").write_bytes(b"nothing")
    done = run("make_lmdb.py", folders, tmp_path / "x.lmdb", "--shuffle")
    assert "  left out 1 that cannot be read: cat/5.png (damaged, cut short or not an image)" in done.stdout
    assert (tmp_path / "x.lmdb/skipped.txt").read_text().startswith("cat/5.png: damaged")
    assert refused("make_lmdb.py", folders, tmp_path / "y.lmdb", "--strict").startswith("error: cat/5.png: ")
    assert not (tmp_path / "y.lmdb").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "x.lmdb"], "error: nowhere: no such folder or list file"),
        (["src", "x.lmdb", "--resize", "5"], "argument --resize: '5' is not HEIGHTxWIDTH, like 256x256"),
        (["src", "x.lmdb", "--resize", "0x5"], "'0x5' is not HEIGHTxWIDTH"),
        (["src", "x.lmdb", "--pad", "-1"], "argument --pad: '-1' is no whole number from 1"),
        (["src", "x.lmdb", "--seed", "a"], "argument --seed: 'a' is no whole number from 0"),
        (["src", "x.lmdb", "--hold-out", "2", "y.lmdb"], "--hold-out: '2' is not a fraction between 0 and 1"),
        (["src", "x.lmdb", "--hold-out", "0.1", "./x.lmdb"], "x.lmdb: given for both parts"),
        (["src", "x.lmdb", "--mix", "0"], "argument --mix: '0' is no whole number from 1"),
        (["src", "x.lmdb", "--mix", "9", "--hold-out", "0.1", "y.lmdb"], "--mix: makes one database"),
        (["src", "src", "--force"], "src: holds cat, so it is not just a database"),
        (["src", "/"], "error: /: not a name for a database"),
        (["src"], "the following arguments are required: OUT.lmdb"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, folders, arguments, complaint):
    assert complaint in refused("make_lmdb.py", *arguments, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, long_list):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))

    said = refused("make_lmdb.py", long_list, tmp_path / "x.lmdb", preexec_fn=little_room)
    assert said == f"error: {tmp_path}/x.lmdb: Input/output error, is the disk full?; nothing was written"
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "long.txt"}


def interrupted(tmp_path: Path, long_list: Path, number: int) -> str:
    """Stop a run in its middle; what it says."""
    half = tmp_path / "x.lmdb.part/data.mdb"
    child = subprocess.Popen(command("make_lmdb.py", long_list, tmp_path / "x.lmdb"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not (half.exists() and half.stat().st_size > 1 << 20):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate()
    assert child.returncode not in (0, 1)
    return said.decode()


def test_a_killed_run_leaves_no_database_and_the_next_cleans_up(tmp_path, folders, long_list):
    interrupted(tmp_path, long_list, signal.SIGKILL)
    assert (tmp_path / "x.lmdb.part/data.mdb").exists()
    assert not (tmp_path / "x.lmdb").exists()
    run("make_lmdb.py", folders, tmp_path / "x.lmdb", "--shuffle")
    assert not (tmp_path / "x.lmdb.part").exists()
    assert len(open_lmdb(tmp_path / "x.lmdb")) == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up_itself(tmp_path, long_list, number):
    assert "Traceback" not in interrupted(tmp_path, long_list, number)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "long.txt"}


# ----------------------------------------------------------------------------------------------- fetch_data


@pytest.fixture
def idx_files(tmp_path):
    """A Fashion-MNIST of 40 and 20 images."""
    (tmp_path / "idx").mkdir()
    for name, count in (("train", 40), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 4, 4), np.uint8)
        numbers = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", numbers)):
            head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (tmp_path / f"idx/{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return tmp_path / "idx"


def test_fashion_mnist_is_made_once(tmp_path, idx_files):
    out = tmp_path / "data"
    done = run("fetch_data.py", "fashion-mnist", idx_files, "--out", out)
    assert f"{out}/fashion_mnist_train.lmdb: 40 images of 1x4x4, 10 classes" in done.stdout
    assert labels(out / "fashion_mnist_test.lmdb") == [i % 10 for i in range(20)]
    assert labels(out / "fashion_mnist_train.lmdb") != [i % 10 for i in range(40)]
    before = (out / "fashion_mnist_train.lmdb").stat().st_ino
    done = run("fetch_data.py", "fashion-mnist", idx_files, "--out", out, "--hold-out", "0.25")
    assert f"{out}/fashion_mnist_train.lmdb: is there" in done.stdout
    assert (out / "fashion_mnist_train.lmdb").stat().st_ino == before
    parts = [labels(out / f"fashion_mnist_{part}.lmdb") for part in ("fit", "val")]
    assert [np.bincount(part).tolist() for part in parts] == [[3] * 10, [1] * 10]
    os.truncate(out / "fashion_mnist_train.lmdb/data.mdb", 8192)
    done = run("fetch_data.py", "fashion-mnist", idx_files, "--out", out, "--seed", "0")
    assert f"{out}/fashion_mnist_train.lmdb: 40 images" in done.stdout
    done = run("fetch_data.py", "fashion-mnist", idx_files, "--out", out, "--seed", "1")
    assert "is there" not in done.stdout


def test_fashion_mnist_comes_from_the_package_where_it_is_not_installed(tmp_path, idx_files):
    (tmp_path / "bin").mkdir()
    scripts = {  # a package without a network; the first download fails as it does without lists
        "apt-get": 'case "$*" in download*) echo E: no lists >&2; exit 100;; *download*) touch x.deb;; esac',
        "dpkg-deb": f"mkdir -p $3/usr/share/datasets; cp -r {idx_files} $3/usr/share/datasets/fashion-mnist",
    }
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    if Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("the package is installed here")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = run("fetch_data.py", "fashion-mnist", "--out", tmp_path / "data", env={**os.environ, "PATH": path})
    assert done.stderr == "Fetching the package dataset-fashion-mnist (31 MB)\n"
    assert len(labels(tmp_path / "data/fashion_mnist_train.lmdb")) == 40
    (tmp_path / "bin/apt-get").write_text("#!/bin/sh\necho E: no network >&2; exit 100\n")
    arguments = ["fashion-mnist", "--out", tmp_path / "other"]
    done = run("fetch_data.py", *arguments, code=2, env={**os.environ, "PATH": path})
    assert "error: cannot fetch Debian's package dataset-fashion-mnist (E: no network); " in done.stderr


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_cifar10_comes_from_a_folder_or_an_archive(tmp_path, kind):
    files = {
        f"{part}/{name}/{i}.png": picture(i, 8, 8, 3)
        for part in ("train", "test")
        for name in ("cat", "ant")
        for i in range(4)
    }
    src = tmp_path / ("src.tar.xz" if kind == "archive" else "src")
    if kind == "archive":
        with tarfile.open(src, "w:xz") as tar:
            for name, content in {"README.md": b"text", **files}.items():
                member = tarfile.TarInfo(f"./top/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            (src / name).parent.mkdir(parents=True, exist_ok=True)
            (src / name).write_bytes(content)
    run("fetch_data.py", "cifar10", src, "--out", tmp_path / "data", "--pad", "2")
    out = tmp_path / "data/cifar10_test_pad2.lmdb"
    assert (out / "labels.txt").read_text() == "ant\ncat\n"
    assert (out / "list.txt").read_text().splitlines()[4:6] == ["cat/0.png 1", "cat/1.png 1"]
    image, label = open_lmdb(out)[5]
    wanted = cv2.imdecode(np.frombuffer(files["test/cat/1.png"], np.uint8), cv2.IMREAD_COLOR)
    assert label == 1
    assert wanted is not None
    assert np.array_equal(image[:, 2:-2, 2:-2], wanted.transpose(2, 0, 1))
    assert sorted(labels(tmp_path / "data/cifar10_train_pad2.lmdb")) == [0] * 4 + [1] * 4


def test_fetch_data_says_what_is_wrong(tmp_path):
    (tmp_path / "broken.tar.xz").write_bytes(b"\xfd7zXZ\0" + b"x" * 100)
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "data"]
    assert "cifar10 needs SRC" in refused("fetch_data.py", "cifar10", *out)
    assert "neither a folder nor a whole tar" in refused(
        "fetch_data.py", "cifar10", tmp_path / "broken.tar.xz", *out
    )
    assert "empty/train: No such file" in refused("fetch_data.py", "cifar10", tmp_path / "empty", *out)
    assert "train-images-idx3-ubyte.gz: No such file" in refused(
        "fetch_data.py", "fashion-mnist", tmp_path, *out
    )
    assert "'7' is not a fraction" in refused("fetch_data.py", "fashion-mnist", "--hold-out", "7", *out)
    assert not (tmp_path / "data").exists()
