"""Caffe's layers as functions over torch tensors, forward and (by autograd) backward as Caffe computes them.

``compute(blobs, bottoms) -> tops``: a rule of ``RULES`` makes one for a layer, knowing the phase and the
bottoms' shapes; the first axis may differ when it is used. Adding a layer is adding a rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import params
from ...errors import EngineError
from ...net import Layer
from ...schema import caffe_pb2
from ...shapes import Shape, layer_shapes

Compute = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
Rule = Callable[[Layer, list[Shape], bool], Compute]

FLT_MIN = torch.finfo(torch.float32).tiny  # what Caffe takes a smaller probability for


def compute_of(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    """What a layer computes on bottoms of these shapes. Raises EngineError for one that is not known."""
    rule = RULES.get(layer.type)
    if rule is None:
        raise EngineError(
            f"{layer.where}: the torch engine has no {layer.type} layer; known are {', '.join(sorted(RULES))}"
        )
    return rule(layer, bottoms, train)


def _each(function: Callable[[Tensor], Tensor]) -> Compute:
    """A function of one bottom."""
    return lambda blobs, bottoms: [function(bottoms[0])]


def whole(x: Tensor) -> Tensor:
    """Values in at least float32, for sums that bfloat16 would round."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _axis(axis: int, shape: Shape) -> int:
    return axis % len(shape) if shape else 0


# ---- layers that move windows -----------------------------------------------------------------------------


