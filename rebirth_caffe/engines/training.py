"""Training under real Caffe, in a child process: pycaffe for one device, ``caffe train`` for several GPUs."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from .. import caffemodel
from ..errors import EngineError, WeightsError
from ..schema import caffe_pb2
from . import Engine
from .caffe import Caffe, CaffeEngine
from .child import last_words

TRAINER = Path(__file__).with_name("trainer.py")
TAIL = 400  # lines of Caffe's log that are looked at when it fails

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

# "Iteration 200 (5.2 iter/s, 19s/100 iters), loss = 0.57"; older builds leave the bracket out.
_PROGRESS = re.compile(r"Iteration (\d{1,18})(?: \([^)]*\))?, loss = (\S+)")
MAX_LINE = 2**16  # what is longer is no line of Caffe's


class Diverged(EngineError):
    """The net no longer learns: loss or weights are no numbers any more, or the loss has risen far."""


class Snapshot(NamedTuple):
    """What Caffe writes to go on from: two files, relative to the directory it ran in."""

    weights: str
    state: str


@dataclass(frozen=True)
class Run:
    """One piece of training: where it starts, what it skips, where it stops. Paths are relative to ``home``.

    ``skip`` is in batches of the training net's data layers. Several GPUs are Caffe's own business: it runs
    to the solver's max_iter and spreads the records itself, so neither ``until`` nor ``skip`` is used.
    """

    home: Path
    solver: str
    until: int
    weights: str | None = None
    state: str | None = None
    skip: int = 0
    gpus: tuple[str, ...] = ()
    threads: int = 1
    log: str | None = None  # all that Caffe says goes there, too
    python_layers: bool = False  # whether the net has any
    lock: int | None = None  # a file descriptor that the child keeps open as long as it lives


class Trainer(Protocol):
    """An engine that trains, from snapshot to snapshot."""

    @property
    def engine(self) -> Engine:
        """The engine that tests what was trained."""

    def train(self, run: Run, progress: Callable[[int, float], None]) -> None:
        """Train and leave the snapshot ``snapshot_files`` names; ``progress`` hears (iteration, loss).

        Raises Diverged where the loss is no number any more, EngineError where it cannot go on otherwise.
        """


class CaffeTrainer:
    """Real Caffe."""

    def __init__(self, caffe: Caffe) -> None:
        """Raises EngineError where this Caffe came without a Python that can import it."""
        self.caffe = caffe
        self.engine: Engine = CaffeEngine(caffe)

    def train(self, run: Run, progress: Callable[[int, float], None]) -> None:
        train(self.caffe, run, progress)


def several(gpus: Sequence[str]) -> bool:
    """Whether these devices need ``caffe train``, which spreads one net over them."""
    return len(gpus) > 1 or tuple(gpus) == ("all",)


def train(caffe: Caffe, run: Run, progress: Callable[[int, float], None]) -> None:
    """Train and snapshot; ``progress`` hears (iteration, loss) as Caffe displays them.

    Raises Diverged where the loss becomes NaN or infinite, EngineError with what Caffe said last where it
    stops otherwise. Whatever happens, the child has ended when this returns.
    """
    command, request = _command(caffe, run)
    parent = os.getpid()

    def die_with_parent() -> None:
        """In the child: a killed parent must not leave a training behind that writes into its directory."""
        if sys.platform == "linux":
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it was killed before that
                os.kill(os.getpid(), signal.SIGKILL)

    with tempfile.TemporaryFile("w+") as standard_input:
        standard_input.write(request)
        standard_input.seek(0)
        try:
            child = subprocess.Popen(
                command,
                cwd=run.home,
                stdin=standard_input,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=caffe.environment(run.threads),
                preexec_fn=die_with_parent,
                pass_fds=() if run.lock is None else (run.lock,),
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise EngineError(f"{command[0]}: cannot be run: {error.strerror}") from None
    tail: deque[str] = deque(maxlen=TAIL)
    try:
        with open(os.devnull if run.log is None else run.home / run.log, "w", encoding="utf-8") as log:
            assert child.stderr is not None
            while line := child.stderr.readline(MAX_LINE):
                log.write(line)
                tail.append(line)
                shown = displayed(line)
                if shown is not None:
                    iteration, loss = shown
                    if not math.isfinite(loss):
                        raise Diverged(f"the loss became {loss} at iteration {iteration}")
                    progress(iteration, loss)
        status = child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        assert child.stderr is not None
        child.stderr.close()
    if status != 0:
        more = "" if run.log is None else f" (its log: {run.home / run.log})"
        raise EngineError(f"{run.solver}: Caffe failed: {last_words(''.join(tail), status)[:500]}{more}")


def displayed(line: str) -> tuple[int, float] | None:
    """The iteration and the loss in a line of Caffe's log; NaN for a loss that is no number."""
    seen = _PROGRESS.search(line)
    if seen is None:
        return None
    try:
        return int(seen.group(1)), float(seen.group(2))
    except ValueError:
        return int(seen.group(1)), math.nan


