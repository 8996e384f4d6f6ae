#!/usr/bin/env python3
"""Retrain one net from every start, with several lengths and seeds: how soon does it know again what it knew?

For each start the learning rate is chosen first, on images held out of the training images; only then do
the test images decide. Every run is one line of the output, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli

if TYPE_CHECKING:
    from rebirth_caffe.engines.training import Trainer


@dataclass(frozen=True)
class Beginning:
    """Weights of the reborn layers, what is learned from then ("": labels alone), and whether images are
    calibrated on."""

    init: str
    distil: str
    images: bool = False


# Learning from labels alone is by SGD, in which reborn layers learn calibration.Start.rate times as fast as
# the others; learning from the original is by Adam.
RATES = (0.0005, 0.001, 0.002, 0.004)
SCORES = 4.0
MOMENTUM, MOMENTUM2 = 0.9, 0.999
STARTS = {
    "xavier": Beginning("xavier", ""),
    "inherit": Beginning("inherit", ""),
    "scaled": Beginning("inherit", "", True),
    "lsq": Beginning("lsq", "", True),
    "distil-images": Beginning("inherit", "images"),
    "distil-labels": Beginning("inherit", "labels"),
    "scaled-distil-images": Beginning("inherit", "images", True),
    "scaled-distil-labels": Beginning("inherit", "labels", True),
    "lsq-distil-images": Beginning("lsq", "images", True),
    "lsq-distil-labels": Beginning("lsq", "labels", True),
}
ADAM = 'type: "Adam"\nmomentum: {:g}\nmomentum2: {:g}\n'
SGD = "momentum: 0.9\nweight_decay: 0.0005\n"
ENDS = 'lr_policy: "poly"\npower: 1\nsolver_mode: CPU\n'


@dataclass(frozen=True)
class Job:
    """One run. ``held_out``: trained and tested on the two parts of the training images. ``scores``,
    ``momentum`` and ``momentum2``: what the scores weigh, and Adam's, in learning from the original."""

    start: str
    iterations: int
    seed: int
    rate: float
    held_out: bool
    scores: float = SCORES
    momentum2: float = MOMENTUM2
    momentum: float = MOMENTUM


def parse_args() -> argparse.Namespace:
    from rebirth_caffe.retrain_command import engine_options

    p = cli.Parser(description=__doc__.splitlines()[0])
    p.add_argument("net", metavar="NET", type=Path, help="a folder of prototxts/ with its trained weights")
    p.add_argument("--weights", metavar="W", type=Path, help="these instead of the folder's")
    for name, what in (("train", "to learn from"), ("test", "to test on"),
                       ("fit", "a part of the training images"), ("val", "the other part")):  # fmt: skip
        p.add_argument(f"--{name}", metavar="LMDB", required=True, help=f"images: {what}")
    p.add_argument(
        "--starts", type=_names, default=tuple(STARTS), help=f"of {','.join(STARTS)} (default: all)"
    )
    p.add_argument("--iterations", type=_wholes, default=(1000, 3000, 10000), help="lengths to compare")
    p.add_argument("--choose-at", type=cli.positive, default=1000, help="length the rate is chosen for")
    p.add_argument(
        "--rates",
        type=_rates,
        default=RATES,
        help=f"base_lr to choose from; one alone is taken (default: {','.join(map(str, RATES))})",
    )
    p.add_argument("--seeds", type=_wholes, default=(1, 2, 3), help="default: 1,2,3")
    p.add_argument("--plan", metavar="YAML", type=Path, help="merges, instead of --kernel and --reduce")
    p.add_argument("--kernel", choices=("keep", "cover", "auto"), default="auto", help="default: auto")
    p.add_argument("--reduce", type=float, default=0.5, help="of rebirth_net.py (default: 0.5)")
    p.add_argument(
        "--images", type=cli.positive, default=1024, help="of --fit, to calibrate on (default: 1024)"
    )
    p.add_argument("--normalise", action=argparse.BooleanOptionalAction, default=True,
                   help="of retrain.py, where the original is learned from (default: yes)")  # fmt: skip
    p.add_argument("--scores", metavar="WEIGHT", type=cli.above_zero, default=SCORES,
                   help=f"of retrain.py, where the original teaches (default: {SCORES:g})")  # fmt: skip
    p.add_argument("--momentum", metavar="M", type=cli.fraction, default=MOMENTUM,
                   help=f"of Adam, where the original teaches (default: {MOMENTUM:g})")  # fmt: skip
    p.add_argument("--momentum2", metavar="M", type=cli.fraction, default=MOMENTUM2,
                   help=f"likewise (default: {MOMENTUM2:g})")  # fmt: skip
    p.add_argument("--jobs", type=cli.positive, default=1, help="runs at a time, a thread each (default: 1)")
    engine_options(p)
    p.add_argument("--work", metavar="DIR", type=Path, default=Path("starts"), help="default: starts/")
    p.add_argument("--out", metavar="JSONL", type=Path, required=True, help="a line for every run")
    return p.parse_args()


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in STARTS]:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(STARTS)}")
    return names


