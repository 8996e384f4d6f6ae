"""Reborn layers fitted to what the original put out, layer by layer from the bottom up, without labels.

The original and the reborn net see the same calibration images. For every reborn layer, rows of what it reads
in the reborn net, as fitted so far, stand against what the original gave in its place;
``init.least_squares`` does the arithmetic of ``lsq``, ``init.rescale`` that of ``inherit``, which only scales
what was copied. Memory is bounded, whatever the number of images: rows are drawn evenly from all of them, or
from as many images, evenly spread, as there are rows.

A layer's place in the original is the blob its merge gives (the channels a Concat leaves to it) or, inside a
merge, the blob of the layer it is made after. A reducer that lost channels takes those, of the original's
reducer and of the absorbed branches, that tell best what the layer above needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from . import params
from . import plan as plans
from .caffemodel import Array
from .calibration import Calibration, Fitted, Start, Tell
from .derive import deploy
from .engines import Engine, running
from .errors import RebirthError
from .evaluate import batch_size
from .init import least_squares, rescale
from .init.fill import generator
from .init.least_squares import Doubles, Floats, Moments, Weights
from .init.reborn import group_of, stored, weight_and_bias
from .merge import IN, OUT, TENSOR, Merge, Spec
from .net import TEST, Layer, Net, Value, View
from .plan import Plan
from .rules.match import feeding, plain_relu
from .shapes import all_param_shapes, infer

ROWS = 1 << 15  # of a layer, about
BYTES = 1 << 28  # of a layer's rows, at most
HELD = 5  # every fifth image chooses the ridge
MOST_INPUTS = 4608  # of a layer, a 3x3 kernel on 512 channels: time goes with their cube

Flags = NDArray[np.bool_]
Batch = tuple[Floats, int]  # images, and how many there are in all
Found = list[Mapping[str, Floats]]  # blobs, of each net
Forward = Callable[[Floats], Mapping[str, Floats]]  # from images to blobs
Places = tuple[NDArray[np.int64], ...]  # image, row, column


def fit(
    net: Net,
    reborn: Net,
    plan: Plan,
    start: Start,
    engine: Engine,
    threads: int = 1,
    tell: Tell = lambda done, total: None,
    mix: bool = True,
) -> tuple[Net, list[Fitted]]:
    """``reborn``, which ``plan`` made of ``net``, with its reborn layers fitted, and what came of each.

    ``mix``: keep of what was inherited what a fit cannot tell, for a training to go on from; else the closest
    fits are taken as they are, which say what a merge loses. ``tell`` hears how many images of how many have
    been seen. Raises RebirthError, also for a net without weights, and EngineError.
    """
    if start.calibration is None:
        return reborn, []
    images = _Images(start.calibration, engine, threads)
    return _Fit(images, start, tell, mix).all(net, reborn, plan)


def output_errors(
    net: Net,
    reborn: Net,
    plan: Plan,
    calibration: Calibration,
    engine: Engine,
    threads: int = 1,
    tell: Tell = lambda done, total: None,
) -> dict[str, float]:
    """How far off the blobs are that the merges of ``plan`` give in ``reborn``, by the merges' ids.

    The relative error over the calibration images (see ``init.least_squares.error``), with all that the
    merges below have changed in it. A blob that the original has not, or in another size, is left out.
    """
    old, new = _original(net, plan), _Side(deploy(reborn))
    outs = {merge.id: _Level(old, new, merge).out() for merge in plan.active if not merge.exact}
    outs = {merge: blob for merge, blob in outs.items() if old.same(new, blob)}
    blobs = list(dict.fromkeys(outs.values()))
    if not blobs:
        return {}
    wrong, count = dict.fromkeys(blobs, 0.0), 0
    sums = {blob: np.zeros((2, old.shapes[blob][1])) for blob in blobs}  # of the values, of their squares
    with _Images(calibration, engine, threads).through(old, blobs, new, blobs) as batches:
        for (images, total), (found, wanted) in batches:
            count += len(images)
            for blob in blobs:
                y = wanted[blob].astype(np.float64).reshape(len(images), sums[blob].shape[1], -1)
                wrong[blob] += float(np.square(found[blob].reshape(y.shape) - y).sum())
                sums[blob] += y.sum(axis=(0, 2)), np.square(y).sum(axis=(0, 2))
            tell(count, total)
    errors = {}
    for blob, (values, squares) in sums.items():
        each = count * math.prod(old.shapes[blob][2:])  # of a channel
        spread = float((squares - np.square(values) / each).sum())
        errors[blob] = math.sqrt(wrong[blob] / (spread if spread > 0 else each * len(values)))
    return {merge: errors[blob] for merge, blob in outs.items()}


class _Side:
    """One of the two nets, as the engine runs it."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.view: View = net.graph.view(TEST)
        self.names = {layer.name for layer in net.layers}
        # Of a blob that is written in place the last value.
        self.values = {value.name: value for value in self.view.values}
        self.shapes = {value.name: shape for value, shape in infer(self.view, 1).items() if shape is not None}
        inputs = [
            *self.view.inputs,
            *(v for x in self.view.layers if x.type == "Input" for v in self.view.tops[x]),
        ]
        if len(inputs) != 1:
            raise RebirthError(
                f"{net.path}: has {len(inputs)} inputs; calibration images go into exactly one"
            )
        self.input = inputs[0].name

    def same(self, other: _Side, name: str) -> bool:
        """Whether both have a blob, of one shape."""
        return name in self.shapes and self.shapes[name] == other.shapes.get(name)

    def part(self, blobs: Sequence[str]) -> Net:
        """The layers that make these blobs."""
        needed = feeding(self.view, [self.values[name] for name in blobs])
        return self.net.replace(lambda layer: [layer] if layer in needed or layer.type == "Input" else [])


