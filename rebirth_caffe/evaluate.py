"""Accuracy of a deploy net over a database, in any engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data import Lmdb, open_lmdb
from .engines import Engine
from .errors import RebirthError
from .net import Layer, Net
from .schema import caffe_pb2

BATCH = 100
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Transform:
    """What is done to an image on its way into the net, as Caffe's DataTransformer does it in TEST.

    A crop takes the centre; then the mean is subtracted, then ``scale`` multiplies.
    """

    crop: int = 0
    mean_values: tuple[float, ...] = ()
    mean_file: str | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, layer: Layer) -> Transform:
        """The transformation a Data layer asks for."""
        t = layer.param.transform_param
        return cls(t.crop_size, tuple(t.mean_value), t.mean_file or None, t.scale)

    def __call__(self, image: NDArray[np.uint8]) -> Images:
        """A C x H x W image, ready for the net."""
        top = (image.shape[1] - self.crop) // 2 if self.crop else 0
        left = (image.shape[2] - self.crop) // 2 if self.crop else 0
        if min(top, left) < 0:
            raise RebirthError(
                f"crop {self.crop} of {image.shape[1]}x{image.shape[2]} images; give a smaller --crop"
            )
        window = (slice(top, top + self.crop), slice(left, left + self.crop)) if self.crop else ()
        values = image[(slice(None), *window)].astype(np.float32)
        if self.mean_file is not None:
            mean = _mean_image(Path(self.mean_file))
            values = values - mean[(slice(None), *window)]
        elif self.mean_values:
            means = np.asarray(self.mean_values, np.float32)
            if len(means) not in (1, len(values)):
                raise RebirthError(f"{len(means)} mean values for images of {len(values)} channels")
            values = values - means.reshape(-1, 1, 1)
        return values * np.float32(self.scale)


_means: dict[Path, Images] = {}


def _mean_image(path: Path) -> Images:
    """A mean.binaryproto, read once."""
    if path not in _means:
        blob = caffe_pb2.BlobProto()
        try:
            blob.ParseFromString(path.read_bytes())
        except Exception as error:
            raise RebirthError(f"{path}: no mean image of Caffe: {error}") from None
        shape = tuple(blob.shape.dim)[-3:] or (blob.channels, blob.height, blob.width)
        _means[path] = np.asarray(blob.data, np.float32).reshape(shape)
    return _means[path]


@dataclass(frozen=True)
class Accuracy:
    """Shares (0..1) of images whose label is the net's first guess, or among its first five; mean loss."""

    top1: float
    top5: float
    loss: float
    images: int


def evaluate(
    prototxt: Path,
    weights: Path,
    database: Path | str,
    engine: Engine,
    transform: Transform | None = None,
    threads: int = 1,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Run every image of an LMDB through a deploy net that ends in probabilities.

    Raises RebirthError where net and images do not fit together, EngineError where the engine refuses.
    """
    transform = transform or Transform()
    net = Net.load(prototxt)
    view = net.graph.views[0]
    if len(view.outputs) != 1:
        names = ", ".join(value.name for value in view.outputs)
        raise RebirthError(f"{prototxt}: has the outputs {names}; accuracy needs exactly one")
    output = view.outputs[0].name
    right1 = right5 = seen = 0
    loss = 0.0
    with open_lmdb(database) as images:
        total = min(len(images), limit or len(images))
        first = transform(images[0][0])
        with engine.open(prototxt, weights, threads=threads, batch=min(BATCH, total)) as session:
            name, shape = _input(net, session.blobs())
            if shape[1:] != first.shape:
                raise RebirthError(
                    f"{prototxt}: takes {'x'.join(map(str, shape[1:]))}, the images are "
                    f"{'x'.join(map(str, first.shape))} after the crop; give the --crop it was trained with"
                )
            for start in range(0, total, shape[0]):
                batch, labels = _batch(images, start, min(start + shape[0], total), transform, shape)
                scores = session.forward({name: batch}, [output])[output].reshape(shape[0], -1)[: len(labels)]
                if labels.max() >= scores.shape[1]:
                    raise RebirthError(
                        f"{database}: label {labels.max()}, but {prototxt} knows {scores.shape[1]}"
                    )
                own = scores[np.arange(len(labels)), labels]
                rank = (scores > own[:, None]).sum(axis=1)
                right1 += int((rank < 1).sum())
                right5 += int((rank < 5).sum())
                loss += float(-np.log(np.maximum(own, 1e-38)).sum())
                seen += len(labels)
                progress(seen, total)
    if not math.isfinite(loss):
        raise RebirthError(f"{weights}: the net's output is not finite; the weights have diverged")
    return Accuracy(right1 / seen, right5 / seen, loss / seen, seen)


def _input(net: Net, blobs: dict[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    view = net.graph.views[0]
    names = [v.name for v in view.inputs]
    names += [v.name for x in view.layers if x.type == "Input" for v in view.tops[x]]
    if len(names) != 1:
        raise RebirthError(
            f"{net.path}: has {len(names)} inputs; accuracy needs exactly one, give a deploy net"
        )
    return names[0], blobs[names[0]]


def _batch(
    images: Lmdb, start: int, stop: int, transform: Transform, shape: tuple[int, ...]
) -> tuple[Images, NDArray[np.int64]]:
    """Images start..stop, the rest of the batch zero, and their labels."""
    batch = np.zeros(shape, np.float32)
    labels = np.zeros(stop - start, np.int64)
    for i in range(start, stop):
        image, labels[i - start] = images[i]
        batch[i - start] = transform(image)
    return batch, labels
