"""Step by step from the original's weights to the reborn net's, under real Caffe or torch.

A directory made by ``rebirth_net.py --train-data`` holds the original, the plan and a solver template. Each
training step of the plan is applied to the net as trained so far, trained, tested, and kept or rolled back;
one that made several merges first gives up, one at a time, those that do most harm (see ``sensitivity``).

Training runs in segments of fixed length. Each starts afresh from the last snapshot, with a seed of its
own and the data layers moved on to where the segment begins, so that a run that was killed and started again
does the same arithmetic as one that was not. What is done is in ``retrain/journal.jsonl``; a segment that is
not there has not happened. (Several GPUs are Caffe's own business: there a killed run goes on from Caffe's
last whole snapshot, and is not the same to the bit.)

    retrain/journal.jsonl, lock
    retrain/NN-<step>/       train_val and solver prototxt, caffe.log, snapshots; the weights it ended with
    final/                   deploy, train_val, weights, plan.yaml, accuracy.json
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from . import caffemodel, distil, normalise, prototxt, sensitivity
from . import plan as plans
from .calibration import Calibration, Start, transform_of
from .cost import cost
from .data import lmdb_info
from .derive import deploy
from .distil import SCORES
from .engines import Engine
from .engines.training import (
    Diverged,
    Run,
    Snapshot,
    Trainer,
    check_snapshot,
    newest_snapshot,
    several,
    snapshot_files,
)
from .errors import PlanError, RebirthError
from .evaluate import Accuracy, Labels, NotFinite, evaluate_net, guesses, is_labelled
from .fit import fit
from .journal import Event, Journal, sole_user, sync
from .merge import Merge
from .net import TEST, TRAIN, Net
from .plan import Plan
from .schema import caffe_pb2
from .solver import Schedule, data_layer, solver_text, with_rates
from .stages import SENSITIVITY, Settings, check_labels
from .transform import Transform

FINE_TUNE = "fine-tune"  # of the whole net, after the plan's own steps
SLOWER = 0.1  # of the learning rate, once, after a step diverged
DISPLAYS = 50  # of a segment, at least: the live line and the curve live on them
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Options:
    """What a person asks for; a run goes on only under the same.

    ``iterations`` a step, ``final_iterations`` of the whole net at the end, ``max_drop`` in points of top-1
    below the original (None: every step is kept), ``segment`` in iterations. ``schedule``: see Plan.steps.
    ``engine``, ``device``, ``amp``: what trains, where, and "bf16" or "" for float32.
    ``distil``: learn from the original, with the labels or from the images alone (one of distil.SOURCES);
    "": from the labels only. ``normalise``: with batch normalisation meanwhile, where ``distil`` is (see the
    module of that name); ``scores``: what they weigh there. ``test_interval``: test on the way, too, before
    the first segment of a step and at the ends of those that are multiples of so many iterations of it (0:
    only at its end).
    """

    iterations: int = 90_000
    final_iterations: int = 0
    max_drop: float | None = None
    segment: int = 1000
    threads: int = 1
    gpus: tuple[str, ...] = ()
    engine: str = "caffe"
    device: str = "cpu"
    amp: str = ""
    schedule: str = "steps"
    distil: str = ""
    normalise: bool = False
    scores: float = SCORES
    test_interval: int = 0


FLAGS = {"gpus": "--gpu"}

Tell = Callable[[str, dict[str, Any]], None]


@dataclass
class Outcome:
    """What a whole run has led to; the content of accuracy.json."""

    original: Accuracy
    final: Accuracy
    steps: list[Event]
    curve: list[Event]  # on the way
    macs: tuple[int, int]  # of the deploy nets, original and final
    labelled: bool = True  # False where, without labels, right is what the original says

    def to_json(self) -> dict[str, Any]:
        """Plain data: original, steps in order, final; what is right where there are no labels."""
        return {
            **({} if self.labelled else {"right": "what the original says"}),
            "original": {**dataclasses.asdict(self.original), "macs": self.macs[0]},
            "steps": self.steps,
            "curve": self.curve,
            "final": {**dataclasses.asdict(self.final), "macs": self.macs[1]},
        }


@dataclass(frozen=True)
class Step:
    """One training step of the plan (without merges: the fine-tune) in a folder of its own.

    One that had to give up a merge goes on as a smaller one, from the ``weights`` it ended with, in which the
    ``restored`` layers begin as in the original again.
    """

    folder: str
    stage: str
    what: plans.Step
    iterations: int
    weights: str = ""
    restored: frozenset[str] = frozenset()

    @property
    def merges(self) -> tuple[Merge, ...]:
        """The merges made in it."""
        return self.what.merges


def retrain(
    home: Path, options: Options, trainer: Trainer, tell: Tell = lambda what, details: None, until: str = ""
) -> Outcome | None:
    """Train every step of the plan in ``home``, or go on where a run was stopped.

    ``tell`` hears what happens: ("run", steps and what they have led to so far), ("step", ...), ("progress",
    ...), ("testing", ...), ("result", ...), ("note", ...). ``until`` names the last step to train; then
    nothing final is written and None returned. Raises RebirthError, EngineError with what Caffe said where it
    fails.
    """
    for name in ("plan.yaml", *(f"original/{name}" for name in ORIGINAL)):
        if not (home / name).is_file():
            raise RebirthError(
                f"{home / name}: no such file; "
                "make the directory with rebirth_net.py --weights ... --train-data ... --test-data ..."
            )
    try:
        with sole_user(home / "retrain") as lock:
            return _Run(home, options, trainer, tell, lock, until).all()
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RebirthError(
            f"{home}: {error.strerror}; free some space and run the same command again, it goes on from here"
        ) from None


ORIGINAL = ("train_val.prototxt", "weights.caffemodel", "solver.prototxt", "settings.json")


class _Run:
    """One process at work on a directory."""

    def __init__(
        self, home: Path, options: Options, trainer: Trainer, tell: Tell, lock: int, until: str = ""
    ) -> None:
        self.home, self.options, self.trainer, self.tell = home, options, trainer, tell
        self.lock, self.until = lock, until
        self.guesses: Labels | None = None
        self.plan = plans.load(home / "plan.yaml")
        self.settings = Settings.read(home)
        self.template = prototxt.read_text(home / "original/solver.prototxt")
        if options.distil:
            self.template = distil.template(self.template)
        self.solver = caffe_pb2.SolverParameter()
        prototxt.to_message(prototxt.parse(self.template), self.solver)
        self.steps = self._steps()
        if until and until not in [step.stage for step in self.steps]:
            names = ", ".join(step.stage for step in self.steps) or "none"
            raise RebirthError(f"--stage {until}: no step is called that; there are {names}")
        self.journal = Journal(home / "retrain" / "journal.jsonl")
        for left in (*(home / "retrain").glob(".test.*"), *home.glob(".final.*")):
            shutil.rmtree(left, ignore_errors=True)  # of a killed run

    def _steps(self) -> list[Step]:
        steps = [(step, self.options.iterations) for step in self.plan.steps(self.options.schedule)]
        if self.options.final_iterations:
            steps.append((plans.Step(FINE_TUNE, ()), self.options.final_iterations))
        return [
            Step(f"{number:02d}-{step.name.replace('/', '_')}", step.name, step, iterations)
            for number, (step, iterations) in enumerate(steps, 1)
        ]

    def _same_as_before(self) -> None:
        """A run goes on only with the options and the files it began with."""
        files = {
            f"original/{name}": zlib.crc32((self.home / "original" / name).read_bytes()) for name in ORIGINAL
        }
        now: dict[str, Any] = {
            "options": json.loads(json.dumps(dataclasses.asdict(self.options))),
            "files": {"plan.yaml": zlib.crc32(plans.dump(self.plan).encode()), **files},
        }
        begun = self.journal.find("begin")
        if begun is None:
            self.journal.add("begin", **now)
            return
        again = f"or remove {self.home / 'retrain'} to start again"
        defaults = dataclasses.asdict(Options())  # an option may be younger than the run
        other = []
        for name, asked in now["options"].items():
            value = begun["options"].get(name, defaults[name])
            if asked != value and not (_unset(asked) and _unset(value)):
                flag = FLAGS.get(name, "--" + name.replace("_", "-"))
                said = ",".join(value) if isinstance(value, list) else "" if value is True else str(value)
                other.append(f"without {flag}" if _unset(value) else f"with {flag} {said}".rstrip())
        if other:
            raise RebirthError(f"{self.home}: this run began {', '.join(other)}; go on like that, {again}")
        for name, digest in begun["files"].items():
            if now["files"].get(name) != digest:
                raise RebirthError(
                    f"{self.home / name}: has changed since this run began; put it back, {again}"
                )

    def all(self) -> Outcome | None:
        net = Net.load(self.home / "original/train_val.prototxt", self.home / "original/weights.caffemodel")
        source = self._tested_on(net).param.data_param.source
        net.image = lmdb_info(source)[1:]
        self.given = net
        net = plans.apply(net, self.plan.only(()), self.settings.init, self.settings.seed)
        self.original = net
        learned_from = data_layer(net, TRAIN)
        if learned_from is not None:
            check_labels(learned_from, self.options.distil)
        self.teacher = distil.Teacher(net) if self.options.distil else None
        self._same_as_before()  # nothing is remembered of a run that was refused
        done = [e["stage"] for e in self.journal.all("step")]
        steps = [(step.stage, step.iterations) for step in self.steps]
        self.tell("run", {"steps": steps, "done": done})
        macs = cost(deploy(net)).macs
        original = self._original(net)
        for step in self.steps:
            net = self._step(step, net, original)
            if step.stage == self.until:
                return None
        return self._finish(net, original, macs)

    # ---- testing ------------------------------------------------------------------------------------------

    def _tested_on(self, net: Net) -> Any:
        layer = data_layer(net, TEST)
        if layer is None:
            raise RebirthError(f"{net.path}: has no Data layer in TEST; give --test-data to rebirth_net.py")
        return layer

    def _original(self, net: Net) -> Accuracy:
        known = self.journal.find("original")
        if known is None:
            known = self.journal.add("original", **dataclasses.asdict(self._test(net, "the original")))
        self.tell("original", known)
        return _accuracy(known)

    def _test(self, net: Net, what: str) -> Accuracy:
        """Accuracy of the deploy net of ``net`` on the test data."""
        return evaluate_net(net, *self._test_on(net, what), labels=self._labels())

    def _test_on(
        self, net: Net, what: str
    ) -> tuple[str, Engine, Transform, int, Callable[[int, int], None], Path]:
        layer = self._tested_on(net)
        return (
            layer.param.data_param.source,
            self.trainer.engine,
            Transform.of(layer),
            self.options.threads,
            lambda done, total: self.tell("testing", {"what": what, "done": done, "of": total}),
            self.home / "retrain",
        )

    def _labels(self) -> Labels | None:
        """Labels for test images that have none: what the original takes them for."""
        if is_labelled(self._tested_on(self.original).param.data_param.source):
            return None
        if self.guesses is None:
            self.tell("note", {"text": "no labels to test with: right is what the original says"})
            self.guesses = guesses(self.original, *self._test_on(self.original, "the original"))
        return self.guesses

    # ---- one step -----------------------------------------------------------------------------------------

    def _step(self, step: Step, net: Net, original: Accuracy) -> Net:
        """The net after a step: trained, without the merges it had to give up, or as it was."""
        done = self.journal.find("step", step=step.folder) or self._train(step, net, original)
        self._tidy(step, done["weights"])
        if done["kept"]:
            plan = Plan(self.plan.net, step.merges)
            return self._trained(plans.apply(net.without_weights(), plan), done["weights"])
        smaller = self._smaller(step, net, done)
        if smaller is None:
            return net
        after = self._step(smaller, net, original)
        self._tidy(step, None)
        return after

    def _train(self, step: Step, net: Net, original: Accuracy) -> Event:
        """Train a step, longer once where that may help; how it ended."""
        kept_before = {id_ for e in self.journal.all("step", kept=True) for id_ in e["merges"]}
        again = tuple(merge for merge in step.what.again if merge.id in kept_before)
        if step.what.again and not again:
            return self._left_out(step, net, "its merges were rolled back", "its merges were rolled back")
        step = dataclasses.replace(step, what=dataclasses.replace(step.what, again=again))
        try:
            reborn = self._reborn(step, net)
        except PlanError as error:
            lost = [e["stage"] for e in self.journal.all("step", kept=False)]
            if not lost:
                raise
            return self._left_out(step, net, f"as {lost[-1]} was rolled back ({error})", str(error))
        self.tell("step", {"stage": step.stage, "iterations": step.iterations})
        (self.home / "retrain" / step.folder).mkdir(exist_ok=True)
        weights = self._begin(step, reborn)
        found: dict[str, Any] = {}
        attempts = 1 if step.weights else 2
        for attempt in range(1, attempts + 1):
            weights, tested = self._attempt(step, attempt, reborn, weights)
            drop = round(100 * (original.top1 - tested["top1"]), 6)  # without what floats add
            kept = self.options.max_drop is None or drop <= self.options.max_drop or not step.merges
            if kept:
                break
            next_ = "training it longer, once" if attempt < attempts else "rolled back"
            if attempt == attempts and len(step.merges) > 1:
                worst = self._worst(step, original)
                found = {"dropped": dataclasses.asdict(worst)}
                next_ = f"going on without {worst.merge}: {worst}"
            said = f"{step.stage}: top-1 {tested['top1']:.2%}, {drop:.2f} points below the original"
            self.tell("note", {"text": f"{said}; {next_}"})
        return self._done(
            step,
            net,
            reborn,
            kept=kept,
            weights=weights if kept or found else None,
            **{name: tested[name] for name in ("top1", "top5", "loss")},
            iterations=step.iterations * attempt,
            seconds=round(sum(e["seconds"] for e in self._segments_of(step)), 1),
            **found,
        )

    def _left_out(self, step: Step, net: Net, why: str, reason: str) -> Event:
        """Record a step that was not trained at all."""
        self.tell("note", {"text": f"{step.stage}: left out, {why}"})
        nothing = {"top1": None, "top5": None, "loss": None, "iterations": 0, "seconds": 0.0}
        return self._done(step, net, net, kept=False, weights=None, reason=reason, **nothing)

    def _reborn(self, step: Step, net: Net) -> Net:
        """A net in which a step's merges are made."""
        plan, start = Plan(self.plan.net, step.merges), self.settings.start(net)
        reborn = plans.apply(net, plan, start.init, start.seed)
        if step.weights:
            trained = caffemodel.read(self.home / step.weights).by_name()
            names = {layer.name for layer in reborn.layers if layer.name in trained} - step.restored
            blobs = {name: [blob.array for blob in trained[name].blobs] for name in trained}
            blobs |= normalise.fold(trained)
            return reborn.with_blobs({name: blobs[name] for name in names})
        reborn, fitted = fit(
            net,
            reborn,
            plan,
            start,
            self.trainer.engine,
            self.options.threads,
            lambda n, of: self.tell("testing", {"what": "the original", "done": n, "of": of}),
        )
        for one in fitted:
            self.tell("note", {"text": f"{step.stage}: {one}"})
        return reborn

    # ---- giving up one merge ------------------------------------------------------------------------------

    def _worst(self, step: Step, original: Accuracy) -> sensitivity.Price:
        """Which merge of a step does most harm for what it saves: by sensitivity.json, or as measured now."""
        rows = sensitivity.read(self.home / SENSITIVITY)
        found = sensitivity.known(self.given, step.merges, rows) if rows else {}
        alone = [found.get(merge.id) or self._alone(merge) for merge in step.merges]
        return sensitivity.prices(alone, original.top1)[0]

    def _alone(self, merge: Merge) -> sensitivity.Alone:
        """A merge by itself, measured once."""
        known = self.journal.find("alone", merge=merge.id)
        if known is None:
            what = f"{merge.id} by itself"
            self.tell("note", {"text": f"measuring {what}, which is not in {SENSITIVITY}"})
            learned_from = data_layer(self.given, TRAIN)
            assert learned_from is not None
            images = Calibration(learned_from.param.data_param.source, transform=transform_of(self.given))
            one = sensitivity.alone(
                self.given,
                merge,
                plans.select(self.given, self.plan, only=[merge.id]),
                Start("lsq", self.settings.seed, images),
                self.trainer.engine,
                lambda net: self._test(net, what).top1,
            )
            known = self.journal.add("alone", **dataclasses.asdict(one))
        return sensitivity.Alone(**{f.name: known[f.name] for f in dataclasses.fields(sensitivity.Alone)})

    def _smaller(self, step: Step, net: Net, done: Event) -> Step | None:
        """What is left of a step without the merge that it gave up and those that need it; None: nothing."""
        if "dropped" not in done:
            return None
        bare = net.without_weights()
        left: list[Merge] = []
        for merge in step.merges:
            if merge.id != done["dropped"]["merge"] and _fits(bare, [*left, merge]):
                left.append(merge)
        if not left:
            return None
        first = step.folder.rpartition(".")[0] if step.weights else step.folder
        return dataclasses.replace(
            step,
            folder=f"{first}.{len(left)}",
            what=dataclasses.replace(step.what, merges=tuple(left)),
            weights=done["weights"],
            restored=frozenset(name for merge in step.merges if merge not in left for name in merge.layers),
        )

    # ---- training -----------------------------------------------------------------------------------------

    def _learner(self, step: Step, reborn: Net, done: float = 0.0) -> Net:
        """What Caffe trains in a step of which a part ``done`` (0..1) is behind."""
        if self.teacher is None:
            return with_rates(reborn, step.what.new, self.settings.start(reborn).rate)
        found = self.journal.find("targets", step=step.folder)
        if found is None:
            merges = step.what.again or [merge for merge in self.plan.active if not merge.exact]
            measured = self.teacher.measure(
                distil.blobs(reborn, merges),
                self.trainer.engine,
                self.options.threads,
                progress=lambda n, of: self.tell("testing", {"what": "the original", "done": n, "of": of}),
            )
            targets = [dataclasses.asdict(target) for target in measured]
            found = self.journal.add("targets", step=step.folder, targets=targets)
        known = [distil.Target(**target) for target in found["targets"]]
        norms = self._norms(reborn)
        source, scores = self.options.distil, self.options.scores
        return distil.side_by_side(reborn, self.teacher, known, source, done, norms, scores)

    def _norms(self, reborn: Net) -> list[str]:
        """The convolutions that are normalised while ``reborn`` learns."""
        if self.teacher is None or not self.options.normalise:
            return []
        return [layer.name for layer in normalise.convolutions(reborn)]

    def _begin(self, step: Step, reborn: Net) -> str:
        """Write the weights that a step begins with; their path."""
        weights = f"retrain/{step.folder}/start.caffemodel"
        norms = self._norms(reborn)
        if self.teacher is None or not norms:
            self._learner(step, reborn).write_weights(self.home / weights)
        elif self.journal.find("measured", step=step.folder) is None:
            moments = normalise.measure(
                reborn,
                norms,
                self.teacher.database,
                self.teacher.transform,
                self.trainer.engine,
                self.options.threads,
                lambda n, of: self.tell("testing", {"what": "the reborn net", "done": n, "of": of}),
            )
            learner = normalise.started(self._learner(step, reborn), moments)
            learner.write_weights(self.home / weights)
            sync(self.home / weights)
            self.journal.add("measured", step=step.folder)
        return weights

    def _trained(self, reborn: Net, weights: str) -> Net:
        """``reborn`` with the weights that a training has come to."""
        net = reborn.with_weights(self.home / weights)
        records = [*net.strangers, *(layer.record for layer in net.layers if layer.record is not None)]
        return net.with_blobs(normalise.fold({record.name: record for record in records}))

    def _done(self, step: Step, before: Net, after: Net, **found: Any) -> Event:
        """Record how a step ended: the net before it, and the one that was trained."""
        entry = self.journal.add(
            "step",
            step=step.folder,
            stage=step.stage,
            merges=[merge.id for merge in step.merges],
            macs=cost(deploy(after)).macs,
            macs_before=cost(deploy(before)).macs,
            **found,
        )
        self.tell("result", entry)
        return entry

    def _tidy(self, step: Step, weights: str | None) -> None:
        """Leave of a step's weights and snapshots only those it ended with."""
        for path in (self.home / "retrain" / step.folder).glob("*"):
            if path.suffix in (".caffemodel", ".solverstate") and (
                weights is None or path != self.home / weights
            ):
                path.unlink(missing_ok=True)

    def _attempt(self, step: Step, attempt: int, reborn: Net, weights: str) -> tuple[str, Event]:
        """Train a step's iterations from ``weights`` and test: the weights it ends with, their accuracy."""
        while True:
            diverged = [e for e in self.journal.all("diverged", step=step.folder) if e["attempt"] <= attempt]
            try:
                ended = self._segments(step, attempt, reborn, weights, SLOWER if diverged else 1.0)
                tested = self.journal.find("tested", step=step.folder, attempt=attempt)
                if tested is None:
                    accuracy = self._test(self._trained(reborn, ended), step.stage)
                    numbers = dataclasses.asdict(accuracy)
                    tested = self.journal.add("tested", step=step.folder, attempt=attempt, **numbers)
                return ended, tested
            except (Diverged, NotFinite) as error:
                if diverged:
                    raise RebirthError(
                        f"step '{step.stage}' diverged again, at a tenth of its learning rate: {error}; "
                        f"lower base_lr in {self.home / 'original/solver.prototxt'}, remove "
                        f"{self.home / 'retrain'} and start again"
                    ) from None
                self.journal.add("diverged", step=step.folder, attempt=attempt, reason=str(error))
                said = f"{step.stage}: diverged, {error}; starting it again at a tenth of the learning rate"
                self.tell("note", {"text": said})

    def _segments_of(self, step: Step, **details: Any) -> list[Event]:
        return self.journal.all("segment", step=step.folder, **details)

    def _segments(self, step: Step, attempt: int, reborn: Net, weights: str, rate: float) -> str:
        """Train in segments; the path of the weights that the last one ends with."""
        files = _Files(self.home, step, attempt, rate)
        names = {x.name for x in self._learner(step, reborn).graph.view(TRAIN).layers if x.blobs}
        python = any(layer.type == "Python" for layer in reborn.layers)
        whole = several(self.options.gpus)  # in one go
        done = self._segments_of(step, attempt=attempt, rate=rate)
        at = done[-1]["iteration"] if done else 0
        last = Snapshot(done[-1]["weights"], done[-1]["state"]) if done else None
        losses = [loss for e in done for _, loss in e["losses"]]
        if whole and not done:
            at, last = newest_snapshot(self.home, files.prefix, names) or (0, None)
        elif at < step.iterations:
            files.remove_snapshots(but=(weights, *(last or ())))
        if 0 < at < step.iterations:
            said = f"{step.stage}: going on from iteration {at:,} of {step.iterations:,}"
            self.tell("note", {"text": said})
        while at < step.iterations:
            self._on_the_way(step, attempt, rate, at, reborn, weights if last is None else last.weights)
            stop = step.iterations if whole else min(at + self.options.segment, step.iterations)
            schedule = Schedule(
                iterations=step.iterations,
                seed=_seed(self.settings.seed, step.folder, attempt, at),
                net=files.net,
                prefix=files.prefix,
                lr_factor=rate,
                driven=True,
                display=max(1, self.options.segment // DISPLAYS),
                snapshot=self.options.segment if whole else None,
            )
            middle = (at + stop) / 2 / step.iterations
            self._learner(step, reborn, middle).write(self.home / files.net)
            (self.home / files.solver).write_bytes(prototxt.encode(solver_text(self.template, schedule)))
            told = _Told(self.tell, step)
            begun = monotonic()
            self.trainer.train(
                Run(
                    home=self.home,
                    solver=files.solver,
                    until=stop,
                    weights=weights,
                    state=None if last is None else last.state,
                    skip=0 if whole else self._skip(reborn, at),
                    gpus=self.options.gpus,
                    threads=self.options.threads,
                    log=files.log,
                    python_layers=python,
                    lock=self.lock,
                ),
                told,
            )
            made = snapshot_files(files.prefix, stop)
            check_snapshot(self.home, made, stop, names)
            losses += [loss for _, loss in told.losses]
            if _risen(losses):
                raise Diverged(f"the loss rose from {losses[0]:.3g} to {losses[-1]:.3g} by iteration {stop}")
            sync(*(self.home / name for name in made))
            self.journal.add(
                "segment",
                step=step.folder,
                attempt=attempt,
                rate=rate,
                iteration=stop,
                weights=made.weights,
                state=made.state,
                losses=told.losses,
                seconds=round(monotonic() - begun, 2),
            )
            files.remove_snapshots(but=(weights, *made))
            at, last = stop, made
        return weights if last is None else last.weights

    def _on_the_way(self, step: Step, attempt: int, rate: float, at: int, reborn: Net, weights: str) -> None:
        """Test what a step has come to by iteration ``at``, where that was asked for, once."""
        place = {"step": step.folder, "attempt": attempt, "rate": rate, "iteration": at}
        interval = self.options.test_interval
        if not interval or at % interval or self.journal.find("curve", **place) is not None:
            return
        accuracy = self._test(self._trained(reborn, weights), f"{step.stage} at {at:,}")
        self.tell("curve", self.journal.add("curve", **place, **dataclasses.asdict(accuracy)))

    def _skip(self, net: Net, iteration: int) -> int:
        """Batches from the start of the database to where an iteration reads, to within a batch."""
        layer = data_layer(net, TRAIN)
        if layer is None or not iteration:
            return 0
        source = layer.param.data_param
        batches = -(-lmdb_info(source.source).images // max(1, source.batch_size))
        return iteration * max(1, self.solver.iter_size) % batches

    # ---- the end ------------------------------------------------------------------------------------------

    def _finish(self, net: Net, original: Accuracy, macs: int) -> Outcome:
        """Write final/, at once and whole."""
        # The last step that was kept has been tested as it is now.
        kept = [e for e in self.journal.all("step") if e["kept"] and e["top1"] is not None]
        tested = original
        if kept:
            tested = Accuracy(kept[-1]["top1"], kept[-1]["top5"], kept[-1]["loss"], original.images)
        steps = [
            {key: value for key, value in e.items() if key not in ("event", "step", "weights")}
            for e in self.journal.all("step")
        ]
        curve = [
            {key: value for key, value in e.items() if key not in ("event", "images")}
            for e in self.journal.all("curve")
        ]
        deployed = plans.without_dropout(deploy(net))
        labelled = is_labelled(self._tested_on(self.original).param.data_param.source)
        outcome = Outcome(original, tested, steps, curve, (macs, cost(deployed).macs), labelled)
        accuracy = json.dumps(outcome.to_json(), indent=2) + "\n"
        final = self.home / "final"
        if _holds(final, accuracy):
            return outcome
        work = Path(tempfile.mkdtemp(prefix=".final.", dir=self.home))
        try:
            deployed.write(work / "deploy.prototxt")
            deployed.write_weights(work / "weights.caffemodel")
            net.write(work / "train_val.prototxt")
            (work / "plan.yaml").write_text(plans.dump(self._kept(steps)), "utf-8")
            (work / "accuracy.json").write_text(accuracy, "utf-8")
            work.chmod(0o777 & ~_umask())
            sync(*work.iterdir())
            if final.exists():  # of a run before this one
                final.rename(Path(tempfile.mkdtemp(prefix=".final.", dir=self.home)) / "before")
            work.rename(final)
            sync(final)
        finally:
            for left in self.home.glob(".final.*"):
                shutil.rmtree(left, ignore_errors=True)
        return outcome

    def _kept(self, steps: Sequence[Event]) -> Plan:
        """The plan of the final net: what was rolled back is switched off, and says why."""
        notes: dict[str, str] = {}
        for step in steps:
            why = step.get("reason") or f"top-1 {step['top1']:.2%} after {step['iterations']} iterations"
            notes |= dict.fromkeys(step["merges"], "" if step["kept"] else f"rolled back: {why}")
            if "dropped" in step:
                worst = sensitivity.Price(**step["dropped"])
                notes[worst.merge] += f"; {worst}"
        active = {merge.id for merge in self.plan.active}
        merges = []
        for merge in self.plan.merges:
            if merge.id in active and notes.get(merge.id):
                merge = dataclasses.replace(merge, enabled=False, note=notes[merge.id])
            elif merge.enabled and merge.id not in active:  # it must not come back in the other's place
                merge = dataclasses.replace(merge, enabled=False)
            merges.append(merge)
        return Plan(self.plan.net, tuple(merges))


@dataclass(frozen=True)
class _Files:
    """A step's files, relative to the directory of the run."""

    home: Path
    step: Step
    attempt: int
    rate: float

    @property
    def folder(self) -> str:
        return f"retrain/{self.step.folder}"

    @property
    def net(self) -> str:
        return f"{self.folder}/train_val.prototxt"

    @property
    def solver(self) -> str:
        return f"{self.folder}/solver.prototxt"

    @property
    def log(self) -> str:
        return f"{self.folder}/caffe.log"

    @property
    def prefix(self) -> str:
        """Of the snapshots: those of another attempt or rate are never taken for these."""
        return f"{self.folder}/a{self.attempt}r{self.rate:g}"

    def remove_snapshots(self, but: Sequence[str]) -> None:
        """Remove all snapshots of this step but these: older ones, and what a killed run left."""
        for path in (self.home / self.folder).glob("a*_iter_*"):
            if f"{self.folder}/{path.name}" not in but:
                path.unlink(missing_ok=True)


@dataclass
class _Told:
    """Hears Caffe's progress, keeps it and passes it on."""

    tell: Tell
    step: Step
    losses: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, iteration: int, loss: float) -> None:
        self.losses.append((iteration, loss))
        of = self.step.iterations
        self.tell("progress", {"stage": self.step.stage, "iteration": iteration, "of": of, "loss": loss})


def _unset(option: Any) -> bool:
    """Whether an option is as if it had not been given; 0 is something given."""
    return option is None or option is False or option in ("", [])


def _risen(losses: Sequence[float]) -> bool:
    """Whether a step has unlearned: its loss is far above where it began, not just for a moment."""
    return len(losses) > 10 and fmean(losses[-10:]) > max(2 * losses[0], losses[0] + 1)


def _fits(net: Net, merges: Sequence[Merge]) -> bool:
    """Whether these merges can be made of a net."""
    try:
        plans.apply(net, Plan(net.name, tuple(merges)))
    except PlanError:
        return False
    return True


def _accuracy(event: Event) -> Accuracy:
    return Accuracy(**{f.name: event[f.name] for f in dataclasses.fields(Accuracy)})


def _holds(final: Path, accuracy: str) -> bool:
    """Whether final/ is already there, whole, and of this run."""
    names = ("deploy.prototxt", "weights.caffemodel", "train_val.prototxt", "plan.yaml")
    try:
        return (final / "accuracy.json").read_text("utf-8") == accuracy and all(
            (final / name).is_file() for name in names
        )
    except (OSError, ValueError):
        return False


def _seed(seed: int, step: str, attempt: int, iteration: int) -> int:
    """A seed of its own for every segment."""
    return zlib.crc32(f"{seed} {step} {attempt} {iteration}".encode()) & 0x7FFFFFFF


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == "__main__":  # as torchrun starts it: python -m rebirth_caffe.retrain
    from rebirth_caffe import cli
    from rebirth_caffe.retrain_command import main

    cli.run(main)
