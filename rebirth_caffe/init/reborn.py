"""Weights for reborn layers: ``xavier`` (noise) or ``inherit`` (the absorbed kernels where they belong).

Inherit, for each range of output channels (``Rows``) of a reborn convolution:
- from the layer it is made after: its kernel at its place in the new one, zero around it; of a reducer that
  shrank the channels that carry most weight into what they feed;
- from an absorbed branch: that branch's kernel as a function of the merge's input, seen through what is left
  of the absorber's own reducers: W_branch pinv(W_reducer), at its place;
- from the input itself, passed on by an absorbed pool: the identity, likewise.
What has no source comes from the filler. Where the merge drops max pooling or LRN behind the layer, all of
it is scaled by what these are expected to do (see ``rescale``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import params
from ..caffemodel import Array
from ..merge import IN, TENSOR, Merge, Rows, Spec
from ..net import Layer, Net
from ..rules.match import plain_relu
from ..schema import caffe_pb2
from .fill import XAVIER, fill, generator
from .rescale import pooled

# A reducer's filter this much weaker than the strongest has died in training; nothing is seen through it.
DEAD = 1e-2


@dataclass
class _Blob:
    """What is known of a blob inside the merge.

    Where the merge's input x is constant over the image and no activation cuts, the blob is
    ``matrix`` x + ``shift``; a matrix of None is the identity.
    """

    channels: int  # 0: not known
    known: bool = True
    matrix: Array | None = None
    shift: Array | None = None
    chosen: Array | None = None  # the original channels left of it, None for all


def reborn(net: Net, merge: Merge, method: str, seed: int) -> dict[str, list[Array]]:
    """Blobs of every reborn layer of ``merge``; layers made after one without weights are left out."""
    blobs: dict[str, _Blob] = {IN: _Blob(_input_channels(net, merge))}
    out: dict[str, list[Array]] = {}
    for spec in merge.becomes:
        layer, source = net.layer(spec.like), blobs.get(spec.bottom[0], _Blob(0, known=False))
        if layer.type not in TENSOR:
            blobs[spec.top[0]] = source
            continue
        if not layer.blobs:
            blobs[spec.top[0]] = _Blob(spec.num_output or 0, known=False)
            continue
        weight, bias = weight_and_bias(layer)
        chosen = None
        if not spec.kept:
            if method != "xavier":
                weight, bias, chosen = _inherit(net, merge, spec, source, blobs[IN], seed)
                factor = np.float32(_dropped(net, merge, layer))
                weight, bias = weight * factor, bias * factor
            else:
                weight, bias = _xavier(layer, spec, source, seed)
            out[spec.name] = stored(layer, weight, bias)
        behind = _through(weight, bias, spec.group or group_of(layer), source)
        blobs[spec.top[0]] = replace(behind, chosen=chosen)
    return out


def _input_channels(net: Net, merge: Merge) -> int:
    """Channels of the merge's input: its first convolution reads as many."""
    layers = [layer for layer in map(net.layer, merge.layers) if layer.type == "Convolution"]
    first = min(layers, key=net.places.__getitem__, default=None)
    return weight_and_bias(first)[0].shape[1] * group_of(first) if first is not None and first.blobs else 0


def group_of(layer: Layer) -> int:
    """Into how many groups a layer's channels fall."""
    return int(layer.param.convolution_param.group) if layer.type == "Convolution" else 1


def _transposed(layer: Layer) -> bool:
    return layer.type == "InnerProduct" and layer.param.inner_product_param.transpose


def stored(layer: Layer, weight: Array, bias: Array) -> list[Array]:
    """The blobs of a layer like ``layer`` with this weight (outputs first) and bias."""
    return [np.ascontiguousarray(weight.T if _transposed(layer) else weight), bias][: len(layer.blobs)]


def weight_and_bias(layer: Layer) -> tuple[Array, Array]:
    """Weight (outputs first) and bias (zeros where there is none) of a layer."""
    weight = layer.blobs[0].array
    if layer.type == "InnerProduct":
        weight = weight.reshape(weight.shape[-2:])
    if _transposed(layer):
        weight = weight.T
    has_bias = len(layer.blobs) > 1
    bias = layer.blobs[1].array.reshape(-1) if has_bias else np.zeros(len(weight), np.float32)
    return weight, bias


