"""What the rules ask of a graph: chains of layers, who is in the way, what must not be touched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .. import params
from ..merge import IN, OUT, TENSOR, border
from ..net import TEST, TRAIN, Graph, Layer, Net, Value, View
from ..shapes import LOSSES, MaybeShape, infer

WEIGHTED = (*TENSOR, "Deconvolution", "Embed", "LSTM", "RNN")
ACTIVATION = ("ReLU", "PReLU", "ELU", "Sigmoid", "TanH")
NORMALISING = ("LRN", "BatchNorm", "Scale")
ABSORBED = ("Pooling", *NORMALISING)
AFFINE = ("BatchNorm", "Scale", "Bias", "Power")  # of one bottom: factor x + shift, a channel
REBIRTH, FOLDED, COMPOSED, JOINED, STRIDED, MOVED, CUT = (
    f"/{what}" for what in ("rebirth", "folded", "composed", "joined", "strided", "moved", "slice")
)
_MADE = re.compile(rf"({'|'.join((REBIRTH, FOLDED, COMPOSED, JOINED, STRIDED))})\d*$")


class Matcher:
    """A net with what rules need to know about it, computed once."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.graph: Graph = net.graph
        self.names = Counter(layer.name for layer in net.layers)
        self.known = {*self.names, *net.header.input, *(top for layer in net.layers for top in layer.top)}
        self.reborn: dict[tuple[str, str], str] = {}
        self.shared = Counter(name for layer in net.layers for name in set(layer.shared_params()))
        self.classifiers = _classifiers(self.graph)
        self.shapes: dict[tuple[Layer, int], MaybeShape] = {}
        self.input_shapes: dict[tuple[Layer, int], MaybeShape] = {}
        for view in reversed(self.graph.views):  # the plain TEST view, first in the list, has the last word
            shapes = infer(view)
            for layer in view.layers:
                for i, value in enumerate(view.tops[layer]):
                    self.shapes[layer, i] = shapes[value]
                for i, value in enumerate(view.bottoms[layer]):
                    self.input_shapes[layer, i] = shapes[value]
        self.deployed = _deployed(self.graph)

    def fresh(self, layer: Layer, suffix: str) -> str:
        """A name for what ``layer`` becomes, as a layer and as a blob: one that no weights file knows.

        A layer becomes one thing at most, so asking again gives the same name.
        """
        if (layer.name, suffix) not in self.reborn:
            self.reborn[layer.name, suffix] = self.fresh_name(original_name(layer), suffix)
        return self.reborn[layer.name, suffix]

    def fresh_name(self, base: str, suffix: str) -> str:
        """A name for a new layer and its blob."""
        name, i = base + suffix, 2
        while name in self.known:
            name, i = f"{base}{suffix}{i}", i + 1
        self.known.add(name)
        return name

    def untouchable(self, layer: Layer) -> str | None:
        """Why no rule may rewrite this layer's weights, or None."""
        if not layer.name:
            return "it has no name"
        if self.names[layer.name] > 1:
            return f"{self.names[layer.name]} layers are called '{layer.name}'"
        if len(layer.bottom) != 1 or len(layer.top) != 1:
            return f"'{layer.name}' has several bottoms or tops"
        if layer.strange is not None:
            return _of_a_fork(layer)
        shared = next((name for name in layer.shared_params() if self.shared[name] > 1), None)
        if shared is not None:
            return f"'{layer.name}' shares its weights under the name '{shared}'"
        if layer in self.classifiers:
            return f"'{layer.name}' is the last classifier"
        own = layer.param
        if (own.convolution_param if layer.type == "Convolution" else own.inner_product_param).axis != 1:
            return f"'{layer.name}' has its outputs on another axis than the channels"
        return None

    def readers(self, layer: Layer) -> list[Layer]:
        """Who reads the layer's first top in any phase."""
        return list(dict.fromkeys(reader for reader, _ in self.graph.readers(layer)))

    def other_readers(self, layer: Layer) -> list[Layer]:
        """Who else reads the layer's first bottom in any phase."""
        values = [view.bottoms[layer][0] for view in self.graph.views if layer in view.bottoms]
        return list(dict.fromkeys(r for value in values for r, _ in value.readers if r is not layer))

    def only_reader(self, layer: Layer) -> Layer | None:
        """The one layer that reads the only top of ``layer``, once and in the same phases, or None."""
        readers = self.graph.readers(layer)
        if len(readers) == 1 and len(layer.top) == 1 and self.graph.same_views(layer, readers[0][0]):
            return readers[0][0]
        return None

    def why_not_only(self, layer: Layer, reader: Layer) -> str:
        """Why ``reader``, which reads the first top of ``layer``, is not its ``only_reader``."""
        others = [r for r in self.readers(layer) if r is not reader]
        if others:
            return f"blob '{layer.top[0]}' has a second reader, '{others[0].name}'"
        if len(layer.top) > 1:
            return f"'{layer.name}' has several bottoms or tops"
        if len(self.graph.readers(layer)) > 1:
            return f"'{reader.name}' reads '{layer.top[0]}' twice"
        return f"'{layer.name}' and '{reader.name}' are not in the same phases"

    def border(self, group: Iterable[Layer]) -> tuple[dict[tuple[Layer, int], str], dict[Layer, str]]:
        """What a merge of these layers calls the blobs at its border: (layer, bottom index) -> @in, @in2, ...
        of every bottom from outside, and maker -> @out, @out2, ..."""
        inside = set(group)
        layers = [layer for layer in self.net.layers if layer in inside]

        def source(reader: tuple[Layer, int]) -> tuple[object, ...]:
            producers = [p for p in self.graph.producers(*reader) if p not in inside]
            return (reader[0].bottom[reader[1]], *producers) if producers else ()

        readers, outs = self.graph.border(layers)
        names = {source(reader): border(IN, i) for i, reader in enumerate(readers)}
        bottoms = [(layer, i) for layer in layers for i in range(len(layer.bottom))]
        ins = {reader: names[source(reader)] for reader in bottoms if source(reader)}
        return ins, {maker: border(OUT, i) for i, (maker, _) in enumerate(outs)}

    def simple(self, layer: Layer) -> bool:
        """One bottom, one top, a name of its own, and nothing in it that stock Caffe does not know."""
        return self.why_not_simple(layer) is None

    def why_not_simple(self, layer: Layer) -> str | None:
        """Why a layer is not ``simple``."""
        alone = len(layer.bottom) == len(layer.top) == 1 and layer.name and self.names[layer.name] == 1
        if not alone:
            return f"'{layer.name}' has several bottoms or tops, or a name that is not its own"
        return _of_a_fork(layer) if layer.strange is not None else None

    def is_global(self, layer: Layer) -> bool:
        """Whether a Pooling makes one pixel of its whole input, and more than one of that."""
        pool = params.pool(layer.param)
        if pool.kernel is None:
            return True
        before, after = self.input_shapes.get((layer, 0)), self.shapes.get((layer, 0))
        if before is None or after is None or after[2:] != (1, 1) or before[2:] == (1, 1):
            return False
        return all(k - p >= size for k, p, size in zip(pool.kernel, pool.pad, before[2:], strict=True))


