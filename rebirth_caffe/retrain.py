"""Step by step from the original's weights to the reborn net's, under real Caffe.

A directory made by ``rebirth_net.py --train-data`` holds the original, the plan and a solver template. Each
training step of the plan is applied to the net as trained so far, trained, tested, and kept or rolled back.

Training runs in segments of fixed length. Each starts Caffe afresh from the last snapshot, with a seed of its
own and the data layers moved on to where the segment begins, so that a run that was killed and started again
does the same arithmetic as one that was not. What is done is in ``retrain/journal.jsonl``; a segment that is
not there has not happened.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plan as plans
from . import prototxt
from .cost import cost
from .data import lmdb_info
from .derive import deploy
from .engines.caffe import Caffe, CaffeEngine
from .engines.training import Diverged, Run, snapshot_files, train
from .errors import RebirthError
from .evaluate import Accuracy, Transform, evaluate
from .journal import Event, Journal, sole_user, sync
from .merge import Merge
from .net import TEST, TRAIN, Net
from .plan import Plan
from .schema import caffe_pb2
from .solver import Schedule, data_layer, solver_text, with_rates

FINAL = "final"
SLOWER = 0.1  # the learning rate after a step diverged, once


@dataclass(frozen=True)
class Options:
    """What a person asks for; a run goes on only under the same.

    ``iterations`` a step, ``final_iterations`` of the whole net at the end, ``max_drop`` in points of top-1
    below the original (None: every step is kept), ``segment`` in iterations.
    """

    iterations: int = 90_000
    final_iterations: int = 0
    max_drop: float | None = None
    segment: int = 1000
    threads: int = 1
    gpus: tuple[str, ...] = ()


Tell = Callable[[str, dict[str, Any]], None]


@dataclass
class Outcome:
    """What a whole run has led to; the content of accuracy.json."""

    original: Accuracy
    final: Accuracy
    steps: list[Event]

    def to_json(self) -> dict[str, Any]:
        """Plain data: original, steps in order, final."""
        return {
            "original": dataclasses.asdict(self.original),
            "steps": self.steps,
            "final": dataclasses.asdict(self.final),
        }


def retrain(
    home: Path, options: Options, caffe: Caffe, tell: Tell = lambda what, details: None, until: str = ""
) -> Outcome | None:
    """Train every step of the plan in ``home``, or go on where a run was stopped.

    ``tell`` hears what happens: ("step", ...), ("progress", ...), ("result", ...), ("note", ...). ``until``
    names the last step to train; then nothing final is written and None returned. Raises RebirthError,
    EngineError with the tail of Caffe's log where Caffe fails.
    """
    for name in ("plan.yaml", "original/train_val.prototxt", "original/weights.caffemodel"):
        if not (home / name).is_file():
            raise RebirthError(
                f"{home / name}: no such file; "
                "make the directory with rebirth_net.py --weights ... --train-data ..."
            )
    with sole_user(home / "retrain"):
        return _Run(home, options, caffe, tell).all(until)


class _Run:
    """One process at work on a directory."""

    def __init__(self, home: Path, options: Options, caffe: Caffe, tell: Tell) -> None:
        self.home, self.options, self.caffe, self.tell = home, options, caffe, tell
        self.engine = CaffeEngine(caffe)
        self.plan = plans.load(home / "plan.yaml")
        self.template = prototxt.read_text(home / "original/solver.prototxt")
        self.solver = caffe_pb2.SolverParameter()
        prototxt.to_message(prototxt.parse(self.template), self.solver)
        self.settings = json.loads((home / "original/settings.json").read_text("utf-8"))
        self.journal = Journal(home / "retrain" / "journal.jsonl")
        self._same_as_before()

    def _same_as_before(self) -> None:
        """A run goes on only with the plan and the options it began with."""
        now = {
            "options": json.loads(json.dumps(dataclasses.asdict(self.options))),
            "plan": zlib.crc32(plans.dump(self.plan).encode()),
        }
        begun = self.journal.find("begin")
        if begun is None:
            self.journal.add("begin", **now)
            return
        for name, value in begun["options"].items():
            if now["options"].get(name) != value:
                flag = name.replace("_", "-")
                raise RebirthError(
                    f"{self.home}: this run began with --{flag} {value}; go on with that, "
                    f"or remove {self.home / 'retrain'} to start again"
                )
        if begun["plan"] != now["plan"]:
            raise RebirthError(
                f"{self.home}: plan.yaml has changed since this run began; "
                f"remove {self.home / 'retrain'} to start again"
            )

    def all(self, until: str) -> Outcome | None:
        net = Net.load(self.home / "original/train_val.prototxt", self.home / "original/weights.caffemodel")
        exact = Plan(self.plan.net, tuple(m for m in self.plan.active if m.exact))
        net = plans.apply(net, exact)
        if until and until not in self.plan.stages:
            raise RebirthError(f"no step is called '{until}'; there are {', '.join(self.plan.stages)}")
        original = self._original(net)
        for number, stage in enumerate(self.plan.stages, 1):
            merges = [m for m in self.plan.active if m.stage == stage]
            net = self._step(f"{number:02d}-{stage}".replace("/", "_"), stage, merges, net, original)
            if stage == until:
                return None
        if self.options.final_iterations:
            number = len(self.plan.stages) + 1
            net = self._step(f"{number:02d}-{FINAL}", FINAL, [], net, original)
        return self._finish(net, original)

    # ---- testing ------------------------------------------------------------------------------------------

    def _original(self, net: Net) -> Accuracy:
        known = self.journal.find("original")
        if known is None:
            self.tell("note", {"text": "testing the original"})
            known = self.journal.add("original", **dataclasses.asdict(self._test(net)))
        return Accuracy(**{f.name: known[f.name] for f in dataclasses.fields(Accuracy)})

    def _test(self, net: Net) -> Accuracy:
        """Accuracy of the deploy net of ``net`` on the test data."""
        layer = data_layer(net, TEST)
        if layer is None:
            raise RebirthError(f"{net.path}: has no Data layer in TEST; give --test-data to rebirth_net.py")
        transform = Transform.of(layer)
        with tempfile.TemporaryDirectory(dir=self.home / "retrain") as folder:
            deployed = deploy(net)
            deployed.write(Path(folder) / "deploy.prototxt")
            deployed.write_weights(Path(folder) / "weights.caffemodel")
            return evaluate(
                Path(folder) / "deploy.prototxt",
                Path(folder) / "weights.caffemodel",
                layer.param.data_param.source,
                self.engine,
                transform,
                self.options.threads,
            )

    # ---- one step -----------------------------------------------------------------------------------------

    def _step(self, folder: str, stage: str, merges: list[Merge], net: Net, original: Accuracy) -> Net:
        """The net after a step: trained, or as it was where the step was rolled back."""
        reborn = plans.apply(
            net, Plan(self.plan.net, tuple(merges)), self.settings["init"], self.settings["seed"]
        )
        done = self.journal.find("step", stage=stage)
        if done is not None:
            return self._loaded(reborn, done["weights"]) if done["kept"] else net
        total = self.options.iterations if merges else self.options.final_iterations
        self.tell("step", {"stage": stage, "iterations": total})
        work = self.home / "retrain" / folder
        work.mkdir(exist_ok=True)
        new = [spec.name for merge in merges for spec in merge.becomes if not spec.kept]
        with_rates(reborn, new).write(work / "train_val.prototxt")
        reborn.write_weights(work / "start.caffemodel")
        begun = time.monotonic()
        weights = f"retrain/{folder}/start.caffemodel"
        for attempt in (1, 2):
            weights = self._attempt(folder, stage, attempt, weights, total)
            trained = self._loaded(reborn, weights)
            tested = self.journal.find("tested", stage=stage, attempt=attempt) or self.journal.add(
                "tested", stage=stage, attempt=attempt, **dataclasses.asdict(self._test(trained))
            )
            drop = 100 * (original.top1 - tested["top1"])
            kept = self.options.max_drop is None or drop <= self.options.max_drop or not merges
            if kept or attempt == 2:
                break
            self.tell("note", {"text": f"{stage}: {drop:.2f} points below the original, training it longer"})
        if not kept:
            self.tell("note", {"text": f"{stage}: still {drop:.2f} points below, rolled back"})
        segments = self.journal.all("segment", stage=stage)
        entry = self.journal.add(
            "step",
            stage=stage,
            kept=kept,
            top1=tested["top1"],
            top5=tested["top5"],
            loss=tested["loss"],
            iterations=total * attempt,
            seconds=round(sum(s["seconds"] for s in segments) or time.monotonic() - begun, 1),
            macs=cost(deploy(reborn)).macs,
            weights=weights,
        )
        self.tell("result", entry)
        return trained if kept else net

    def _loaded(self, net: Net, weights: str) -> Net:
        return net.with_weights(self.home / weights)

    def _attempt(self, folder: str, stage: str, attempt: int, weights: str, total: int) -> str:
        """Train ``total`` iterations from ``weights`` in segments; the path of the weights it ends with."""
        while True:
            slower = self.journal.find("diverged", stage=stage, attempt=attempt)
            rate = SLOWER if slower is not None else 1.0
            try:
                return self._segments(folder, stage, attempt, weights, total, rate)
            except Diverged as error:
                if slower is not None:
                    raise RebirthError(
                        f"step '{stage}' diverged again at a tenth of its learning rate: {error}; "
                        "give a solver template with a lower base_lr"
                    ) from None
                self.journal.add("diverged", stage=stage, attempt=attempt)
                self.tell("note", {"text": f"{stage}: {error}; starting it again at a tenth of the rate"})

    def _segments(self, folder: str, stage: str, attempt: int, weights: str, total: int, rate: float) -> str:
        done = self.journal.all("segment", stage=stage, attempt=attempt, rate=rate)
        at = done[-1]["iteration"] if done else 0
        state = done[-1]["state"] if done else None
        result = str(done[-1]["weights"]) if done else weights
        length = total if len(self.options.gpus) > 1 else self.options.segment
        while at < total:
            stop = min(at + length, total)
            # A name of its own for every segment: what a killed one left is simply overwritten.
            prefix = f"retrain/{folder}/a{attempt}r{rate:g}"
            schedule = Schedule(
                iterations=total,
                seed=_seed(self.settings["seed"], stage, attempt, at),
                net=f"retrain/{folder}/train_val.prototxt",
                prefix=prefix,
                lr_factor=rate,
                segment=self.options.segment,
            )
            solver = self.home / "retrain" / folder / "solver.prototxt"
            solver.write_bytes(prototxt.encode(solver_text(self.template, schedule)))
            losses: list[tuple[int, float]] = []

            def hear(iteration: int, loss: float, losses: list[tuple[int, float]] = losses) -> None:
                losses.append((iteration, loss))
                self.tell("progress", {"stage": stage, "iteration": iteration, "of": total, "loss": loss})

            begun = time.monotonic()
            train(
                self.caffe,
                Run(
                    home=self.home,
                    solver=str(solver.relative_to(self.home)),
                    until=stop,
                    weights=weights,
                    state=state,
                    skip=self._skip(folder, at),
                    gpus=self.options.gpus,
                    threads=self.options.threads,
                ),
                hear,
            )
            made = snapshot_files(prefix, stop)
            sync(*(self.home / name for name in made))
            self.journal.add(
                "segment",
                stage=stage,
                attempt=attempt,
                rate=rate,
                iteration=stop,
                weights=made[0],
                state=made[1],
                losses=losses,
                seconds=round(time.monotonic() - begun, 2),
            )
            for old in snapshot_files(prefix, at):
                (self.home / old).unlink(missing_ok=True)
            at, state, result = stop, made[1], made[0]
        return result

    def _skip(self, folder: str, iteration: int) -> int:
        """Batches from the start of the database to where an iteration reads."""
        net = Net.load(self.home / "retrain" / folder / "train_val.prototxt")
        layer = data_layer(net, TRAIN)
        if layer is None or not iteration:
            return 0
        source = layer.param.data_param
        batches = -(-lmdb_info(source.source).images // max(1, source.batch_size))
        return iteration * max(1, self.solver.iter_size) % batches

    # ---- the end ------------------------------------------------------------------------------------------

    def _finish(self, net: Net, original: Accuracy) -> Outcome:
        """Write final/ at once and whole."""
        from .rebirth import without_dropout

        tested = self.journal.find("finished")
        if tested is None:
            tested = self.journal.add("finished", **dataclasses.asdict(self._test(net)))
        steps = [
            {key: value for key, value in e.items() if key not in ("event", "weights")}
            for e in self.journal.all("step")
        ]
        final = Accuracy(**{f.name: tested[f.name] for f in dataclasses.fields(Accuracy)})
        outcome = Outcome(original, final, steps)
        rolled_back = {step["stage"] for step in steps if not step["kept"]}
        kept = Plan(
            self.plan.net,
            tuple(
                dataclasses.replace(m, enabled=False, note="rolled back: it cost too much accuracy")
                if m.stage in rolled_back
                else m
                for m in self.plan.merges
            ),
        )
        work = Path(tempfile.mkdtemp(prefix=".final.", dir=self.home))
        try:
            deployed = without_dropout(deploy(net))
            deployed.write(work / "deploy.prototxt")
            deployed.write_weights(work / "weights.caffemodel")
            net.write(work / "train_val.prototxt")
            (work / "plan.yaml").write_text(plans.dump(kept), "utf-8")
            (work / "accuracy.json").write_text(json.dumps(outcome.to_json(), indent=2) + "\n", "utf-8")
            sync(*work.iterdir())
            work.chmod(0o755)
            if (self.home / "final").exists():
                shutil.rmtree(self.home / "final")
            work.replace(self.home / "final")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return outcome


def _seed(seed: int, stage: str, attempt: int, iteration: int) -> int:
    """A seed of its own for every segment."""
    return zlib.crc32(f"{seed} {stage} {attempt} {iteration}".encode()) & 0x7FFFFFFF


def iterations_of(home: Path) -> int:
    """Iterations a step, as the directory was made for. Raises RebirthError where it is none of ours."""
    path = home / "original/settings.json"
    if not path.is_file():
        raise RebirthError(f"{path}: no such file; make the directory with rebirth_net.py --train-data")
    return int(json.loads(path.read_text("utf-8"))["iterations"])
