"""A deploy net from a train_val net."""

from __future__ import annotations

from .errors import NetError
from .net import TEST, Layer, Net, State
from .prototxt import quote
from .shapes import LOSSES, RULES, infer

DATA = ("Data", "DummyData", "HDF5Data", "ImageData", "MemoryData", "WindowData")
# What turns the scores a loss reads into what a user of the net wants.
_HEADS = {"SoftmaxWithLoss": "Softmax", "SigmoidCrossEntropyLoss": "Sigmoid"}

_MEND_SIZE = {
    "Data": "give it a crop_size, or --image 3x224x224 (channels x height x width)",
    "ImageData": "give it a crop_size",
}


def is_trainable(net: Net) -> bool:
    """Whether a net is a train_val (it reads data or has a loss), not a deploy net."""
    return any(reads_data(layer) or layer.type in LOSSES or _is_fork_loss(layer) for layer in net.layers)


def reads_data(layer: Layer) -> bool:
    """Whether a layer brings data into a net: one of Caffe's, or a fork's that only writes blobs."""
    return layer.type in DATA or (layer.type not in RULES and bool(layer.top) and not layer.bottom)


def _is_fork_loss(layer: Layer) -> bool:
    """Whether a layer stock Caffe does not know is a loss, by its name or its weight."""
    return layer.type not in RULES and (layer.type.endswith("Loss") or any(layer.param.loss_weight))


def deploy(net: Net) -> Net:
    """What one runs of a train_val: an Input of one image, the layers that feed the main loss, Softmax.

    Data, losses, accuracies and auxiliary heads are left out; what stays keeps its text and its weights. A
    deploy net is returned as it is. Raises NetError where the input's size is not known, or where a fork's
    loss reads what no one here can tell to be an output.
    """
    if not is_trainable(net):
        return net
    from .rules.match import feeding, main_output

    strange = next((layer for layer in net.layers if _is_fork_loss(layer)), None)
    if strange is not None:
        raise NetError(
            f"{strange.where}: {strange.type} is a loss stock Caffe does not know, so the outputs of the "
            "deploy net are not known; write that by hand"
        )
    loss, view, scores = main_output(net.graph)
    needed = feeding(view, scores)
    kept = [layer for layer in view.layers if layer in needed and not reads_data(layer)]
    if not kept:
        raise NetError(f"{net.path}: has no layers between its data and its loss; give a net that computes")
    read = {value for layer in kept for value in view.bottoms[layer]}
    shapes = infer(view, batch=1)
    inputs: list[Layer] = []
    for value in (v for layer in view.layers if reads_data(layer) for v in view.tops[layer] if v in read):
        shape = shapes[value]
        if shape is None:
            maker = value.producer
            assert maker is not None
            mend = _MEND_SIZE.get(maker.type, "write the deploy net by hand")
            raise NetError(f"{maker.where}: its image size is not in the file; {mend}")
        dims = " ".join(f"dim: {d}" for d in shape)
        inputs.append(
            _layer(net, value.name, "Input", [], value.name, f"input_param {{ shape {{ {dims} }} }}")
        )
    head: list[Layer] = []
    if loss is not None and loss.type in _HEADS:
        blobs = {blob for layer in kept for blob in (layer.name, *layer.top)}
        name = next(name for name in ("prob", loss.name, f"{loss.name}/prob") if name not in blobs)
        axis = loss.param.softmax_param.axis
        extra = f"softmax_param {{ axis: {axis} }}" if axis != 1 else ""
        head.append(_layer(net, name, _HEADS[loss.type], [scores[0].name], name, extra))
    plain = State(TEST, net.header.state.level, frozenset(net.header.state.stage))

    def swap(layer: Layer) -> list[Layer]:
        if layer not in needed or reads_data(layer):
            return []
        always = layer if plain.includes(layer) else _without_rules(layer)
        return [*(inputs if layer is kept[0] else []), always, *(head if layer is kept[-1] else [])]

    return net.replace(swap)


def _without_rules(layer: Layer) -> Layer:
    """A layer that is in the net whatever phase and stage it is run in."""
    text = layer.text
    for field in reversed(layer.tree.fields):
        if field.name in ("include", "exclude"):
            start, end = field.start - layer.offset, field.end - layer.offset
            before = text[:start].rstrip(" \t")
            text = (before[:-1] if before.endswith("\n") else before) + text[end:]
    changed = Layer.from_text(text, path=layer.path, line=layer.line)
    changed.record = layer.record
    return changed


def _layer(net: Net, name: str, kind: str, bottom: list[str], top: str, extra: str = "") -> Layer:
    lines = [f"name: {quote(name)}", f"type: {quote(kind)}"]
    lines += [f"bottom: {quote(b)}" for b in bottom] + [f"top: {quote(top)}"] + ([extra] if extra else [])
    end = net.newline
    return Layer.from_text(f"layer {{{end}" + "".join(f"  {line}{end}" for line in lines) + f"}}{end}")