def _taps(weight: Array) -> Array:
    """A kernel's response to a constant image: outputs x inputs."""
    taps: Array = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
    return taps


def _through(weight: Array, bias: Array, group: int, source: _Blob) -> _Blob:
    """The blob that a layer makes of ``source``."""
    taps = _taps(weight)
    fits = source.matrix is None or taps.shape[1] == len(source.matrix)
    if group > 1 or not source.known or not fits:
        return _Blob(len(weight), known=False)
    if source.matrix is None or source.shift is None:
        return _Blob(len(weight), matrix=taps, shift=bias)
    return _Blob(len(weight), matrix=taps @ source.matrix, shift=bias + taps @ source.shift)


def _xavier(layer: Layer, spec: Spec, source: _Blob, seed: int) -> tuple[Array, Array]:
    """The paper's start: a xavier weight, the bias from the layer's own filler."""
    shape = _shape(layer, spec, source)
    random = generator(seed, spec.name)
    return fill(XAVIER, shape, random), fill(_bias_filler(layer), shape[:1], random, layer.where)


def _shape(layer: Layer, spec: Spec, source: _Blob) -> tuple[int, ...]:
    """The shape of the reborn layer's weight."""
    weight, _ = weight_and_bias(layer)
    n = spec.num_output or len(weight)
    channels = source.channels if layer.type == "Convolution" else 0
    inputs = (channels or weight.shape[1] * group_of(layer)) // (spec.group or group_of(layer))
    return n, inputs, *(spec.kernel or weight.shape[2:])


def _bias_filler(layer: Layer) -> caffe_pb2.FillerParameter:
    p = layer.param.convolution_param if layer.type == "Convolution" else layer.param.inner_product_param
    return p.bias_filler


def _inherit(
    net: Net, merge: Merge, spec: Spec, source: _Blob, start: _Blob, seed: int
) -> tuple[Array, Array, Array | None]:
    """Weight, bias and, of a shrunk reducer, the channels that stayed."""
    layer = net.layer(spec.like)
    shape = _shape(layer, spec, source)
    n, inputs, *size = shape
    chosen: Array | None = None
    at = 0
    pieces: list[tuple[slice, Array, Array]] = []
    for rows in spec.rows:
        if rows.layer == spec.like:
            own, own_bias = weight_and_bias(layer)
            if source.chosen is not None:
                own = own[:, source.chosen]
            if len(spec.rows) == 1 and n < len(own):
                chosen = _strongest(net, merge, spec, own, n)
                own, own_bias = own[chosen], own_bias[chosen]
        else:
            found = _branch(net, merge, rows.layer, source, start)
            if found is None:  # nothing to inherit from: the filler's values stay
                at += start.channels if rows.layer == IN else _num_output(net.layer(rows.layer))
                continue
            own, own_bias = found
        own, own_bias = own[: n - at], own_bias[: n - at]
        if own.shape[1] == inputs:
            pieces.append((slice(at, at + len(own)), _placed(own, rows, size), own_bias))
        at += len(own)
    if sum(len(own) for _, own, _ in pieces) == n:  # nothing is left to chance
        new_weight, new_bias = np.empty(shape, np.float32), np.empty(n, np.float32)
    else:
        new_weight, new_bias = _xavier(layer, spec, source, seed)
    for where, own, own_bias in pieces:
        new_weight[where], new_bias[where] = own, own_bias
    return new_weight, new_bias, chosen


def _dropped(net: Net, merge: Merge, layer: Layer) -> float:
    """The factor that stands for the max pooling and LRN that ``merge`` drops behind a layer and its ReLU."""
    factor, relu = 1.0, False
    while True:
        behind = [x for x, _ in net.graph.readers(layer) if x.name in merge.layers]
        if not behind:
            return factor if relu else 1.0
        layer = behind[0]
        if layer.type in TENSOR:
            return 1.0
        relu |= plain_relu(layer)
        if layer.name in merge.absorbs and layer.type == "LRN":
            factor *= layer.param.lrn_param.k**-layer.param.lrn_param.beta  # where activations are small
        if layer.name in merge.absorbs and layer.type == "Pooling":
            pool = params.pool(layer.param)
            if pool.method == "MAX" and pool.kernel is not None:
                factor *= pooled(math.prod(pool.kernel))


