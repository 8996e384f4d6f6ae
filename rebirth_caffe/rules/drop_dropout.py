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
        if layer.type == "Dropout":
            reason = _refused(m, layer)
            if reason is not None:
                found.refuse(reason, [layer])
            else:
                id_ = found.id(f"drop:{layer.name}")
                found.merges.append(Merge(id_, "drop", "", (layer.name,), ()))


def _refused(m: Matcher, layer: Layer) -> str | None:
    """Why what reads the Dropout's top cannot read its bottom instead."""
    reason = m.why_not_simple(layer)
    if reason is not None:
        return reason
    if layer.bottom != layer.top and not m.readers(layer):
        return f"'{layer.top[0]}' is an output of the net, its name must stay"
    return None
