"""A net trained from its fillers by its own solver."""

import subprocess
import sys
from pathlib import Path

import pytest

from rebirth_caffe.errors import RebirthError
from rebirth_caffe.net import Net
from rebirth_caffe.originals import begin
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    """A net of its own, with databases."""
    tiny.databases(tmp_path)
    (tmp_path / "train_val.prototxt").write_text(tiny.NET)
    (tmp_path / "solver.prototxt").write_text(tiny.WHOLE)
    return tmp_path


def test_the_directory_starts_from_the_fillers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert begin(folder, folder / "a") == 150
    assert begin(folder, folder / "b", iterations=7, seed=1) == 7
    assert begin(folder, folder / "c", seed=2) == 150
    weights = {name: (folder / name / "original/weights.caffemodel").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    net = Net.load(folder / "a/original/train_val.prototxt", folder / "a/original/weights.caffemodel")
    assert abs(net.layer("conv1").blobs[0].array).max() > 0
    assert str(folder / "train.lmdb") in net.text()


def test_or_from_weights_by_another_solver(folder, monkeypatch):
    monkeypatch.chdir(folder)
    begin(folder, folder / "a")
    first = folder / "a/original/weights.caffemodel"
    (folder / "on.prototxt").write_text(tiny.WHOLE.replace("max_iter: 150", "max_iter: 30"))
    assert begin(folder, folder / "b", seed=2, weights=first, solver=folder / "on.prototxt") == 30
    assert "max_iter: 30" in (folder / "b/original/solver.prototxt").read_text()
    made, wanted = (
        Net.load(folder / "train_val.prototxt", path)
        for path in (folder / "b/original/weights.caffemodel", first)
    )
    for name in ("conv1", "conv2", "fc"):
        assert (made.layer(name).blobs[0].array == wanted.layer(name).blobs[0].array).all()


def test_a_directory_of_a_run_is_left_alone_and_another_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    begin(folder, folder / "a")
    (folder / "a/original/weights.caffemodel").write_bytes(b"mine")
    assert begin(folder, folder / "a") == 150
    assert (folder / "a/original/weights.caffemodel").read_bytes() == b"mine"
    (folder / "other").mkdir()
    with pytest.raises(RebirthError, match="no training directory"):
        begin(folder, folder / "other")


def test_a_missing_database_is_told_and_nothing_written(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(RebirthError, match=r"nowhere\.lmdb"):
        begin(folder, folder / "a", train_data="nowhere.lmdb")
    assert sorted(p.name for p in folder.iterdir()) == [
        "solver.prototxt", "test.lmdb", "train.lmdb", "train_val.prototxt",
    ]  # fmt: skip


def test_it_trains_and_goes_on(caffe, folder):
    command = [sys.executable, str(ROOT / "tools/train_original.py"), str(folder)]
    command += ["--out", "run", "--iterations", "40", "--segment", "20"]
    first = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "wrote run/final/" in first.stdout
    events = [e["event"] for e in tiny.journal(folder / "run")]
    assert events.count("segment") == 2
    before = (folder / "run/final/weights.caffemodel").read_bytes()
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert [e["event"] for e in tiny.journal(folder / "run")] == events
    assert (folder / "run/final/weights.caffemodel").read_bytes() == before