def _original(net: Net, plan: Plan) -> _Side:
    """The original of what ``plan`` makes of ``net``: with its exact merges, which compute the same, since
    the others are made after the layers that those leave."""
    return _Side(deploy(plans.apply(net, plan.only(()))))


@dataclass(frozen=True)
class _Images:
    """The calibration images, and what runs the two nets on them."""

    calibration: Calibration
    engine: Engine
    threads: int

    @contextmanager
    def through(
        self, old: _Side, wanted: Sequence[str], new: _Side, found: Sequence[str]
    ) -> Iterator[Iterator[tuple[Batch, Found]]]:
        """Each batch of images, with the blobs ``found`` of the new net and those ``wanted`` of the old."""
        size = min(batch_size(old.net), self.calibration.images)
        shape = old.shapes[old.input][1:]
        batches = self.calibration.batches((shape[0], shape[1], shape[2]), size)
        with (
            self._running(old, wanted, size) as one,
            self._running(new, found, size) as other,
            _computing((other, one), batches) as computed,
        ):
            yield computed

    @contextmanager
    def _running(self, side: _Side, blobs: Sequence[str], size: int) -> Iterator[Forward]:
        """A function from images, at most ``size``, to blobs."""
        made = [name for name in blobs if name != side.input]
        if not made:
            yield lambda images: {side.input: images}
            return
        with running(self.engine, side.part(made), threads=self.threads, batch=size) as session:
            takes = session.blobs()[side.input]  # an engine may not follow the batch

            def forward(images: Floats) -> dict[str, Floats]:
                full = np.zeros(takes, np.float32)
                full[: len(images)] = images
                found = session.forward({side.input: full}, made)
                return {side.input: images, **{name: blob[: len(images)] for name, blob in found.items()}}

            yield forward


@dataclass(frozen=True)
class _Target:
    """What a reborn layer should put out: channels of blobs of the original.

    Of a reducer that lost channels, ``need`` weighs the candidates (``least_squares.directions``) and
    ``kernels`` are theirs in the original.
    """

    channels: tuple[tuple[str, slice], ...]
    relu: bool
    need: Doubles | None = None
    kernels: Doubles | None = None


