"""Two linear layers with nothing between them become one, where that takes fewer multiply-adds.

conv -> conv                  =>  conv      k = k1 + (k2-1) s1, s = s1 s2, p = p1 + p2 s1
conv -> AVE pool              =>  conv      an average is a convolution with 1 / (its window's pixels)
AVE pool -> conv              =>  conv
pool of 1x1, stride s -> conv =>  conv      dilated by s where its kernel is larger
InnerProduct -> InnerProduct  =>  InnerProduct

The upper one's padding is zeros where the lower one would have given something else: it may pad only over a
1x1 layer without pad and bias. ``init/exact.py`` does the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

from .. import params
from ..merge import IN, OUT, TENSOR, Merge, Rows, Spec
from ..net import Layer
from ..shapes import conv_size
from . import Findings
from .match import COMPOSED, Matcher, original_name


@dataclass(frozen=True)
class Taps:
    """A linear layer's window along one axis."""

    kernel: int
    stride: int
    pad: int
    dilation: int

    @property
    def extent(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def then(self, other: Taps) -> Taps:
        """The window of ``other`` on top of this one."""
        step = other.dilation * self.stride
        dilation = gcd(self.dilation * (self.kernel > 1), step * (other.kernel > 1)) or 1
        extent = self.extent + (other.kernel - 1) * step
        return Taps(
            (extent - 1) // dilation + 1,
            self.stride * other.stride,
            self.pad + other.pad * self.stride,
            dilation,
        )


def propose(m: Matcher, found: Findings) -> None:
    """Every pair of linear layers that one of them can stand for at a lower price."""
    for first in m.net.layers:
        second = m.only_reader(first)
        if second is None or not found.taken.isdisjoint([first, second]):
            continue
        kinds = (first.type, second.type)
        if kinds == ("InnerProduct", "InnerProduct"):
            made = _inner_products(m, first, second)
        elif "Convolution" in kinds and all(_is_linear(m, layer) for layer in (first, second)):
            made = _windows(m, first, second)
        else:
            continue
        if isinstance(made, str):
            found.refuse(made, [first, second])
        else:
            names = (first.name, second.name)
            id_ = found.id(f"compose:{original_name(first)}+{original_name(second)}")
            found.add(Merge(id_, "compose", "", names, (made,)), [first, second])


def _is_linear(m: Matcher, layer: Layer) -> bool:
    """Whether a layer is a convolution over images, or a pool that is one in all but name."""
    shape = m.input_shapes.get((layer, 0))
    if shape is None or len(shape) != 4:
        return False
    if layer.type != "Pooling":
        return layer.type == "Convolution"
    pool = params.pool(layer.param)
    if pool.kernel is None or m.is_global(layer):
        return False
    return pool.method == "AVE" or max(pool.kernel) == 1


def _inner_products(m: Matcher, first: Layer, second: Layer) -> Spec | str:
    reason = m.untouchable(first) or m.untouchable(second)
    shape = m.input_shapes[first, 0]
    if reason is not None or shape is None:
        return reason or f"the size of '{first.bottom[0]}' is not known"
    inputs, middle = prod(shape[1:]), first.param.inner_product_param.num_output
    outputs = second.param.inner_product_param.num_output
    price = _dearer(inputs * outputs, middle * (inputs + outputs))
    return price or Spec(
        m.fresh(second, COMPOSED), second.name, (IN,), (OUT,), outputs, rows=(Rows(second.name),)
    )


def _windows(m: Matcher, first: Layer, second: Layer) -> Spec | str:
    """What two layers with windows become, or why they do not."""
    for layer in (first, second):
        reason = m.untouchable(layer) if layer.type in TENSOR else _not_one_window(m, layer)
        if reason is not None:
            return reason
    below, above = taps(first), taps(second)
    if any(axis.pad for axis in above) and (
        any((axis.kernel, axis.pad) != (1, 0) for axis in below) or may_have_bias(first)
    ):
        return f"'{second.name}' pads what '{first.name}' gives with zeros"
    both = [lower.then(upper) for lower, upper in zip(below, above, strict=True)]
    before, between, after = m.input_shapes[first, 0], m.shapes[first, 0], m.shapes[second, 0]
    assert before is not None
    assert between is not None
    assert after is not None
    size = tuple(conv_size(s, t.extent, t.stride, t.pad) for s, t in zip(before[2:], both, strict=True))
    if size != after[2:]:
        return f"one layer would give {size[0]}x{size[1]} pixels instead of {after[2]}x{after[3]}"
    like = second if second.type == "Convolution" else first
    group = _group(first, second)
    new = after[1] * before[1] // group * prod(t.kernel for t in both) * prod(after[2:])
    price = _dearer(new, _price(first, before, between) + _price(second, between, after))
    if price is not None:
        return price
    height, width = both
    return Spec(
        m.fresh(like, COMPOSED),
        like.name,
        (IN,),
        (OUT,),
        after[1],
        (height.kernel, width.kernel),
        (height.stride, width.stride),
        (height.pad, width.pad),
        group,
        (Rows(like.name),),
        (height.dilation, width.dilation),
    )


def taps(layer: Layer) -> tuple[Taps, Taps]:
    """A convolution's or pool's windows over height and width."""
    if layer.type == "Convolution":
        conv = params.conv(layer.param)
        geometry = (conv.kernel, conv.stride, conv.pad, conv.dilation)
    else:
        pool = params.pool(layer.param)
        assert pool.kernel is not None
        geometry = (pool.kernel, pool.stride, pool.pad, (1, 1))
    height, width = (Taps(*axis) for axis in zip(*geometry, strict=True))
    return height, width


def may_have_bias(layer: Layer) -> bool:
    """Whether a layer adds anything; without weights, whether it might."""
    if layer.type != "Convolution" or not layer.param.convolution_param.bias_term:
        return False
    return len(layer.blobs) < 2 or bool(layer.blobs[1].array.any())


def _not_one_window(m: Matcher, pool: Layer) -> str | None:
    """Why a pool is no convolution: Caffe clips its last windows, and averages over what is left."""
    reason = m.why_not_simple(pool)
    if reason is not None:
        return reason
    before, after = m.input_shapes[pool, 0], m.shapes[pool, 0]
    assert before is not None
    assert after is not None
    for size, out, axis in zip(before[2:], after[2:], taps(pool), strict=True):
        if (out - 1) * axis.stride + axis.kernel > size + 2 * axis.pad:
            return f"the last windows of '{pool.name}' are clipped"
    return None


def _group(first: Layer, second: Layer) -> int:
    """The groups of the composed layer: those both have, where a pool has whatever the other has."""
    groups = {x.param.convolution_param.group for x in (first, second) if x.type == "Convolution"}
    return int(groups.pop()) if len(groups) == 1 else 1


def _price(layer: Layer, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Multiply-adds; of a pool its additions."""
    group = layer.param.convolution_param.group if layer.type == "Convolution" else before[1]
    return int(prod(after[1:]) * before[1] // group * prod(t.kernel for t in taps(layer)))


def _dearer(new: int, old: int) -> str | None:
    if new < old:
        return None
    return f"one layer would take {new / 1e6:.3g} instead of {old / 1e6:.3g} M multiply-adds"
