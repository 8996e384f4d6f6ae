"""Dropout in a net that is never trained again.

x -> Dropout -> y  =>  x -> y      (exact: in TEST Caffe's Dropout passes its input on)
"""

from __future__ import annotations

from ..merge import Merge
from ..net import Layer
from . import Findings
from .match import Matcher


def propose(m: Matcher, found: Findings) -> None:
    """Every Dropout of a deploy net."""
    for layer in m.net.layers:
        if layer.type == "Dropout" and layer not in found.taken:
            reason = why_it_stays(m, layer)
            if reason is not None:
                found.refuse(reason, [layer])
            else:
                found.add(Merge(found.id(f"drop:{layer.name}"), "drop", "", (layer.name,), ()), [layer])


def why_it_stays(m: Matcher, layer: Layer) -> str | None:
    """Why what reads the layer's top cannot read its bottom instead."""
    reason = m.why_not_simple(layer)
    if reason is not None or layer.bottom == layer.top:
        return reason
    if not m.readers(layer):
        return f"'{layer.top[0]}' is an output of the net, its name must stay"
    in_place = next((r for r in m.readers(layer) if layer.top[0] in r.top), None)
    if in_place is not None and m.other_readers(layer):
        return f"'{in_place.name}' works in place on it, and '{layer.bottom[0]}' has other readers"
    return None
