"""Any number of prototxts through the whole tool and real Caffe: what a collection says of this tool.

Each file is read, written back, reborn (by default and ``exact``) and, as far as real Caffe builds it, built
and computed before and after. That happens in a process of its own, which may take so long and so much
memory and no more: what one file does is no other's business.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from . import prototxt
from .caffemodel import Array, Blob, Record
from .derive import deploy, is_trainable
from .engines import Engine, Session
from .errors import EngineError, RebirthError
from .init.fill import generator
from .net import TEST, Layer, Net, Value
from .rebirth import Result, rebirth
from .schema import caffe_pb2
from .shapes import STOCK, Shape, all_param_shapes, infer

OK, REFUSED, FAILED = "ok", "refused", "FAILED"
# Layers that open files, write them or run code as soon as Caffe builds them: nets that hold one are not
# built. A train_val's deploy net has left its data behind.
_CLOSED = ("Data", "HDF5Data", "HDF5Output", "ImageData", "Python", "WindowData")
_CLOSED_TEXT = re.compile(
    rb"""["'](?:%s)["']|\b(?:HDF5_|IMAGE_|WINDOW_)?DATA\b|HDF5_OUTPUT""" % "|".join(_CLOSED).encode()
)
# A step in these functions turns the last bit of a value into another answer.
_STEPS = ("Accuracy", "ArgMax", "Filter", "Threshold")
_SAME = 1e-4  # largest difference of what exact merges leave, relative to the largest value


@dataclass(frozen=True)
class Limits:
    """What one file may take: processor seconds here, seconds in Caffe, bytes, weights to be made up."""

    seconds: int = 5
    caffe_seconds: float = 60
    memory: int = 4 * 2**30
    weights: int = 64_000_000


@dataclass
class Checked:
    """What became of one file."""

    path: Path
    status: str = OK  # or REFUSED, with the reason, or FAILED: something this tool must not do
    note: str = ""  # why it was refused or failed
    layers: int = 0
    merges: int = 0  # to be retrained
    exact: int = 0
    seconds: float = 0  # of a processor, for reading, writing and both rebirths
    written: bool = False  # whether an unchanged write gave the same bytes
    caffe: str = ""  # what Caffe said: "same", "refuses it: ...", "not asked: ..."
    built: bool = False  # whether Caffe built the original
    difference: float | None = None  # of the outputs after exact merges, where they were computed
    unknown: list[str] = field(default_factory=list)  # types whose shapes are not known

    def fail(self, note: str) -> None:
        """Something that must not be; the first of them is kept."""
        if self.status != FAILED:
            self.status, self.note = FAILED, note


