#!/usr/bin/env python3
"""Retrain a reborn net step by step under real Caffe; killed, it goes on when started again."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli

EPILOG = """DIR gets retrain/ (journal and snapshots), training.png, and at the end final/ with
deploy.prototxt, weights.caffemodel, train_val.prototxt, plan.yaml and accuracy.json."""


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, epilog=EPILOG)
    p.add_argument("directory", metavar="DIR", type=Path, help="made by rebirth_net.py --train-data")
    p.add_argument("--caffe", metavar="PATH", help="a Caffe's directory or command (default: looked for)")
    p.add_argument("--gpu", metavar="IDS", type=_gpus, default=(),
                   help="a device number, several (0,1) or all (default: the CPU)")  # fmt: skip
    p.add_argument("--threads", metavar="N", type=cli.positive, default=1, help="of the CPU (default: 1)")
    p.add_argument(
        "--iterations", metavar="N", type=cli.positive, help="of each step (default: as in the solvers)"
    )
    p.add_argument("--final-iterations", metavar="N", type=cli.whole, default=0,
                   help="of the whole net at the end (default: 0)")  # fmt: skip
    p.add_argument("--max-drop", metavar="POINTS", type=_points,
                   help="train a step longer, once, that ends further below the original's top-1, "
                   "then roll it back (default: keep every step)")  # fmt: skip
    p.add_argument("--segment", metavar="N", type=cli.positive, default=1000,
                   help="iterations between snapshots (default: 1000)")  # fmt: skip
    p.add_argument("--test-interval", metavar="N", type=cli.whole, default=0,
                   help="test on the way, too, where a segment ends at a multiple of N iterations "
                   "(default: only where a step ends)")  # fmt: skip
    cli.learning(p, *["as the directory was made"] * 2)
    p.add_argument("--stage", metavar="ID", default="", help="stop after this step")
    return p.parse_args()


def _gpus(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"all|\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not device numbers, like 0,1, nor all")
    return tuple(dict.fromkeys(text.split(",")))


def _points(text: str) -> float:
    try:
        points = float(text)
    except ValueError:
        points = -1.0
    if not 0 <= points <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of points from 0 to 100, like 0.5")
    return points


def main() -> None:
    args = parse_args()
    from rebirth_caffe.engines.caffe import find_caffe
    from rebirth_caffe.engines.training import CaffeTrainer
    from rebirth_caffe.retrain import Options, retrain
    from rebirth_caffe.stages import Settings, schedule_for
    from rebirth_caffe.training_report import Screen, draw

    made_for = Settings.read(args.directory)
    distil, schedule = made_for.distil, args.schedule or made_for.schedule
    if args.distil is not None:
        distil = args.distil
        schedule = schedule_for(args.schedule, distil)
    options = Options(
        iterations=args.iterations or made_for.iterations,
        final_iterations=args.final_iterations,
        max_drop=args.max_drop,
        segment=args.segment,
        threads=args.threads,
        gpus=args.gpu,
        schedule=schedule,
        test_interval=args.test_interval,
        distil=distil,
    )

    def tell(what: str, details: dict[str, Any]) -> None:
        screen.tell(what, details)
        if what == "result":
            draw(args.directory)

    with Screen() as screen:
        try:
            outcome = retrain(args.directory, options, CaffeTrainer(find_caffe(args.caffe)), tell, args.stage)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last snapshot", file=sys.stderr)
            raise
        draw(args.directory)
        if outcome is not None:
            screen.summary(outcome)
            screen.console.print(f"wrote {args.directory / 'final'}/", markup=False)
        else:
            screen.console.print(
                f"stopped after {args.stage}; without --stage the rest goes on", markup=False
            )


if __name__ == "__main__":
    cli.run(main)