def _rates(text: str) -> tuple[float, ...]:
    return tuple(cli.above_zero(word) for word in text.split(","))


def _wholes(text: str) -> tuple[int, ...]:
    return tuple(cli.positive(word) for word in text.split(","))


def main() -> None:
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    def job(start: str, iterations: int, seed: int, rate: float, held_out: bool) -> Job:
        taught = (args.scores, args.momentum2, args.momentum) if STARTS[start].distil else ()
        return Job(start, iterations, seed, rate, held_out, *taught)

    choosing = {
        start: [job(start, args.choose_at, args.seeds[0], rate, True) for rate in args.rates]
        for start in args.starts
        if len(args.rates) > 1
    }
    known = run([job for jobs in choosing.values() for job in jobs], args)
    rates = dict.fromkeys(args.starts, args.rates[0])
    for start, jobs in choosing.items():
        rates[start] = max(jobs, key=lambda job: known[job]["final"]["top1"]).rate
        print(f"{start}: base_lr {rates[start]:g}", flush=True)
    run(
        [
            job(s, n, seed, rates[s], False)
            for seed in args.seeds
            for n in args.iterations
            for s in args.starts
        ],
        args,
    )


def run(jobs: Iterable[Job], args: argparse.Namespace) -> dict[Job, dict[str, Any]]:
    """The results of these jobs; those that are not in the output yet are run and added to it."""
    known: dict[Job, dict[str, Any]] = {}
    if args.out.exists():
        for line in args.out.read_text("utf-8").splitlines():
            entry = json.loads(line)
            known[Job(**entry["job"])] = entry
    todo = [job for job in jobs if job not in known]
    with ProcessPoolExecutor(args.jobs) as pool:
        running = {pool.submit(one, job, args): job for job in todo}
        for done in as_completed(running):
            entry = {"job": asdict(running[done]), **done.result()}
            known[running[done]] = entry
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(
                f"{running[done]}: top-1 {entry['final']['top1']:.2%}, {entry['seconds']:.0f} s", flush=True
            )
    return known


def one(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Rebirth and retrain; what came of it."""
    from rebirth_caffe.retrain_command import trainer_for

    with trainer_for(args) as trainer:
        assert trainer is not None  # these processes are not torchrun's
        return _one(job, args, trainer)


def _one(job: Job, args: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    from rebirth_caffe.calibration import Calibration
    from rebirth_caffe.rebirth import rebirth
    from rebirth_caffe.retrain import Options, retrain
    from rebirth_caffe.solver import TrainData
    from rebirth_caffe.stages import Training

    begin = STARTS[job.start]
    part = "val" if job.held_out else "test"
    setting = "-".join(f"{x:g}" for x in (job.rate, job.scores, job.momentum2, job.momentum))
    home = args.work / f"{job.start}-{job.iterations}-{job.seed}-{setting}-{part}"
    if not home.exists():
        solver = Path(f"{home}.solver")
        learns = ADAM.format(job.momentum, job.momentum2) if begin.distil else SGD
        solver.write_text(f"base_lr: {job.rate:g}\n{ENDS}{learns}", "utf-8")
        data = TrainData(args.fit, args.val) if job.held_out else TrainData(args.train, args.test)
        weights = args.weights or args.net / f"{args.net.name}.caffemodel"
        training = Training(data, solver, job.iterations, "joint", begin.distil, trainer.engine)
        made = rebirth(
            args.net / "train_val.prototxt",
            weights,
            plan=args.plan,
            kernel=args.kernel,
            reduce=args.reduce,
            init=begin.init,
            seed=job.seed,
            training=training,
            caffe=args.caffe,
            calibration=Calibration(args.fit, args.images) if begin.images else None,
        )
        made.write(home)
    segment = max(100, job.iterations // 20)
    options = Options(
        job.iterations,
        segment=segment,
        schedule="joint",
        distil=begin.distil,
        normalise=bool(begin.distil) and args.normalise,
        scores=job.scores,
        test_interval=2 * segment,
        engine=args.engine,
        device=args.device,
        amp=args.amp,
        threads=args.threads,
    )
    outcome = retrain(home, options, trainer)
    assert outcome is not None
    found = outcome.to_json()
    return {**found, "seconds": sum(step["seconds"] for step in found["steps"])}


if __name__ == "__main__":
    cli.run(main)