class _Fit:
    """The fit of one net."""

    def __init__(self, images: _Images, start: Start, tell: Tell, mix: bool) -> None:
        self.images, self.seed, self.tell = images, start.seed, tell
        self.lsq = start.init == "lsq"
        self.fitted = partial(_fitted, mix=mix) if self.lsq else _rescaled

    def all(self, before: Net, after: Net, plan: Plan) -> tuple[Net, list[Fitted]]:
        """``after`` with fitted layers."""
        old, student = _original(before, plan), deploy(after)
        bare = next((x for x, s in all_param_shapes(old.net).items() if s and not x.blobs), None)
        if bare is not None:
            raise RebirthError(
                f"{bare.where}: has no weights to learn from; give complete weights, or no --calibration"
            )
        names = {layer.name for layer in student.layers}
        merges = [merge for merge in plan.active if not merge.exact]
        levels = [(merge, specs) for merge in merges for specs in _levels(merge, names)]
        made: dict[str, list[Array]] = {}
        found: list[Fitted] = []
        for number, (merge, specs) in enumerate(levels):
            level = _Level(old, _Side(student.with_blobs(made)), merge)
            targets = {spec.name: level.target(spec) for spec in specs}
            if not self.lsq:  # the channels that a reducer has kept are as they were
                targets = {n: t for n, t in targets.items() if isinstance(t, str) or t.need is None}
            wanted = {name: target for name, target in targets.items() if isinstance(target, _Target)}
            rows = self._rows(level, wanted, number, len(levels)) if wanted else {}
            for name, target in targets.items():
                if isinstance(target, _Target):
                    fitted, made[name] = self.fitted(merge, level.new.net.layer(name), target, *rows[name])
                else:
                    fitted = Fitted(merge.id, name, note=target)
                found.append(fitted)
        return after.with_blobs(made), found

    def _rows(
        self, level: _Level, targets: Mapping[str, _Target], number: int, of: int
    ) -> dict[str, tuple[Floats, Floats, Flags]]:
        """For each layer rows of what it reads and of what it should give, and which of them are held out."""
        layers = {name: level.new.net.layer(name) for name in targets}
        reads = list(dict.fromkeys(layer.bottom[0] for layer in layers.values()))
        gives = list(dict.fromkeys(blob for target in targets.values() for blob, _ in target.channels))
        randoms = {name: generator(self.seed, name) for name in targets}
        rows: dict[str, list[tuple[Floats, Floats, Flags]]] = {name: [] for name in targets}
        seen, first, alike = 0, None, True
        with self.images.through(level.old, gives, level.new, reads) as batches:
            for (images, total), (given, wanted) in batches:
                first = images[0].copy() if first is None else first
                alike = alike and bool((images == first).all())
                for name, target in targets.items():
                    y = np.concatenate(
                        [wanted[blob][:, channels] for blob, channels in target.channels], axis=1
                    )
                    x = given[layers[name].bottom[0]]
                    rows[name].append(_some(layers[name], x, y, seen, total, randoms[name]))
                seen += len(images)
                self.tell(number * total + seen, of * total)
        if alike:
            raise RebirthError(
                f"{self.images.calibration.source}: its {seen} images are one and the same; give others"
            )
        return {name: tuple(map(np.concatenate, zip(*some, strict=True))) for name, some in rows.items()}  # type: ignore[misc]


@contextmanager
def _computing(sides: Sequence[Forward], batches: Iterator[Batch]) -> Iterator[Iterator[tuple[Batch, Found]]]:
    """Each batch with what the nets make of it. They compute at the same time, a batch ahead."""
    with ThreadPoolExecutor(len(sides)) as pool:

        def computed() -> Iterator[tuple[Batch, Found]]:
            last: Batch | None = None
            begun: list[Future[Mapping[str, Floats]]] = []
            for batch in chain(batches, [None]):
                found = [one.result() for one in begun]  # a net takes one batch at a time
                begun = [pool.submit(side, batch[0]) for side in sides] if batch is not None else []
                if last is not None:
                    yield last, found
                last = batch

        yield computed()


