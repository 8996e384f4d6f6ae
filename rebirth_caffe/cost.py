"""What a net costs: multiply-adds, parameters, activation bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import NetError
from .net import TEST, Layer, Net, Value, View
from .shapes import MaybeShape, Shape, infer, param_shapes

FLOAT_BYTES = 4
# Types whose tops are new views of the bottom's memory; a Concat or Slice of one is, too.
_SHARES_MEMORY = {"Flatten", "Reshape", "Split"}
_MAY_SHARE_MEMORY = {"Concat", "Slice"}


@dataclass(frozen=True)
class Cost:
    """A net's cost for one image; bytes as float32.

    ``activation_bytes`` counts every blob (Caffe's way: all are held at once),
    ``peak_activation_bytes`` the most that is alive at a time when memory is reused after a blob's last
    reader. ``unknown`` lists layers whose cost is not known and so not counted.
    """

    layers: int
    macs: int
    params: int
    activation_bytes: int
    peak_activation_bytes: int
    unknown: tuple[str, ...] = ()


def cost(net: Net, phase: int = TEST) -> Cost:
    """The cost of one forward pass in ``phase``, of one image (of the file's batch where it is fixed)."""
    view = net.graph.view(phase)
    shapes = _shapes(view)
    macs = params = 0
    unknown, shared = [], set()
    for layer in view.layers:
        bottoms = [shapes.get(value) for value in view.bottoms[layer]]
        blobs = param_shapes(layer, bottoms)
        if blobs is None:
            unknown.append(layer.name)
        for i, blob in enumerate(blobs or []):
            name = layer.spec(i).name
            params += 0 if name and name in shared else math.prod(blob)
            shared.add(name)
        macs += layer_macs(layer, bottoms, [shapes[value] for value in view.tops[layer]])
    total, peak = _activations(view, shapes)
    return Cost(len(view.layers), macs, params, total, peak, tuple(unknown))


def _shapes(view: View) -> dict[Value, MaybeShape]:
    """Shapes for one image, or for the file's batch where a Reshape or the like counts on it."""
    full = infer(view)
    try:
        one = infer(view, batch=1)
    except NetError:
        return full
    for layer in view.layers:
        bottoms = view.bottoms[layer]
        if param_shapes(layer, [one[b] for b in bottoms]) != param_shapes(layer, [full[b] for b in bottoms]):
            return full  # its weights would be others
    return one


def layer_macs(layer: Layer, bottoms: list[MaybeShape], tops: list[MaybeShape]) -> int:
    """Multiply-adds of a layer with weights (Convolution, Deconvolution, InnerProduct), else 0."""
    if layer.type not in ("Convolution", "Deconvolution", "InnerProduct"):
        return 0
    blobs = param_shapes(layer, bottoms)
    if not blobs:
        return 0
    macs = 0
    for bottom, top in zip(bottoms, tops, strict=False):
        if bottom is None or top is None:
            continue
        if layer.type == "Deconvolution":
            macs += math.prod(blobs[0][1:]) * math.prod(bottom)
        else:
            outputs = layer.param.inner_product_param.num_output or blobs[0][0]
            macs += math.prod(blobs[0]) * math.prod(top) // outputs
    return macs


def _activations(view: View, shapes: dict[Value, MaybeShape]) -> tuple[int, int]:
    """(total, peak) bytes of the view's blobs."""
    buffer: dict[Value, Value] = {}  # value -> the value whose memory it uses
    for value in view.values:
        layer = value.producer
        buffer[value] = value
        if layer is not None:
            reused = [b for b in view.bottoms[layer] if b.name == value.name]
            one = len(layer.bottom) == len(layer.top) == 1
            if layer.type in _SHARES_MEMORY or (one and layer.type in _MAY_SHARE_MEMORY):
                reused = view.bottoms[layer][:1]
            if reused:
                buffer[value] = buffer[reused[0]]
    size = {value: math.prod(_shape(shapes[value])) * FLOAT_BYTES for value in set(buffer.values())}
    order = {layer: i for i, layer in enumerate(view.layers)}
    end = len(order)
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for value in view.values:
        store = buffer[value]
        born = order[value.producer] if value.producer is not None else 0
        first[store] = min(first.get(store, born), born)
        dies = max((order[reader] for reader, _ in value.readers), default=end)
        last[store] = max(last.get(store, dies), dies)
    change = [0] * (end + 2)
    for store, bytes_ in size.items():
        change[first[store]] += bytes_
        change[last[store] + 1] -= bytes_
    alive = peak = 0
    for step in change:
        alive += step
        peak = max(peak, alive)
    return sum(size.values()), peak


def _shape(shape: MaybeShape) -> Shape:
    return (0,) if shape is None else shape
