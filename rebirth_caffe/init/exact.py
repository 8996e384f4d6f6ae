"""The arithmetic of exact merges, in float64 throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..caffemodel import Array, Blob
from ..errors import WeightsError
from ..merge import TENSOR, Merge
from ..net import Layer, Net
from ..rules.compose import taps

Double = NDArray[np.float64]


def exact(net: Net, merge: Merge) -> dict[str, list[Array]]:
    """Blobs of the layers an exact merge makes; {} where it makes none, or the originals have no weights.

    Raises WeightsError where some of the originals have weights and others lack theirs.
    """
    layers = [net.layer(name) for name in merge.absorbs]
    if merge.kind not in _ARITHMETIC or not any(layer.blobs for layer in layers):
        return {}
    for layer in layers:
        if layer.type in _WEIGHTED and not layer.blobs:
            raise WeightsError(
                f"layer '{layer.name}' has no weights in the file, so {_doing(merge, layers)}; "
                f"give complete weights or --skip {merge.id}"
            )
    made = _ARITHMETIC[merge.kind](merge, layers)
    return {name: [np.ascontiguousarray(blob, np.float32) for blob in blobs] for name, blobs in made.items()}


_WEIGHTED = (*TENSOR, "BatchNorm", "Scale", "Bias")


def _doing(merge: Merge, layers: list[Layer]) -> str:
    base = next(layer for layer in layers if layer.type in TENSOR)
    done = {"fold": "folded", "compose": "composed", "join": "joined", "stride": "given another stride"}
    return f"'{base.name}' cannot be {done[merge.kind]}"


# ---- fold -------------------------------------------------------------------------------------------------


def _fold(merge: Merge, layers: list[Layer]) -> dict[str, list[Double]]:
    """Each layer beside the one with weights maps a channel x to factor * x + shift."""
    at = next(i for i, layer in enumerate(layers) if layer.type in TENSOR)
    base = layers[at]
    transposed = base.type == "InnerProduct" and base.param.inner_product_param.transpose
    stored = base.blobs[0].array.astype(np.float64)
    weight = stored.reshape(stored.shape[-2:]).T if transposed else stored
    if base.type == "InnerProduct":
        weight = weight.reshape(weight.shape[-2:])
    outputs = len(weight)
    bias = _bias(base, outputs)
    if at:
        factor, shift = _affine(layers[:at])
        # outputs of a group x its input channels x taps: a channel's factor is that of all its taps
        groups = base.param.convolution_param.group if base.type == "Convolution" else 1
        channels = weight.shape[1] * groups if base.type == "Convolution" else max(factor.size, shift.size)
        split = weight.reshape(groups, outputs // groups, channels // groups, -1)
        factor, shift = (np.broadcast_to(v, channels).reshape(groups, 1, -1, 1) for v in (factor, shift))
        bias = bias + (split * shift).sum(axis=(2, 3)).reshape(-1)
        weight = (split * factor).reshape(weight.shape)
    if layers[at + 1 :]:
        factor, shift = (np.broadcast_to(v, outputs) for v in _affine(layers[at + 1 :]))
        weight = (weight.reshape(outputs, -1) * factor[:, None]).reshape(weight.shape)
        bias = bias * factor + shift
    return {merge.becomes[0].name: [(weight.T if transposed else weight).reshape(stored.shape), bias]}


def _affine(layers: list[Layer]) -> tuple[Double, Double]:
    """(factor, shift) a channel, or one for all, of layers in a row, in TEST."""
    factor, shift = np.ones(1), np.zeros(1)
    for layer in layers:
        own_factor, own_shift = _own_affine(layer)
        factor, shift = factor * own_factor, shift * own_factor + own_shift
    return factor, shift


def _own_affine(layer: Layer) -> tuple[Double, Double]:
    blobs = [blob.array.astype(np.float64).reshape(-1) for blob in layer.blobs]
    if layer.type == "Power":
        p = layer.param.power_param
        return np.full(1, p.scale, np.float64), np.full(1, p.shift, np.float64)
    if layer.type == "Bias":
        return np.ones(1), blobs[0]
    if layer.type == "Scale":
        return blobs[0], blobs[1] if len(blobs) > 1 else np.zeros(1)
    return batch_norm(layer.blobs, layer.param.batch_norm_param.eps)


def batch_norm(blobs: Sequence[Blob], eps: float) -> tuple[Double, Double]:
    """(factor, shift) a channel of a BatchNorm with these three blobs, in TEST."""
    mean, variance, count = (blob.array.astype(np.float64).reshape(-1) for blob in blobs)
    unit = 0.0 if count[0] == 0 else 1 / count[0]
    factor = 1 / np.sqrt(variance * unit + eps)
    return factor, -mean * unit * factor


# ---- compose ----------------------------------------------------------------------------------------------


def _compose(merge: Merge, layers: list[Layer]) -> dict[str, list[Double]]:
    """One kernel of two: under each of the upper one's taps lie the lower one's."""
    first, second = layers
    spec = merge.becomes[0]
    if first.type == second.type == "InnerProduct":
        (lower, b1), (upper, b2) = _matrix(first), _matrix(second)
        weight = upper @ lower
        transposed = second.param.inner_product_param.transpose
        return {spec.name: [weight.T if transposed else weight, b2 + upper @ b1]}
    groups = spec.group or 1
    like = next(layer for layer in (second, first) if layer.type == "Convolution")
    channels = len(first.blobs[0].array) if first.type == "Convolution" else _inputs(like)
    lower, b1 = _kernel(first, channels, groups)
    upper, b2 = _kernel(second, channels, groups)
    below, above = taps(first), taps(second)
    both = [a.then(b) for a, b in zip(below, above, strict=True)]
    weight = np.zeros((groups, upper.shape[1], lower.shape[2], *(t.kernel for t in both)))
    for i, j in product(range(above[0].kernel), range(above[1].kernel)):
        for u, v in product(range(below[0].kernel), range(below[1].kernel)):
            row, column = (
                (lo * a.dilation + up * b.dilation * a.stride) // t.dilation
                for lo, up, a, b, t in zip((u, v), (i, j), below, above, both, strict=True)
            )
            weight[..., row, column] += upper[..., i, j] @ lower[..., u, v]
    bias = b2 + (upper.sum(axis=(3, 4)) @ b1.reshape(groups, -1, 1)).reshape(-1)
    return {spec.name: [weight.reshape(-1, *weight.shape[2:]), bias]}


def _matrix(layer: Layer) -> tuple[Double, Double]:
    """An InnerProduct's weight (outputs x inputs) and bias."""
    weight = layer.blobs[0].array.astype(np.float64)
    weight = weight.reshape(weight.shape[-2:])
    if layer.param.inner_product_param.transpose:
        weight = weight.T
    return weight, _bias(layer, len(weight))