def _levels(merge: Merge, names: set[str]) -> list[list[Spec]]:
    """The reborn layers of a merge from the bottom up; those of a level do not read each other."""
    depth: dict[str, int] = {IN: 0}
    levels: dict[int, list[Spec]] = {}
    for spec in merge.becomes:
        at = max(depth.get(name, 0) for name in spec.bottom)
        if not spec.kept and spec.name in names:
            levels.setdefault(at, []).append(spec)
            at += 1
        depth.update(dict.fromkeys(spec.top, at))
    return [levels[at] for at in sorted(levels)]


@dataclass
class _Level:
    """Where to find, in both nets, what a merge's layers read and should give."""

    old: _Side
    new: _Side
    merge: Merge

    def target(self, spec: Spec) -> _Target | str:
        """What a reborn layer should put out; a reason where the original does not show it."""
        layer = self.new.net.layer(spec.name)
        weight, _ = weight_and_bias(layer)
        if weight[0].size > MOST_INPUTS:
            return f"reads {weight[0].size:,} values, too many to fit: as inherited"
        out = self.out()
        value, relu, first = self.new.view.tops[layer][0], False, 0
        while True:
            readers = value.readers
            if value.name == out and value is self.new.values[out] and self.new.same(self.old, out):
                return _Target(((out, slice(first, first + len(weight))),), relu)
            if len(readers) != 1:
                break
            reader, index = readers[0]
            if plain_relu(reader):
                relu = True
            elif reader.type == "Concat" and reader.param.concat_param.axis == 1:
                first += sum(self.new.shapes[v.name][1] for v in self.new.view.bottoms[reader][:index])
            elif reader.type in TENSOR:
                return self._inside(spec, value, relu)
            elif reader.type != "Dropout":
                return f"what it should put out is hidden behind '{reader.name}': as inherited"
            value = self.new.view.tops[reader][0]
        return "what it should put out is not in the original: as inherited"

    def out(self) -> str:
        """The blob the merge gives; "" where another merge has changed it."""
        last = next((spec for spec in reversed(self.merge.becomes) if OUT in spec.top), None)
        if last is None or last.name not in self.new.names:
            return ""
        return self.new.net.layer(last.name).top[last.top.index(OUT)]

    def _inside(self, spec: Spec, value: Value, relu: bool) -> _Target | str:
        """The target of a layer that another reborn layer reads."""
        if spec.like not in self.old.names:
            return "the layer it is made after is not in the original: as inherited"
        like = self.old.net.layer(spec.like)
        top, shape = like.top[0], self.new.shapes[value.name]
        theirs = self.old.shapes[top]
        if theirs == shape:
            return _Target(((top, slice(None)),), relu)
        above = next((s for s in self.merge.becomes if s.bottom == spec.top and s.like != s.name), None)
        if above is None or theirs[2:] != shape[2:] or above.like not in self.old.names:
            return "no blob of the original is like what it puts out: as inherited"
        return self._reduced(like, self.old.net.layer(above.like), above, relu)

    def _reduced(self, like: Layer, reader: Layer, above: Spec, relu: bool) -> _Target:
        """The target of a reducer: its own channels, as much as their reader weighs them, and those of every
        absorbed branch that gives what the reader is to give, pixel by pixel."""
        weight, _ = weight_and_bias(reader)
        taps = np.moveaxis(weight, 1, -1).reshape(-1, weight.shape[1]).astype(np.float64)
        own, _ = weight_and_bias(like)
        branches = [
            branch
            for rows in above.rows
            if rows.layer in self.old.names and rows.layer != reader.name
            for branch in [self.old.net.layer(rows.layer)]
            if self.old.shapes[branch.top[0]][2:] == self.old.shapes[like.top[0]][2:]
        ]
        size = len(own) + sum(len(weight_and_bias(branch)[0]) for branch in branches)
        need, kernels = np.eye(size), np.zeros((size, own[0].size))
        need[: len(own), : len(own)] = taps.T @ taps
        at = 0
        for layer in (like, *branches):
            kernel, _ = weight_and_bias(layer)
            if layer.bottom == like.bottom and kernel.shape[1:] == own.shape[1:]:
                kernels[at : at + len(kernel)] = kernel.reshape(len(kernel), -1)
            at += len(kernel)
        channels = tuple((layer.top[0], slice(None)) for layer in (like, *branches))
        return _Target(channels, relu, need, kernels)


