"""A tiny net over tiny databases, for the tests that train under real Caffe."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rebirth_caffe.data import Images, from_idx, write_lmdb
from rebirth_caffe.engines.caffe import Caffe
from rebirth_caffe.engines.training import Run, train
from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.solver import TrainData
from rebirth_caffe.stages import Training

ROOT = Path(__file__).resolve().parents[1]
TRAIN_IMAGES, TEST_IMAGES = 330, 200  # not whole batches: the data wraps around in the middle of one
CLASSES = 10

# Two merges that need training (conv1, conv2), random crops and mirroring, dropout, an auxiliary head.
NET = """
name: "tiny"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  transform_param { mirror: true crop_size: 24 mean_value: 70 scale: 0.02 }
  data_param { source: "train.lmdb" batch_size: 16 backend: LMDB } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  transform_param { crop_size: 24 mean_value: 70 scale: 0.02 }
  data_param { source: "test.lmdb" batch_size: 50 backend: LMDB } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"  # the first
  param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 8 kernel_size: 5 pad: 2 weight_filler { type: "xavier" } } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param { pool: MAX kernel_size: 3 stride: 2 } }
layer { name: "norm1" type: "LRN" bottom: "pool1" top: "norm1"
  lrn_param { local_size: 5 alpha: 1 beta: 0.75 } }
layer { name: "conv2" type: "Convolution" bottom: "norm1" top: "conv2"
  convolution_param { num_output: 12 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "relu2" type: "ReLU" bottom: "conv2" top: "conv2" }
layer { name: "pool2" type: "Pooling" bottom: "conv2" top: "pool2"
  pooling_param { pool: MAX kernel_size: 3 stride: 2 } }
layer { name: "aux" type: "InnerProduct" bottom: "norm1" top: "aux" include { phase: TRAIN }
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
layer { name: "aux/loss" type: "SoftmaxWithLoss" bottom: "aux" bottom: "label" top: "aux/loss"
  loss_weight: 0.1 include { phase: TRAIN } }
layer { name: "drop" type: "Dropout" bottom: "pool2" top: "pool2" dropout_param { dropout_ratio: 0.2 } }
layer { name: "fc" type: "InnerProduct" bottom: "pool2" top: "fc"
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
layer { name: "accuracy" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy"
  include { phase: TEST } }
layer { name: "accuracy5" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy5"
  accuracy_param { top_k: 5 } include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
SOLVER = """base_lr: 0.01  # gently
lr_policy: "step"
gamma: 0.1
momentum: 0.9
weight_decay: 0.0002
solver_mode: CPU
"""
WHOLE = """net: "train_val.prototxt"
base_lr: 0.02
lr_policy: "fixed"
momentum: 0.9
max_iter: 150
snapshot_prefix: "original"
random_seed: 1
display: 50
"""


def synthetic(count: int, seed: int) -> Images:
    """28 x 28 images of ten classes that a tiny net learns in a moment: a bar at one of ten places."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    pixels = random.integers(0, 90, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 5)
        image[4 + 12 * row : 12 + 12 * row, 4 + 4 * column : 9 + 4 * column] += 120
    return Images([str(i) for i in range(count)], labels, lambda i: pixels[i], tuple("0123456789"))


def fashion_mnist(scratch: Path) -> Path | None:
    """The folder with Fashion-MNIST's files, where Debian's package is installed or can be fetched."""
    code = """if True:
        import sys, fetch_data
        folder = fetch_data.INSTALLED
        print(folder if folder.is_dir() else fetch_data._unpacked(fetch_data.Path(sys.argv[1])))
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(scratch)],
            cwd=ROOT / "tools",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return None if done.returncode else Path(done.stdout.splitlines()[-1])


def databases(folder: Path, fashion: Path | None = None) -> None:
    """train.lmdb and test.lmdb: of Fashion-MNIST's images where they are there, else synthetic ones."""
    for name, part, count, seed in (("train", "train", TRAIN_IMAGES, 1), ("test", "t10k", TEST_IMAGES, 2)):
        if fashion is None:
            images = synthetic(count, seed)
        else:
            kinds = ("images-idx3", "labels-idx1")
            images = from_idx(*(fashion / f"{part}-{kind}-ubyte.gz" for kind in kinds))
        write_lmdb(folder / f"{name}.lmdb", images, order=np.arange(count), force=True)


def original(caffe: Caffe, folder: Path) -> None:
    """Train the tiny net in ``folder``, which has the databases: original.caffemodel beside it."""
    (folder / "train_val.prototxt").write_text(NET)
    (folder / "whole.prototxt").write_text(WHOLE)
    train(caffe, Run(folder, "whole.prototxt", 150), lambda iteration, loss: None)
    (folder / "original_iter_150.caffemodel").rename(folder / "original.caffemodel")


def trained(tmp_path_factory: Any, caffe: Caffe) -> Path:
    """A directory with the databases and the tiny net that real Caffe has trained on them."""

    def make(folder: Path) -> None:
        databases(folder, fashion_mnist(folder))
        original(caffe, folder)

    return once(shared_folder(tmp_path_factory) / "tiny", make)


def learned(trained: Path) -> Net:
    """The tiny net as real Caffe has taught it, its Data layers reading the databases from anywhere."""
    text = (trained / "train_val.prototxt").read_text()
    for name in ("train.lmdb", "test.lmdb"):
        text = text.replace(f'"{name}"', f'"{trained / name}"')
    return Net.parse(text).with_weights(trained / "original.caffemodel")


def reborn(
    folder: Path,
    out: Path,
    *,
    solver: str | None = SOLVER,
    iterations: int = 6,
    learning: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """What rebirth_net.py --train-data makes of the original in ``folder``; ``learning``: see Training."""
    template = None
    if solver is not None:
        template = out.parent / f"{out.name}.solver"
        template.write_text(solver)
    data = TrainData(str(folder / "train.lmdb"), str(folder / "test.lmdb"))
    rebirth(
        folder / "train_val.prototxt",
        folder / "original.caffemodel",
        training=Training(data, template, iterations, **learning or {}),
        **options,
    ).write(out)
    return out


def once(shared: Path, make: Callable[[Path], None]) -> Path:
    """A directory that one of the processes of a test run makes and all of them use."""
    shared.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            unfinished = shared.with_name(shared.name + ".unfinished")
            unfinished.mkdir(exist_ok=True)
            make(unfinished)
            unfinished.rename(shared)
    return shared


def shared_folder(tmp_path_factory: Any) -> Path:
    """Where the processes of one test run meet."""
    base = Path(tmp_path_factory.getbasetemp())
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


def journal(home: Path) -> list[dict[str, Any]]:
    """The events of a run."""
    return [json.loads(line) for line in (home / "retrain/journal.jsonl").read_text().splitlines()]
