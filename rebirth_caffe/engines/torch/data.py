"""The batches of a Data layer: records in the database's order, decoded ahead by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from ...data import Lmdb
from ...errors import EngineError
from ...net import Layer
from ...transform import Floats, Transform

AHEAD = 4  # batches that each worker has ready


@dataclass
class Batches:
    """Batch ``i`` of one of ``size`` processes that share the records: images and labels.

    Together they read what one process with a batch ``size`` times as large would read, from batch ``skip``
    on, and see the same crops and mirrors: these depend on the seed and the place of the record only.
    """

    layer: Layer
    seed: int
    skip: int = 0
    rank: int = 0
    size: int = 1
    _images: Lmdb | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        data, transform = self.layer.param.data_param, self.layer.param.transform_param
        if data.backend != data.LMDB:
            raise EngineError(f"{self.layer.where}: torch reads LMDB only; set backend: LMDB")
        if transform.force_color or transform.force_gray or data.rand_skip:
            raise EngineError(f"{self.layer.where}: torch knows no force_color, force_gray nor rand_skip")
        self.source, self.batch = data.source, data.batch_size
        self.transform = Transform.of(self.layer)

    def __getitem__(self, i: int) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        if self._images is None:  # in the process that reads: a database is not carried into another
            self._images = Lmdb(self.source)
        first = ((self.skip + i) * self.size + self.rank) * self.batch
        records = [self._images[(first + j) % len(self._images)] for j in range(self.batch)]
        random = np.random.default_rng([self.seed, i])
        images = [image for image, _ in records]
        if any(image.shape[0] != images[0].shape[0] for image in images) or (
            not self.transform.crop and any(image.shape != images[0].shape for image in images)
        ):
            raise EngineError(f"{self.source}: images of several sizes; make it again with --resize")
        values = self.transform.train(images, random, self.rank * self.batch, self.size * self.batch)
        return values, np.array([label for _, label in records], np.int64)

    def read(self, count: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``count`` batches in order; 0 workers: read when they are wanted."""
        ahead = {"prefetch_factor": AHEAD} if workers else {}
        loader = DataLoader(self, batch_size=None, sampler=range(count), num_workers=workers, **ahead)
        return iter(loader)
