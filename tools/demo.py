#!/usr/bin/env python3
"""The tour: a trained net reborn, retrained and timed against its original; then two large ones, for speed.

It only runs the commands a person would type, and shows them. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Net, and the flags of each reborn version of it. --kernel auto also merges the pools that only another
# kernel can take in: in GoogLeNet that changes two kernels, in CaffeNet it adds three pools.
TOUR = (
    ("bvlc_googlenet", {"reborn": [], "reborn_auto": ["--kernel", "auto"]}),
    ("bvlc_reference_caffenet", {"reborn": [], "reborn_auto": ["--kernel", "auto"]}),
)
TRAINED = "prototxts/fashion_googlenet"
IMAGES = "data/fashion_mnist_{}.lmdb"


class Failed(Exception):
    """A command of the tour that ended with this status."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="where to write (default: demo/ in the repository)"
    )
    parser.add_argument("--runs", type=int, default=20, help="timed forwards of each net (default: 20)")
    parser.add_argument("--engine", default="caffe,opencv", help="as in tools/benchmark.py")
    parser.add_argument("--iterations", type=int, default=1750, help="of the training (default: 1750)")
    args = parser.parse_args()
    if args.out != parser.get_default("out"):
        args.out = args.out.resolve()
    try:
        accuracy(args)
        speed(args)
    except Failed as failed:
        return int(failed.args[0])
    return 0


def accuracy(args: argparse.Namespace) -> None:
    """The whole way of a trained net."""
    out = args.out / "fashion"
    train, test = (IMAGES.format(part) for part in ("train", "test"))
    show(["tools/fetch_data.py", "fashion-mnist"])
    if not (ROOT / out / "plan.yaml").exists():
        show(
            [
                *("tools/rebirth_net.py", f"{TRAINED}/train_val.prototxt"),
                *("--weights", f"{TRAINED}/fashion_googlenet.caffemodel", "--kernel", "auto"),
                *("--train-data", train, "--test-data", test),
                *("--distil", "--solver", f"{TRAINED}/solver_distil.prototxt"),
                *("--iterations", str(args.iterations), "--out", str(out)),
            ]
        )
    show(["tools/retrain.py", str(out), "--segment", "500", "--scores", "16"])
    show(
        [
            *("tools/benchmark.py", f"{TRAINED}/deploy.prototxt", f"{out}/final/deploy.prototxt"),
            *("--weights", f"{TRAINED}/fashion_googlenet.caffemodel"),
            *("--weights", f"{out}/final/weights.caffemodel"),
            *("--engine", args.engine, "--runs", str(10 * args.runs)),
        ]
    )


def speed(args: argparse.Namespace) -> None:
    """Large nets, whose published weights are not at hand: time does not depend on them."""
    for name, versions in TOUR:
        original = f"prototxts/{name}/deploy.prototxt"
        nets = [original]
        for version, flags in versions.items():
            out = args.out / name / version
            quiet = ["--json"] if flags else []  # the second table would say nearly the same
            command = ["tools/rebirth_net.py", original, "--out", str(out), "--force", *flags, *quiet]
            show(command, hide=bool(quiet))
            nets.append(str(out / "deploy.prototxt"))
        show(["tools/benchmark.py", *nets, "--engine", args.engine, "--runs", str(args.runs)])


def show(command: list[str], hide: bool = False) -> None:
    """Run one of our commands in the repository, after printing it. Raises Failed."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL if hide else None, check=False
    )
    if done.returncode:
        raise Failed(done.returncode)


if __name__ == "__main__":
    sys.exit(main())
