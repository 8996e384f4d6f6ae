"""What Caffe needs to train a step: a net that reads data, learning rates, a solver.

A train_val keeps its own data layers, with what is given put over them; a deploy net gets Data layers, a
SoftmaxWithLoss and accuracies in place of its inputs and its Softmax.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import prototxt
from .derive import DATA, is_trainable
from .errors import NetError, PrototxtError
from .net import TEST, TRAIN, Layer, Net
from .prototxt import Field, Message, number, quote, render
from .schema import caffe_pb2
from .shapes import all_param_shapes, infer
from .upgrade import upgrade

# The paper's: SGD with momentum 0.9, a tenth of the rate after 40 of 90 thousand iterations, new layers ten
# times faster (0.01 against 0.001). The step's place scales with the iterations.
ITERATIONS = 90_000
STEP = 4 / 9
REBORN_LR = 10.0
TEMPLATE = """\
test_interval: 1000
base_lr: 0.001
lr_policy: "step"
gamma: 0.1
momentum: 0.9
weight_decay: 0.0002
display: 100
snapshot: 1000
solver_mode: CPU
"""


@dataclass(frozen=True)
class TrainData:
    """The databases to train and test on, and what is done to an image on its way into the net.

    None leaves a train_val's own data layers as they are, and gives a deploy net's Caffe's default. Paths are
    written as they are given.
    """

    train: str
    test: str
    mean_file: str | None = None
    mean_values: tuple[float, ...] | None = None
    scale: float | None = None
    crop: int | None = None
    mirror: bool | None = None
    batch: int | None = None


def trainable(net: Net, data: TrainData) -> Net:
    """``net`` as a train_val over ``data``; everything else in it keeps its text and its weights.

    Raises NetError where a deploy net has not exactly one input and one output, or a train_val no Data layer.
    """
    return _with_sources(net, data) if is_trainable(net) else _from_deploy(net, data)


def _with_sources(net: Net, data: TrainData) -> Net:
    views = {phase: set(net.graph.view(phase).layers) for phase in (TRAIN, TEST)}
    changed: dict[Layer, list[Layer]] = {}
    for layer in net.layers:
        phases = [phase for phase, layers in views.items() if layer in layers]
        if layer.type == "Data" and phases:
            changed[layer] = [_data_layer(layer, data, phase, len(phases) > 1) for phase in phases]
    for phase, layers in views.items():
        found = sum(layer in layers for layer in changed)
        if found != 1:
            kinds = ", ".join(sorted({layer.type for layer in layers if layer.type in DATA})) or "nowhere"
            where = "TEST" if phase == TEST else "TRAIN"
            raise NetError(
                f"{net.path}: has {found} Data layers in {where} (its data comes from {kinds}), and a "
                "database needs exactly one to go into; give the deploy net instead"
            )
    return net.replace(lambda layer: changed.get(layer, [layer]))


def _data_layer(layer: Layer, data: TrainData, phase: int, both: bool) -> Layer:
    """A Data layer over another database, for one phase; ``both``: so far it served the other, too."""
    test = phase == TEST
    tree = layer.tree.copy()
    if both:
        rules = [f for f in tree.fields if f.name not in ("include", "exclude")]
        at = next((i for i, f in enumerate(rules) if f.name.endswith("_param")), len(rules))
        rule = Message([Field("phase", "TEST" if test else "TRAIN")])
        tree.fields[:] = [*rules[:at], Field("include", rule, one_line=True), *rules[at:]]
        transform = tree.message("transform_param")
        if test and transform is not None and transform.all("mirror"):
            transform.set("mirror", "false")
    source = _inside(tree, "data_param")
    source.set("source", quote(data.test if test else data.train))
    source.set("backend", "LMDB")
    if data.batch is not None and not test:
        source.set("batch_size", str(data.batch))
    _transform(tree, data, test)
    return layer.again(tree)


def _transform(tree: Message, data: TrainData, test: bool) -> None:
    given = [data.mean_file, data.mean_values, data.scale, data.crop, data.mirror]
    if all(value is None for value in given):
        return
    t = _inside(tree, "transform_param")
    if data.mirror is not None and not test:
        t.set("mirror", "true" if data.mirror else "false")
    if data.crop is not None:
        t.set("crop_size", str(data.crop))
    if data.mean_file is not None:
        t.set("mean_file", quote(data.mean_file), drop=("mean_value",))
    if data.mean_values is not None:
        t.set("mean_value", *map(number, data.mean_values), drop=("mean_file",))
    if data.scale is not None:
        t.set("scale", number(data.scale))


def _inside(tree: Message, name: str) -> Message:
    """The sub-message ``name``, made where it is missing."""
    found = tree.message(name)
    if found is None:
        found = Message()
        tree.fields.append(Field(name, found))
    return found


def _from_deploy(net: Net, data: TrainData) -> Net:
    view = net.graph.view(TEST)
    inputs = [*view.inputs, *(v for x in view.layers if x.type == "Input" for v in view.tops[x])]
    softmax = [
        layer for layer in view.layers if layer.type == "Softmax" and view.tops[layer][0] in view.outputs
    ]
    if len(inputs) != 1 or len(softmax) > 1 or (not softmax and len(view.outputs) != 1):
        raise NetError(
            f"{net.path}: has {len(inputs)} inputs and {len(view.outputs)} outputs; "
            "training from a deploy net needs one of each, give a train_val"
        )
    name = inputs[0].name
    value = view.bottoms[softmax[0]][0] if softmax else view.outputs[0]
    shape = infer(view)[value]
    classes = shape[1] if shape is not None and len(shape) > 1 else None
    scores = value.name
    label = "label" if all("label" not in layer.top for layer in net.layers) else "rebirth_label"
    first = [_new_data(name, label, data, phase) for phase in (TRAIN, TEST)]
    last = [
        _new("loss", "SoftmaxWithLoss", [scores, label], "loss"),
        _new("accuracy/top-1", "Accuracy", [scores, label], "accuracy/top-1", _INCLUDE_TEST),
    ]
    if classes is None or classes >= 5:  # Caffe refuses to look for five among fewer
        top5 = [*_INCLUDE_TEST, Field("accuracy_param", Message([Field("top_k", "5")]))]
        last.append(_new("accuracy/top-5", "Accuracy", [scores, label], "accuracy/top-5", top5))
    gone = {*softmax, *(layer for layer in view.layers if layer.type == "Input")}
    kept = [layer for layer in net.layers if layer not in gone]

    def swap(layer: Layer) -> list[Layer]:
        if layer in gone:
            return []
        return [*(first if layer is kept[0] else []), layer, *(last if layer is kept[-1] else [])]

    made = net.replace(swap)
    made.items = [item for item in made.items if isinstance(item, Layer) or not _is_input(item)]
    made.header = caffe_pb2.NetParameter()
    made.header.CopyFrom(net.header)
    for header_field in ("input", "input_dim", "input_shape"):
        made.header.ClearField(header_field)
    return made


_INCLUDE_TEST = [Field("include", Message([Field("phase", "TEST")]), one_line=True)]


def _is_input(text: str) -> bool:
    """Whether a piece of a file's head declares an input."""
    return any(f.name in ("input", "input_dim", "input_shape") for f in prototxt.parse(text).fields)