def check(
    paths: Sequence[Path], engine: Engine | None, jobs: int = 1, limits: Limits | None = None
) -> Iterator[Checked]:
    """Check every file, ``jobs`` at a time; the results in the order of ``paths``.

    ``engine`` is real Caffe; without it nets are only read, written and reborn.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="check_corpus.") as scratch:
        waiting = list(reversed(range(len(paths))))
        running: list[_Job] = []
        done: dict[int, Checked] = {}
        told = 0
        try:
            while told < len(paths):
                while waiting and len(running) < jobs:
                    i = waiting.pop()
                    running.append(_Job(i, paths[i], engine, limits, Path(scratch) / str(i)))
                patience = max(0.0, min(job.deadline for job in running) - time.monotonic())
                heard = wait([job.pipe for job in running], patience)
                for job in list(running):
                    if job.pipe in heard:
                        job.listen()
                    elif time.monotonic() >= job.deadline:
                        job.late()
                    if job.ended:
                        running.remove(job)
                        done[job.index] = job.checked
                while told in done:
                    yield done.pop(told)
                    told += 1
        finally:
            for job in running:
                job.kill()


class _Job:
    """One file in its process."""

    def __init__(self, index: int, path: Path, engine: Engine | None, limits: Limits, folder: Path) -> None:
        self.index = index
        self.checked = Checked(path)
        self.limits = limits
        self.folder = folder
        self.ended = False
        self.in_caffe = False
        # Its processor time is limited by the system; this is for what waits and does not compute.
        self.deadline = time.monotonic() + 20 * limits.seconds
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe(duplex=False)
        self.process = fork.Process(target=_child, args=(path, engine, limits, folder, theirs))
        self.process.start()
        theirs.close()

    def listen(self) -> None:
        """Take what the process says; that it ended, where it says no more."""
        try:
            self.checked, self.ended = self.pipe.recv()
        except EOFError:
            self.process.join()
            if self.in_caffe:
                self.checked.caffe = f"not known: its process ended with {self.process.exitcode}"
            elif self.process.exitcode == -signal.SIGXCPU:
                self.late()
            else:
                self.checked.fail(f"its process ended with {self.process.exitcode}")
            self.ended = True
        self.in_caffe = True
        self.deadline = time.monotonic() + self.limits.caffe_seconds
        if self.ended:
            self.kill()

    def late(self) -> None:
        """It takes too long."""
        if self.in_caffe:
            self.checked.caffe = f"not known: Caffe takes more than {self.limits.caffe_seconds:g} s"
        else:
            self.checked.seconds = self.limits.seconds
            self.checked.fail(f"takes more than {self.limits.seconds:g} s")
        self.ended = True
        self.kill()

    def kill(self) -> None:
        """End the process, Caffe with it, and remove its files."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _child(path: Path, engine: Engine | None, limits: Limits, folder: Path, out: Connection) -> None:
    """Check one file: what the tool makes of it is told first, then what Caffe does."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, unlimited = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, unlimited))
    checked = Checked(path)
    start = time.process_time()
    results: list[Result] = []
    with _noting(checked):
        results = _ours(path, checked)
    checked.seconds = time.process_time() - start
    resource.setrlimit(resource.RLIMIT_CPU, (unlimited, unlimited))
    out.send((checked, engine is None))
    if engine is not None:
        folder.mkdir()
        with _noting(checked):
            _caffes(checked, results, engine, limits, folder)
        out.send((checked, True))


class _noting:
    """Whatever goes wrong inside becomes one line of ``checked``."""

    def __init__(self, checked: Checked) -> None:
        self.checked = checked

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, RebirthError):
            self.checked.status, self.checked.note = REFUSED, str(error)
        elif isinstance(error, Exception):
            at = traceback.extract_tb(trace)[-1]
            self.checked.fail(f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})")
        return isinstance(error, Exception)


# ---- this tool --------------------------------------------------------------------------------------------


def _ours(path: Path, checked: Checked) -> list[Result]:
    """Read, write, rebirth by default and exactly."""
    net = Net.load(path)
    # A net of an older era is written as one of today, from then on unchanged.
    original = prototxt.encode(Net.parse(net.text(), path).text()) if net.converted else path.read_bytes()
    checked.written = prototxt.encode(net.text()) == original
    if not checked.written:
        checked.fail("an unchanged write gives other bytes")
    checked.layers = len(net.layers)
    results = [rebirth(path), rebirth(path, exact=True)]
    checked.exact = sum(merge.exact for merge in results[0].merges)
    checked.merges = len(results[0].merges) - checked.exact
    for result in results:
        Net.parse(result.net.text(), path)
    return results


# ---- Caffe ------------------------------------------------------------------------------------------------


def _caffes(checked: Checked, results: list[Result], engine: Engine, limits: Limits, folder: Path) -> None:
    """Whether Caffe builds what it built before, with the same shapes and, after exact merges, outputs."""
    if not results:
        _refused(checked, engine)
        return
    weights = made_up(results[0].original, limits.weights)
    if weights is not None:
        path = folder / "made_up.caffemodel"
        weights.write_weights(path)
        results = [rebirth(checked.path, path), rebirth(checked.path, path, exact=True)]
    net = results[0].original
    derived = _closed(net) and is_trainable(net) and not results[0].no_deploy
    before = deploy(net) if derived else net
    part = stock_part(before)
    if not part.layers:
        checked.caffe = "not asked: everything in it depends on files, code or a fork's layers"
        return
    whole = len(part.layers) == len(before.layers)
    given = checked.path if part.text() == before.text() and not derived else None
    before = part
    try:
        session = _open(engine, before, folder / "before", given)
    except EngineError as error:
        checked.caffe = f"refuses it: {_said(error)}"
        return
    checked.built = whole
    checked.caffe = "same" if whole else f"same in the {len(part.layers)} layers that it can build"
    with session:
        shapes = session.blobs()
        _compare_with_ours(checked, before, shapes)
        for result, which in zip(results, ("default", "exact"), strict=True):
            merged = result.deploy if derived else result.net
            after = stock_part(merged)
            if after.text() == before.text():
                continue
            try:
                reborn = _open(engine, after, folder / which)
            except EngineError as error:
                checked.fail(f"Caffe does not build it after the {which} rebirth: {_said(error)}")
                continue
            # What only a fork's layer reads is no output of the whole net: a merge may have taken it away.
            there = {top for layer in merged.layers for top in layer.top}
            outputs = [v for v in before.graph.view(TEST).outputs if whole or v.name in there]
            with reborn:
                _compare_shapes(checked, outputs, shapes, reborn.blobs(), which)
                if which == "exact" and _has_all_weights(before):
                    _compare_outputs(checked, outputs, session, reborn)


def _open(engine: Engine, net: Net, path: Path, given: Path | None = None) -> Session:
    """The net, as it is in the file ``given``, with its weights where it has any, in Caffe."""
    prototxt_path, weights = given or path.with_suffix(".prototxt"), path.with_suffix(".caffemodel")
    if given is None:
        net.write(prototxt_path)
    if not any(layer.blobs for layer in net.layers):
        return engine.open(prototxt_path, None)
    net.write_weights(weights)
    return engine.open(prototxt_path, weights)


def stock_part(net: Net) -> Net:
    """What of a net stock Caffe builds without opening a file, running code or knowing a fork's layers."""
    known = set(net.header.input)

    def swap(layer: Layer) -> list[Layer]:
        layer = _in_stock_words(layer)
        stock = layer.type in STOCK and layer.type not in _CLOSED and not layer.unknown
        good = stock and known.issuperset(layer.bottom)
        (known.update if good else known.difference_update)(layer.top)
        return [layer] if good else []

    return net.replace(swap)


