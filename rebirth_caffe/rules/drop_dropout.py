"""Dropout in a net that is never trained again.

x -> Dropout -> y  =>  x -> y      (exact: in TEST Caffe's Dropout passes its input on)
"""

from __future__ import annotations

from ..merge import Merge, Refusal
from . import Findings
from .match import Matcher


def propose(m: Matcher) -> Findings:
    """Every Dropout of a deploy net."""
    found = Findings()
    for layer in m.graph.net.layers:
        if layer.type != "Dropout":
            continue
        reason = None
        if not m.simple(layer):
            reason = f"'{layer.name}' has several bottoms or tops, or a name that is not its own"
        elif layer.bottom != layer.top:
            producers = m.graph.producers(layer)
            if not m.readers(layer):
                reason = f"'{layer.top[0]}' is an output of the net, its name must stay"
            elif any(
                reader is not layer and blob in reader.top
                for producer in producers
                if producer is not None
                for blob in layer.bottom
                for reader, _ in m.graph.readers(producer, producer.top.index(blob))
            ):
                reason = f"'{layer.bottom[0]}' is overwritten in place by another layer"
        if reason is not None:
            found.refused.append(Refusal((layer.name,), reason))
        else:
            found.merges.append(Merge(f"drop:{layer.name}", "drop", "", (layer.name,), ()))
    return found