def _num_output(layer: Layer) -> int:
    return int(layer.param.convolution_param.num_output)


def _placed(kernel: Array, rows: Rows, size: Sequence[int]) -> Array:
    """``kernel`` in a larger (or, by hand, smaller) one, zero around it."""
    if kernel.shape[2:] == tuple(size):
        return kernel
    out = np.zeros((*kernel.shape[:2], *size), np.float32)
    cut = []
    for axis in (0, 1):
        k, new = kernel.shape[2 + axis], size[axis]
        corner = (new - k) // 2 if rows.at is None else rows.at[axis]
        corner = min(max(corner, min(0, new - k)), max(0, new - k))
        first = max(0, -corner)
        cut.append((slice(max(corner, 0), max(corner, 0) + min(k, new)), slice(first, first + min(k, new))))
    out[:, :, cut[0][0], cut[1][0]] = kernel[:, :, cut[0][1], cut[1][1]]
    return out


def _strongest(net: Net, merge: Merge, spec: Spec, weight: Array, n: int) -> Array:
    """The n output channels with the largest |weights in| x |weights out|, in order."""
    strength = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
    reader = _reader(net, merge, spec)
    feeds = weight_and_bias(reader)[0] if reader is not None and reader.blobs else None
    if feeds is not None and feeds.shape[1] == len(weight):
        strength = strength * np.linalg.norm(feeds.swapaxes(0, 1).reshape(len(weight), -1), axis=1)
    return np.sort(np.argsort(-strength, kind="stable")[:n])


def _reader(net: Net, merge: Merge, spec: Spec) -> Layer | None:
    """The original of the next layer with weights in the branch."""
    blob = spec.top[0]
    for behind in merge.becomes[merge.becomes.index(spec) + 1 :]:
        if behind.bottom[0] == blob:
            if net.layer(behind.like).type in TENSOR:
                return net.layer(behind.like)
            blob = behind.top[0]
    return None


def _branch(net: Net, merge: Merge, name: str, source: _Blob, start: _Blob) -> tuple[Array, Array] | None:
    """An absorbed branch's kernel over the absorber's input (outputs x source channels x kh x kw)."""
    if not source.known or not start.channels:
        return None
    if name == IN:
        weight = np.eye(start.channels, dtype=np.float32)[:, :, None, None]
        bias = np.zeros(len(weight), np.float32)
    else:
        chain = _upwards(net, merge, name)
        if not all(layer.blobs and group_of(layer) == 1 for layer in chain):
            return None
        weight, bias = weight_and_bias(chain[0])
        for below in chain[1:]:
            inner, inner_bias = weight_and_bias(below)
            bias = bias + _taps(weight) @ inner_bias
            weight = _over(weight, _taps(inner))
    if source.matrix is not None and source.shift is not None:
        weight = _over(weight, np.linalg.pinv(source.matrix, rcond=DEAD))
        bias = bias - _taps(weight) @ source.shift
    return weight.astype(np.float32), bias.astype(np.float32)


def _over(kernel: Array, matrix: Array) -> Array:
    """A kernel over inputs that are ``matrix`` times others, as a kernel over those."""
    taps: Array = kernel.transpose(0, 2, 3, 1) @ matrix
    return taps.transpose(0, 3, 1, 2)


def _upwards(net: Net, merge: Merge, name: str) -> list[Layer]:
    """The convolutions of an absorbed branch, from its last one up to the merge's input."""
    group = set(merge.layers)
    chain, layer = [], net.layer(name)
    while layer.name in group:
        if layer.type == "Convolution":
            chain.append(layer)
        above = net.graph.producers(layer)[0]
        if above is None:
            break
        layer = above
    return chain