def _in_stock_words(layer: Layer) -> Layer:
    """A Pooling with round_mode for a fork's ceil_mode."""
    tree = layer.tree.copy()
    pooling = tree.message("pooling_param")
    if layer.strange is not None or pooling is None or not pooling.all("ceil_mode"):
        return layer
    mode = caffe_pb2.PoolingParameter.RoundMode.Name(layer.param.pooling_param.round_mode)
    pooling.set("round_mode", mode, drop=("ceil_mode",))
    return layer.again(tree)


def _said(error: EngineError) -> str:
    """What Caffe said, without the names of temporary files."""
    return str(error).split(" refuses it: ")[-1]


def _closed(net: Net) -> bool:
    return any(layer.type in _CLOSED for layer in net.layers)


def _refused(checked: Checked, engine: Engine) -> None:
    """Whether Caffe, too, refuses what this tool did."""
    if _CLOSED_TEXT.search(checked.path.read_bytes()):
        checked.caffe = "not asked: its layers read files or run code"
        return
    try:
        with engine.open(checked.path, None) as session:
            if session.blobs():
                checked.built = True
                checked.fail(f"Caffe builds it, refused here: {checked.note}")
    except EngineError as error:
        checked.caffe = f"refuses it: {_said(error)}"


def _compare_with_ours(checked: Checked, net: Net, shapes: dict[str, Shape]) -> None:
    """Shapes are those Caffe computes, or not known."""
    view = net.graph.view(TEST)
    for value, ours in {value.name: (value, shape) for value, shape in infer(view).items()}.values():
        if ours is None and value.producer is not None:
            checked.unknown.append(value.producer.type)
        elif ours is not None and value.name in shapes and shapes[value.name] != ours:
            checked.fail(f"blob '{value.name}' is {shapes[value.name]} in Caffe, {ours} here")


