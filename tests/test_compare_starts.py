"""tools/compare_starts.py: every start of a tiny net, under both engines."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from tests import tiny

TOOL = tiny.ROOT / "tools/compare_starts.py"


@pytest.fixture(scope="module")
def tiny_net(tmp_path_factory, caffe):
    """A folder as prototxts/ has them: the trained tiny net and, beside it, its databases."""
    made = tiny.trained(tmp_path_factory, caffe)
    folder = tmp_path_factory.mktemp("starts") / "tiny"
    folder.mkdir()
    shutil.copy(made / "train_val.prototxt", folder)
    shutil.copy(made / "original.caffemodel", folder / "tiny.caffemodel")
    return folder, made / "train.lmdb", made / "test.lmdb"


def compare(tiny_net, tmp_path, *more):
    """Run it; the lines it wrote and what it said."""
    folder, train, test = tiny_net
    out = tmp_path / "starts.jsonl"
    command: list[str | Path] = [sys.executable, TOOL, folder]
    for name, data in (("train", train), ("test", test), ("fit", train), ("val", test)):
        command += [f"--{name}", data]
    command += ["--choose-at", "2", "--iterations", "3", "--seeds", "1", "--images", "40"]
    command += ["--work", tmp_path / "work", "--out", out, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()], done.stdout


def plot(*arguments):
    command = [sys.executable, tiny.ROOT / "tools/plot_starts.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_best_rate_of_a_start_is_chosen_and_tested(tiny_net, tmp_path):
    options = ("--starts", "inherit,lsq-distil-images", "--rates", "0.001,0.01")
    taught = ("--scores", "2", "--momentum2", "0.9")
    lines, said = compare(tiny_net, tmp_path, *options, *taught)
    assert len(lines) == 6
    for start in ("inherit", "lsq-distil-images"):
        mine = [line for line in lines if line["job"]["start"] == start]
        chosen, (tested,) = ([x for x in mine if x["job"]["held_out"] is held] for held in (True, False))
        assert {x["job"]["rate"] for x in chosen} == {0.001, 0.01}
        best = max(chosen, key=lambda x: x["final"]["top1"])
        assert tested["job"] == {**best["job"], "iterations": 3, "held_out": False}
        assert f"{start}: base_lr {tested['job']['rate']:g}\n" in said
        assert [point["iteration"] for point in tested["curve"]] == [0]
        assert tested["final"]["macs"] < tested["original"]["macs"]
        (home,) = (tmp_path / "work").glob(f"{start}-3-*-test")
        scores = 2 if "distil" in start else 4
        assert tested["job"]["scores"] == scores == tiny.journal(home)[0]["options"]["scores"]
        adam = (
            f"momentum2: {tested['job']['momentum2']:g}\n" in (home / "original/solver.prototxt").read_text()
        )
        assert (tested["job"]["momentum2"], adam) == ((0.9, True) if "distil" in start else (0.999, False))
    again, _ = compare(tiny_net, tmp_path, *options, *taught)
    assert again == lines  # nothing is done twice
    picture = tmp_path / "starts.png"
    done = plot(tmp_path / "starts.jsonl", picture)
    *table, wrote = done.stdout.splitlines()
    assert (done.returncode, wrote, done.stderr) == (0, f"wrote {picture}", "")
    ends = {line["job"]["start"]: line for line in lines if not line["job"]["held_out"]}
    assert table[0] == "| start | base_lr | 3 |"
    assert sorted(table[2:]) == sorted(
        f"| {start}{', scores 2, momentum2 0.9' * ('distil' in start)} | {end['job']['rate']:g} "
        f"| {100 * end['final']['top1']:.2f} |"
        for start, end in ends.items()
    )
    drawn = cv2.imread(str(picture))
    assert drawn is not None
    assert drawn.std() > 10
    done = plot(tmp_path / "starts.jsonl", picture, "--iterations", "2")  # those chose the rate
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/starts.jsonl: no run of 2 iterations to draw\n"


@pytest.mark.parametrize(("start", "init", "factor"), [("lsq", "lsq", 4), ("scaled", "inherit", 4)])
def test_on_torch_starts_are_fitted_to_images_they_learn_from(tiny_net, tmp_path, start, init, factor):
    """And what was fitted learns more slowly than noise, which takes ten times the rate."""
    pytest.importorskip("torch")
    (line,), _ = compare(tiny_net, tmp_path, "--starts", start, "--rates", "0.001", "--engine", "torch")
    (home,) = (tmp_path / "work").glob(f"{start}-3-*-test")
    settings = json.loads((home / "original/settings.json").read_text())
    assert (settings["init"], settings["distil"], settings["images"]) == (init, "", 40)
    assert settings["calibration"] == str(tiny_net[1].resolve())
    assert tiny.journal(home)[0]["options"]["engine"] == "torch"
    rates = re.findall(r"lr_mult: (\S+)", (home / "stages/01-joint/train_val.prototxt").read_text())
    assert max(map(float, rates)) == 2 * factor  # the biases'
    assert line["curve"][0]["top1"] > 0.2  # of ten classes, before it has learned anything


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (("--starts", "lsq,best"), "'best' is none of xavier, inherit, scaled, lsq, "),
        (("--momentum2", "1"), "'1' is not a fraction between 0 and 1"),
    ],
)
def test_what_is_none_is_refused(tmp_path, option, complaint):
    done = subprocess.run(
        [sys.executable, TOOL, tmp_path, *option], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert complaint in done.stderr
