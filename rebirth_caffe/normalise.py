"""Batch normalisation for the time of training: put behind convolutions, and folded into them afterwards.

Deep nets in which nothing normalises learn slowly, and at low rates only. While it is trained a convolution
is therefore followed by BatchNorm and Scale,

    y = gamma * (Wx + b - mean) / sqrt(variance + eps) + beta

with the mean and variance of a batch (Ioffe and Szegedy, 2015). Scale begins with the deviation and the mean
of what the convolution put out, so that y is at first what it was. What is learned in the end is a
convolution again, with gamma W / sqrt(variance + eps) for its weight: no other net ever sees the two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .caffemodel import Array, Record
from .derive import deploy
from .engines import Engine
from .evaluate import observe
from .init.exact import batch_norm
from .net import TEST, Layer, Net
from .prototxt import quote
from .transform import Transform

PREFIX = "normalise/"  # in front of the names of what is added
EPS = 1e-5  # Caffe's own
KEPT = 0.99  # of the moving mean and variance by each batch: they are those of the last hundred
IMAGES = 200  # to measure means and variances on

Doubles = NDArray[np.float64]
Moments = tuple[Doubles, Doubles]  # mean and variance of each channel

# BatchNorm's blobs are no parameters; Caffe before 1.0 has to be told.
LAYERS = """\
layer {{
  name: {norm}
  type: "BatchNorm"
  bottom: {raw}
  top: {top}
  param {{ lr_mult: 0 decay_mult: 0 }}
  param {{ lr_mult: 0 decay_mult: 0 }}
  param {{ lr_mult: 0 decay_mult: 0 }}
  batch_norm_param {{ moving_average_fraction: {kept} eps: {eps} }}
}}
layer {{
  name: {scale}
  type: "Scale"
  bottom: {top}
  top: {top}
  param {{ decay_mult: 0 }}
  param {{ decay_mult: 0 }}
  scale_param {{ bias_term: true }}
}}
"""


def convolutions(net: Net) -> list[Layer]:
    """The layers of a net with weights that are normalised while it learns.

    They are the convolutions of its deploy net that learn by themselves, have a bias to take the shift, and
    are not normalised as it is; none, should the net have layers that are called as norms are.
    """
    if any(layer.name.startswith(PREFIX) for layer in net.layers):
        return []
    view = deploy(net).graph.view(TEST)
    found = []
    for layer in view.layers:
        learns = len(layer.blobs) == 2 and layer.spec(0).lr_mult and not layer.shared_params()
        readers = {reader.type for reader, _ in view.tops[layer][0].readers} if layer.top else set()
        if layer.type == "Convolution" and learns and "BatchNorm" not in readers:
            found.append(layer)
    return found


def with_norms(net: Net, names: Iterable[str]) -> Net:
    """``net`` with BatchNorm and Scale, which change nothing yet, behind these convolutions."""
    wanted = set(names)
    outputs: dict[str, int] = {}

    def swap(layer: Layer) -> list[Layer]:
        if layer.name not in wanted:
            return [layer]
        outputs[layer.name] = len(layer.blobs[0].array)
        norm, scale = _names(layer.name)
        text = LAYERS.format(
            norm=quote(norm), scale=quote(scale), raw=quote(norm), top=quote(layer.top[0]), kept=KEPT, eps=EPS
        )
        return [layer.rewired(layer.bottom, [norm]), *Net.parse(text).layers]

    made = net.replace(swap)
    return started(made, {name: (np.zeros(n), np.full(n, 1 - EPS)) for name, n in outputs.items()})


def started(net: Net, moments: Mapping[str, Moments]) -> Net:
    """A net ``with_norms`` whose norms begin with these means and variances, and take nothing away."""
    blobs: dict[str, list[Array]] = {}
    for name, (mean, variance) in moments.items():
        norm, scale = _names(name)
        blobs[norm] = _single(mean, variance, np.ones(1))
        blobs[scale] = _single(np.sqrt(variance + EPS), mean)
    return net.with_blobs(blobs)


def measure(
    net: Net,
    names: Sequence[str],
    database: str,
    transform: Transform,
    engine: Engine,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Moments]:
    """Mean and variance of each channel that these convolutions of ``net`` put out, over some images of a
    database, spread evenly over it. Raises RebirthError where these do not fit, EngineError."""
    blobs = {_names(name)[0]: name for name in names}
    sums = {name: np.zeros((2, 1)) for name in names}
    counts = dict.fromkeys(names, 0)
    watched = with_norms(deploy(net), names)
    for found in observe(watched, list(blobs), database, transform, engine, threads, IMAGES, progress):
        for blob, name in blobs.items():
            value = found[blob].astype(np.float64)
            sums[name] = sums[name] + [value.sum(axis=(0, 2, 3)), np.square(value).sum(axis=(0, 2, 3))]
            counts[name] += value[:, 0].size
    made = {}
    for name, (total, squares) in sums.items():
        mean = total / counts[name]
        made[name] = mean, np.maximum(squares / counts[name] - mean * mean, 0)
    return made


def fold(records: Mapping[str, Record]) -> dict[str, list[Array]]:
    """The blobs of convolutions that were trained with norms, from the records of a caffemodel: by their
    names, those of the norms folded in."""
    found: dict[str, list[Array]] = {}
    for name in records:
        norm, scale = _names(name)
        if norm not in records:
            continue
        weight, bias = (blob.array.astype(np.float64) for blob in records[name].blobs)
        factor, shift = batch_norm(records[norm].blobs, EPS)
        gamma, beta = (blob.array.ravel().astype(np.float64) for blob in records[scale].blobs)
        factor, shift = gamma * factor, gamma * shift + beta
        weight *= factor.reshape(-1, *[1] * (weight.ndim - 1))
        found[name] = _single(weight, (bias.ravel() * factor + shift).reshape(bias.shape))
    return found


def _names(name: str) -> tuple[str, str]:
    """The BatchNorm behind a convolution, which is also what its own blob is called, and the Scale."""
    return PREFIX + name, f"{PREFIX}{name}/scale"


def _single(*arrays: Doubles) -> list[Array]:
    return [array.astype(np.float32) for array in arrays]
