#!/usr/bin/env python3
"""Retrain a reborn net step by step under real Caffe; killed, it goes on when started again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__)
    p.add_argument("directory", metavar="DIR", type=Path, help="made by rebirth_net.py --train-data")
    p.add_argument("--caffe", metavar="PATH", help="a Caffe's directory or command (default: looked for)")
    p.add_argument("--gpu", metavar="IDS", default="", help="device numbers 0,1 or all (default: the CPU)")
    p.add_argument("--threads", metavar="N", type=int, default=1, help="of the CPU (default: 1)")
    p.add_argument("--iterations", metavar="N", type=int, help="of each step (default: as in the solvers)")
    p.add_argument("--final-iterations", metavar="N", type=int, default=0,
                   help="of the whole net at the end (default: 0)")  # fmt: skip
    p.add_argument("--max-drop", metavar="POINTS", type=float,
                   help="roll a step back that ends further below the original's top-1")  # fmt: skip
    p.add_argument("--segment", metavar="N", type=int, default=1000,
                   help="iterations between snapshots (default: 1000)")  # fmt: skip
    p.add_argument("--stage", metavar="ID", default="", help="stop after this step")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    from rebirth_caffe.engines.caffe import find_caffe
    from rebirth_caffe.retrain import Options, iterations_of, retrain
    from rebirth_caffe.training_report import Screen, draw

    options = Options(
        iterations=args.iterations or iterations_of(args.directory),
        final_iterations=args.final_iterations,
        max_drop=args.max_drop,
        segment=args.segment,
        threads=args.threads,
        gpus=tuple(word for word in args.gpu.split(",") if word),
    )
    with Screen() as screen:
        outcome = retrain(args.directory, options, find_caffe(args.caffe), screen.tell, args.stage)
        draw(args.directory)
        if outcome is not None:
            screen.summary(outcome)


if __name__ == "__main__":
    cli.run(main)
