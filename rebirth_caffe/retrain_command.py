"""The command ``retrain``: tools/retrain.py, and ``python -m rebirth_caffe.retrain`` for torchrun."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli
from .errors import RebirthError

if TYPE_CHECKING:
    from .engines.training import Trainer

DESCRIPTION = "Retrain a reborn net step by step; killed, it goes on when started again."
EPILOG = """DIR gets retrain/ (journal and snapshots), training.png, and at the end final/ with
deploy.prototxt, weights.caffemodel, train_val.prototxt, plan.yaml and accuracy.json."""


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=DESCRIPTION, epilog=EPILOG)
    p.add_argument("directory", metavar="DIR", type=Path, help="made by rebirth_net.py --train-data")
    engine_options(p)
    p.add_argument("--gpu", metavar="IDS", type=_gpus, default=(),
                   help="Caffe's: a device number, several (0,1) or all (default: the CPU)")  # fmt: skip
    p.add_argument(
        "--iterations", metavar="N", type=cli.positive, help="of each step (default: as in the solvers)"
    )
    p.add_argument("--final-iterations", metavar="N", type=cli.whole, default=0,
                   help="of the whole net at the end (default: 0)")  # fmt: skip
    p.add_argument("--max-drop", metavar="POINTS", type=_points,
                   help="train a step longer, once, that ends further below the original's top-1, then have "
                   "it give up its most harmful merge (by sensitivity.json, or as measured now), then the "
                   "next, or roll it back (default: keep every step)")  # fmt: skip
    p.add_argument("--segment", metavar="N", type=cli.positive,
                   help="iterations between snapshots, where with --distil the losses' weights shift "
                   "(default: 1000; with --distil a twentieth of a step's, of 100 to 1000)")  # fmt: skip
    p.add_argument("--test-interval", metavar="N", type=cli.whole, default=0,
                   help="test on the way, too, where a step begins and where a segment ends at a multiple of "
                   "N iterations (default: only where a step ends)")  # fmt: skip
    cli.learning(p, *["as the directory was made"] * 2)
    p.add_argument("--normalise", action=argparse.BooleanOptionalAction,
                   help="with --distil: BatchNorm behind every convolution while it learns, and folded "
                   "into it in what is tested and written (default: yes)")  # fmt: skip
    p.add_argument("--scores", metavar="WEIGHT", type=cli.above_zero,
                   help="with --distil: what the scores count, beside 1 for each group's output at first "
                   "(default: 4)")  # fmt: skip
    p.add_argument("--stage", metavar="ID", default="", help="stop after this step")
    return p.parse_args()


def engine_options(p: argparse.ArgumentParser) -> None:
    """Add what says which engine trains, and how; see ``trainer_for``."""
    p.add_argument("--engine", choices=("caffe", "torch"), default="caffe", help="default: caffe")
    p.add_argument("--caffe", metavar="PATH", help="a Caffe's directory or command (default: looked for)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="torch's (default: cpu)")
    p.add_argument(
        "--amp", choices=("bf16",), default="", help="torch: compute in bfloat16 where that will do"
    )
    p.add_argument("--workers", metavar="N", type=cli.whole, default=0,
                   help="torch: processes that read and decode images (default: none)")  # fmt: skip
    p.add_argument("--threads", metavar="N", type=cli.positive, default=1, help="of the CPU (default: 1)")


@contextmanager
def trainer_for(args: argparse.Namespace) -> Iterator[Trainer | None]:
    """The engine that shall train; None in one of torchrun's processes that only followed the first.

    Raises RebirthError for options of the other engine, EngineError where the engine is missing.
    """
    if args.engine == "torch":
        from .engines.torch import TorchEngine

        foreign = [f for f, given in (("--gpu", getattr(args, "gpu", ())), ("--caffe", args.caffe)) if given]
        if foreign:
            raise RebirthError(f"{foreign[0]} is Caffe's; with --engine torch give --device cuda")
        TorchEngine()  # refuses where torch is missing, in one line
        from .engines.torch.trainer import TorchTrainer

        trainer = TorchTrainer(args.device, bool(args.amp), args.workers)
        with trainer.together() as first:
            yield trainer if first else None
        return
    if args.device != "cpu" or args.amp or args.workers or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RebirthError("--device, --amp, --workers and torchrun want --engine torch")
    from .engines.caffe import find_caffe
    from .engines.training import CaffeTrainer

    yield CaffeTrainer(find_caffe(args.caffe))


def segment_for(iterations: int, distil: str) -> int:
    """How many iterations lie between two snapshots of a step of so many.

    Learning from the original, the weights of its losses shift there: some twenty times.
    """
    return min(1000, max(100, iterations // 20)) if distil else 1000


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
    with trainer_for(args) as trainer:
        if trainer is not None:
            _retrain(args, trainer)


def _retrain(args: argparse.Namespace, trainer: Trainer) -> None:
    from .distil import SCORES
    from .retrain import Options, retrain
    from .stages import Settings, schedule_for
    from .training_report import Screen, draw

    made_for = Settings.read(args.directory)
    distil, schedule = made_for.distil, args.schedule or made_for.schedule
    if args.distil is not None:
        distil = args.distil
        schedule = schedule_for(args.schedule, distil)
    if args.normalise and not distil:
        raise RebirthError("--normalise is for learning from the original; give --distil, too")
    if args.scores is not None and not distil:
        raise RebirthError("--scores is for learning from the original; give --distil, too")
    iterations = args.iterations or made_for.iterations
    options = Options(
        iterations=iterations,
        final_iterations=args.final_iterations,
        max_drop=args.max_drop,
        segment=args.segment or segment_for(iterations, distil),
        threads=args.threads,
        gpus=args.gpu,
        engine=args.engine,
        device=args.device,
        amp=args.amp,
        schedule=schedule,
        test_interval=args.test_interval,
        distil=distil,
        normalise=bool(distil) if args.normalise is None else args.normalise,
        scores=args.scores or SCORES,
    )

    def tell(what: str, details: dict[str, Any]) -> None:
        screen.tell(what, details)
        if what == "result":
            draw(args.directory)

    with Screen() as screen:
        try:
            outcome = retrain(args.directory, options, trainer, tell, args.stage)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last snapshot", file=sys.stderr)
            raise
        draw(args.directory)
        if outcome is not None:
            screen.summary(outcome)
            final = args.directory / "final"
            screen.console.print(
                f"wrote {final}/: ship deploy.prototxt with weights.caffemodel", markup=False
            )
        else:
            screen.console.print(
                f"stopped after {args.stage}; without --stage the rest goes on", markup=False
            )
