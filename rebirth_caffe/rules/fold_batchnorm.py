"""BatchNorm and Scale into the layer with weights below them; exact in TEST.

conv -> BatchNorm -> Scale  =>  conv      W' = W g/s, b' = (b - mean) g/s + beta, s = sqrt(var + eps)
conv -> BatchNorm           =>  conv      g = 1, beta = 0
conv -> Scale               =>  conv      mean = 0, s = 1

BatchNorm's stored mean and variance are divided by its third blob first (0 stands for an empty average and
makes both 0, as in Caffe). ``init/fold.py`` does the arithmetic.
"""

from __future__ import annotations

from ..merge import IN, OUT, Merge, Refusal, Rows, Spec
from ..net import Layer
from . import Findings
from .match import FOLDED, TENSOR, Matcher


def propose(m: Matcher) -> Findings:
    """Every BatchNorm and Scale right behind a Convolution or InnerProduct."""
    found = Findings()
    names: set[str] = set()
    for layer in m.graph.net.layers:
        if layer.type in TENSOR:
            _behind(m, layer, names, found)
    return found


def _behind(m: Matcher, layer: Layer, names: set[str], found: Findings) -> None:
    chain: list[Layer] = []
    at = layer
    while True:
        candidates = [r for r in m.readers(at) if r.type in ("BatchNorm", "Scale")]
        if not candidates:
            break
        reason = _refused(m, at, candidates[0])
        if reason is not None:
            found.refused.append(Refusal((layer.name, candidates[0].name), reason))
            break
        at = candidates[0]
        chain.append(at)
    if not chain:
        return
    group = (layer.name, *(x.name for x in chain))
    reason = m.untouchable(layer)
    if reason is None:
        reason = _axis(m, layer)
    if reason is not None:
        found.refused.append(Refusal(group, reason))
        return
    spec = Spec(m.fresh(layer.name, FOLDED, names), layer.name, (IN,), (OUT,), rows=(Rows(layer.name),))
    found.merges.append(Merge(f"fold:{layer.name}", "fold", "", group, (spec,)))


def _refused(m: Matcher, at: Layer, following: Layer) -> str | None:
    """Why ``following`` cannot be folded into the chain that ends in ``at``."""
    if m.only_reader(at) is not following:
        if len(m.readers(at)) > 1:
            other = next(r for r in m.readers(at) if r is not following)
            return f"blob '{at.top[0]}' has a second reader, '{other.name}'"
        return f"'{at.name}' and '{following.name}' are not in the same phases"
    if not m.simple(following):
        return f"'{following.name}' has several bottoms or tops, or a name that is not its own"
    shared = next((name for name in following.shared_params() if m.shared[name] > 1), None)
    if shared is not None:
        return f"'{following.name}' shares its blobs under the name '{shared}'"
    norm, scale = following.param.batch_norm_param, following.param.scale_param
    if following.type == "BatchNorm" and norm.HasField("use_global_stats") and not norm.use_global_stats:
        return f"'{following.name}' normalises by the batch it sees (use_global_stats: false)"
    if following.type == "Scale" and (scale.axis, scale.num_axes) != (1, 1):
        return f"'{following.name}' does not scale by channel"
    return None


def _axis(m: Matcher, layer: Layer) -> str | None:
    shape = m.shapes.get((layer, 0))
    if layer.type == "InnerProduct" and layer.param.inner_product_param.axis != 1:
        return f"'{layer.name}' has its outputs on another axis than the channels"
    if layer.type == "Convolution" and layer.param.convolution_param.axis != 1:
        return f"'{layer.name}' has its outputs on another axis than the channels"
    return None if shape is None or len(shape) > 1 else f"'{layer.name}' has no channels"