def _compare_shapes(
    checked: Checked, outputs: list[Value], before: dict[str, Shape], after: dict[str, Shape], which: str
) -> None:
    """Outputs are still there, and what is still there has its old shape."""
    for name in {value.name for value in outputs} - after.keys():
        checked.fail(f"output '{name}' is gone after the {which} rebirth")
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            checked.fail(f"blob '{name}' was {before[name]}, {after[name]} after the {which} rebirth")


def _compare_outputs(checked: Checked, outputs: list[Value], before: Session, after: Session) -> None:
    """Exact merges leave what the net computes."""
    smooth = [v.name for v in outputs if v.producer is not None and v.producer.type not in _STEPS]
    try:
        old, new = (session.forward(None, smooth) for session in (before, after))
    except EngineError as error:
        checked.caffe = f"same, not computed: {_said(error)}"  # made-up inputs are not good for every layer
        return
    for name, values in old.items():
        if not values.size or not np.isfinite(values).all():
            continue
        largest = float(np.abs(values).max()) or 1.0
        difference = float(np.abs(new[name] - values).max()) / largest
        checked.difference = max(difference, checked.difference or 0)
        if not difference <= _SAME:
            checked.fail(f"output '{name}' differs by {difference:.1e} of its largest after exact merges")


# ---- weights ----------------------------------------------------------------------------------------------


def made_up(net: Net, limit: int) -> Net | None:
    """The net with random weights under which values keep their scale from layer to layer.

    Layers whose weights are not known get none, nor do those that a weights file cannot tell apart. None
    where there are none at all, or more than ``limit`` values.
    """
    shapes = all_param_shapes(net)
    count = sum(math.prod(shape) for needed in shapes.values() for shape in needed or [])
    if not 0 < count <= limit:
        return None
    shadowed = net.graph.shadowed()
    named: dict[str, set[str]] = {}
    for layer, needed in shapes.items():
        if layer not in shadowed:
            named.setdefault(layer.name, set()).add(str(needed))
    shared: dict[str, Array] = {}
    loaded = net.without_weights()
    for layer, (old, needed) in zip(loaded.layers, ((x, shapes.get(x)) for x in net.layers), strict=True):
        if needed and old not in shadowed and len(named[old.name]) == 1:
            arrays = _arrays(old, needed)
            for i, array in enumerate(arrays):
                if old.spec(i).name:
                    arrays[i] = shared.setdefault(old.spec(i).name, array)
            layer.record = Record(layer.name, layer.type, [Blob(array) for array in arrays])
    return loaded if any(layer.blobs for layer in loaded.layers) else None


def _has_all_weights(net: Net) -> bool:
    return all(layer.blobs or not needed for layer, needed in all_param_shapes(net).items())


def _arrays(layer: Layer, shapes: Sequence[Shape]) -> list[Array]:
    random = generator(0, layer.name)

    def normal(shape: Shape, deviation: float) -> Array:
        return random.standard_normal(shape, np.float32) * np.float32(deviation)

    if layer.type == "BatchNorm":  # sums over a running average, as training leaves them
        factor = np.float32(999.98)
        mean, variance = normal(shapes[0], 0.3), random.uniform(0.5, 2, shapes[1]).astype(np.float32)
        return [mean * factor, variance * factor, np.full(1, factor, np.float32)]
    if layer.type == "Scale":
        return [random.uniform(0.5, 1, shapes[0]).astype(np.float32), *(normal(s, 0.1) for s in shapes[1:])]
    weight = normal(shapes[0], math.sqrt(2 / max(math.prod(shapes[0][1:]), 1)))
    return [weight, *(normal(shape, 0.1) for shape in shapes[1:])]
