"""Typed reading of layer parameters, with Caffe's defaults and its several ways to say the same."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import NetError
from .schema import caffe_pb2

Axes = tuple[int, ...]  # one number per spatial axis, height before width


@dataclass(frozen=True)
class Conv:
    """Geometry of a Convolution or Deconvolution over its spatial axes."""

    num_output: int
    kernel: Axes
    stride: Axes
    pad: Axes
    dilation: Axes
    group: int
    bias_term: bool
    axis: int

    @property
    def extent(self) -> Axes:
        """Input pixels a window spans: dilation x (kernel - 1) + 1."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


@dataclass(frozen=True)
class Pool:
    """Geometry of a 2-D Pooling. ``kernel`` is None for global pooling."""

    method: str  # MAX, AVE, STOCHASTIC
    kernel: Axes | None
    stride: Axes
    pad: Axes
    ceil: bool


def conv(layer: caffe_pb2.LayerParameter, spatial_axes: int = 2) -> Conv:
    """Read ``convolution_param``. Raises NetError where it says too little or contradicts itself.

    A bottom that ends with the channels has no spatial axes; the layer is then an InnerProduct.
    """
    p = layer.convolution_param

    def axes(name: str, default: int | None) -> Axes:
        repeated = list(getattr(p, {"kernel": "kernel_size"}.get(name, name)))
        if name != "dilation" and (p.HasField(f"{name}_h") or p.HasField(f"{name}_w")):
            if repeated or spatial_axes != 2:
                raise NetError(f"layer '{layer.name}': {name}_h/{name}_w beside another {name}; give one")
            if name != "pad" and not (p.HasField(f"{name}_h") and p.HasField(f"{name}_w")):
                raise NetError(f"layer '{layer.name}': {name}_h and {name}_w go together; give both")
            return tuple(getattr(p, f"{name}_{s}") for s in "hw")
        if not repeated and default is not None:
            return (default,) * spatial_axes
        if len(repeated) == 1 or not spatial_axes:
            return tuple(repeated[:1] * spatial_axes)
        if len(repeated) != spatial_axes:
            what = "kernel_size is missing" if not repeated else f"{len(repeated)} values of {name}"
            raise NetError(f"layer '{layer.name}': {what}; give one, or one per spatial axis")
        return tuple(repeated)

    result = Conv(
        num_output=p.num_output,
        kernel=axes("kernel", None),
        stride=axes("stride", 1),
        pad=axes("pad", 0),
        dilation=axes("dilation", 1),
        group=p.group,
        bias_term=p.bias_term,
        axis=p.axis,
    )
    for name, values in (
        ("num_output", (result.num_output,) if layer.type != "Im2col" else ()),
        ("kernel_size", result.kernel),
        ("stride", result.stride),
        ("dilation", result.dilation),
        ("group", (result.group,)),
    ):
        if min(values, default=1) < 1:
            raise NetError(f"layer '{layer.name}': {name} is {min(values)}; it must be at least 1")
    if result.num_output % result.group:
        raise NetError(
            f"layer '{layer.name}': num_output {result.num_output} is no multiple of group {result.group}"
        )
    return result


def pool(layer: caffe_pb2.LayerParameter) -> Pool:
    """Read ``pooling_param``. Raises NetError where it says too little or contradicts itself."""
    p = layer.pooling_param

    def pair(both: str, base: str, default: int | None) -> Axes | None:
        h, w = f"{base}_h", f"{base}_w"
        if p.HasField(h) != p.HasField(w) or (p.HasField(h) and p.HasField(both)):
            raise NetError(f"layer '{layer.name}': give {both}, or both {h} and {w}")
        if p.HasField(h):
            return getattr(p, h), getattr(p, w)
        if p.HasField(both) or default is not None:
            value: int = getattr(p, both) if default is None or p.HasField(both) else default
            return value, value
        return None

    kernel = pair("kernel_size", "kernel", None)
    if p.global_pooling:
        if kernel is not None:
            raise NetError(f"layer '{layer.name}': global_pooling and a kernel_size; drop one of them")
    elif kernel is None:
        raise NetError(f"layer '{layer.name}': kernel_size is missing; give it or global_pooling: true")
    stride, pad = pair("stride", "stride", 1), pair("pad", "pad", 0)
    assert stride is not None
    assert pad is not None
    if p.global_pooling and (max(pad) > 0 or max(stride) > 1):
        raise NetError(f"layer '{layer.name}': global_pooling with a pad or stride; drop these")
    if min(stride) < 1 or (kernel is not None and min(kernel) < 1):
        raise NetError(f"layer '{layer.name}': kernel_size and stride must be at least 1")
    if kernel is not None and any(a >= k for a, k in zip(pad, kernel, strict=True)):
        raise NetError(f"layer '{layer.name}': pad must be smaller than kernel_size")
    method = caffe_pb2.PoolingParameter.PoolMethod.Name(p.pool)
    ceil = p.round_mode == caffe_pb2.PoolingParameter.CEIL
    return Pool(method, kernel, stride, pad, ceil)
