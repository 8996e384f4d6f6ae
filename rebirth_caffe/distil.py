"""Learning from the original: one train net that holds it, frozen, beside the reborn net on the same images.

Where something was merged, the reborn net shall give what the original gives there, and the same scores:

    L = w * sum over groups b of d_b  +  v * d_scores  +  L_labels,    d_b = |S_b - T_b|^2 / (n_b * var T_b)

b: output blobs of the merged groups; S_b, T_b: what the reborn net (the student) and the original (the
teacher) give for a batch; n_b: numbers in T_b; var T_b: their variance over many images, so that every d_b is
1 for a student that always gives the mean. w falls from 1 to 0.05 while it learns, v stays: groups only show
the way to the scores. Without labels L_labels is left out. The teacher has no backward pass: nothing in it
learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from . import normalise, solver
from . import plan as plans
from .caffemodel import Record
from .derive import DATA, deploy
from .engines import Engine
from .errors import NetError, RebirthError
from .evaluate import observe
from .merge import OUT, Merge
from .net import TEST, TRAIN, Layer, Net
from .prototxt import Field, Message, number, quote, render
from .rules.match import feeding, main_output
from .shapes import all_param_shapes
from .solver import data_layer
from .transform import Transform

LABELS, IMAGES = "labels", "images"  # what there is to learn from, besides the original
SOURCES = (LABELS, IMAGES)
GROUPS = (1.0, 0.05)  # weight of the groups' outputs, at the start and at the end
SCORES = 4.0  # default weight of the scores; the labels' losses keep their own (docs/RESULTS.md)
TEACHER, LOSS = "teacher/", "distil/"  # in front of the names of what is added
CALIBRATION = 500  # images over which variances are measured
SILENT = 1e-12  # a blob whose variance is below this never says anything

# Adam suits losses of very different scales better than SGD; the last tenth of a schedule that goes to zero
# brings much of the accuracy; a higher rate undoes what some nets have inherited (docs/RESULTS.md).
TEMPLATE = """\
type: "Adam"
base_lr: 0.001
lr_policy: "poly"
power: 1
momentum: 0.9
momentum2: 0.999
display: 100
snapshot: 1000
solver_mode: CPU
"""


@dataclass(frozen=True)
class Target:
    """A blob of the original that the reborn net has, too: numbers per image, variance of the original's."""

    blob: str
    size: int
    variance: float


class Teacher:
    """The original as it is used: up to the scores, without Dropout; and the images both nets learn from."""

    def __init__(self, original: Net) -> None:
        """``original`` is a train_val with its weights.

        Raises NetError where it has no main output that a reborn net could be compared with.
        """
        deployed = plans.without_dropout(deploy(original))
        scores = main_output(original.graph)[2]
        if len(scores) != 1 or not any(scores[0].name in layer.top for layer in deployed.layers):
            raise NetError(f"{original.path}: has {len(scores)} outputs; learning from it needs exactly one")
        view = deployed.graph.view(TEST)
        needed = feeding(view, [[v for v in view.values if v.name == scores[0].name][-1]])
        self.net = deployed.replace(lambda layer: [layer] if layer in needed else [])
        self.scores = scores[0].name
        self.images = [top for layer in self.net.layers if layer.type == "Input" for top in layer.top]
        taken = {name for layer in original.layers for name in (layer.name, *layer.top)}
        self.prefix, self.loss = (_fresh(name, taken) for name in (TEACHER, LOSS))
        reads = data_layer(original, TRAIN)
        if reads is None:
            raise NetError(f"{original.path}: reads no database in TRAIN; give --train-data")
        self.database = reads.param.data_param.source
        self.transform = Transform.of(reads)

    def frozen(self) -> list[Layer]:
        """Its layers, to stand beside the reborn net's: names of their own, and nothing that learns."""
        shapes = all_param_shapes(self.net)
        return [
            self._frozen(layer, len(shapes.get(layer) or layer.blobs))
            for layer in self.net.layers
            if layer.type != "Input"
        ]

    def _frozen(self, layer: Layer, params: int) -> Layer:
        tree = layer.tree.copy()
        gone = ("include", "exclude", "param", "propagate_down")
        tree.fields[:] = [f for f in tree.fields if f.name not in gone]
        tree.set("name", quote(self.prefix + layer.name))
        tree.set("bottom", *(quote(b if b in self.images else self.prefix + b) for b in layer.bottom))
        tree.set("top", *(quote(self.prefix + top) for top in layer.top))
        still = Message([Field("lr_mult", "0"), Field("decay_mult", "0")])
        at = next((i for i, f in enumerate(tree.fields) if f.name.endswith("_param")), len(tree.fields))
        tree.fields[at:at] = [Field("param", still.copy(), one_line=True) for _ in range(params)]
        if layer.type == "BatchNorm":  # otherwise it would take the mean of this batch, and remember it
            statistics = tree.message("batch_norm_param")
            if statistics is None:
                statistics = Message()
                tree.fields.append(Field("batch_norm_param", statistics))
            statistics.set("use_global_stats", "true")
        made = Layer.from_text(render(Message([Field("layer", tree)])))
        if layer.blobs:
            made.record = Record(made.name, made.type, layer.blobs)
        return made

    def measure(
        self,
        blobs: Sequence[str],
        engine: Engine,
        threads: int = 1,
        images: int = CALIBRATION,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Target]:
        """Size and variance of its blobs over some images of the database, spread evenly over it.

        A blob that is the same for all of them teaches nothing and is left out.
        """
        sums = {blob: np.zeros(2) for blob in blobs}
        shapes: dict[str, tuple[int, ...]] = {}
        seen = 0
        for found in observe(
            self.net, blobs, self.database, self.transform, engine, threads, images, progress
        ):
            for blob, value in found.items():
                exact = value.astype(np.float64)
                sums[blob] += exact.sum(), np.square(exact).sum()
                shapes[blob] = value.shape
            seen += len(exact)
        targets = []
        for blob in blobs:
            size = math.prod(shapes[blob][1:])
            mean, square = sums[blob] / (seen * size)
            if square - mean * mean > SILENT:
                targets.append(Target(blob, size, float(square - mean * mean)))
        if not targets:
            raise RebirthError(f"{self.net.path}: gives the same for every image; is it trained?")
        return targets


