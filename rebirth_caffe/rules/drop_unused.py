"""Layers that make no difference.

x -> (what nobody reads)                                   =>  x
x -> Concat of one, Slice into one, Power (1 x + 0) -> y   =>  x -> y

A blob that no layer reads is an output of the net and stays; what ends in a Silence nobody reads.
"""

from __future__ import annotations

from ..merge import Merge
from ..net import Graph, Layer
from ..shapes import RULES, SOURCES
from . import Findings
from .drop_dropout import why_it_stays
from .match import Matcher


def propose(m: Matcher, found: Findings) -> None:
    """Every layer that passes its input on, and every group of layers that ends in nothing."""
    for layer in m.net.layers:
        if passes_on(layer) and layer not in found.taken:
            reason = why_it_stays(m, layer)
            if reason is not None:
                found.refuse(reason, [layer])
            else:
                found.add(Merge(found.id(f"unused:{layer.name}"), "drop", "", (layer.name,), ()), [layer])


def propose_dead(m: Matcher, found: Findings) -> None:
    """Every group of layers of a deploy net that feeds no output."""
    gone: set[Layer] = set()
    for group in _groups(m.graph, _dead(m.graph) - found.taken):
        reason = _needed(m, group, gone)
        if reason is not None:
            found.refuse(reason, group)
        else:
            names = tuple(layer.name for layer in group)
            found.add(Merge(found.id(f"unused:{names[-1]}"), "drop", "", names, ()), group)
            gone.update(group)


def passes_on(layer: Layer) -> bool:
    """Whether a layer's one top is its one bottom."""
    if len(layer.bottom) != 1 or len(layer.top) != 1 or layer.strange is not None:
        return False
    power = layer.param.power_param
    identity = (power.power, power.scale, power.shift) == (1, 1, 0)
    return layer.type in ("Concat", "Slice", "Split") or (layer.type == "Power" and identity)


def is_output(graph: Graph, layer: Layer, top: int) -> bool:
    """Whether a top is an output of the net in some state."""
    return any(layer in view.tops and not view.tops[layer][top].readers for view in graph.views)


def _dead(graph: Graph) -> set[Layer]:
    """The layers from which no way leads to an output, a file or a layer this project does not know."""
    dead = {
        layer
        for layer in graph.net.layers
        if layer.type in RULES
        and layer.type not in SOURCES
        and (layer.top or layer.type == "Silence")
        and not any(is_output(graph, layer, i) for i in range(len(layer.top)))
    }
    todo = [layer for layer in graph.net.layers if layer not in dead]
    while todo:
        reader = todo.pop()
        feeding = {p for i in range(len(reader.bottom)) for p in graph.producers(reader, i) if p in dead}
        dead -= feeding
        todo += feeding
    return dead


def _groups(graph: Graph, dead: set[Layer]) -> list[list[Layer]]:
    """Dead layers that read each other's tops, in the file's order."""
    place = graph.net.places
    group_of: dict[Layer, list[Layer]] = {}
    for layer in (x for x in graph.net.layers if x in dead):
        makers = {p for i in range(len(layer.bottom)) for p in graph.producers(layer, i) if p in group_of}
        joined = sorted({id(group_of[p]): group_of[p] for p in makers}.values(), key=len) or [[]]
        for group in joined[:-1]:  # the smaller ones into the largest: no layer moves often
            joined[-1].extend(group)
        joined[-1].append(layer)
        group_of.update(dict.fromkeys([layer, *(x for group in joined[:-1] for x in group)], joined[-1]))
    groups = [
        sorted(group, key=place.__getitem__) for group in {id(g): g for g in group_of.values()}.values()
    ]
    return sorted(groups, key=lambda group: place[group[-1]])


def _needed(m: Matcher, group: list[Layer], gone: set[Layer]) -> str | None:
    """Why dead layers have to stay when those that are ``gone`` do not."""
    nameless = next((x for x in group if not x.name or m.names[x.name] > 1), None)
    if nameless is not None:
        return f"'{nameless.name}' is a name that is not its own"
    inside = set(group)
    for view in m.graph.views:
        for value in (value for layer in group for value in view.bottoms.get(layer, [])):
            # From the last reader on: the first ones are those that are gone.
            staying = (r for r, _ in reversed(value.readers) if r not in inside and r not in gone)
            if value.producer not in inside and next(staying, None) is None:
                return f"'{value.name}' would become an output of the net"
    return None
