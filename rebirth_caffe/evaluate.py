"""Accuracy of a net over a database, in any engine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .calibration import spread
from .cost import cost
from .data import UNLABELLED, Lmdb, open_lmdb
from .derive import deploy
from .engines import Engine, Session, running
from .errors import RebirthError, by_x
from .net import TEST, Net
from .shapes import all_param_shapes
from .transform import Transform, advice

BATCH = 100
BATCH_BYTES = 256 << 20  # of all the net's blobs in a batch
FLT_MIN = float(np.finfo(np.float32).tiny)  # what Caffe's loss takes a smaller probability for
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class NotFinite(RebirthError):
    """A net whose output is no number."""


@dataclass(frozen=True)
class Accuracy:
    """Shares (0..1) of images whose label is the net's first guess, or among its first five; mean loss."""

    top1: float
    top5: float
    loss: float
    images: int


def evaluate_net(
    net: Net,
    database: Path | str,
    engine: Engine,
    transform: Transform | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    scratch: Path | None = None,
    labels: Labels | None = None,
) -> Accuracy:
    """``evaluate`` for a net with its weights: deploy, or a train_val, of which the deploy net is derived.

    ``scratch`` is where the files for the engine are written, and removed again.
    """
    with _files(net, scratch) as files:
        return evaluate(*files, database, engine, transform, threads, progress, net.path, labels)


def is_labelled(database: Path | str) -> bool:
    """Whether its images have labels."""
    with open_lmdb(database) as images:
        return bool(images[0][1] != UNLABELLED)


def guesses(
    net: Net,
    database: Path | str,
    engine: Engine,
    transform: Transform | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    scratch: Path | None = None,
) -> Labels:
    """What class a net takes each image for; arguments as of ``evaluate_net``."""
    with _files(net, scratch) as files:
        found = _scores(*files, database, engine, transform, threads, progress, net.path)
        return np.concatenate([scores.argmax(axis=1) for scores, _, _ in found])


@contextmanager
def _files(net: Net, scratch: Path | None) -> Iterator[tuple[Path, Path]]:
    """The deploy net of ``net`` and its weights, as files for a while."""
    if not any(layer.blobs for layer in net.layers):
        raise RebirthError(f"{net.path}: has no weights; an untrained net has no accuracy")
    deployed = deploy(net)
    if bare := [x.name for x, shapes in all_param_shapes(deployed).items() if shapes and not x.blobs]:
        more = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
        raise RebirthError(f"{net.path}: no weights for '{bare[0]}'{more}; give weights of this very net")
    with tempfile.TemporaryDirectory(prefix=".test.", dir=scratch) as folder:
        files = (Path(folder) / "deploy.prototxt", Path(folder) / "net.caffemodel")
        deployed.write(files[0])
        deployed.write_weights(files[1])
        yield files


def evaluate(
    prototxt: Path,
    weights: Path,
    database: Path | str,
    engine: Engine,
    transform: Transform | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    name: str = "",
    labels: Labels | None = None,
) -> Accuracy:
    """Run every image of an LMDB through a deploy net; counts and loss as Caffe's own layers have them.

    ``name`` is what messages call the net; ``labels`` stand for the database's own. Raises RebirthError where
    net and images do not fit together, NotFinite where the net gives no numbers, EngineError where the engine
    refuses.
    """
    name = name or str(prototxt)
    right1 = right5 = seen = 0
    loss = 0.0
    for scores, own, kind in _scores(prototxt, weights, database, engine, transform, threads, progress, name):
        wanted = own if labels is None else labels[seen : seen + len(own)]
        if not 0 <= wanted.min() <= wanted.max() < scores.shape[1]:
            wrong = wanted.max() if wanted.min() >= 0 else wanted.min()
            if wrong == UNLABELLED:
                raise RebirthError(f"{database}: its images have no labels; give some that have")
            raise RebirthError(f"{database}: label {wrong}, but {name} knows {scores.shape[1]} classes")
        rank = _ranks(scores, wanted)
        right1 += int((rank < 1).sum())
        right5 += int((rank < 5).sum())
        loss += _loss(scores, wanted, kind)
        seen += len(wanted)
    return Accuracy(right1 / seen, right5 / seen, loss / seen, seen)


