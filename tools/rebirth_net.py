#!/usr/bin/env python3
"""Rewrite a Caffe net into a faster one: deploy, train_val, weights, plan and report."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rebirth_caffe.calibration import Calibration, Tell
    from rebirth_caffe.stages import Training

# What is heavy is imported in main(), so that --help and a wrong option answer at once.


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__)
    p.add_argument("prototxt", metavar="IN.prototxt", help="a deploy or train_val net")
    p.add_argument("--weights", metavar="W.caffemodel", help="its trained weights (current or V1 storage)")
    p.add_argument("--out", metavar="DIR", help="where to write (default: <name of the net>_rebirth/)")
    p.add_argument("--force", action="store_true",
                   help="replace what an earlier run wrote into --out; other files there stay")  # fmt: skip
    p.add_argument("--plan", metavar="PLAN.yaml",
                   help="apply this plan, --reduce and --kernel as they are in it")  # fmt: skip
    which = p.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="IDS", type=_ids, default=(),
                       help="just these merges or training steps: conv1,4b-4d")  # fmt: skip
    which.add_argument("--skip", metavar="IDS", type=_ids, default=(), help="all but these")
    p.add_argument("--exact", action="store_true",
                   help="only what leaves the net's function as it is, and all of that; verified on random "
                   "inputs in Caffe (or OpenCV) before anything is written; without it, those exact merges "
                   "that no engine loses by are made beside the others")  # fmt: skip
    p.add_argument("--reduce", metavar="R", type=_float,
                   help="what is left of the reducers under merged branches (default: 0.5)")  # fmt: skip
    p.add_argument("--kernel", choices=("keep", "cover", "auto"),
                   help="kernel of a convolution that takes in a pool: the original, all the two of them "
                   "saw, or the smallest well-centred (default: keep)")  # fmt: skip
    p.add_argument("--init", choices=("xavier", "inherit", "lsq"), default="inherit",
                   help="weights of reborn layers: noise as in the paper, the absorbed layers', or fitted to "
                   "what the original does with images (default: inherit)")  # fmt: skip
    p.add_argument("--calibration", metavar="IMAGES",
                   help="images for lsq and --sensitivity, or for inherit to scale by what it copies, "
                   "without labels: an LMDB, a folder, a list (default: for the first two --train-data); "
                   "for a deploy net with --mean-value, --scale, --crop as it was trained; files are resized "
                   "to what the net takes, not cropped")  # fmt: skip
    p.add_argument("--images", metavar="N", type=cli.positive, help="of them, to use (default: 1024)")
    p.add_argument("--sensitivity", action="store_true",
                   help="measure, too, what each merge alone saves and loses, in every geometry; takes "
                   "images, as lsq, and minutes (inherit copies without scaling then)")  # fmt: skip
    p.add_argument("--seed", metavar="N", type=cli.whole, default=0, help="of everything random (default: 0)")
    p.add_argument("--image", metavar="CxHxW", type=_image,
                   help="what a Data layer reads, where its prototxt does not say: 3x32x32")  # fmt: skip
    p.add_argument("--proto", metavar="FORK.proto", help="the caffe.proto of the fork the net is for")
    p.add_argument("--caffe", metavar="PATH",
                   help="a Caffe's directory or command, for all that runs a net")  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="show what would be done, write nothing")
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    t = p.add_argument_group("training", "write what tools/retrain.py and caffe train need, too")
    t.add_argument("--train-data", metavar="LMDB", help="images to train on (tools/make_lmdb.py)")
    t.add_argument("--test-data", metavar="LMDB", help="images to test on")
    t.add_argument("--mean-file", metavar="BINARYPROTO", help="mean image to subtract")
    t.add_argument(
        "--mean-value", metavar="V,V,V", type=cli.numbers, help="mean value of each channel to subtract"
    )
    t.add_argument("--scale", metavar="S", type=_float, help="factor after that")
    t.add_argument("--crop", metavar="N", type=cli.positive, help="crop to N x N, at random in training")
    t.add_argument("--mirror", action=argparse.BooleanOptionalAction, help="mirror at random in training")
    t.add_argument("--batch", metavar="N", type=cli.positive, help="training batch (default 32)")
    t.add_argument("--solver", metavar="TEMPLATE", type=Path,
                   help="solver prototxt for every step (default: SGD, with --distil Adam)")  # fmt: skip
    t.add_argument("--iterations", metavar="N", type=cli.positive,
                   help="of a step, in the solvers written (default: 90000)")  # fmt: skip
    cli.learning(t, "steps; joint with --distil", "no")
    args = p.parse_args()
    if (args.train_data is None) != (args.test_data is None):
        p.error("--train-data and --test-data go together")
    for name in (
        *(() if args.calibration else ("mean_file", "mean_value", "scale", "crop")),
        *("mirror", "batch", "solver", "iterations", "schedule", "distil"),
    ):
        if args.train_data is None and getattr(args, name) is not None:
            also = ", or --calibration" if name in ("mean_file", "mean_value", "scale", "crop") else ""
            p.error(f"--{name.replace('_', '-')} is of no use without --train-data and --test-data{also}")
    learning = "--sensitivity" if args.sensitivity else "--init lsq" if args.init == "lsq" else ""
    if learning and not (args.calibration or args.train_data):
        p.error(f"{learning} takes images; give --calibration, or --train-data and --test-data")
    if args.exact and learning:
        p.error(f"{learning} is of no use with --exact, which leaves nothing to re-train")
    for name in ("kernel", "reduce", "calibration", "schedule", "distil", "solver", "iterations"):
        if args.exact and getattr(args, name) is not None:
            p.error(f"--{name} is of no use with --exact, which leaves nothing to re-train")
    for name in ("kernel", "reduce"):
        if args.plan and getattr(args, name) is not None:
            p.error(f"--{name} is of no use with --plan, which has its own")
    args.kernel = args.kernel or "keep"
    args.reduce = 0.5 if args.reduce is None else args.reduce
    if not learning and args.calibration and args.init == "xavier":
        p.error("--calibration is for --init lsq and inherit, and for --sensitivity")
    if not learning and args.images and not args.calibration:
        p.error("--images says how many of --calibration; give that")
    if (learning or args.calibration) and not args.weights:
        p.error(f"{learning or '--calibration'} takes a trained net; give --weights")
    return args


def _ids(text: str) -> tuple[str, ...]:
    ids = tuple(word.strip() for word in text.split(",") if word.strip())
    if not ids:
        raise argparse.ArgumentTypeError("names no merge; give ids like conv1,4b-4d")
    return ids


def _image(text: str) -> tuple[int, int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and 0 < int(size) < 2**15 for size in sizes):
        raise argparse.ArgumentTypeError(f"'{text}' is no CxHxW; give channels, height and width: 3x32x32")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is no number")
    return value


def main() -> None:
    args = parse_args()
    if args.init != "lsq" and not args.sensitivity:
        # These matrices are small: threads would only wait for each other.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from rebirth_caffe.rebirth import may_write, rebirth

    def out(name: str) -> Path:
        return Path(re.sub(r"[^\w.+-]", "_", name)[:60] + "_rebirth" if args.out is None else args.out)

    def named(name: str) -> None:
        if not args.dry_run:
            may_write(out(name), args.force)

    with _progress(args) as tell:
        result = rebirth(
            args.prototxt, args.weights, plan=args.plan, only=args.only, skip=args.skip, exact=args.exact,
            reduce=args.reduce, kernel=args.kernel, init=args.init, seed=args.seed, image=args.image,
            proto=args.proto, training=_training(args), caffe=args.caffe,
            calibration=_calibration(args),
            sensitivity=args.sensitivity, tell=tell, named=named,
        )  # fmt: skip
    folder = out(result.original.name)
    written = [] if args.dry_run else result.write(folder, args.force)
    if args.json:
        print(json.dumps(result.report(), indent=2))
        return
    from rebirth_caffe.report import show

    show(result)
    if written:
        names = [path.name + "/" * path.is_dir() for path in written]
        print(cli.printable(f"wrote {folder}/: {', '.join(names)}"))
        if "stages/" in names:
            retrain = f"python tools/retrain.py {shlex.quote(str(folder))}"
            again = "make it again with the original's --weights, to retrain it"
            print(cli.printable(f"next: {retrain if args.weights else again}"))


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Tell]:
    """A bar, where there is something to wait for."""
    if args.init != "lsq" and not args.sensitivity and args.calibration is None:
        yield lambda done, total: None
        return
    from rebirth_caffe.data import show_progress

    with show_progress("done") as progress:
        yield progress


def _calibration(args: argparse.Namespace) -> Calibration | None:
    if args.calibration is None and args.images is None:
        return None
    from rebirth_caffe.calibration import IMAGES, Calibration
    from rebirth_caffe.transform import Transform

    transform = Transform(args.crop or 0, args.mean_value or (), args.mean_file, args.scale or 1.0)
    return Calibration(args.calibration or args.train_data, args.images or IMAGES, transform)


def _training(args: argparse.Namespace) -> Training | None:
    if args.train_data is None:
        return None
    from rebirth_caffe.engines import any_engine
    from rebirth_caffe.solver import TrainData
    from rebirth_caffe.stages import Training

    data = TrainData(
        args.train_data, args.test_data, args.mean_file, args.mean_value, args.scale, args.crop, args.mirror,
        args.batch,
    )  # fmt: skip
    distil = args.distil or ""
    engine = any_engine(args.caffe) if distil else None
    return Training(data, args.solver, args.iterations or 90_000, args.schedule or "", distil, engine)


if __name__ == "__main__":
    cli.run(main)