def _fitted(
    merge: Merge, layer: Layer, target: _Target, x: Floats, y: Floats, held: Flags, mix: bool
) -> tuple[Fitted, list[Array]]:
    """What came of a layer, and its blobs."""
    weight, bias = weight_and_bias(layer)
    start: Doubles = weight.reshape(len(weight), -1).astype(np.float64)
    if target.need is not None and target.kernels is not None:
        covariance = Moments(y.shape[1]).add(y).covariance
        chosen = least_squares.directions(covariance, target.need, len(weight), target.relu)
        y, start = y @ chosen.astype(np.float32), chosen.T @ target.kernels
    pieces: list[Weights] = []
    errors: list[tuple[float, float, float]] = []
    ridges: list[float] = []
    worse = False
    for mine, wanted, own, shift in _groups(layer, x, y, start, bias):
        best = least_squares.fit(mine, wanted, held, target.relu, own)
        ridges.append(best.ridge)
        made, tried = best.weights, best.tried
        inherited = own, shift
        before = least_squares.error(mine[held], wanted[held], inherited, target.relu)
        if mix and target.need is None:  # the channels of a reducer that lost some are not inherited
            scaled = _scaled(inherited, _factors(inherited, mine[~held], wanted[~held], target.relu))
            made, tried = (_mixed(weights, scaled, best.channels) for weights in (made, tried))
        after = least_squares.error(mine[held], wanted[held], tried, target.relu)
        if target.need is None and after > before:
            made, after, worse = inherited, before, True
        pieces.append(made)
        errors.append((before, after, best.error))
    found = np.concatenate([piece for piece, _ in pieces]).reshape(weight.shape).astype(np.float32)
    moved = np.concatenate([piece for _, piece in pieces]).astype(np.float32)
    notes = ["no fit is better than what is inherited"] if worse else []
    dead = int((y.max(axis=0) <= 0).sum()) if target.relu else 0
    if dead:
        notes.append(f"{dead} of {len(found)} channels never active in the original")
    still = int((x.max(axis=0) == x.min(axis=0)).sum())
    if still:
        notes.append(f"{still} of {x.shape[1]} inputs never change")
    if len(x) < 2 * start.shape[1]:
        notes.append(f"{len(x):,} rows for {start.shape[1]:,} inputs: more images would do it good")
    before, after, least = (float(one) for one in np.mean(errors, axis=0))
    fitted = Fitted(
        merge.id,
        layer.name,
        before=before if target.need is None else None,
        after=after,
        least=least,
        ridge=max(ridges),
        note="; ".join(notes),
    )
    return fitted, stored(layer, found, moved)


def _mixed(fitted: Weights, scaled: Weights, error: Doubles) -> Weights:
    """A fit with as much of what was inherited, scaled to the target by s, as it cannot tell; of a channel

        w = (1 - e) w_fit + e s w_inherited,    e: the fit's relative error on rows held out

    What x does not tell of y least squares answers with the mean. Its channels are blurred, and so more alike
    than the original's; the layers above, and a training, need the detail that was lost, which the inherited
    kernels have, if not where it belongs (docs/RESULTS.md). A fit without error stays as it is.
    """
    share = np.minimum(error, 1)
    (weight, shift), (weight_too, shift_too) = _scaled(fitted, 1 - share), _scaled(scaled, share)
    return weight + weight_too, shift + shift_too


