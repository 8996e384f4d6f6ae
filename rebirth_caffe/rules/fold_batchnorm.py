"""BatchNorm and Scale into the layer with weights below them; exact in TEST.

conv -> BatchNorm -> Scale  =>  conv      W' = W g/s, b' = (b - mean) g/s + beta, s = sqrt(var + eps)
conv -> BatchNorm           =>  conv      g = 1, beta = 0
conv -> Scale               =>  conv      mean = 0, s = 1

BatchNorm's stored mean and variance are divided by its third blob first (0 stands for an empty average and
makes both 0, as in Caffe). ``init/fold.py`` does the arithmetic.
"""

from __future__ import annotations

from ..merge import IN, OUT, TENSOR, Merge, Rows, Spec
from ..net import Layer
from . import Findings
from .match import FOLDED, Matcher


def propose(m: Matcher, found: Findings) -> None:
    """Every BatchNorm and Scale right behind a Convolution or InnerProduct."""
    for layer in m.net.layers:
        if layer.type in TENSOR:
            _behind(m, layer, found)


def _behind(m: Matcher, layer: Layer, found: Findings) -> None:
    chain: list[Layer] = []
    at = layer
    while True:
        candidates = [r for r in m.readers(at) if r.type in ("BatchNorm", "Scale")]
        if not candidates:
            break
        reason = _refused(m, at, candidates[0])
        if reason is not None:
            found.refuse(reason, [layer, candidates[0]])
            break
        at = candidates[0]
        chain.append(at)
    if not chain:
        return
    reason = m.untouchable(layer)
    if reason is not None:
        found.refuse(reason, [layer, *chain])
        return
    spec = Spec(m.fresh(layer, FOLDED), layer.name, (IN,), (OUT,), rows=(Rows(layer.name),))
    group = tuple(x.name for x in (layer, *chain))
    found.merges.append(Merge(found.id(f"fold:{layer.name}"), "fold", "", group, (spec,)))


def _refused(m: Matcher, at: Layer, following: Layer) -> str | None:
    """Why ``following`` cannot be folded into the chain that ends in ``at``."""
    if m.only_reader(at) is not following:
        return m.why_not_only(at, following)
    reason = m.why_not_simple(following)
    if reason is not None:
        return reason
    shared = next((name for name in following.shared_params() if m.shared[name] > 1), None)
    if shared is not None:
        return f"'{following.name}' shares its blobs under the name '{shared}'"
    norm, scale = following.param.batch_norm_param, following.param.scale_param
    if following.type == "BatchNorm" and norm.HasField("use_global_stats") and not norm.use_global_stats:
        return f"'{following.name}' normalises by the batch it sees (use_global_stats: false)"
    if following.type == "Scale" and (scale.axis, scale.num_axes) != (1, 1):
        return f"'{following.name}' does not scale by channel"
    return None
