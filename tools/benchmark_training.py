#!/usr/bin/env python3
"""Time training iterations in Caffe and in torch, in turn, on images made of noise."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.errors import RebirthError

ENGINES = ("caffe", "torch", "torch-bf16")
SETTLED = 2  # iterations after which all memory has been allocated
EPILOG = """The engines train a few iterations of each net in turn, again and again; the first two of each
turn are not counted. Started by torchrun with N processes it also times torch divided among them: a
N-th of the batch and of the threads each."""


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, epilog=EPILOG)
    p.add_argument(
        "nets", metavar="NET[:BATCH]", nargs="+", help="folders of nets, like prototxts/cifar10_full:64"
    )
    p.add_argument("--engine", default=",".join(ENGINES), help=f"default: {','.join(ENGINES)}")
    p.add_argument("--threads", metavar="N", type=cli.positive, default=os.cpu_count() or 1,
                   help="default: all cores")  # fmt: skip
    p.add_argument("--iterations", metavar="N", type=cli.positive, default=6, help="of a turn (default: 6)")
    p.add_argument("--rounds", metavar="N", type=cli.positive, default=3, help="turns each (default: 3)")
    p.add_argument("--caffe", metavar="PATH", help="a Caffe's directory or command (default: looked for)")
    p.add_argument("--out", metavar="FILE", type=Path, help="write every turn's time there, as JSON")
    return p.parse_args()


def prepare(home: Path, folder: Path, batch: int, parts: int) -> int:
    """A database of noise and what trains on it, with the whole batch and with a part of it; the batch."""
    import numpy as np

    from rebirth_caffe.data import Images, write_lmdb
    from rebirth_caffe.init.fill import fill_missing
    from rebirth_caffe.net import TRAIN, Net
    from rebirth_caffe.solver import TrainData, data_layer, trainable

    net = Net.load(folder / "train_val.prototxt")
    layer = data_layer(net, TRAIN)
    deploy = Net.load(folder / "deploy.prototxt").layer("data")
    if layer is None:
        raise RebirthError(f"{net.path}: reads no database in TRAIN")
    channels, height, width = list(deploy.param.input_param.shape[0].dim)[1:]
    batch = batch or layer.param.data_param.batch_size
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2 * batch, height, width, channels), np.uint8)
    labels = random.integers(0, 10, 2 * batch)
    images = Images([str(i) for i in range(2 * batch)], labels, lambda i: pixels[i].squeeze(), ())
    source = str(home / "noise.lmdb")
    write_lmdb(home / "noise.lmdb", images)
    for name, size in (("whole", batch), ("part", max(1, batch // parts))):
        made = trainable(net, TrainData(source, source, None, (128.0,), batch=size))
        made.image = (channels, height, width)
        fill_missing(made)
        made.write(home / f"{name}.prototxt")
        made.write_weights(home / "start.caffemodel")
        (home / f"{name}.solver").write_text(
            f'net: "{name}.prototxt" snapshot_prefix: "{name}" base_lr: 0.0001 lr_policy: "fixed" '
            "momentum: 0.9 weight_decay: 0.0002 max_iter: 1000000 display: 1 random_seed: 1\n"
        )
    return batch


def main() -> None:
    args = parse_args()
    from rebirth_caffe.engines.caffe import find_caffe
    from rebirth_caffe.engines.torch.trainer import TorchTrainer
    from rebirth_caffe.engines.training import CaffeTrainer, Run, Trainer

    several = TorchTrainer()
    trainers: dict[str, Trainer] = {}
    for name in args.engine.split(","):
        if name not in ENGINES:
            raise RebirthError(f"--engine {name}: not known; give some of {','.join(ENGINES)}")
        torch = TorchTrainer(amp=name.endswith("bf16"), alone=True)
        trainers[name] = torch if name != "caffe" else CaffeTrainer(find_caffe(args.caffe))
    if several.size > 1:
        trainers[f"torch, {several.size} processes"] = several

    def turn(name: str, home: Path) -> float:
        """Seconds of an iteration."""
        times: list[float] = []
        divided = trainers[name] is several
        solver = "part.solver" if divided else "whole.solver"
        threads = max(1, args.threads // several.size) if divided else args.threads
        run = Run(home, solver, SETTLED + args.iterations + 1, weights="start.caffemodel", threads=threads)
        trainers[name].train(run, lambda iteration, loss: times.append(time.perf_counter()))
        return float((times[-1] - times[SETTLED]) / args.iterations)

    found: list[dict[str, Any]] = []
    with several.together() as first, tempfile.TemporaryDirectory(prefix="rebirth.") as scratch:
        for number, given in enumerate(args.nets if first else []):
            folder, _, size = given.partition(":")
            home = Path(scratch) / str(number)
            home.mkdir()
            batch = prepare(home, Path(folder), int(size or 0), several.size)
            times: dict[str, list[float]] = {name: [] for name in trainers}
            for _ in range(args.rounds):
                for name in trainers:
                    times[name].append(turn(name, home))
            found.append({"net": Path(folder).name, "batch": batch, "seconds": times})
            show(found[-1])
    if first and args.out is not None:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "machine": platform.machine()}
        setting = {"threads": args.threads, "iterations": args.iterations, **machine}
        args.out.write_text(json.dumps({**setting, "nets": found}, indent=1) + "\n", "utf-8")


def show(one: dict[str, Any]) -> None:
    """A line for each engine: iterations a second, and the ratio to the first."""
    medians = {name: median(times) for name, times in one["seconds"].items()}
    base = next(iter(medians.values()))
    for name, seconds in medians.items():
        spread = _spread(one["seconds"][name])
        print(
            f"{one['net']}, batch {one['batch']}, {name}: {1 / seconds:.3g} iterations/s "
            f"(±{spread:.0%}), {one['batch'] / seconds:.3g} images/s, {base / seconds:.2f}x",
            flush=True,
        )


def _spread(times: Sequence[float]) -> float:
    return float((max(times) - min(times)) / 2 / median(times))


if __name__ == "__main__":
    cli.run(main)
