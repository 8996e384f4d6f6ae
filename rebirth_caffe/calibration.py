"""Images to calibrate on: any few hundred of the kind the net will see, no labels are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import RebirthError, by_x
from .net import Net
from .solver import REBORN_LR, data_layer
from .transform import Transform, advice

Floats = NDArray[np.float32]
Tell = Callable[[int, int], None]  # how many are done, of how many
IMAGES = 1024
LEAST = 10
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Calibration:
    """A database, a folder of images (and its folders) or a list file, and how many images to take of it.

    They are spread evenly over it. ``transform`` is what is done to each on its way into the net.
    """

    source: str
    images: int = IMAGES
    transform: Transform = field(default_factory=Transform)

    def batches(self, shape: tuple[int, int, int], size: int) -> Iterator[tuple[Floats, int]]:
        """The images as the net takes them (n x C x H x W), ``size`` at a time, and how many there are.

        Raises RebirthError where they do not fit the net or cannot be read.
        """
        count, load = self._open(shape)
        chosen = spread(count, self.images)
        if len(chosen) < LEAST:
            what = f"--images {self.images}" if count >= LEAST else f"{self.source}: {count} images"
            raise RebirthError(f"{what}; to calibrate takes {LEAST} or more")
        for at in range(0, len(chosen), size):
            batch = np.stack([load(i) for i in chosen[at : at + size]])
            if batch.shape[1:] != shape:
                raise RebirthError(
                    f"{self.source}: its images are {by_x(batch.shape[1:])} after the transformation, "
                    f"the net takes {by_x(shape)}; {advice(batch.shape[1:], shape)}"
                )
            yield batch, len(chosen)

    def _open(self, shape: tuple[int, int, int]) -> tuple[int, Callable[[int], Floats]]:
        """How many images there are, and how to get one."""
        from .data import Recipe, open_lmdb  # takes time to import

        transform = self.transform
        path = Path(self.source)
        if (path / "data.mdb").is_file():
            database = open_lmdb(path)
            transform.shape(database[0][0], path)
            return len(database), lambda i: transform(database[i][0])
        files = _files(path)
        recipe = Recipe(resize=shape[1:], gray=shape[0] == 1)
        transform = replace(transform, crop=0)  # files are made the size the net takes

        def load(i: int) -> Floats:
            try:
                pixels = recipe.pixels(files[i].read_bytes())
            except ValueError as error:
                raise RebirthError(f"{files[i]}: {error}; remove it") from None
            except OSError as error:
                whose = f"{files[i]}, of the images of {path}"
                raise RebirthError(f"{whose}: {error.strerror}; correct or remove it") from None
            return transform(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

        return len(files), load


@dataclass(frozen=True)
class Fitted:
    """What came of a reborn layer: the relative error of its output (``init.least_squares.error``) on images
    that were held out, as inherited, as it is now, and of the closest fit, which its kernel and stride allow.
    ``note`` says why it was not fitted, or what is odd."""

    merge: str
    layer: str
    before: float | None = None
    after: float | None = None
    least: float | None = None
    ridge: float | None = None
    note: str = ""

    def __str__(self) -> str:
        said = [] if self.after is None else [f"relative error {self.after:.2f}"]
        return f"{self.layer}: {'; '.join([*said, *[self.note] * bool(self.note)])}"


# What was fitted to images has the scale of a trained net and bears less than noise does (docs/RESULTS.md).
FITTED_LR = 4.0


@dataclass(frozen=True)
class Start:
    """How reborn layers start: ``init`` is xavier, inherit or lsq, which needs the images."""

    init: str = "inherit"
    seed: int = 0
    calibration: Calibration | None = None

    @property
    def rate(self) -> float:
        """How many times as fast as the other layers reborn ones learn: the paper's ten times where nothing
        was fitted."""
        return REBORN_LR if self.calibration is None or self.init == "xavier" else FITTED_LR


def spread(count: int, wanted: int) -> list[int]:
    """Which of ``count`` images to take, ``wanted`` at most, evenly from the first to the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, wanted)).astype(int).tolist()))


def transform_of(net: Net) -> Transform:
    """What the Data layer of a train_val does to an image; nothing in a net without one."""
    layer = data_layer(net)
    return Transform() if layer is None else Transform.of(layer)


def _files(path: Path) -> list[Path]:
    """The images of a folder, or of a list: a path on each line, a label behind it or not."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    elif path.suffix.lower() in SUFFIXES:
        raise RebirthError(f"{path}: is one image; give an LMDB, a folder or a list of images")
    elif path.is_file():
        lines = [line.strip() for line in path.read_bytes().decode("utf-8", "surrogateescape").splitlines()]
        lines = [line for line in lines if line]
        whole = (path.parent / lines[0]).exists() if lines else True
        files = [path.parent / (line if whole else line.rsplit(None, 1)[0]) for line in lines]
    else:
        raise RebirthError(f"{path}: no such database, folder or list of images")
    if not files:
        raise RebirthError(f"{path}: holds no images; give an LMDB, a folder or a list of images")
    return files
