"""The stride of 1x1 convolutions, pulled up to where it saves work.

conv -> ReLU -> 1x1 conv of stride s  =>  conv of s times its stride -> ReLU -> 1x1 conv
a + conv(x) -> 1x1 convs of stride s  =>  every s-th pixel of a + conv of stride s -> 1x1 convs

A 1x1 convolution of stride s looks at every s-th pixel only; the others need not be computed. Functions of
each pixel (ReLU, Eltwise, Concat, ...) and 1x1 convolutions pass the stride on; a larger convolution takes
it; where somebody else reads the whole blob, as at a ResNet's shortcut, a 1x1 convolution of one channel a
group picks the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .. import params
from ..merge import Merge, Rows, Spec
from ..net import TEST, Layer
from . import Findings
from .match import STRIDED, Matcher, joins_channels, original_name

_EACH_PIXEL = ("AbsVal", "BNLL", "Dropout", "ELU", "Exp", "Log", "Power", "PReLU", "ReLU", "Sigmoid", "TanH")


def propose(m: Matcher, found: Findings) -> None:
    """A merge for every blob of which only strided 1x1 convolutions read anything."""
    for value in m.graph.view(TEST).values:
        readers = list(dict.fromkeys(reader for reader, _ in value.readers))
        producer = value.producer
        if producer is None or not readers or not all(_is_strided_pointwise(m, r) for r in readers):
            continue
        strides = {params.conv(reader.param).stride for reader in readers}
        if len(strides) > 1 or set(m.readers(producer)) != set(readers) or len(producer.top) > 1:
            continue
        if not all(m.graph.same_views(producer, reader) for reader in readers):
            continue
        pull = _Pull(m, found, strides.pop())
        if pull.passes(producer) and pull.saved(producer) > 0:
            reason = next((r for r in map(m.untouchable, readers) if r is not None), None)
            if reason is not None or not found.taken.isdisjoint(readers):
                found.refuse(reason or "another merge has taken its layers", readers)
            else:
                found.add(pull.merge(producer, readers), [*pull.group(producer), *readers])


def _is_strided_pointwise(m: Matcher, layer: Layer) -> bool:
    if layer.type != "Convolution" or len(m.input_shapes.get((layer, 0)) or ()) != 4:
        return False
    conv = params.conv(layer.param)
    return max(conv.kernel) == 1 < max(conv.stride) and not any(conv.pad)


class _Pull:
    """A stride on its way up from one blob."""

    def __init__(self, m: Matcher, found: Findings, stride: Sequence[int]) -> None:
        self.m = m
        self.found = found
        self.stride = (stride[0], stride[1])

    def passes(self, layer: Layer) -> bool:
        """Whether a layer can take the stride or pass it on."""
        shape = self.m.shapes.get((layer, 0))
        if layer in self.found.taken or shape is None or len(shape) != 4 or len(layer.top) != 1:
            return False
        if layer.type == "Convolution":
            return self.m.untouchable(layer) is None
        if not layer.name or self.m.names[layer.name] > 1 or layer.strange is not None:
            return False
        p = layer.param
        if layer.type in ("Scale", "Bias"):
            axes = p.scale_param if layer.type == "Scale" else p.bias_param
            return len(layer.bottom) == 1 and (axes.axis, axes.num_axes) == (1, 1)
        if layer.type == "BatchNorm":  # else its statistics would be those of other pixels
            return bool(p.batch_norm_param.use_global_stats)
        return joins_channels(layer) or layer.type in (*_EACH_PIXEL, "Eltwise")

    def above(self, layer: Layer, index: int) -> Layer | None:
        """What makes a bottom, where it can be made with the stride; None where it has to be picked from."""
        producers = self.m.graph.producers(layer, index)
        producer = producers[0] if len(producers) == 1 else None
        if producer is None or self.m.only_reader(producer) is not layer or not self.passes(producer):
            return None
        return producer

    def goes_on(self, layer: Layer) -> bool:
        """Whether a layer passes the stride on instead of taking it."""
        if layer.type != "Convolution":
            return True
        conv = params.conv(layer.param)
        above = self.above(layer, 0)
        pointwise = {*conv.kernel, *conv.stride} == {1} and not any(conv.pad)
        return pointwise and above is not None and self.saved(above) > 0

    def saved(self, layer: Layer) -> float:
        """Multiply-adds less for making every ``stride``-th pixel of a layer's top only."""
        shape = self.m.shapes[layer, 0]
        assert shape is not None
        saved = 0.0
        if layer.type == "Convolution":
            conv, bottom = params.conv(layer.param), self.m.input_shapes[layer, 0]
            assert bottom is not None
            macs = prod(shape[1:]) * bottom[1] // conv.group * prod(conv.kernel)
            saved = macs * (1 - 1 / prod(self.stride))
        if self.goes_on(layer):
            for i in range(len(layer.bottom)):
                above = self.above(layer, i)
                picked = self.m.input_shapes[layer, i]
                assert picked is not None
                saved += self.saved(above) if above is not None else -prod(picked[1:]) / prod(self.stride)
        return saved

    def group(self, layer: Layer) -> list[Layer]:
        """The layers that change with this one, those above first."""
        layers = []
        if self.goes_on(layer):
            above = [self.above(layer, i) for i in range(len(layer.bottom))]
            layers = [x for producer in above if producer is not None for x in self.group(producer)]
        return [*layers, layer]

    def merge(self, top: Layer, readers: list[Layer]) -> Merge:
        """What becomes of the layers that make ``top``'s blob, and of its readers."""
        m, group = self.m, self.group(top)
        ins, outs = m.border([*group, *readers])
        specs: list[Spec] = []
        made: dict[Layer, str] = {}  # the blob each layer of the group makes now
        picked: dict[str, str] = {}
        for layer in group:
            bottoms = []
            for i, name in enumerate(layer.bottom):
                above = self.above(layer, i) if self.goes_on(layer) else None
                at = made[above] if above is not None else ins[layer, i]
                if above is None and self.goes_on(layer):
                    if at not in picked:
                        picked[at] = m.fresh_name(name, STRIDED)
                        specs.append(self._pick(layer, i, at, picked[at]))
                    at = picked[at]
                bottoms.append(at)
            in_place = layer.top[0] in layer.bottom and self.goes_on(layer)
            made[layer] = bottoms[0] if in_place else m.fresh(layer, STRIDED)
            if self.goes_on(layer):
                specs.append(Spec(layer.name, layer.name, tuple(bottoms), (made[layer],)))
            else:
                own = params.conv(layer.param).stride
                stride = (own[0] * self.stride[0], own[1] * self.stride[1])
                specs.append(_restrided(m, layer, bottoms[0], made[layer], stride))
        for reader in readers:
            specs.append(_restrided(m, reader, made[top], outs[reader], (1, 1)))
        absorbed = [x for x in (*group, *readers) if x in readers or not self.goes_on(x)]
        id_ = self.found.id(f"stride:{original_name(readers[0])}")
        return Merge(id_, "stride", "", tuple(x.name for x in absorbed), tuple(specs))

    def _pick(self, layer: Layer, index: int, bottom: str, top: str) -> Spec:
        shape = self.m.input_shapes[layer, index]
        assert shape is not None
        return Spec(top, "", (bottom,), (top,), shape[1], stride=self.stride, type="Convolution")


def _restrided(m: Matcher, conv: Layer, bottom: str, top: str, stride: tuple[int, int]) -> Spec:
    name = m.fresh(conv, STRIDED)
    return Spec(name, conv.name, (bottom,), (top,), stride=stride, rows=(Rows(conv.name),))
