#!/usr/bin/env python3
"""Train one of the nets in prototxts/ from its fillers, by its own solver; killed, it goes on.

It is the fine-tune of tools/retrain.py with nothing merged and no weights to start from, so it is as safe
against kills, and two runs with one seed end with the same weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.retrain_command import engine_options, trainer_for


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__.splitlines()[0])
    p.add_argument(
        "net", metavar="NET", type=Path, help="a folder with train_val.prototxt and solver.prototxt"
    )
    p.add_argument("--train-data", metavar="LMDB", help="images to train on (default: as in train_val)")
    p.add_argument("--test-data", metavar="LMDB", help="images to test on (default: as in train_val)")
    p.add_argument("--weights", metavar="W", type=Path, help="go on from these (default: from the fillers)")
    p.add_argument("--solver", metavar="S", type=Path, help="default: the folder's solver.prototxt")
    p.add_argument("--out", metavar="DIR", type=Path, help="where to work (default: <name>_original/)")
    engine_options(p)
    p.add_argument("--iterations", metavar="N", type=cli.positive, help="default: the solver's max_iter")
    p.add_argument("--segment", metavar="N", type=cli.positive, default=1000,
                   help="iterations between snapshots (default: 1000)")  # fmt: skip
    p.add_argument("--seed", metavar="N", type=cli.whole, default=1, help="of everything random (default: 1)")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    from rebirth_caffe.originals import begin
    from rebirth_caffe.retrain import Options, retrain
    from rebirth_caffe.training_report import Screen, draw

    out = args.out or Path(f"{args.net.resolve().name}_original")
    with trainer_for(args) as trainer:
        if trainer is None:
            return
        data = args.train_data, args.test_data
        iterations = begin(args.net, out, *data, args.iterations, args.seed, args.weights, args.solver)
        engine = {name: getattr(args, name) for name in ("threads", "engine", "device", "amp")}
        options = Options(1, iterations, segment=args.segment, **engine)
        with Screen() as screen:
            outcome = retrain(out, options, trainer, screen.tell)
            draw(out)
            if outcome is not None:
                screen.summary(outcome)
    print(f"wrote {out}/final/: weights.caffemodel, deploy.prototxt, accuracy.json")


if __name__ == "__main__":
    cli.run(main)
