"""What the rules ask of a graph: chains of layers, who is in the way, what must not be touched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .. import params
from ..net import TEST, Graph, Layer, Net
from ..shapes import LOSSES, MaybeShape, infer

TENSOR = ("Convolution", "InnerProduct")
WEIGHTED = (*TENSOR, "Deconvolution", "Embed", "LSTM", "RNN")
ACTIVATION = ("ReLU", "PReLU", "ELU", "Sigmoid", "TanH")
NORMALISING = ("LRN", "BatchNorm", "Scale")
ABSORBED = ("Pooling", *NORMALISING)
REBIRTH, FOLDED = "/rebirth", "/folded"


class Matcher:
    """A net with what rules need to know about it, computed once."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.graph: Graph = net.graph
        self.names = Counter(layer.name for layer in net.layers)
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

    def fresh(self, base: str, suffix: str, taken: set[str]) -> str:
        """A layer name for something made of ``base``: one that no weights file knows."""
        for old in (REBIRTH, FOLDED):
            base = base.removesuffix(old)
        name, i = base + suffix, 2
        while name in self.names or name in taken:
            name, i = f"{base}{suffix}{i}", i + 1
        taken.add(name)
        return name

    def untouchable(self, layer: Layer) -> str | None:
        """Why no rule may rewrite this layer's weights, or None."""
        if not layer.name:
            return "it has no name"
        if self.names[layer.name] > 1:
            return f"{self.names[layer.name]} layers are called '{layer.name}'"
        if len(layer.bottom) != 1 or len(layer.top) != 1:
            return f"'{layer.name}' has several bottoms or tops"
        shared = next((name for name in layer.shared_params() if self.shared[name] > 1), None)
        if shared is not None:
            return f"'{layer.name}' shares its weights under the name '{shared}'"
        if layer in self.classifiers:
            return f"'{layer.name}' is the last classifier"
        return None

    def readers(self, layer: Layer) -> list[Layer]:
        """Who reads the layer's first top in any phase."""
        return [reader for reader, _ in self.graph.readers(layer)]

    def only_reader(self, layer: Layer) -> Layer | None:
        """The one layer that reads the only top of ``layer``, in the same phases, or None."""
        readers = self.readers(layer)
        if len(readers) == 1 and len(layer.top) == 1 and self.graph.same_views(layer, readers[0]):
            return readers[0]
        return None

    def simple(self, layer: Layer) -> bool:
        """One bottom, one top, a name of its own."""
        return (
            len(layer.bottom) == 1
            and len(layer.top) == 1
            and bool(layer.name)
            and self.names[layer.name] == 1
        )

    def second_reader(self, layer: Layer) -> str:
        """``blob 'x' has a second reader, 'y'``."""
        others = [r.name for r in self.readers(layer) if r.type not in ABSORBED] or [
            r.name for r in self.readers(layer)[1:]
        ]
        return f"blob '{layer.top[0]}' has a second reader, '{others[0]}'"

    def is_global(self, layer: Layer) -> bool:
        """Whether a Pooling takes in its whole input."""
        pool = params.pool(layer.param)
        shape = self.input_shapes.get((layer, 0))
        if pool.kernel is None:
            return True
        return (
            shape is not None
            and self.shapes[layer, 0] is not None
            and shape[2:] != (1, 1)
            and all(k >= size for k, size in zip(pool.kernel, shape[2:], strict=True))
        )


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


def follow(m: Matcher, start: Layer, activations: tuple[Layer, ...] = ()) -> Chain:
    """The chain of poolings, normalisations and activations behind ``start``.

    It ends before a second activation that the first does not make idle (``activations`` are those already
    met), before a global pool and before whatever is read twice. Activations behind the last layer that can
    be absorbed are part of it only where they repeat one of the chain's.
    """
    chain = Chain()
    met = list(activations)
    at = start
    while True:
        following = m.only_reader(at)
        if following is None:
            looked = [r for r in m.readers(at) if r.type in ABSORBED and r in m.deployed]
            if looked:
                chain.refusal, chain.beyond = _why_not_only(m, at), (looked[0],)
            break
        if following.type in ACTIVATION and m.simple(following):
            if met and not _same_function(met[0], following):
                break
            met.append(following)
        elif following.type in ABSORBED:
            reason = _unabsorbable(m, following)
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


def _why_not_only(m: Matcher, at: Layer) -> str:
    if len(m.readers(at)) > 1:
        return m.second_reader(at)
    return f"'{at.name}' and what follows it are not in the same phases"


def _unabsorbable(m: Matcher, layer: Layer) -> str | None:
    if not m.simple(layer):
        return f"'{layer.name}' has several bottoms or tops, or a name that is not its own"
    if layer.type == "Pooling":
        if m.is_global(layer):
            return f"'{layer.name}' is the global pool"
        if params.pool(layer.param).method == "STOCHASTIC":
            return f"'{layer.name}' pools stochastically"
    return None


def _same_function(a: Layer, b: Layer) -> bool:
    """Whether two activations do what one of them does: plain ReLUs."""
    return all(x.type == "ReLU" and x.param.relu_param.negative_slope == 0 for x in (a, b))


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
                todo += [v.producer for v in view.bottoms[layer] if v.producer is not None]
    return found


def _deployed(graph: Graph) -> set[Layer]:
    """Layers that feed the main output: all of a deploy net, not the auxiliary heads of a train_val."""
    view = graph.view(TEST)
    head = main_loss(graph)
    if head is None:
        return set(view.layers)
    roots = [v.producer for v in view.bottoms.get(head, []) if v.producer is not None]
    seen: set[Layer] = set()
    while roots:
        layer = roots.pop()
        if layer not in seen:
            seen.add(layer)
            roots += [v.producer for v in view.bottoms[layer] if v.producer is not None]
    return seen


def main_loss(graph: Graph) -> Layer | None:
    """The loss layer with the largest weight, the last of equals; None in a net without one."""
    losses = [layer for layer in graph.view(TEST).layers if layer.type in LOSSES]
    best = max((_loss_weight(layer) for layer in losses), default=0.0)
    return next((layer for layer in reversed(losses) if _loss_weight(layer) == best), None)


def _loss_weight(layer: Layer) -> float:
    return layer.param.loss_weight[0] if layer.param.loss_weight else 1.0