def _scores(
    prototxt: Path,
    weights: Path,
    database: Path | str,
    engine: Engine,
    transform: Transform | None,
    threads: int,
    progress: Callable[[int, int], None],
    name: str,
) -> Iterator[tuple[Floats, Labels, str]]:
    """Scores of a batch of images, their labels, and what kind of scores (see ``_ends``)."""
    transform = transform or Transform()
    net = Net.load(prototxt)
    blob, output, kind = _ends(net, name)
    seen = 0
    with open_lmdb(database) as images:
        total = len(images)
        shape = transform.shape(images[0][0], database)
        batch = min(batch_size(net), total)
        with engine.open(prototxt, weights, threads=threads, batch=batch) as session:
            wanted = session.blobs()[blob]
            if wanted[1:] != shape:
                raise RebirthError(
                    f"{name}: takes {by_x(wanted[1:])}, the images of {database} are {by_x(shape)} after the "
                    f"transformation; {advice(shape, wanted[1:])}"
                )
            for found, labels in _forwards(session, blob, images, transform, [output]):
                out = found[output]
                if math.prod(out.shape[2:]) != 1:
                    raise RebirthError(
                        f"{name}: gives {by_x(out.shape[1:])} for an image, not a score for each class"
                    )
                scores = out.reshape(len(out), -1)
                if not np.isfinite(scores).all():
                    raise NotFinite(f"{name}: the net's output is not finite; its weights have diverged")
                yield scores, labels, kind
                seen += len(labels)
                progress(seen, total)


def _ranks(scores: Floats, labels: Labels) -> NDArray[np.int64]:
    """How many classes come before the right one; of equals it is the last, as in Caffe."""
    own = scores[np.arange(len(labels)), labels][:, None]
    return np.asarray((scores >= own).sum(axis=1) - 1)


def _loss(scores: Floats, labels: Labels, kind: str) -> float:
    """The sum of SoftmaxWithLoss over scores, or over what are probabilities already."""
    values = scores.astype(np.float64)
    if kind == "scores":
        values = np.exp(values - values.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
    return -math.fsum(np.log(np.maximum(values[np.arange(len(labels)), labels], FLT_MIN)))


def _ends(net: Net, name: str) -> tuple[str, str, str]:
    """The blobs where images go in and where "scores" come out, or "probabilities".

    They are read before a Softmax, which rounds, unless it works in place.
    """
    view = net.graph.view(TEST)
    inputs = [*view.inputs, *(v for x in view.layers if x.type == "Input" for v in view.tops[x])]
    for what, found in (("inputs", inputs), ("outputs", view.outputs)):
        if len(found) != 1:
            names = f" ({', '.join(value.name for value in found)})" if found else ""
            raise RebirthError(f"{name}: has {len(found)} {what}{names}; accuracy needs exactly one")
    output = view.outputs[0]
    layer = output.producer
    if layer is None or layer.type != "Softmax":
        return inputs[0].name, output.name, "scores"
    before = view.bottoms[layer][0]
    if before.name == output.name:
        return inputs[0].name, output.name, "probabilities"
    return inputs[0].name, before.name, "scores"


def observe(
    net: Net,
    blobs: Sequence[str],
    database: Path | str,
    transform: Transform,
    engine: Engine,
    threads: int = 1,
    images: int = 500,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Mapping[str, Floats]]:
    """What a deploy net with its weights gives in ``blobs`` for ``images`` of a database, spread evenly over
    it, batch by batch: images x the shape of the blob."""
    image = next(top for layer in net.layers if layer.type == "Input" for top in layer.top)
    with open_lmdb(database) as lmdb:
        chosen, seen = spread(len(lmdb), images), 0
        with running(engine, net, threads=threads, batch=min(50, len(chosen))) as session:
            for found, labels in _forwards(session, image, lmdb, transform, blobs, chosen):
                yield found
                seen += len(labels)
                progress(seen, len(chosen))


def _forwards(
    session: Session,
    image: str,
    images: Lmdb,
    transform: Transform,
    blobs: Sequence[str],
    chosen: Sequence[int] | None = None,
) -> Iterator[tuple[dict[str, Floats], Labels]]:
    """What a net gives in ``blobs`` for each batch of ``images`` (or of the ``chosen``) put into ``image``;
    and their labels."""
    shape = session.blobs()[image]
    for pixels, labels in batches(images, shape[0], chosen):
        values = np.zeros(shape, np.float32)
        values[: len(labels)] = transform(pixels)
        found = session.forward({image: values}, blobs)
        yield {blob: value[: len(labels)] for blob, value in found.items()}, labels


def batch_size(net: Net) -> int:
    """Images that a net of this size takes at a time."""
    try:
        each = cost(net).activation_bytes
    except RebirthError:
        return 1
    return max(1, min(BATCH, BATCH_BYTES // max(1, each)))


def batches(
    images: Lmdb, size: int, chosen: Sequence[int] | None = None
) -> Iterator[tuple[NDArray[np.uint8], Labels]]:
    """Images (all, or the ``chosen``) and labels, ``size`` at a time."""
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    total = len(images if chosen is None else chosen)
    for i, (image, label) in enumerate(images if chosen is None else (images[j] for j in chosen), 1):
        if pixels and image.shape != pixels[0].shape:
            raise RebirthError(
                f"{images.path}: images of {by_x(pixels[0].shape)} and of {by_x(image.shape)}; "
                "make it again with --resize"
            )
        pixels.append(image)
        labels.append(label)
        if len(pixels) == size or i == total:
            yield np.stack(pixels), np.array(labels, np.int64)
            pixels, labels = pixels[:0], labels[:0]