@dataclass
class Chain:
    """Layers behind a first one that a merge can take in."""

    layers: list[Layer] = field(default_factory=list)
    refusal: str | None = None  # why it does not go on, where what follows looked absorbable
    beyond: tuple[Layer, ...] = ()  # the layers the refusal is about

    @property
    def pools(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.type == "Pooling"]

    @property
    def normalising(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.type in NORMALISING]

    @property
    def activations(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.type in ACTIVATION]


def follow(m: Matcher, start: Layer, activations: Iterable[Layer] = ()) -> Chain:
    """The chain of poolings, normalisations and activations behind ``start``.

    It ends before a second activation that the first does not make idle (``activations`` are those already
    met), before a global pool and before whatever is read twice. Activations behind the last layer that can
    be absorbed are part of it only where they repeat one of the chain's.
    """
    chain = Chain()
    before = list(activations)
    met, idle = bool(before), all(map(plain_relu, before))  # whether another plain one does nothing
    at = start
    while True:
        following = m.only_reader(at)
        if following is None:
            looked = [r for r in m.readers(at) if r.type in ABSORBED and r in m.deployed]
            if looked:
                chain.refusal, chain.beyond = m.why_not_only(at, looked[0]), (looked[0],)
            break
        if following.type in ACTIVATION and m.simple(following):
            if met and not (idle and plain_relu(following)):
                break
            met, idle = True, idle and plain_relu(following)
        elif following.type in ABSORBED:
            reason = unabsorbable(m, following)
            if reason is not None:
                chain.refusal, chain.beyond = reason, (following,)
                break
        else:
            break
        chain.layers.append(following)
        at = following
    last = max((i for i, layer in enumerate(chain.layers) if layer.type in ABSORBED), default=-1)
    if not any(layer.type in ACTIVATION for layer in chain.layers[: last + 1]):
        del chain.layers[last + 1 :]
    return chain