def _new(name: str, kind: str, bottom: Iterable[str], top: str, more: Iterable[Field] = ()) -> Layer:
    tree = Message(
        [
            Field("name", quote(name)),
            Field("type", quote(kind)),
            *(Field("bottom", quote(b)) for b in bottom),
            Field("top", quote(top)),
            *more,
        ]
    )
    return Layer.from_text(render(Message([Field("layer", tree)])))


def _new_data(name: str, label: str, data: TrainData, phase: int) -> Layer:
    test = phase == TEST
    phase_name = caffe_pb2.Phase.Name(caffe_pb2.Phase.ValueType(phase))
    tree = Message(
        [
            Field("name", quote("data")),
            Field("type", quote("Data")),
            Field("top", quote(name)),
            Field("top", quote(label)),
            Field("include", Message([Field("phase", phase_name)]), one_line=True),
        ]
    )
    _transform(tree, data, test)
    source = _inside(tree, "data_param")
    source.set("source", quote(data.test if test else data.train))
    source.set("batch_size", str(50 if test else data.batch or 32))
    source.set("backend", "LMDB")
    return Layer.from_text(render(Message([Field("layer", tree)])))


def with_rates(net: Net, names: Iterable[str], factor: float = REBORN_LR) -> Net:
    """``net`` in which the layers ``names`` learn ``factor`` times as fast."""
    shapes = all_param_shapes(net)
    wanted = set(names)

    def swap(layer: Layer) -> list[Layer]:
        if layer.name not in wanted:
            return [layer]
        blobs = shapes.get(layer) or layer.blobs
        if not blobs:
            return [layer]
        tree = layer.tree.copy()
        specs = [f.value.copy() for f in layer.tree.all("param") if isinstance(f.value, Message)]
        specs += [Message() for _ in range(len(blobs) - len(specs))]
        for i, spec in enumerate(specs):
            spec.set("lr_mult", number(float(layer.spec(i).lr_mult * factor)))
        at = next((i for i, f in enumerate(tree.fields) if f.name == "param"), None)
        if at is None:  # before the layer's own parameters
            at = next((i for i, f in enumerate(tree.fields) if f.name.endswith("_param")), len(tree.fields))
        rest = [f for f in tree.fields if f.name != "param"]
        tree.fields[:] = [*rest[:at], *(Field("param", spec, one_line=True) for spec in specs), *rest[at:]]
        return [layer.again(tree)]

    return net.replace(swap)


