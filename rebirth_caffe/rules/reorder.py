"""Layers that may change places, so that the later one has less to do.

ReLU -> MAX pool      =>  MAX pool -> ReLU       max(relu(x)) = relu(max(x))
1x1 conv -> AVE pool  =>  AVE pool -> 1x1 conv   where the pool leaves fewer pixels or has fewer channels then
AVE pool -> 1x1 conv  =>  1x1 conv -> AVE pool   where the pool leaves as many and has fewer channels then

Caffe divides an average by the window's size with padding, so a padded pool takes part of a bias away: such
a convolution must have none. Every layer keeps its name and its weights.
"""

from __future__ import annotations

from math import prod

from .. import params
from ..merge import IN, OUT, Merge, Spec
from ..net import Layer
from . import Findings
from .compose import may_have_bias
from .match import MOVED, Matcher, original_name


def relu_behind_pool(m: Matcher, found: Findings) -> None:
    """Every ReLU in front of a MAX pool with fewer outputs than inputs."""
    for relu in m.net.layers:
        if relu.type != "ReLU" or not m.simple(relu) or relu.param.relu_param.negative_slope < 0:
            continue
        pool = m.only_reader(relu)
        if pool is None or not found.taken.isdisjoint([relu, pool]) or not _is_pool(m, pool, "MAX"):
            continue
        if _pixels(m, pool)[1] < _pixels(m, pool)[0]:
            _swap(found, relu, pool, OUT)


def average_pools(m: Matcher, found: Findings) -> None:
    """Every average pool and 1x1 convolution that are cheaper the other way round."""
    for first in m.net.layers:
        second = m.only_reader(first)
        if second is None or not found.taken.isdisjoint([first, second]):
            continue
        for conv, pool in ((first, second), (second, first)):
            if _is_pointwise(m, conv) and _is_pool(m, pool, "AVE"):
                before, after = _pixels(m, pool)
                channels, outputs = m.input_shapes[conv, 0], m.shapes[conv, 0]
                assert channels is not None
                assert outputs is not None
                fewer = channels[1] < outputs[1] if conv is first else channels[1] > outputs[1]
                gain = fewer if before == after else conv is first and after < before
                if not gain:
                    continue
                if max(params.pool(pool.param).pad) and may_have_bias(conv):
                    found.refuse(f"'{pool.name}' pads, and '{conv.name}' has a bias", [first, second])
                else:
                    _swap(found, first, second, m.fresh(second, MOVED))


def _swap(found: Findings, first: Layer, second: Layer, between: str) -> None:
    specs = (
        Spec(second.name, second.name, (IN,), (between,)),
        Spec(first.name, first.name, (between,), (OUT,)),
    )
    found.add(Merge(found.id(f"reorder:{original_name(first)}"), "reorder", "", (), specs), [first, second])


def _is_pointwise(m: Matcher, layer: Layer) -> bool:
    """A 1x1 convolution of every pixel."""
    shape = m.input_shapes.get((layer, 0))
    if layer.type != "Convolution" or not m.simple(layer) or shape is None or len(shape) != 4:
        return False
    conv = params.conv(layer.param)
    return conv.axis == 1 and {*conv.kernel, *conv.stride} == {1} and not any(conv.pad)


def _is_pool(m: Matcher, layer: Layer, method: str) -> bool:
    """A pool of this kind with something in each of its windows."""
    if layer.type != "Pooling" or not m.simple(layer) or params.pool(layer.param).method != method:
        return False
    pool = params.pool(layer.param)
    before, after = m.input_shapes.get((layer, 0)), m.shapes.get((layer, 0))
    if before is None or after is None:
        return False
    starts = zip(before[2:], after[2:], pool.stride, pool.pad, strict=True)
    return all((out - 1) * stride - pad < size for size, out, stride, pad in starts)


def _pixels(m: Matcher, pool: Layer) -> tuple[int, int]:
    """How many a pool reads and gives."""
    before, after = m.input_shapes[pool, 0], m.shapes[pool, 0]
    assert before is not None
    assert after is not None
    return prod(before[2:]), prod(after[2:])
