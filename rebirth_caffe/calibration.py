"""Images to calibrate on: no labels are needed, any few hundred of the kind the net will see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data import Recipe, open_lmdb
from .errors import RebirthError
from .evaluate import Transform

Floats = NDArray[np.float32]
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
        chosen = np.unique(np.linspace(0, count - 1, min(count, self.images)).astype(int))
        if len(chosen) < LEAST:
            raise RebirthError(f"{self.source}: {len(chosen)} images; to calibrate takes {LEAST} or more")
        for at in range(0, len(chosen), size):
            batch = np.stack([load(int(i)) for i in chosen[at : at + size]])
            if batch.shape[1:] != shape:
                raise RebirthError(
                    f"{self.source}: its images are {_x(batch.shape[1:])} after the transformation, "
                    f"the net takes {_x(shape)}; give the --crop it was trained with, or other images"
                )
            yield batch, len(chosen)

    def _open(self, shape: tuple[int, int, int]) -> tuple[int, Callable[[int], Floats]]:
        """How many images there are, and how to get one."""
        path = Path(self.source)
        if (path / "data.mdb").is_file():
            database = open_lmdb(path)
            return len(database), lambda i: self.transform(database[i][0])
        files = _files(path)
        size, transform = shape[1:], replace(self.transform, crop=0)
        if self.transform.mean_file is not None:
            size, transform = size, self.transform
        recipe = Recipe(resize=size, gray=shape[0] == 1)

        def load(i: int) -> Floats:
            try:
                pixels = recipe.pixels(files[i].read_bytes())
            except ValueError as error:
                raise RebirthError(f"{files[i]}: {error}; remove it") from None
            return transform(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

        return len(files), load


def _files(path: Path) -> list[Path]:
    """The images of a folder, or of a list: a path on each line, a label behind it or not."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
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


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
