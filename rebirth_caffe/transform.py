"""What Caffe's DataTransformer does to an image on its way into a net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from .errors import RebirthError, by_x
from .net import Layer
from .schema import caffe_pb2

if TYPE_CHECKING:
    from numpy.random import Generator

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
T = TypeVar("T", np.uint8, np.float32)


UNTOUCHED = "images go in as they are, 0 to 255; else give the net's --mean-value and --scale"
SIZE = "give the --crop it was trained with, or other images"


def advice(shape: Sequence[int], wanted: Sequence[int], size: str = SIZE) -> str:
    """What to do about images (channels x height x width) where others are ``wanted``; ``size``: where it is
    their size alone."""
    if shape[0] == wanted[0]:
        return size
    again = f"make the database again {'with' if wanted[0] == 1 else 'without'} make_lmdb.py's --gray"
    sized = "" if tuple(shape[1:]) == tuple(wanted[1:]) else f" and with --resize {wanted[1]}x{wanted[2]}"
    return f"give the images it was trained for, or {again}{sized}"


@dataclass(frozen=True)
class Transform:
    """A crop, then the mean is subtracted, then ``scale`` multiplies; in TRAIN a mirror, perhaps.

    In TEST the crop is the middle of the image, in TRAIN it is anywhere.
    """

    crop: int = 0
    mean_values: tuple[float, ...] = ()
    mean_file: str | None = None
    scale: float = 1.0
    mirror: bool = False

    @classmethod
    def of(cls, layer: Layer) -> Transform:
        """The transformation a Data layer asks for."""
        t = layer.param.transform_param
        return cls(t.crop_size, tuple(t.mean_value), t.mean_file or None, t.scale, t.mirror)

    def __call__(self, images: Pixels) -> Floats:
        """Images (... x C x H x W) as in TEST."""
        height, width = images.shape[-2:]
        at = ((height - self.crop) // 2, (width - self.crop) // 2) if self.crop else (0, 0)
        values = self._window(images, *at).astype(np.float32)
        mean = self._mean(images.shape[-3:])
        if mean is not None:
            values -= self._window(mean, *at) if mean.shape[-1] > 1 else mean
        values *= np.float32(self.scale)
        return values

    @property
    def leaves_values(self) -> bool:
        """Whether no mean is subtracted and nothing scaled."""
        return self.mean_file is None and not self.mean_values and self.scale == 1

    def shape(self, image: Pixels, source: object) -> tuple[int, ...]:
        """Of an image (C x H x W) of ``source``, transformed. Raises RebirthError that names it."""
        try:
            return self(image).shape
        except RebirthError as error:
            raise RebirthError(f"{source}: {error}") from None

    def train(self, images: Sequence[Pixels], random: Generator, first: int = 0, of: int = 0) -> Floats:
        """Images (each C x H x W) as in TRAIN: N x C x H x W.

        They are those from ``first`` on of a batch of ``of`` (default: all of it): what is drawn for an image
        depends on its place in the batch only.
        """
        drawn = random.random((of or len(images), 3))[first : first + len(images)]
        channels, height, width = images[0].shape
        values = np.empty((len(images), channels, self.crop or height, self.crop or width), np.float32)
        for value, image, (down, right, turn) in zip(values, images, drawn, strict=True):
            height, width = image.shape[-2:]
            at = (int(down * (height - self.crop + 1)), int(right * (width - self.crop + 1)))
            at = at if self.crop else (0, 0)
            step = -1 if self.mirror and turn < 0.5 else 1
            value[...] = self._window(image, *at)[..., ::step]
            if self.mean_file is not None:
                whole = self._mean(image.shape)
                assert whole is not None
                value -= self._window(whole, *at)[..., ::step]
        mean = None if self.mean_file is not None else self._mean(values.shape[-3:])
        if mean is not None:
            values -= mean
        values *= np.float32(self.scale)
        return values

    def _window(self, images: NDArray[T], top: int, left: int) -> NDArray[T]:
        if not self.crop:
            return images
        height, width = images.shape[-2:]
        if self.crop > min(height, width):
            raise RebirthError(
                f"crop {self.crop} of {height}x{width} images; give larger ones, or a smaller --crop"
            )
        return images[..., top : top + self.crop, left : left + self.crop]

    def _mean(self, shape: tuple[int, ...]) -> Floats | None:
        """The mean of images of this shape, as large as they are or one value a channel."""
        if self.mean_file is not None:
            mean = _mean_image(Path(self.mean_file))
            if mean.shape != shape:
                raise RebirthError(
                    f"{self.mean_file}: a mean of {by_x(mean.shape)}, but the images are {by_x(shape)}; "
                    "give the mean of these images, or --mean-value"
                )
            return mean
        if len(self.mean_values) not in (0, 1, shape[0]):
            channels = f"{shape[0]} channel{'s' * (shape[0] > 1)}"
            raise RebirthError(
                f"{len(self.mean_values)} mean values for images of {channels}; give other images, or one "
                "value for each channel, or one for all"
            )
        return np.asarray(self.mean_values, np.float32).reshape(-1, 1, 1) if self.mean_values else None


_means: dict[Path, Floats] = {}


def _mean_image(path: Path) -> Floats:
    """A mean.binaryproto, read once."""
    if path not in _means:
        blob = caffe_pb2.BlobProto()
        try:
            blob.ParseFromString(path.read_bytes())
            shape = tuple(blob.shape.dim)[-3:] or (blob.channels, blob.height, blob.width)
            _means[path] = np.asarray(blob.data, np.float32).reshape(shape)
        except (DecodeError, ValueError) as error:
            raise RebirthError(
                f"{path}: no mean image of Caffe's ({error}); give a mean.binaryproto"
            ) from None
    return _means[path]