def _factors(weights: Weights, x: Floats, y: Floats, relu: bool) -> Doubles:
    """Of each channel, to be nearest to the target on rows."""
    return rescale.scales(least_squares.outputs(x, weights, relu), y)


def _scaled(weights: Weights, factors: Doubles) -> Weights:
    """Each channel times its factor."""
    return weights[0] * factors[:, None], weights[1] * factors


def _rescaled(
    merge: Merge, layer: Layer, target: _Target, x: Floats, y: Floats, held: Flags
) -> tuple[Fitted, list[Array]]:
    """What came of a layer whose channels are only scaled, and its blobs."""
    weight, bias = weight_and_bias(layer)
    flat: Doubles = weight.reshape(len(weight), -1).astype(np.float64)
    factors: list[Doubles] = []
    errors: list[tuple[float, float]] = []
    for mine, wanted, own, shift in _groups(layer, x, y, flat, bias):
        factors.append(_factors((own, shift), mine[~held], wanted[~held], target.relu))
        weights = (own, shift), _scaled((own, shift), factors[-1])
        before, after = (least_squares.error(mine[held], wanted[held], w, target.relu) for w in weights)
        errors.append((before, after))
    factor = np.concatenate(factors)
    before, after = np.mean(errors, axis=0)
    fitted = Fitted(merge.id, layer.name, float(before), float(after), note=f"scaled by {factor.mean():.2f}")
    made, moved = _scaled((flat, bias.astype(np.float64)), factor)
    return fitted, stored(layer, made.reshape(weight.shape).astype(np.float32), moved.astype(np.float32))


def _groups(
    layer: Layer, x: Floats, y: Floats, weight: Doubles, bias: Array
) -> Iterator[tuple[Floats, Floats, Doubles, Doubles]]:
    """Rows, targets, weight and bias of each group of a layer."""
    arrays = ((x, 1), (y, 1), (weight, 0), (bias.astype(np.float64), 0))
    return zip(*(np.split(array, group_of(layer), axis) for array, axis in arrays), strict=True)


def _some(
    layer: Layer, x: Floats, y: Floats, seen: int, images: int, random: np.random.Generator
) -> tuple[Floats, Floats, Flags]:
    """Rows of one batch: what the layer reads, what it should give, which are held out.

    ``seen``: how many of all the ``images`` came before.
    """
    conv = None if layer.type == "InnerProduct" else params.conv(layer.param)
    inputs = x[0].size if conv is None else x.shape[1] * math.prod(conv.kernel)
    rows = min(ROWS, BYTES // (4 * (inputs + y.shape[1])))
    order = np.arange(seen, seen + len(x) + 1) * min(rows, images) // images
    taken = np.flatnonzero(np.diff(order))
    held = order[taken] % HELD == HELD - 1
    if conv is None:
        return x[taken].reshape(len(taken), -1), y[taken].reshape(len(taken), -1), held
    pixels = math.prod(y.shape[2:])
    each = min(max(rows // images, 1), pixels)
    drawn = [random.permutation(pixels)[:each] for _ in taken]
    image, (row, column) = np.repeat(taken, each), np.divmod(np.array(drawn, np.int64).ravel(), y.shape[3])
    return patches(x, conv, (image, row, column)), y[image, :, row, column], np.repeat(held, each)


def patches(x: Floats, conv: params.Conv, places: Places) -> Floats:
    """What a (2-D) convolution reads for these of its outputs: channels x kernel, as in its weight."""
    (image, row, column), (height, width) = places, conv.pad
    padded = np.pad(x, ((0, 0), (0, 0), (height, height), (width, width)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, conv.extent, axis=(2, 3))
    found = windows[image, :, row * conv.stride[0], column * conv.stride[1]]
    return found[..., :: conv.dilation[0], :: conv.dilation[1]].reshape(len(image), -1)