def unabsorbable(m: Matcher, layer: Layer) -> str | None:
    """Why a layer without weights worth the name cannot go, or None."""
    reason = m.why_not_simple(layer)
    if reason is not None:
        return reason
    if layer.type == "Pooling":
        if m.is_global(layer):
            return f"'{layer.name}' is the global pool"
        if params.pool(layer.param).method == "STOCHASTIC":
            return f"'{layer.name}' pools stochastically"
    return None


def _of_a_fork(layer: Layer) -> str:
    assert layer.strange is not None
    return f"'{layer.name}' has a field stock Caffe does not know, {layer.strange.name}"


def original_name(layer: Layer) -> str:
    """What a layer was called before merges."""
    return _MADE.sub("", layer.name)


def joins_channels(layer: Layer) -> bool:
    """Whether a layer is Caffe's Concat along the channels."""
    p = layer.param.concat_param
    if layer.type != "Concat" or layer.strange is not None:
        return False
    return (p.concat_dim if p.HasField("concat_dim") else p.axis) == 1


def plain_relu(layer: Layer) -> bool:
    """Whether an activation may be repeated at no effect."""
    return layer.type == "ReLU" and layer.param.relu_param.negative_slope == 0


# How many of a layer's bottoms it reads values of; of the others only the size.
_READ = {"Crop": 1, "PriorBox": 0}


def _classifiers(graph: Graph) -> set[Layer]:
    """The last layers with weights on every way to an output or a loss."""
    found: set[Layer] = set()
    for view in graph.views:
        seen: set[Layer] = set()
        todo = [value.producer for value in view.outputs if value.producer is not None]
        while todo:
            layer = todo.pop()
            if layer in seen:
                continue
            seen.add(layer)
            if layer.type in WEIGHTED:
                found.add(layer)
            else:
                read = view.bottoms[layer][: _READ.get(layer.type)]
                todo += [value.producer for value in read if value.producer is not None]
    return found


def _deployed(graph: Graph) -> set[Layer]:
    """Layers that feed the main output: all of a deploy net, not the auxiliary heads of a train_val."""
    head, view, scores = main_output(graph)
    if head is None:
        return set(view.layers)
    return feeding(view, scores)


def feeding(view: View, values: Iterable[Value]) -> set[Layer]:
    """The layers that these values depend on."""
    todo = [value.producer for value in values]
    found: set[Layer] = set()
    while todo:
        layer = todo.pop()
        if layer is not None and layer not in found:
            found.add(layer)
            todo += [value.producer for value in view.bottoms[layer]]
    return found


def main_output(graph: Graph) -> tuple[Layer | None, View, list[Value]]:
    """What a net is for: its main loss (in a net that has none, its last accuracy), and the scores it reads.

    The main loss is the one with the largest weight, the last of equals. None and all outputs in a net
    without either. The view is that of TEST wherever the scores exist there.
    """
    test = graph.view(TEST)
    for kinds in (LOSSES, ("Accuracy",)):
        for view in (test, graph.view(TRAIN)):
            heads = [layer for layer in view.layers if layer.type in kinds and layer.bottom]
            if heads:
                head = max(reversed(heads), key=_loss_weight)
                score = view.bottoms[head][0]
                in_test = test.tops.get(score.producer, []) if score.producer else []
                return head, *((test, [in_test[score.index]]) if in_test else (view, [score]))
    return None, test, test.outputs


def _loss_weight(layer: Layer) -> float:
    return layer.param.loss_weight[0] if layer.param.loss_weight else 1.0