def _command(caffe: Caffe, run: Run) -> tuple[list[str], str]:
    """The child's command line and what it reads."""
    if several(run.gpus):
        if caffe.binary is None:
            raise EngineError(
                "several GPUs need the caffe command, and this Caffe has only its Python module; "
                "give one GPU, or a Caffe with its command"
            )
        start = ["-snapshot", run.state] if run.state else ["-weights", run.weights] if run.weights else []
        return [str(caffe.binary), "train", "-solver", run.solver, *start, "-gpu", ",".join(run.gpus)], ""
    request = {
        "solver": run.solver,
        "weights": run.weights,
        "state": run.state,
        "skip": run.skip,
        "until": run.until,
        "gpu": int(run.gpus[0]) if run.gpus else None,
        "io": run.python_layers,
    }
    return [str(caffe.python), str(TRAINER)], json.dumps(request) + "\n"


def snapshot_files(prefix: str, iteration: int) -> Snapshot:
    """What Caffe calls the weights and the state of a snapshot."""
    return Snapshot(f"{prefix}_iter_{iteration}.caffemodel", f"{prefix}_iter_{iteration}.solverstate")


def check_snapshot(home: Path, snapshot: Snapshot, iteration: int, names: set[str]) -> None:
    """Read back what Caffe wrote: it does not notice a disk that is full.

    ``names`` are the layers that must have weights. Raises EngineError where the files are not whole,
    Diverged where a weight is no number.
    """
    state = caffe_pb2.SolverState()
    try:
        state.ParseFromString((home / snapshot.state).read_bytes())
        records = caffemodel.read(home / snapshot.weights).by_name()
        whole = state.iter == iteration and all(name in records and records[name].blobs for name in names)
    except (OSError, DecodeError, WeightsError):
        whole = False
    if not whole:
        raise EngineError(
            f"{home / snapshot.weights}: Caffe's snapshot is missing or not whole; is the disk full? "
            "Free some space and run the same command again"
        )
    for record in records.values():
        if not all(np.isfinite(blob.array).all() for blob in record.blobs):
            raise Diverged(
                f"weights of layer '{record.name}' are no numbers any more at iteration {iteration}"
            )


def newest_snapshot(home: Path, prefix: str, names: set[str]) -> tuple[int, Snapshot] | None:
    """The last whole snapshot that a killed ``caffe train`` left behind, and its iteration."""
    folder, name = (home / prefix).parent, Path(prefix).name
    pattern = re.compile(re.escape(name) + r"_iter_(\d+)\.solverstate")
    found = [int(m[1]) for path in folder.iterdir() if (m := pattern.fullmatch(path.name))]
    for iteration in sorted(found, reverse=True):
        snapshot = snapshot_files(prefix, iteration)
        try:
            check_snapshot(home, snapshot, iteration, names)
        except EngineError:
            continue
        return iteration, snapshot
    return None