def blobs(reborn: Net, merges: Iterable[Merge]) -> list[str]:
    """The blobs in which ``reborn`` is compared with its original: what the merges give, and the scores."""
    layers = {layer.name: layer for layer in reborn.layers}
    found = [
        layers[spec.name].top[spec.top.index(OUT)]
        for merge in merges
        for spec in merge.becomes
        if OUT in spec.top and spec.name in layers
    ]
    return list(dict.fromkeys([*found, main_output(reborn.graph)[2][0].name]))


def weight(done: float) -> float:
    """Of the groups' outputs, when a part ``done`` (0..1) of the training is behind."""
    return GROUPS[0] + (GROUPS[1] - GROUPS[0]) * done


def side_by_side(
    reborn: Net,
    teacher: Teacher,
    targets: Sequence[Target],
    source: str,
    done: float,
    normalised: Iterable[str] = (),
    scores: float = SCORES,
) -> Net:
    """The train net of ``reborn`` (a train_val) beside its original, with the weights of both.

    ``source``: LABELS or IMAGES. Layers and blobs of the reborn net keep their names, so that what was
    trained goes back into it; Dropout is left out. Convolutions ``normalised`` are followed by norms, to be
    folded into them again (see ``normalise``). ``scores``: their weight. Raises RebirthError for another
    source.
    """
    if source not in SOURCES:
        raise RebirthError(f"--distil {source}: give one of {', '.join(SOURCES)}")
    student = plans.without_dropout(reborn)
    view = student.graph.view(TRAIN)
    kept = {layer for layer in view.layers if layer.type != "Accuracy"}
    learning = [layer for layer in student.layers if layer in kept]
    if source == IMAGES:
        last = {value.name: value for value in view.values}
        seen = feeding(view, [last[target.blob] for target in targets])
        learning = [_without_labels(layer) for layer in learning if layer in seen]
    compared = [
        _compared(target, teacher, scores if target.blob == teacher.scores else weight(done))
        for target in targets
    ]
    learner = normalise.with_norms(student.edited([f"name: {quote(student.name)}\n", *learning]), normalised)
    return learner.edited([*learner.items, *teacher.frozen(), *compared])


def template(given: str) -> str:
    """The solver to learn with: what a person gave, or in the place of the paper's one that suits better."""
    return TEMPLATE if given == solver.TEMPLATE else given


def _fresh(prefix: str, taken: set[str]) -> str:
    while any(name.startswith(prefix) for name in taken):
        prefix = "_" + prefix
    return prefix


def _without_labels(layer: Layer) -> Layer:
    if layer.type not in DATA or len(layer.top) < 2:
        return layer
    tree = layer.tree.copy()
    tree.set("top", quote(layer.top[0]))
    return layer.again(tree)


def _compared(target: Target, teacher: Teacher, w: float) -> Layer:
    """The loss of one blob. Caffe's EuclideanLoss is the sum of squares over 2 * batch."""
    tree = Message(
        [
            Field("name", quote(teacher.loss + target.blob)),
            Field("type", quote("EuclideanLoss")),
            Field("bottom", quote(target.blob)),
            Field("bottom", quote(teacher.prefix + target.blob)),
            Field("top", quote(teacher.loss + target.blob)),
            Field("loss_weight", _g(2 * w / (target.size * target.variance))),
            Field("propagate_down", "true"),
            Field("propagate_down", "false"),
        ]
    )
    return Layer.from_text(render(Message([Field("layer", tree)])))


def _g(value: float) -> str:
    return number(float(f"{value:.6g}"))
