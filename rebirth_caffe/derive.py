"""A deploy net from a train_val net."""

from __future__ import annotations

from .errors import NetError
from .net import TEST, Layer, Net
from .prototxt import quote
from .shapes import LOSSES, infer

DATA = ("Data", "DummyData", "HDF5Data", "ImageData", "MemoryData", "WindowData")
# What turns the scores a loss reads into what a user of the net wants.
_HEADS = {"SoftmaxWithLoss": ("Softmax", "prob"), "SigmoidCrossEntropyLoss": ("Sigmoid", "prob")}


def is_trainable(net: Net) -> bool:
    """Whether a net is a train_val (it reads data or has a loss), not a deploy net."""
    return any(layer.type in DATA or layer.type in LOSSES for layer in net.layers)


def deploy(net: Net) -> Net:
    """What one runs of a train_val: an Input of one image, the layers that feed the main loss, Softmax.

    Data, losses, accuracies and auxiliary heads are left out; what stays keeps its text and its weights. A
    deploy net is returned as it is. Raises NetError where the input's size is not known.
    """
    if not is_trainable(net):
        return net
    from .rules.match import main_loss

    graph = net.graph
    view = graph.view(TEST)
    loss = main_loss(graph)
    shapes = infer(view, batch=1)
    wanted = view.bottoms[loss][:1] if loss is not None else view.outputs
    needed: set[Layer] = set()
    todo = [value.producer for value in wanted if value.producer is not None]
    inputs = []
    while todo:
        layer = todo.pop()
        if layer in needed:
            continue
        needed.add(layer)
        todo += [value.producer for value in view.bottoms[layer] if value.producer is not None]
    for layer in view.layers:
        if layer.type in DATA:
            read = {value for reader in needed for value in view.bottoms[reader]}
            inputs += [value for value in view.tops[layer] if value in read]
    new: list[Layer] = []
    for value in inputs:
        shape = shapes[value]
        if shape is None:
            raise NetError(
                f"{value.producer.where if value.producer else net.path}: its image size is not in the file; "
                "give it a crop_size, or --image 3x224x224 (channels x height x width)"
            )
        dims = " ".join(f"dim: {d}" for d in shape)
        new.append(_layer(net, value.name, "Input", [], value.name, f"input_param {{ shape {{ {dims} }} }}"))
    head: list[Layer] = []
    if loss is not None and loss.type in _HEADS:
        kind, name = _HEADS[loss.type]
        head.append(_layer(net, name, kind, [wanted[0].name], name))
    kept = [layer for layer in view.layers if layer in needed and layer.type not in DATA]
    if not kept:
        raise NetError(f"{net.path}: has no layers between its data and its loss; give a net that computes")
    first, last = kept[0], kept[-1]

    def swap(layer: Layer) -> list[Layer]:
        if layer not in needed or layer.type in DATA:
            return []
        return [*(new if layer is first else []), layer, *(head if layer is last else [])]

    return net.replace(swap)


def _layer(net: Net, name: str, kind: str, bottom: list[str], top: str, extra: str = "") -> Layer:
    lines = [f"name: {quote(name)}", f"type: {quote(kind)}"]
    lines += [f"bottom: {quote(b)}" for b in bottom] + [f"top: {quote(top)}"] + ([extra] if extra else [])
    end = net.newline
    return Layer.from_text(f"layer {{{end}" + "".join(f"  {line}{end}" for line in lines) + f"}}{end}")
