"""tools/benchmark.py as a person runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rebirth_caffe.engines.caffe import Caffe
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Net

TOOL = Path(__file__).parents[1] / "tools" / "benchmark.py"

SMALL = """
name: "small"
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 24 dim: 24 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 8 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "norm1" type: "LRN" bottom: "conv1" top: "norm1" }
layer { name: "fc" type: "InnerProduct" bottom: "norm1" top: "fc" inner_product_param { num_output: 10 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""


def write_net(folder: Path) -> tuple[Path, Path]:
    """The net and weights for it: (prototxt, caffemodel)."""
    prototxt, weights = folder / "small.prototxt", folder / "small.caffemodel"
    prototxt.write_text(SMALL)
    net = Net.load(prototxt)
    fill_missing(net, seed=1)
    net.write_weights(weights)
    return prototxt, weights


def benchmark(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tool, from a directory that is not the repository's."""
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        env={**os.environ, "COLUMNS": "100", **environment},
        cwd="/",
        capture_output=True,
        text=True,
    )


def error_of(*arguments: object, **environment: str) -> str:
    done = benchmark(*arguments, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.strip()


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two nets and the weights of the first."""
    folder = tmp_path_factory.mktemp("nets")
    prototxt, weights = write_net(folder)
    wide = folder / "wide.prototxt"
    wide.write_text(SMALL.replace("num_output: 8", "num_output: 64"))
    return prototxt, wide, weights


def test_the_table(caffe: Caffe, nets: tuple[Path, Path, Path]) -> None:
    done = benchmark(*nets[:2], "--weights", nets[2], "--weights", "-", "--runs", 3, "--layers")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.stdout.startswith(f"Caffe {caffe.version}, OpenCV 4")
    assert "batch 1, 1 thread, median of 3 forwards in turn" in done.stdout
    rows = [line for line in lines if line[:1] in (["small"], ["wide"])]
    assert [row[:2] for row in rows] == 2 * [
        [net, engine] for engine in ("Caffe", "OpenCV") for net in ("small", "wide")
    ]
    assert rows[0][-1] == "1"
    assert rows[1][-1].endswith("x")
    assert float(rows[1][-1][:-1]) < 1
    assert sum(line[:2] == ["conv1", "Convolution"] for line in lines) == 2
    assert sum(line[:1] == ["together"] for line in lines) == 2
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_json_and_nothing_else(nets: tuple[Path, Path, Path]) -> None:
    done = benchmark(*nets[:2], "--engine", "opencv", "--runs", 3, "--batch", 2, "--threads", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert [net["name"] for net in document["nets"]] == ["small", "wide"]
    assert [engine["name"] for engine in document["engines"]] == ["opencv"]
    assert (document["threads"], document["batch"], document["runs"]) == (2, 2, 3)
    base, other = document["results"]
    assert base["ratio"] == 1
    assert other["ratio"] == pytest.approx(base["median_ms"] / other["median_ms"], rel=1e-2)
    assert len(base["runs_ms"]) == 3
    assert "layers" not in base


def test_without_caffe(nets: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """OpenCV goes on alone; whatever needs Caffe says how to get it."""
    missing = {"REBIRTH_CAFFE": str(tmp_path / "gone")}
    assert "REBIRTH_CAFFE" in error_of(nets[0], **missing)
    assert benchmark(nets[0], "--engine", "opencv", "--runs", 1, **missing).returncode == 0


def test_bad_input_gets_one_line(nets: tuple[Path, Path, Path], tmp_path: Path) -> None:
    prototxt, _, weights = nets
    opencv = ("--engine", "opencv")
    assert "engine 'mxnet' is not known; known are caffe, opencv" in error_of(prototxt, "--engine", "mxnet")
    assert f"{tmp_path}/none.prototxt" in error_of(tmp_path / "none.prototxt", *opencv)
    assert f"{tmp_path}/none.caffemodel" in error_of(
        prototxt, *opencv, "--weights", tmp_path / "none.caffemodel"
    )
    assert "1 nets but 2 weights" in error_of(prototxt, *opencv, "--weights", weights, "--weights", "-")
    cut = tmp_path / "cut.caffemodel"
    cut.write_bytes(weights.read_bytes()[:-10])
    assert str(cut) in error_of(prototxt, *opencv, "--weights", cut)
    train_val = tmp_path / "train_val.prototxt"
    train_val.write_text(SMALL.replace('type: "Input"', 'type: "Data"'))
    assert "time the deploy net" in error_of(train_val, *opencv)
    done = benchmark(prototxt, "--runs", 0)
    assert done.returncode == 2
    assert "--runs" in done.stderr


def test_help_is_quick() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(TOOL), "--help"], capture_output=True, text=True, check=True
    )
    assert "--engine" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"numpy", "cv2", "rich", "google.protobuf"}
