"""Layer type -> output shapes, as Caffe computes them, and the shapes of a layer's weights.

A shape is a tuple of ints, outermost axis first. What cannot be known from the prototxt (a fork's layer, a
Filter's count) is None and so is everything that depends on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from . import params
from .errors import NetError, WeightsError, by_x
from .net import Layer, Net, Value, View
from .schema import caffe_pb2

Shape = tuple[int, ...]
MaybeShape = Shape | None
Rule = Callable[[Layer, list[Shape]], Sequence[MaybeShape]]

# Channels of a Data layer where neither its prototxt nor ``Net.image`` nor weights say: the database does,
# and it is never opened here.
ASSUMED_CHANNELS = 3


def infer(view: View, batch: int | None = None) -> dict[Value, MaybeShape]:
    """The shape of every value of a view; None where it cannot be known.

    ``batch`` replaces the first dimension of whatever enters the net. Raises NetError where the layers do
    not fit together, in Caffe's own terms.
    """

    def entering(shape: MaybeShape) -> MaybeShape:
        return (batch, *shape[1:]) if batch is not None and shape else shape

    image = view.net.image or (_first_channels(view) or ASSUMED_CHANNELS, 0, 0)
    shapes: dict[Value, MaybeShape] = {}
    for value, shape in itertools.zip_longest(view.inputs, _input_shapes(view.net.header)):
        if value is not None:  # of an input that says no shape none is known
            _check_sizes(f"{view.net.path}: input '{value.name}'", shape)
            shapes[value] = entering(shape)
    for layer in view.layers:
        bottoms = [shapes.get(value) for value in view.bottoms[layer]]
        if layer.type == "Data" and layer.strange is None:
            tops = list(_data_of(layer, image))
        else:
            tops = layer_shapes(layer, bottoms)
        if layer.type in SOURCES and layer.type != "Parameter":
            tops = [entering(shape) for shape in tops]
        for i, value in enumerate(view.tops[layer]):
            shapes[value] = tops[i] if i < len(tops) else None
    return shapes


def layer_shapes(layer: Layer, bottoms: list[MaybeShape]) -> list[MaybeShape]:
    """The shapes of a layer's tops from those of its bottoms."""
    rule = RULES.get(layer.type)
    known = [shape for shape in bottoms if shape is not None]
    if rule is None or layer.strange is not None:  # a fork's: what it works on in place keeps its shape
        at = dict(zip(layer.bottom, bottoms, strict=False))
        return [at.get(name) for name in layer.top]
    if len(known) < len(bottoms):
        return [None] * len(layer.top)
    if len(bottoms) < _MIN_BOTTOMS.get(layer.type, 0 if layer.type in SOURCES else 1):
        raise NetError(f"{layer.where}: {layer.type} has {len(bottoms)} bottoms, too few; add the missing")
    for bottom in known:
        if len(bottom) < _MIN_AXES.get(layer.type, 0):
            raise NetError(f"{layer.where}: its bottom has too few axes ({by_x(bottom)}) for {layer.type}")
    tops = list(rule(layer, known))
    for shape in tops:
        _check_sizes(f"{layer.where}: its output", shape)
    return tops


def _check_sizes(what: str, shape: MaybeShape) -> None:
    """Raise NetError for a shape no blob of Caffe's can have."""
    if shape is not None and (any(d < 0 for d in shape) or math.prod(shape) >= 2**31):
        raise NetError(f"{what} would be {by_x(shape)}; correct the sizes")


def _first_channels(view: View) -> int | None:
    """The image channels that the weights of a convolution right behind a Data layer were made for."""
    for layer in view.layers:
        makers = [value.producer for value in view.bottoms[layer] if value.producer is not None]
        if layer.type == "Convolution" and layer.blobs and any(maker.type == "Data" for maker in makers):
            shape = layer.blobs[0].shape
            return shape[1] * layer.param.convolution_param.group if len(shape) > 1 else None
    return None


def _input_shapes(header: caffe_pb2.NetParameter) -> list[MaybeShape]:
    if header.input_shape:
        return [_fixed(shape.dim) for shape in header.input_shape]
    dims = header.input_dim
    return [_fixed(dims[i : i + 4]) for i in range(0, len(dims) - 3, 4)]


def _fixed(dims: Sequence[int]) -> MaybeShape:
    """The shape of an input. A 0 behind the batch is a size that only whoever runs the net gives it: stock
    Caffe builds hardly a layer on it before that, forks do."""
    return None if 0 in dims[1:] and min(dims) >= 0 else tuple(dims)