# What would have a driven solver write other files than those that are waited for.
_SNAPSHOTS = ("snapshot", "snapshot_diff", "snapshot_format", "snapshot_after_train")


@dataclass(frozen=True)
class Schedule:
    """How one training step is solved."""

    iterations: int
    seed: int
    net: str
    prefix: str
    test_iter: int | None = None
    lr_factor: float = 1.0  # below 1 after the step diverged
    driven: bool = False  # by retrain.py, which tests by itself
    display: int | None = None  # at least every so many iterations
    snapshot: int | None = None  # every so many iterations, where ``driven``


def solver_text(template: str, schedule: Schedule, path: str = "<solver>") -> str:
    """A solver prototxt from a template: net, length, seed and snapshots are the step's, all else its own.

    Raises PrototxtError where the template is no solver.
    """
    tree = prototxt.parse(template, path)
    param = caffe_pb2.SolverParameter()
    unknown = prototxt.to_message(tree, param, path)
    layers = [f for f in unknown if f.name in ("layer", "layers")]
    if layers:
        raise PrototxtError(f"{path}:{layers[0].line}: a net, not a solver; give a solver prototxt")
    if not param.HasField("base_lr"):
        raise PrototxtError(f"{path}: has no base_lr; give a whole solver prototxt")
    nets = ("train_net", "test_net", "net_param", "train_net_param", "test_net_param")
    tree.fields[:] = [f for f in tree.fields if f.name not in nets]
    _once(tree, "net", quote(schedule.net))
    if schedule.lr_factor != 1:
        tree.set("base_lr", number(float(f"{param.base_lr * schedule.lr_factor:.6g}")))
    if param.lr_policy == "step" and not param.HasField("stepsize"):
        tree.set("stepsize", str(max(1, round(schedule.iterations * STEP))))
    tree.set("max_iter", str(schedule.iterations))
    tree.set("random_seed", str(schedule.seed))
    tree.set("snapshot_prefix", quote(schedule.prefix))
    gone: set[str] = set()
    if schedule.driven:
        gone = {"test_iter", "test_interval", "test_state", "weights", *_SNAPSHOTS}
    elif schedule.test_iter is None:
        gone = {"test_iter", "test_interval", "test_state"}
    else:
        tree.set("test_iter", str(schedule.test_iter))
        tree.set("test_interval", str(param.test_interval or 1000))
        tree.set("test_initialization", "false")
        if len(param.test_state) > 1:  # of several test nets
            gone = {"test_state"}
    tree.fields[:] = [f for f in tree.fields if f.name not in gone]
    if schedule.snapshot is not None:
        tree.set("snapshot", str(schedule.snapshot))
    if schedule.display is not None:
        tree.set("display", str(max(1, min(param.display or schedule.display, schedule.display))))
    return render(tree)


def _once(tree: Message, name: str, value: str) -> None:
    """Leave exactly one field called ``name``, at the front."""
    tree.fields[:] = [Field(name, value), *(f for f in tree.fields if f.name != name)]


def read_template(path: Path | None) -> str:
    """A user's solver template in today's format, or the paper's."""
    return TEMPLATE if path is None else upgrade(prototxt.read_text(path), path).text


def data_layer(net: Net, phase: int = TEST) -> Layer | None:
    """The Data layer of a phase, if there is one."""
    return next((x for x in net.graph.view(phase).layers if x.type == "Data"), None)
