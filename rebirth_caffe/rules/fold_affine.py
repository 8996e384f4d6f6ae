"""BatchNorm, Scale, Bias and Power into the layer with weights beside them; exact in TEST.

conv -> BatchNorm -> Scale  =>  conv      W' = W g/s, b' = (b - mean) g/s + beta, s = sqrt(var + eps)
conv -> BatchNorm           =>  conv      g = 1, beta = 0
conv -> Scale               =>  conv      mean = 0, s = 1
Scale -> conv               =>  conv      W' = W g, b' = b + sum of W beta over inputs and taps

In front of a convolution that pads, only a factor can be folded: a shift would have to be padded, too.
BatchNorm's stored mean and variance are divided by its third blob first (0 stands for an empty average and
makes both 0, as in Caffe). ``init/exact.py`` does the arithmetic.
"""

from __future__ import annotations

from ..merge import IN, OUT, TENSOR, Merge, Rows, Spec
from ..net import Layer
from . import Findings
from .match import AFFINE, FOLDED, Matcher, original_name


def propose(m: Matcher, found: Findings) -> None:
    """Every BatchNorm, Scale, Bias and Power right behind or in front of a Convolution or InnerProduct."""
    for layer in m.net.layers:
        if layer.type in TENSOR and layer not in found.taken:
            behind = _behind(m, layer, found)
            chain = [*_in_front(m, layer, found), layer, *behind]
            if len(chain) > 1:
                _propose(m, layer, chain, found)


def _propose(m: Matcher, layer: Layer, chain: list[Layer], found: Findings) -> None:
    reason = m.untouchable(layer)
    if reason is not None:
        found.refuse(reason, [layer, *(x for x in chain if x is not layer)])
        return
    spec = Spec(m.fresh(layer, FOLDED), layer.name, (IN,), (OUT,), rows=(Rows(layer.name),))
    names = tuple(x.name for x in chain)
    found.add(Merge(found.id(f"fold:{original_name(layer)}"), "fold", "", names, (spec,)), chain)


def _behind(m: Matcher, layer: Layer, found: Findings) -> list[Layer]:
    """What follows a layer and can be folded into it."""
    chain: list[Layer] = []
    at = layer
    while True:
        candidates = [r for r in m.readers(at) if _looks_affine(r) and r not in found.taken]
        if not candidates:
            return chain
        reason = _why_not_follow(m, at, candidates[0]) or _refused(m, candidates[0])
        if reason is not None:
            found.refuse(reason, [layer, candidates[0]])
            return chain
        at = candidates[0]
        chain.append(at)


def _in_front(m: Matcher, layer: Layer, found: Findings) -> list[Layer]:
    """What precedes a layer and can be folded into it, in the order it is computed."""
    chain: list[Layer] = []
    at = layer
    while len(at.bottom) == 1:
        above = next(iter(m.graph.producers(at)), None)  # a layer may be in no state that works
        if above is None or not _looks_affine(above) or above in found.taken:
            break
        reason = _why_not_follow(m, above, at) or _refused(m, above) or _pads(layer, above)
        if reason is not None:
            found.refuse(reason, [layer, above])
            break
        at = above
        chain.insert(0, at)
    return chain


def _looks_affine(layer: Layer) -> bool:
    return layer.type in AFFINE and (layer.type != "Power" or layer.param.power_param.power == 1)


def _why_not_follow(m: Matcher, at: Layer, following: Layer) -> str | None:
    return None if m.only_reader(at) is following else m.why_not_only(at, following)


def _refused(m: Matcher, layer: Layer) -> str | None:
    """Why a layer is not a factor and a shift a channel, of its own."""
    reason = m.why_not_simple(layer)
    if reason is not None:
        return reason
    shared = next((name for name in layer.shared_params() if m.shared[name] > 1), None)
    if shared is not None:
        return f"'{layer.name}' shares its blobs under the name '{shared}'"
    norm, scale = layer.param.batch_norm_param, layer.param.scale_param
    if layer.type == "BatchNorm" and norm.HasField("use_global_stats") and not norm.use_global_stats:
        return f"'{layer.name}' normalises by the batch it sees (use_global_stats: false)"
    axes = layer.param.bias_param if layer.type == "Bias" else scale
    if (axes.axis, axes.num_axes) != (1, 1):
        return f"'{layer.name}' does not scale by channel"
    return None


def _pads(layer: Layer, above: Layer) -> str | None:
    """Why a layer in front of a convolution's padding cannot go."""
    p = layer.param.convolution_param
    if layer.type != "Convolution" or not any([*p.pad, p.pad_h, p.pad_w]) or not may_shift(above):
        return None
    return f"'{layer.name}' pads with zeros, which '{above.name}' would have shifted"


def may_shift(layer: Layer) -> bool:
    """Whether 0 becomes anything else in an affine layer; without weights, whether it might."""
    if layer.type == "Power":
        return bool(layer.param.power_param.shift)
    if layer.type == "Scale" and not layer.param.scale_param.bias_term:
        return False
    blob = {"BatchNorm": 0, "Scale": 1, "Bias": 0}[layer.type]
    return len(layer.blobs) <= blob or bool(layer.blobs[blob].array.any())
