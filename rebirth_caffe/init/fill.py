"""Caffe's fillers, and weights for a net that has none."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..caffemodel import Array, Blob, Record, Shape
from ..errors import NetError
from ..net import Net
from ..schema import caffe_pb2
from ..shapes import all_param_shapes

if TYPE_CHECKING:  # importing it takes time, and often nothing is drawn
    from numpy.random import Generator

Filler = caffe_pb2.FillerParameter

XAVIER = Filler(type="xavier")


def generator(seed: int, name: str) -> Generator:
    """Random numbers for one layer: they depend on the seed and the layer's name, on nothing else."""
    return np.random.default_rng([seed, zlib.crc32(name.encode("utf-8", "surrogatepass"))])


def fill(filler: Filler, shape: Shape, random: Generator, where: str = "filler") -> Array:
    """A blob drawn from a filler, as Caffe's filler.hpp defines each (float32, of ``shape``).

    Raises NetError, naming ``where``, for a filler Caffe does not know.
    """
    if filler.type not in _FILLERS:
        known = ", ".join(sorted(_FILLERS))
        raise NetError(f"{where}: no filler is called '{filler.type}'; give one of {known}")
    return _FILLERS[filler.type](filler, shape, random)


def _fan(filler: Filler, shape: Shape) -> float:
    count = math.prod(shape)
    fan_in = count / shape[0] if shape else 1
    fan_out = count / shape[1] if len(shape) > 1 else count
    norm = Filler.VarianceNorm.Name(filler.variance_norm)
    return {"FAN_IN": fan_in, "FAN_OUT": fan_out, "AVERAGE": (fan_in + fan_out) / 2}[norm]


def _constant(filler: Filler, shape: Shape, _: Generator) -> Array:
    return np.full(shape, filler.value, np.float32)


def _uniform(filler: Filler, shape: Shape, random: Generator) -> Array:
    return random.uniform(filler.min, filler.max, shape).astype(np.float32)


def _gaussian(filler: Filler, shape: Shape, random: Generator) -> Array:
    values = random.normal(filler.mean, filler.std, shape)
    if filler.sparse >= 0:  # so many non-zero inputs an output, on average
        values *= random.random(shape) < filler.sparse / shape[0]
    return values.astype(np.float32)


def _xavier(filler: Filler, shape: Shape, random: Generator) -> Array:
    limit = math.sqrt(3 / _fan(filler, shape))
    return random.uniform(-limit, limit, shape).astype(np.float32)


def _msra(filler: Filler, shape: Shape, random: Generator) -> Array:
    return random.normal(0, math.sqrt(2 / _fan(filler, shape)), shape).astype(np.float32)


def _positive_unitball(_: Filler, shape: Shape, random: Generator) -> Array:
    values: Array = random.random((shape[0], math.prod(shape[1:])), np.float32)
    values /= values.sum(axis=1, keepdims=True)
    return values.reshape(shape)


def _bilinear(_: Filler, shape: Shape, __: Generator) -> Array:
    f = math.ceil(shape[-1] / 2)
    c = (2 * f - 1 - f % 2) / (2 * f)
    ramp = 1 - np.abs(np.arange(shape[-1]) / f - c)
    return np.broadcast_to(np.outer(ramp, ramp), shape).astype(np.float32)


_FILLERS: dict[str, Callable[[Filler, Shape, Generator], Array]] = {
    "bilinear": _bilinear,
    "constant": _constant,
    "gaussian": _gaussian,
    "msra": _msra,
    "positive_unitball": _positive_unitball,
    "uniform": _uniform,
    "xavier": _xavier,
}


def fill_missing(net: Net, seed: int = 0) -> None:
    """Give every layer that needs weights and has none blobs drawn from its fillers.

    Where a prototxt names no filler Caffe would give zeros and the net would compute nothing; such layers
    get xavier. BatchNorm gets the statistics of a standard normal (mean 0, variance 1, factor 1). Layers that
    no weights file reaches (see ``Graph.shadowed``) are left to Caffe.
    """
    shadowed = net.graph.shadowed()
    for layer, shapes in all_param_shapes(net).items():
        if not shapes or layer.blobs or layer in shadowed:  # not needed or known (a fork's), or there already
            continue
        random = generator(seed, layer.name)
        if layer.type == "BatchNorm":
            arrays = [
                np.full(shape, value, np.float32) for shape, value in zip(shapes, (0, 1, 1), strict=True)
            ]
        else:
            arrays = [
                fill(f, shape, random, layer.where)
                for f, shape in zip(_fillers(layer.param, shapes), shapes, strict=True)
            ]
        layer.record = Record(layer.name, layer.type, [Blob(a) for a in arrays])


def _fillers(param: caffe_pb2.LayerParameter, shapes: list[Shape]) -> list[Filler]:
    """A filler for each blob of a layer."""
    one = Filler(type="constant", value=1)
    zero = Filler(type="constant", value=0)
    kind = param.type
    weighted: Any = {
        "Convolution": param.convolution_param,
        "Deconvolution": param.convolution_param,
        "InnerProduct": param.inner_product_param,
        "Embed": param.embed_param,
    }.get(kind)
    if weighted is not None:
        weight = weighted.weight_filler if weighted.HasField("weight_filler") else XAVIER
        return [weight, weighted.bias_filler][: len(shapes)]
    if kind == "Scale":
        s = param.scale_param
        own = s.filler if s.HasField("filler") else one
        return [own, s.bias_filler] if len(shapes) == 2 else [own if not s.bias_term else s.bias_filler]
    if kind == "Bias":
        return [param.bias_param.filler]
    if kind == "PReLU":
        f = param.prelu_param.filler
        return [f if param.prelu_param.HasField("filler") else Filler(type="constant", value=0.25)]
    if kind in ("LSTM", "RNN"):
        r = param.recurrent_param
        weight = r.weight_filler if r.HasField("weight_filler") else XAVIER
        return [weight if len(shape) > 1 else r.bias_filler for shape in shapes]
    return [zero] * len(shapes)