# ---- helpers ----------------------------------------------------------------------------------------------


def _axis(layer: Layer, axis: int, shape: Shape) -> int:
    """Caffe's canonical axis: negative counts from the end."""
    if not -len(shape) <= axis < len(shape):
        raise NetError(f"{layer.where}: axis {axis} of a {len(shape)}-D bottom ({by_x(shape)}); correct it")
    return axis % len(shape) if shape else 0


def conv_size(size: int, extent: int, stride: int, pad: int) -> int:
    """Output size of a convolution along one axis: rounded down."""
    return (size + 2 * pad - extent) // stride + 1


def pool_size(
    size: int, kernel: int, stride: int, pad: int, ceil: bool = True, clip: bool | None = None
) -> int:
    """Output size of a pooling along one axis: rounded up, windows that start in the far padding clipped.

    Caffe clips both axes where either has padding: ``clip`` says so; without it this one decides.
    """
    span = size + 2 * pad - kernel
    out = (-(-span // stride) if ceil else span // stride) + 1
    if (clip or (clip is None and pad)) and (out - 1) * stride >= size + pad:
        out -= 1
    return out


# ---- layers that make data --------------------------------------------------------------------------------


def _transformed(layer: Layer, batch: int, height: int, width: int, channels: int) -> Sequence[MaybeShape]:
    t = layer.param.transform_param
    if t.crop_size:
        height = width = t.crop_size
    image: MaybeShape = (batch, channels, height, width) if height and width else None
    return [image, (batch,), (batch,)][: len(layer.top)]


def _data(layer: Layer, _: list[Shape]) -> Sequence[MaybeShape]:
    return _data_of(layer, (ASSUMED_CHANNELS, 0, 0))


def _data_of(layer: Layer, image: Shape) -> Sequence[MaybeShape]:
    """A Data layer over images of C x H x W, as far as its own parameters do not say."""
    t = layer.param.transform_param
    channels = 1 if t.force_gray else 3 if t.force_color else image[0]
    if len(t.mean_value) > 1:
        channels = len(t.mean_value)
    return _transformed(layer, layer.param.data_param.batch_size, image[1], image[2], channels)


def _image_data(layer: Layer, _: list[Shape]) -> Sequence[MaybeShape]:
    p = layer.param.image_data_param
    return _transformed(layer, p.batch_size, p.new_height, p.new_width, 3 if p.is_color else 1)


def _memory_data(layer: Layer, _: list[Shape]) -> Sequence[MaybeShape]:
    p = layer.param.memory_data_param
    return [(p.batch_size, p.channels, p.height, p.width), (p.batch_size,)]


def _dummy_data(layer: Layer, _: list[Shape]) -> Sequence[MaybeShape]:
    p = layer.param.dummy_data_param
    if p.shape:
        given: list[MaybeShape] = [tuple(shape.dim) for shape in p.shape]
    else:
        sizes = (p.num, p.channels, p.height, p.width)
        n = max(map(len, sizes))
        if any(len(values) not in (1, n) for values in sizes):
            raise NetError(f"{layer.where}: give num, channels, height and width once, or once per top")
        given = list(zip(*(list(values) * (n // len(values)) for values in sizes), strict=True))
    return given * len(layer.top) if len(given) == 1 else given


def _input(layer: Layer, _: list[Shape]) -> Sequence[MaybeShape]:
    given = [_fixed(shape.dim) for shape in layer.param.input_param.shape]
    return given * len(layer.top) if len(given) == 1 else given


def _parameter(layer: Layer, _: list[Shape]) -> Sequence[MaybeShape]:
    return [tuple(layer.param.parameter_param.shape.dim)]


# ---- layers that move windows -----------------------------------------------------------------------------


def _spatial(layer: Layer, shape: Shape) -> tuple[params.Conv, int, int]:
    """Convolution geometry over a bottom, its channel axis, and its channels."""
    axis = _axis(layer, layer.param.convolution_param.axis, shape)
    geometry = params.conv(layer.param, len(shape) - axis - 1)
    channels = shape[axis]
    if channels % geometry.group:
        raise NetError(f"{layer.where}: {channels} channels are no multiple of group {geometry.group}")
    return geometry, axis, channels


def _windows(layer: Layer, sizes: Shape, geometry: params.Conv) -> Shape:
    out = tuple(map(conv_size, sizes, geometry.extent, geometry.stride, geometry.pad))
    # Caffe's division rounds towards zero: a window may exceed its input by less than a stride.
    spans = zip(sizes, geometry.extent, geometry.stride, geometry.pad, strict=True)
    out = tuple(
        1 if -stride < size + 2 * pad - extent < 0 else o
        for o, (size, extent, stride, pad) in zip(out, spans, strict=True)
    )
    if any(size < 1 for size in out):
        raise NetError(f"{layer.where}: its window {by_x(geometry.extent)} exceeds its input {by_x(sizes)}")
    return out


def _convolution(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    out: list[MaybeShape] = []
    for shape in bottoms:
        geometry, axis, _ = _spatial(layer, shape)
        out.append((*shape[:axis], geometry.num_output, *_windows(layer, shape[axis + 1 :], geometry)))
    return out


def _deconvolution(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    out: list[MaybeShape] = []
    for shape in bottoms:
        g, axis, _ = _spatial(layer, shape)
        sizes = [
            s * (size - 1) + e - 2 * p
            for size, e, s, p in zip(shape[axis + 1 :], g.extent, g.stride, g.pad, strict=True)
        ]
        if any(size < 1 for size in sizes):
            raise NetError(f"{layer.where}: its padding leaves nothing of its output; correct pad")
        out.append((*shape[:axis], g.num_output, *sizes))
    return out


def _im2col(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    g, axis, channels = _spatial(layer, bottoms[0])
    sizes = _windows(layer, bottoms[0][axis + 1 :], g)
    return [(*bottoms[0][:axis], channels * math.prod(g.kernel), *sizes)]


def _pooling(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    shape = bottoms[0]
    if len(shape) != 4:
        raise NetError(f"{layer.where}: Pooling needs a 4-D bottom, not {by_x(shape)}")
    p = params.pool(layer.param)
    kernel = p.kernel or shape[2:]
    sizes = tuple(
        pool_size(size, k, s, pad, p.ceil, any(p.pad))
        for size, k, s, pad in zip(shape[2:], kernel, p.stride, p.pad, strict=True)
    )
    if any(size < 1 for size in sizes):
        raise NetError(f"{layer.where}: its window {by_x(kernel)} is larger than its input {by_x(shape[2:])}")
    return [(*shape[:2], *sizes)] * len(layer.top)


def _spp(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    height, (batch, channels, *sizes) = layer.param.spp_param.pyramid_height, bottoms[0]
    if not 1 <= height <= 15:
        raise NetError(f"{layer.where}: pyramid_height is {height}; give 1 or more")
    for size, bins in itertools.product(sizes, (2**level for level in range(height))):
        kernel = -(-size // bins)
        if (kernel * bins - size + 1) // 2 >= kernel:
            raise NetError(
                f"{layer.where}: {size} pixels do not divide into {bins} bins; lower pyramid_height"
            )
    if height == 1:
        return [(batch, channels, 1, 1)]
    return [(batch, channels * sum(4**level for level in range(height)))]


# ---- layers that keep, join or cut shapes -----------------------------------------------------------------


def _same(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    return [bottoms[0]] * len(layer.top)


def _inner_product(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    p = layer.param.inner_product_param
    axis = _axis(layer, p.axis, bottoms[0])
    if not p.num_output:
        raise NetError(f"{layer.where}: num_output is missing; give 1 or more")
    return [(*bottoms[0][:axis], p.num_output)]


def _embed(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    p = layer.param.embed_param
    if not p.num_output or not p.input_dim:
        raise NetError(f"{layer.where}: num_output or input_dim is missing; give both")
    return [(*bottoms[0], p.num_output)]


def _concat(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    p = layer.param.concat_param
    axis = _axis(layer, p.concat_dim if p.HasField("concat_dim") else p.axis, bottoms[0])
    rest = [shape[:axis] + shape[axis + 1 :] for shape in bottoms]
    if any(shape != rest[0] for shape in rest):
        raise NetError(f"{layer.where}: joins {', '.join(map(by_x, bottoms))}; only axis {axis} may differ")
    total = sum(shape[axis] for shape in bottoms)
    return [(*bottoms[0][:axis], total, *bottoms[0][axis + 1 :])]


def _slice(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    p, shape, n = layer.param.slice_param, bottoms[0], len(layer.top)
    axis = _axis(layer, p.slice_dim if p.HasField("slice_dim") else p.axis, shape)
    points = [0, *p.slice_point, shape[axis]] if p.slice_point else []
    if not points:
        if shape[axis] % n:
            raise NetError(f"{layer.where}: {shape[axis]} channels do not divide into {n} tops")
        points = [i * (shape[axis] // n) for i in range(n + 1)]
    if len(points) != n + 1 or any(a >= b for a, b in itertools.pairwise(points)):
        raise NetError(f"{layer.where}: its slice points do not cut {shape[axis]} channels into {n} tops")
    cuts = itertools.pairwise(points)
    return [(*shape[:axis], b - a, *shape[axis + 1 :]) for a, b in cuts]


def _eltwise(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    if any(shape != bottoms[0] for shape in bottoms):
        raise NetError(f"{layer.where}: its bottoms differ: {', '.join(map(by_x, bottoms))}")
    return [bottoms[0]]


def _flatten(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    shape = bottoms[0]
    start = _axis(layer, layer.param.flatten_param.axis, shape)
    end = _axis(layer, layer.param.flatten_param.end_axis, shape)
    if start > end + 1:
        raise NetError(f"{layer.where}: its axis {start} lies behind its end_axis {end}; swap them")
    return [(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])]


def _reshape(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    p, shape = layer.param.reshape_param, bottoms[0]
    start = p.axis if p.axis >= 0 else len(shape) + p.axis + 1
    end = len(shape) if p.num_axes == -1 else start + p.num_axes
    if not 0 <= start <= end <= len(shape):
        raise NetError(f"{layer.where}: axis and num_axes lie outside its {len(shape)}-D bottom")
    if any(d == 0 and start + i >= len(shape) for i, d in enumerate(p.shape.dim)):
        raise NetError(f"{layer.where}: a dim of 0 copies an axis that its {len(shape)}-D bottom has not")
    dims = [shape[start + i] if d == 0 else d for i, d in enumerate(p.shape.dim)]
    count = math.prod(shape[start:end])
    if dims.count(-1) == 1:
        known = -math.prod(dims)
        if not known or count % known:
            raise NetError(f"{layer.where}: {count} values do not divide into {by_x(tuple(dims))}")
        dims[dims.index(-1)] = count // known
    if math.prod(dims) != count:
        raise NetError(f"{layer.where}: {count} values do not fit {by_x(tuple(dims))}")
    return [(*shape[:start], *dims, *shape[end:])]


def _crop(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    p, (shape, wanted) = layer.param.crop_param, bottoms[:2]
    axis = _axis(layer, p.axis, shape)
    if len(wanted) < len(shape):
        raise NetError(f"{layer.where}: its bottoms have different axes: {by_x(shape)}, {by_x(wanted)}")
    offsets = list(p.offset) or [0]
    if len(offsets) == 1:
        offsets *= len(shape) - axis
    if len(offsets) != len(shape) - axis:
        raise NetError(f"{layer.where}: {len(offsets)} offsets; give one, or one per axis from {axis} on")
    for size, offset, cut in zip(shape[axis:], offsets, wanted[axis:], strict=False):
        if size - offset < cut:
            raise NetError(f"{layer.where}: {cut} at offset {offset} reaches beyond its input of {size}")
    return [shape[:axis] + wanted[axis : len(shape)]]


def _tile(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    shape = list(bottoms[0])
    if layer.param.tile_param.tiles < 1:
        raise NetError(f"{layer.where}: tiles is missing; give 1 or more")
    shape[_axis(layer, layer.param.tile_param.axis, bottoms[0])] *= layer.param.tile_param.tiles
    return [tuple(shape)]


def _reduction(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    return [bottoms[0][: _axis(layer, layer.param.reduction_param.axis, bottoms[0])]]


def _argmax(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    p, shape = layer.param.argmax_param, bottoms[0]
    axis = _axis(layer, p.axis, shape) if p.HasField("axis") else 1
    choices = shape[axis] if p.HasField("axis") else math.prod(shape[1:])
    if not 1 <= p.top_k <= choices:
        raise NetError(f"{layer.where}: top_k is {p.top_k}; it must be 1 to {choices}")
    if p.HasField("axis"):
        return [(*shape[:axis], p.top_k, *shape[axis + 1 :])]
    axes = max(len(shape), 3)
    return [(shape[0], 2 if p.out_max_val else 1, p.top_k, *(1,) * (axes - 3))[:axes]]


def _batch_reindex(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    return [(bottoms[1][0], *bottoms[0][1:])]


def _recurrent(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    steps, batch = bottoms[0][:2]
    n = layer.param.recurrent_param.num_output
    state: MaybeShape = (1, batch, n)
    return [(steps, batch, n), *([state] * (len(layer.top) - 1))]


def _lstm_unit(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    return [bottoms[0], bottoms[0]]


# ---- losses and measures ----------------------------------------------------------------------------------


def _loss(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    """A scalar; SoftmaxWithLoss and its kind give the probabilities as a second top."""
    return [(), bottoms[0]][: max(len(layer.top), 1)]


def _accuracy(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    axis = _axis(layer, layer.param.accuracy_param.axis, bottoms[0])
    return [(), (bottoms[0][axis],)][: len(layer.top)]


def _nothing(layer: Layer, bottoms: list[Shape]) -> Sequence[MaybeShape]:
    return []


SOURCES: dict[str, Rule] = {
    "Data": _data,
    "DummyData": _dummy_data,
    "ImageData": _image_data,
    "Input": _input,
    "MemoryData": _memory_data,
    "Parameter": _parameter,
}
LOSSES = (
    "ContrastiveLoss",
    "EuclideanLoss",
    "HingeLoss",
    "InfogainLoss",
    "MultinomialLogisticLoss",
    "SigmoidCrossEntropyLoss",
    "SoftmaxWithLoss",
)
# Functions of each value, or normalisations: one bottom, a top of the same shape.
SAME = (
    "AbsVal", "BNLL", "BatchNorm", "Bias", "Clip", "Dropout", "ELU", "Exp", "LRN", "Log", "MVN", "PReLU",
    "Power", "ReLU", "Scale", "Sigmoid", "Softmax", "Split", "Swish", "TanH", "Threshold",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **SOURCES,
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(LOSSES, _loss),
    "Accuracy": _accuracy,
    "ArgMax": _argmax,
    "BatchReindex": _batch_reindex,
    "Concat": _concat,
    "Convolution": _convolution,
    "Crop": _crop,
    "Deconvolution": _deconvolution,
    "Eltwise": _eltwise,
    "Embed": _embed,
    "Flatten": _flatten,
    "HDF5Output": _nothing,
    "Im2col": _im2col,
    "InnerProduct": _inner_product,
    "LSTM": _recurrent,
    "LSTMUnit": _lstm_unit,
    "Pooling": _pooling,
    "RNN": _recurrent,
    "Reduction": _reduction,
    "Reshape": _reshape,
    "SPP": _spp,
    "Silence": _nothing,
    "Slice": _slice,
    "Tile": _tile,
}
# Every layer type of stock Caffe: these, and those whose shapes only their data or their code knows.
STOCK = {*RULES, "Filter", "HDF5Data", "Python", "WindowData"}
_MIN_AXES = {"ArgMax": 1, "BatchNorm": 2, "BatchReindex": 1, "LSTM": 2, "PReLU": 2, "RNN": 2, "SPP": 4}
_MIN_BOTTOMS = dict.fromkeys(
    ("Accuracy", "BatchReindex", "Crop", "Eltwise", "LSTM", "RNN", *LOSSES),
    2,
)


# ---- weights ----------------------------------------------------------------------------------------------


def param_shapes(layer: Layer, bottoms: list[MaybeShape]) -> list[Shape] | None:
    """The shapes of a layer's weight blobs; [] where it has none, None where that is not known."""
    if layer.strange is not None:
        return None
    if layer.type not in WEIGHTS:
        return [] if layer.type in RULES else None
    known = [shape for shape in bottoms if shape is not None]
    return WEIGHTS[layer.type](layer, known) if len(known) == len(bottoms) else None


def _conv_weights(layer: Layer, bottoms: list[Shape]) -> list[Shape]:
    g, _, channels = _spatial(layer, bottoms[0])
    weight = (g.num_output, channels // g.group, *g.kernel)
    return [weight, (g.num_output,)][: 1 + g.bias_term]


def _deconv_weights(layer: Layer, bottoms: list[Shape]) -> list[Shape]:
    g, _, channels = _spatial(layer, bottoms[0])
    weight = (channels, g.num_output // g.group, *g.kernel)
    return [weight, (g.num_output,)][: 1 + g.bias_term]


def _inner_product_weights(layer: Layer, bottoms: list[Shape]) -> list[Shape]:
    p = layer.param.inner_product_param
    k = math.prod(bottoms[0][_axis(layer, p.axis, bottoms[0]) :])
    weight = (k, p.num_output) if p.transpose else (p.num_output, k)
    return [weight, (p.num_output,)][: 1 + p.bias_term]


def _embed_weights(layer: Layer, _: list[Shape]) -> list[Shape]:
    p = layer.param.embed_param
    return [(p.input_dim, p.num_output), (p.num_output,)][: 1 + p.bias_term]


def _batch_norm_weights(_: Layer, bottoms: list[Shape]) -> list[Shape]:
    return [(bottoms[0][1],), (bottoms[0][1],), (1,)]


def _scale_weights(layer: Layer, bottoms: list[Shape]) -> list[Shape]:
    p = layer.param.scale_param if layer.type == "Scale" else layer.param.bias_param
    axis = _axis(layer, p.axis, bottoms[0]) if bottoms[0] else 0
    end = len(bottoms[0]) if p.num_axes == -1 else axis + p.num_axes
    if len(bottoms) == 1 and not axis <= end <= len(bottoms[0]):
        raise NetError(
            f"{layer.where}: num_axes {p.num_axes} from axis {axis} of {by_x(bottoms[0])}; correct it"
        )
    factor = bottoms[1] if len(bottoms) > 1 else bottoms[0][axis:end]
    own = [] if len(bottoms) > 1 else [factor]
    return own + [factor] * (layer.type == "Scale" and layer.param.scale_param.bias_term)


def _prelu_weights(layer: Layer, bottoms: list[Shape]) -> list[Shape]:
    return [() if layer.param.prelu_param.channel_shared else (bottoms[0][1],)]


def _parameter_weights(layer: Layer, _: list[Shape]) -> list[Shape]:
    return [tuple(layer.param.parameter_param.shape.dim)]


def _rnn_weights(layer: Layer, bottoms: list[Shape]) -> list[Shape]:
    p, k = layer.param.recurrent_param, math.prod(bottoms[0][2:])
    n = p.num_output
    gates = 4 * n if layer.type == "LSTM" else n
    exposed = (2 if layer.type == "LSTM" else 1) if p.expose_hidden else 0
    static = [(gates, math.prod(bottoms[2][1:]))] if len(bottoms) > 2 + exposed else []
    if layer.type == "LSTM":
        return [(gates, k), (gates,), *static, (gates, n)]
    return [(n, k), (n,), *static, (n, n), (n, n), (n,)]


WEIGHTS: dict[str, Callable[[Layer, list[Shape]], list[Shape]]] = {
    "BatchNorm": _batch_norm_weights,
    "Bias": _scale_weights,
    "Convolution": _conv_weights,
    "Deconvolution": _deconv_weights,
    "Embed": _embed_weights,
    "InnerProduct": _inner_product_weights,
    "LSTM": _rnn_weights,
    "PReLU": _prelu_weights,
    "Parameter": _parameter_weights,
    "RNN": _rnn_weights,
    "Scale": _scale_weights,
}


def all_param_shapes(net: Net) -> dict[Layer, list[Shape] | None]:
    """The weight shapes of every layer that is in some state of the net."""
    out: dict[Layer, list[Shape] | None] = {}
    for view in net.graph.views:
        shapes = infer(view)
        for layer in view.layers:
            if out.get(layer) is None:
                out[layer] = param_shapes(layer, [shapes.get(value) for value in view.bottoms[layer]])
    return out


def check_weights(net: Net, path: Path | str) -> None:
    """Raise WeightsError where a blob of ``net`` does not have the shape its layer needs.

    As in Caffe a legacy 4-D blob fits a lower dimension behind leading ones.
    """
    for layer, needed in all_param_shapes(net).items():
        if needed is None or not layer.blobs:
            continue
        if len(layer.blobs) != len(needed):
            raise WeightsError(
                f"{path}: layer '{layer.name}' has {len(layer.blobs)} blobs, the net needs {len(needed)}; "
                "weights of another net?"
            )
        for i, (blob, shape) in enumerate(zip(layer.blobs, needed, strict=True)):
            if not _fits(blob.shape, shape):
                raise WeightsError(
                    f"{path}: layer '{layer.name}' blob {i} is {by_x(blob.shape)}, the net needs "
                    f"{by_x(shape)}; weights of another net, or a changed num_output or kernel_size?"
                )


def _fits(stored: Shape, needed: Shape) -> bool:
    if stored == needed:
        return True
    ones = len(stored) - len(needed)
    return len(stored) == 4 and ones > 0 and stored == (1,) * ones + needed