def _convolution(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    axis = _axis(layer.param.convolution_param.axis, bottoms[0])
    g = params.conv(layer.param, len(bottoms[0]) - axis - 1)
    if axis != 1 or not 1 <= len(g.kernel) <= 3:
        raise EngineError(f"{layer.where}: torch convolves over 1 to 3 axes behind axis 1, not over these")
    transposed = layer.type == "Deconvolution"
    small = [
        (size, extent)
        for shape in bottoms
        for size, extent, pad in zip(shape[2:], g.extent, g.pad, strict=True)
        if size + 2 * pad < extent
    ]
    if small and not transposed:
        raise EngineError(f"{layer.where}: a window of {small[0][1]} over {small[0][0]} pixels; correct pad")
    plain = (F.conv1d, F.conv2d, F.conv3d)[len(g.kernel) - 1]
    turned = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(g.kernel) - 1]

    def compute(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        weight, bias = blobs[0], blobs[1] if g.bias_term else None
        if transposed:
            return [turned(x, weight, bias, g.stride, g.pad, 0, g.group, g.dilation) for x in bottoms]
        return [plain(x, weight, bias, g.stride, g.pad, g.dilation, g.group) for x in bottoms]

    return compute


def _pooling(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    """Both count windows as Caffe does: rounded up, but none that begins in the far padding."""
    p = params.pool(layer.param)
    size = bottoms[0][2:]
    kernel = p.kernel or (size[0], size[1])
    out = layer_shapes(layer, [bottoms[0]])[0] or ()
    if p.method == "STOCHASTIC" or len(layer.top) > 1:
        what = "stochastic" if p.method == "STOCHASTIC" else "with a mask as its second top"
        raise EngineError(f"{layer.where}: torch has no pooling {what}; use MAX or AVE, with one top")
    if any((n - 1) * s - pad >= z for n, s, pad, z in zip(out[2:], p.stride, p.pad, size, strict=True)):
        raise EngineError(f"{layer.where}: its last window lies outside its bottom; lower its stride")
    largest = p.method == "MAX"
    if p.method == "AVE" and p.kernel is None:
        return _each(lambda x: x.mean((2, 3), keepdim=True))
    if all(pad <= k // 2 for pad, k in zip(p.pad, kernel, strict=True)):
        if largest:
            return _each(lambda x: F.max_pool2d(x, kernel, p.stride, p.pad, ceil_mode=p.ceil))
        return _each(lambda x: F.avg_pool2d(x, kernel, p.stride, p.pad, p.ceil))
    # torch pads by half a window at most: beyond that by hand, to just where the last window ends.
    ends = [
        (n - 1) * s + k - z - pad
        for n, s, k, z, pad in zip(out[2:], p.stride, kernel, size, p.pad, strict=True)
    ]
    around = [p.pad[1], ends[1], p.pad[0], ends[0]]
    if largest:
        return _each(lambda x: F.max_pool2d(F.pad(x, around, value=-math.inf), kernel, p.stride))
    inside = [min(end, pad) for end, pad in zip(ends, p.pad, strict=True)]  # what an average counts
    counted = F.pad(torch.ones(1, 1, *size), [p.pad[1], inside[1], p.pad[0], inside[0]], value=1.0)
    counted = F.pad(counted, [0, ends[1] - inside[1], 0, ends[0] - inside[0]])
    share = F.avg_pool2d(counted, kernel, p.stride)
    return _each(lambda x: F.avg_pool2d(F.pad(x, around), kernel, p.stride) / share.to(x))


# ---- normalisations ---------------------------------------------------------------------------------------


class _AcrossChannels(torch.autograd.Function):
    """y = x s^-beta, s = k + alpha/n (the sum of x^2 over n neighbouring channels).

    dx_i = dy_i s_i^-beta - 2 beta alpha/n x_i (the sum over the same channels of dy_j y_j / s_j)
    """

    @staticmethod
    def forward(ctx, x, band, k, beta):  # type: ignore[no-untyped-def]
        s = F.conv2d(x * x, band).add_(k)
        power = s.rsqrt() if beta in (0.5, 0.75) else s.pow(-beta)
        if beta == 0.75:
            power *= power.sqrt()
        ctx.save_for_backward(x, band, s, power)
        ctx.beta = beta
        return x * power

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, band, s, power = ctx.saved_tensors
        direct = dy * power
        around = F.conv2d((direct * x).div_(s), band).mul_(x)
        return direct.add_(around, alpha=-2 * ctx.beta), None, None, None


def _lrn(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.lrn_param
    if p.norm_region == caffe_pb2.LRNParameter.WITHIN_CHANNEL:

        def within(x: Tensor) -> Tensor:
            mean = F.avg_pool2d(x * x, p.local_size, 1, p.local_size // 2)
            return x * (1 + p.alpha * mean).pow(-p.beta)

        return _each(within)
    channels = bottoms[0][1]
    index = torch.arange(channels)
    near = (index[:, None] - index).abs() <= p.local_size // 2
    weight = (near * (p.alpha / p.local_size)).float().reshape(channels, channels, 1, 1)

    def across(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _AcrossChannels.apply(whole(x), weight.to(whole(x)), p.k, round(p.beta, 6)).to(x.dtype)

    return _each(across)


def _batch_norm(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    """Blobs: the running sums of means and of unbiased variances, and of the weights in them."""
    p = layer.param.batch_norm_param
    global_stats = p.use_global_stats if p.HasField("use_global_stats") else not train
    keep, eps = p.moving_average_fraction, p.eps

    def given(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        factor = torch.where(blobs[2] == 0, 0.0, 1 / blobs[2])
        return [F.batch_norm(bottoms[0], blobs[0] * factor, blobs[1] * factor, eps=eps)]

    def of_batch(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        x = bottoms[0]
        one, zero = torch.ones_like(blobs[0]), torch.zeros_like(blobs[0])  # keep the sums of bfloat16 float32
        y, mean, inverse = torch.native_batch_norm(x, one, zero, None, None, True, 0.0, eps)
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            variance = inverse.double().pow(-2).sub_(eps).clamp_(min=0).to(inverse.dtype)
            blobs[0].mul_(keep).add_(mean)
            blobs[1].mul_(keep).add_(variance, alpha=count / max(count - 1, 1))
            blobs[2].mul_(keep).add_(1)
        return [y]

    return given if global_stats else of_batch


def _scale(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    """A factor, or for Bias a summand, from a blob or the second bottom, at the axes from ``axis`` on."""
    p = layer.param.scale_param if layer.type == "Scale" else layer.param.bias_param
    axis = _axis(p.axis, bottoms[0])
    behind = "scale" if layer.type == "Scale" else "bias"
    bias_term = behind == "scale" and layer.param.scale_param.bias_term

    def spread(factor: Tensor, x: Tensor) -> Tensor:
        return factor.reshape(*factor.shape, *(1,) * (x.dim() - axis - factor.dim()))

    def compute(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        x, factor = bottoms[0], bottoms[1] if len(bottoms) > 1 else blobs[0]
        if behind == "bias":
            return [x + spread(factor, x)]
        if bias_term:
            return [torch.addcmul(spread(blobs[-1], x), x, spread(factor, x))]
        return [x * spread(factor, x)]

    return compute


# ---- functions of each value ------------------------------------------------------------------------------


def _relu(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    slope = layer.param.relu_param.negative_slope
    return _each(F.relu if slope == 0 else lambda x: F.leaky_relu(x, slope))


def _prelu(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    return lambda blobs, bottoms: [F.prelu(bottoms[0], blobs[0].reshape(-1))]


def _elu(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    return _each(lambda x: F.elu(x, layer.param.elu_param.alpha))


def _power(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.power_param
    if p.power == 1:
        return _each(lambda x: x * p.scale + p.shift)
    return _each(lambda x: (x * p.scale + p.shift).pow(p.power))


def _exp(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.exp_param
    log = 1.0 if p.base == -1 else math.log(p.base)
    return _each(lambda x: torch.exp(log * (x * p.scale + p.shift)))


def _log(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.log_param
    log = 1.0 if p.base == -1 else math.log(p.base)
    return _each(lambda x: torch.log(x * p.scale + p.shift) / log)


def _dropout(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    ratio = layer.param.dropout_param.dropout_ratio
    return _each(lambda x: F.dropout(x, ratio, train))


def _softmax(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    return _each(lambda x: F.softmax(whole(x), layer.param.softmax_param.axis))


# ---- layers that join or cut ------------------------------------------------------------------------------


def _inner_product(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.inner_product_param
    axis = _axis(p.axis, bottoms[0])

    def compute(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        x = bottoms[0].reshape(*bottoms[0].shape[:axis], -1)
        return [F.linear(x, blobs[0].t() if p.transpose else blobs[0], blobs[1] if p.bias_term else None)]

    return compute


def _concat(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.concat_param
    axis = p.concat_dim if p.HasField("concat_dim") else p.axis
    return lambda blobs, bottoms: [torch.cat(list(bottoms), axis)]


def _slice(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.slice_param
    axis = _axis(p.slice_dim if p.HasField("slice_dim") else p.axis, bottoms[0])
    size, n = bottoms[0][axis], len(layer.top)
    points = [0, *p.slice_point, size] if p.slice_point else [i * (size // n) for i in range(n + 1)]
    sizes = [b - a for a, b in itertools.pairwise(points)]
    return lambda blobs, bottoms: list(torch.split(bottoms[0], sizes, axis))


def _split(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    return lambda blobs, bottoms: [bottoms[0]] * len(layer.top)


def _reshape(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    """Flatten and Reshape."""
    return _each(lambda x: x.reshape(layer_shapes(layer, [tuple(x.shape)])[0]))


def _eltwise(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.eltwise_param
    coefficients = list(p.coeff)
    if coefficients and len(coefficients) != len(bottoms):
        raise EngineError(f"{layer.where}: {len(coefficients)} coeff for {len(bottoms)} bottoms; give each")

    def total(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        if not coefficients:
            return [sum(bottoms[1:], bottoms[0])]
        result = bottoms[0] * coefficients[0]
        for x, coefficient in zip(bottoms[1:], coefficients[1:], strict=True):
            result = torch.add(result, x, alpha=coefficient)
        return [result]

    def product(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        return [math.prod(bottoms[1:], start=bottoms[0])]

    def largest(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        result = bottoms[0]
        for i, x in enumerate(bottoms[1:], 1):  # of equals Caffe takes the second, then no later one
            result = torch.where(result > x if i == 1 else result >= x, result, x)
        return [result]

    operations = caffe_pb2.EltwiseParameter
    return {operations.SUM: total, operations.PROD: product, operations.MAX: largest}[p.operation]


def _silence(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    return lambda blobs, bottoms: []


def _parameter(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    return lambda blobs, bottoms: [blobs[0]]


# ---- losses and measures ----------------------------------------------------------------------------------


def _normaliser(layer: Layer, default: int) -> Callable[[Tensor, int], Tensor | float]:
    """What a loss is divided by, from which of its values count and the batch."""
    p = layer.param.loss_param
    kinds = caffe_pb2.LossParameter
    kind = p.normalization if p.HasField("normalization") else default
    if p.HasField("normalize") and not p.HasField("normalization"):
        kind = kinds.VALID if p.normalize else kinds.BATCH_SIZE

    def divisor(valid: Tensor, batch: int) -> Tensor | float:
        if kind == kinds.VALID:
            return valid.sum().clamp(min=1)
        return max(1, valid.numel() if kind == kinds.FULL else batch if kind == kinds.BATCH_SIZE else 1)

    return divisor


def _softmax_loss(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.loss_param
    axis = _axis(layer.param.softmax_param.axis, bottoms[0])
    ignored = p.ignore_label if p.HasField("ignore_label") else None
    divisor = _normaliser(layer, caffe_pb2.LossParameter.VALID)
    most = -math.log(FLT_MIN)

    def compute(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        scores = whole(bottoms[0]).movedim(axis, -1)
        labels = bottoms[1].reshape(-1).long()
        valid = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
        # An own label for what is ignored: Caffe's may be any, and labels are checked by torch.
        each = F.cross_entropy(
            scores.reshape(-1, scores.shape[-1]),
            labels.masked_fill(~valid, -100) if ignored is not None else labels,
            reduction="none",
        )
        each = each + (each.clamp(max=most) - each).detach()  # Caffe's gradient is not cut off
        loss = each.sum() / divisor(valid, math.prod(bottoms[0].shape[:axis]))
        return [loss, F.softmax(whole(bottoms[0]), axis)] if len(layer.top) > 1 else [loss]

    return compute


def _sigmoid_loss(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.loss_param
    ignored = p.ignore_label if p.HasField("ignore_label") else None
    divisor = _normaliser(layer, caffe_pb2.LossParameter.BATCH_SIZE)

    def compute(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        scores, target = whole(bottoms[0]), whole(bottoms[1]).detach()  # as Caffe: none learns through it
        valid = torch.ones_like(target, dtype=torch.bool) if ignored is None else target.long() != ignored
        each = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        loss = each.where(valid, 0.0).sum() / divisor(valid, scores.shape[0])
        return [loss, torch.sigmoid(scores)] if len(layer.top) > 1 else [loss]

    return compute


def _euclidean_loss(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    def compute(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        a, b = whole(bottoms[0]), whole(bottoms[1])
        return [F.mse_loss(a, b.reshape(a.shape), reduction="sum") / (2 * a.shape[0])]

    return compute


def _accuracy(layer: Layer, bottoms: list[Shape], train: bool) -> Compute:
    p = layer.param.accuracy_param
    axis = _axis(p.axis, bottoms[0])
    ignored = p.ignore_label if p.HasField("ignore_label") else None

    def compute(blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            scores = whole(bottoms[0].detach()).movedim(axis, -1)
            scores = scores.reshape(-1, scores.shape[-1])
            labels = bottoms[1].reshape(-1).long()
            valid = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
            scores, labels = scores[valid], labels[valid]
            own = scores.gather(1, labels[:, None])
            right = ((scores >= own).sum(1) <= p.top_k).float()  # of equals the label comes last
            tops = [right.sum() / max(len(labels), 1)]
            if len(layer.top) > 1:
                of_class = F.one_hot(labels, scores.shape[1]).float()
                tops.append((right @ of_class) / of_class.sum(0).clamp(min=1))
            return tops

    return compute


RULES: dict[str, Rule] = {
    "AbsVal": lambda *_: _each(torch.abs),
    "Accuracy": _accuracy,
    "BNLL": lambda *_: _each(lambda x: F.softplus(x, threshold=50)),
    "BatchNorm": _batch_norm,
    "Bias": _scale,
    "Concat": _concat,
    "Convolution": _convolution,
    "Deconvolution": _convolution,
    "Dropout": _dropout,
    "ELU": _elu,
    "Eltwise": _eltwise,
    "EuclideanLoss": _euclidean_loss,
    "Exp": _exp,
    "Flatten": _reshape,
    "InnerProduct": _inner_product,
    "LRN": _lrn,
    "Log": _log,
    "PReLU": _prelu,
    "Parameter": _parameter,
    "Pooling": _pooling,
    "Power": _power,
    "ReLU": _relu,
    "Reshape": _reshape,
    "Scale": _scale,
    "Sigmoid": lambda *_: _each(torch.sigmoid),
    "SigmoidCrossEntropyLoss": _sigmoid_loss,
    "Silence": _silence,
    "Slice": _slice,
    "Softmax": _softmax,
    "SoftmaxWithLoss": _softmax_loss,
    "Split": _split,
    "TanH": lambda *_: _each(torch.tanh),
}