def _bias(layer: Layer, outputs: int) -> Double:
    if len(layer.blobs) < 2:
        return np.zeros(outputs)
    return layer.blobs[1].array.astype(np.float64).reshape(-1)


def _inputs(conv: Layer) -> int:
    return conv.blobs[0].shape[1] * int(conv.param.convolution_param.group)


def _kernel(layer: Layer, channels: int, groups: int) -> tuple[Double, Double]:
    """A convolution's or average pool's kernel as groups x outputs x inputs x height x width, and its bias.

    ``groups`` are those of the layer, or 1: then the others' inputs are zeros.
    """
    if layer.type == "Pooling":
        height, width = (t.kernel for t in taps(layer))
        eye = np.eye(channels // groups) / (height * width)
        return np.tile(eye[None, :, :, None, None], (groups, 1, 1, height, width)), np.zeros(channels)
    weight = layer.blobs[0].array.astype(np.float64)
    own = int(layer.param.convolution_param.group)
    split = weight.reshape(own, len(weight) // own, *weight.shape[1:])
    if own != groups:
        full = np.zeros((1, len(weight), _inputs(layer), *weight.shape[2:]))
        outputs, inputs = split.shape[1:3]
        for g in range(own):
            full[0, g * outputs : (g + 1) * outputs, g * inputs : (g + 1) * inputs] = split[g]
        split = full
    return split, _bias(layer, len(weight))


# ---- join and stride --------------------------------------------------------------------------------------


def _join(merge: Merge, layers: list[Layer]) -> dict[str, list[Double]]:
    """The siblings' outputs one behind the other."""
    spec = next(spec for spec in merge.becomes if spec.rows)
    named = {layer.name: layer for layer in layers}
    siblings = [named[row.layer] for row in spec.rows]
    weights = [conv.blobs[0].array.astype(np.float64) for conv in siblings]
    biases = [_bias(conv, len(weight)) for conv, weight in zip(siblings, weights, strict=True)]
    return {spec.name: [np.concatenate(weights), np.concatenate(biases)]}


def _stride(merge: Merge, layers: list[Layer]) -> dict[str, list[Double]]:
    """Weights stay as they were; what picks pixels multiplies by one."""
    named = {layer.name: layer for layer in layers}
    made: dict[str, list[Double]] = {}
    for spec in merge.becomes:
        if spec.type:
            made[spec.name] = [np.ones((spec.num_output or 0, 1, 1, 1))]
        elif not spec.kept:
            made[spec.name] = [blob.array.astype(np.float64) for blob in named[spec.like].blobs]
    return made


_ARITHMETIC: dict[str, Callable[[Merge, list[Layer]], dict[str, list[Double]]]] = {
    "fold": _fold,
    "compose": _compose,
    "join": _join,
    "stride": _stride,
}
