"""The arithmetic of folding BatchNorm and Scale into the layer below them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..caffemodel import Array
from ..errors import WeightsError
from ..merge import Merge
from ..net import Layer, Net


def fold(net: Net, merge: Merge) -> dict[str, list[Array]]:
    """Weight and bias of the folded layer; {} where the original has no weights. In float64 throughout.

    Each layer of the group maps a channel x to factor * x + shift; they compose from the bottom up.
    """
    if not merge.becomes:
        return {}
    spec = merge.becomes[0]
    layers = [net.layer(name) for name in merge.absorbs]
    base = layers[0]
    if not any(layer.blobs for layer in layers):
        return {}
    for layer in layers:
        if not layer.blobs:
            raise WeightsError(
                f"layer '{layer.name}' has no weights in the file, so '{base.name}' cannot be folded; "
                f"give complete weights or --skip {merge.id}"
            )
    weight = base.blobs[0].array.astype(np.float64)
    bias = base.blobs[1].array.astype(np.float64).reshape(-1) if len(base.blobs) > 1 else np.zeros(1)
    for layer in layers[1:]:
        factor, shift = _affine(layer)
        if base.type == "InnerProduct" and base.param.inner_product_param.transpose:
            weight = weight * factor
        else:
            outputs = weight.reshape(len(factor), -1)
            weight = (outputs * factor[:, None]).reshape(weight.shape)
        bias = bias * factor + shift
    return {spec.name: [weight.astype(np.float32), bias.astype(np.float32)]}


def _affine(layer: Layer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(factor, shift) a channel of a BatchNorm or Scale, in TEST."""
    blobs = [blob.array.astype(np.float64).reshape(-1) for blob in layer.blobs]
    if layer.type == "Scale":
        return blobs[0], blobs[1] if len(blobs) > 1 else np.zeros_like(blobs[0])
    mean, variance, count = blobs
    unit = 0.0 if count[0] == 0 else 1 / count[0]
    factor = 1 / np.sqrt(variance * unit + layer.param.batch_norm_param.eps)
    return factor, -mean * unit * factor
