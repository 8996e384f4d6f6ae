"""The files of training: the original to start from, and for every step a net and a solver.

original/   train_val.prototxt, weights.caffemodel, solver.prototxt (the template), settings.json
stages/     NN-<id>/train_val.prototxt and solver.prototxt, for ``caffe train`` by hand from that directory
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import distil
from . import plan as plans
from .calibration import Calibration, Start, transform_of
from .derive import is_trainable
from .engines import Engine
from .errors import RebirthError, WeightsError, by_x
from .merge import Merge
from .net import TEST, TRAIN, Layer, Net
from .plan import Plan
from .shapes import check_weights, infer
from .solver import (
    ITERATIONS,
    Schedule,
    TrainData,
    data_layer,
    read_template,
    solver_text,
    trainable,
    with_rates,
)
from .transform import Transform, advice

FOLDERS = ("original", "stages")
SENSITIVITY = "sensitivity.json"  # beside them, where it was asked for (see ``sensitivity``)


@dataclass(frozen=True)
class Training:
    """What a person gave for training: databases, a solver template, iterations a step, and how to learn.

    ``schedule`` is one of plan.SCHEDULES ("": what suits). ``distil`` is one of distil.SOURCES, or "" to
    learn from the labels alone; ``engine`` computes what the original gives then.
    """

    data: TrainData
    solver: Path | None = None
    iterations: int = ITERATIONS
    schedule: str = ""
    distil: str = ""
    engine: Engine | None = None


def schedule_for(asked: str | None, distil: str) -> str:
    """How to go through the plan: as asked, or what has served best (docs/RESULTS.md)."""
    return asked or ("joint" if distil else "steps")


@dataclass(frozen=True)
class Settings:
    """What a directory to train in remembers of how it was made."""

    init: str
    seed: int
    iterations: int
    schedule: str = "steps"
    distil: str = ""
    calibration: str = ""  # the images of ``init`` lsq, and how many of them
    images: int = 0

    def start(self, net: Net) -> Start:
        """How the reborn layers of ``net``, which tells what is done to an image, begin."""
        calibration = None
        if self.calibration:
            calibration = Calibration(self.calibration, self.images, transform_of(net))
        return Start(self.init, self.seed, calibration)

    def write(self, home: Path) -> None:
        """Write ``original/settings.json``."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (home / "original/settings.json").write_text(text, "utf-8")

    @classmethod
    def read(cls, home: Path) -> Settings:
        """Read them. Raises RebirthError where ``home`` is no directory to train in."""
        path = home / "original/settings.json"
        try:
            found = json.loads(path.read_text("utf-8"))
            return cls(
                str(found["init"]),
                int(found["seed"]),
                int(found["iterations"]),
                str(found["schedule"]),
                str(found["distil"]),
                str(found["calibration"]),
                int(found["images"]),
            )
        except FileNotFoundError:
            if not home.is_dir():
                raise RebirthError(f"{home}: no such directory; rebirth_net.py makes it") from None
            raise RebirthError(
                f"{path}: no such file; make the directory with rebirth_net.py --weights ... --train-data ..."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise RebirthError(f"{path}: damaged; make the directory again with rebirth_net.py") from None


def prepare(net: Net, training: Training) -> Net:
    """``net`` as a train_val over the databases, whose paths hold from any directory.

    Raises RebirthError where a database is missing or the solver template is none.
    """
    from .data import open_lmdb

    solver_text(read_template(training.solver), Schedule(1, 0, "", ""), str(training.solver))
    if training.distil and not any(layer.blobs for layer in net.layers):
        raise RebirthError(
            f"{net.path}: has learned nothing to learn from it; give its --weights, or no --distil"
        )
    made = trainable(net, training.data)
    made = made.replace(lambda layer: [_absolute(layer) if layer.type == "Data" else layer])
    seen: dict[tuple[int, ...], str] = {}
    for phase, flag in ((TRAIN, "--train-data"), (TEST, "--test-data")):
        layer = data_layer(made, phase)
        if layer is None:
            raise RebirthError(f"{net.path}: reads no data; give {flag}")
        with open_lmdb(layer.param.data_param.source) as images:
            info, first = images.info, images[0][0]
        if phase == TRAIN:
            check_labels(layer, training.distil)
        database = f"{layer.param.data_param.source} ({flag})"
        transformed = Transform.of(layer).shape(first, database)
        _same_size(net, transformed, database)
        seen[transformed] = database
        made.image = made.image or (info.channels, info.height, info.width)
    if len(seen) > 1:
        (one, here), (other, there) = seen.items()
        mend = advice(one, other, "give images of one size, or a --crop that makes them so")
        raise RebirthError(f"{here}: its images are {by_x(one)}, those of {there} {by_x(other)}; {mend}")
    try:
        check_weights(made, "--weights")
    except WeightsError as error:
        raise WeightsError(f"{error} Or images of another size: see --crop") from None
    return made


def check_labels(layer: Layer, learn: str) -> None:
    """Raise RebirthError where the labels of a Data layer's images are needed and not there.

    ``learn``: as ``Training.distil``.
    """
    from .evaluate import is_labelled

    source = layer.param.data_param.source
    if not is_labelled(source) and learn != distil.IMAGES:
        raise RebirthError(f"{source}: its images have no labels; learn with --distil images")


def _same_size(net: Net, transformed: tuple[int, ...], database: str) -> None:
    """Raise RebirthError where a deploy net takes other images than these."""
    view = net.graph.view(TEST)
    if is_trainable(net):
        return
    inputs = [*view.inputs, *(v for x in view.layers if x.type == "Input" for v in view.tops[x])]
    shape = infer(view)[inputs[0]]
    if shape is not None and shape[1:] != transformed:
        raise RebirthError(
            f"{net.path}: takes {by_x(shape[1:])}, the images of {database} are {by_x(transformed)}; "
            f"{advice(transformed, shape[1:])}"
        )


def _absolute(layer: Layer) -> Layer:
    """A Data layer whose paths do not depend on where Caffe is started."""
    from .prototxt import quote

    def resolved(path: str) -> str:
        return quote(str(Path(path).resolve()))

    tree = layer.tree.copy()
    for name, key in (
        ("data_param", "source"),
        ("transform_param", "mean_file"),
        ("data_param", "mean_file"),
    ):
        message = tree.message(name)
        if message is not None and message.all(key):
            param: Any = getattr(layer.param, name)
            message.set(key, resolved(getattr(param, key)))
    return layer.again(tree)


def write(folder: Path, original: Net, plan: Plan, training: Training, start: Start) -> None:
    """Write ``original/`` and ``stages/`` into ``folder``. ``original`` is what ``prepare`` made."""
    first = folder / "original"
    first.mkdir()
    original.write(first / "train_val.prototxt")
    if any(layer.blobs for layer in original.layers):
        original.write_weights(first / "weights.caffemodel")
    template = read_template(training.solver)
    (first / "solver.prototxt").write_text(template, "utf-8", "surrogateescape")
    schedule = schedule_for(training.schedule, training.distil)
    images = start.calibration
    Settings(
        init=start.init,
        seed=start.seed,
        iterations=training.iterations,
        schedule=schedule,
        distil=training.distil,
        calibration=str(Path(images.source).resolve()) if images else "",
        images=images.images if images else 0,
    ).write(folder)
    if training.distil:
        template = distil.template(template)
    test_iter = _test_iterations(original)
    steps = plan.steps(schedule)
    teacher = None
    if training.distil and steps:
        teacher = distil.Teacher(plans.apply(original, plan.only(())))
        original.edited(teacher.frozen()).write_weights(first / "teacher.caffemodel")
    bare = original.without_weights()
    made: list[Merge] = []
    nets: list[Net] = []
    compared: list[list[str]] = []  # what each of them has in common with the original
    for step in steps:
        made += step.merges
        nets.append(plans.apply(bare, plan.only(made)))
        compared.append(distil.blobs(nets[-1], step.again or made) if teacher else [])
    targets = {}
    if teacher is not None:
        assert training.engine is not None
        wanted = list(dict.fromkeys(blob for blobs in compared for blob in blobs))
        targets = {target.blob: target for target in teacher.measure(wanted, training.engine)}
    for number, (step, net, blobs) in enumerate(zip(steps, nets, compared, strict=True), 1):
        place = f"stages/{number:02d}-{step.name.replace('/', '_')}"
        (folder / place).mkdir(parents=True)
        if teacher is None:
            learner = with_rates(net, step.new, start.rate)
        else:
            known = [targets[blob] for blob in blobs if blob in targets]
            learner = distil.side_by_side(net, teacher, known, training.distil, 0.5)
        learner.write(folder / place / "train_val.prototxt")
        solved = Schedule(
            training.iterations,
            start.seed,
            f"{place}/train_val.prototxt",
            f"{place}/snapshot",
            None if teacher else test_iter,  # such a net is for learning only
        )
        (folder / place / "solver.prototxt").write_text(
            solver_text(template, solved), "utf-8", "surrogateescape"
        )


def _test_iterations(net: Net) -> int:
    """Batches that make up the test database."""
    from .data import lmdb_info

    layer = data_layer(net, TEST)
    assert layer is not None
    source = layer.param.data_param
    return -(-lmdb_info(source.source).images // max(1, source.batch_size))
