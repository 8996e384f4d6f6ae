"""Training under real Caffe, in a child process: pycaffe for one device, ``caffe train`` for several GPUs."""

from __future__ import annotations

import ctypes
import json
import math
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import EngineError
from .caffe import Caffe

TRAINER = Path(__file__).with_name("trainer.py")
TAIL = 6  # lines of Caffe's log in an error

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

# "Iteration 200 (5.2 iter/s, 19s/100 iters), loss = 0.57"; older builds leave the bracket out.
_PROGRESS = re.compile(r"Iteration (\d+)(?: \([^)]*\))?, loss = (\S+)")
_LOG_PREFIX = re.compile(r"^[IWEF]\d{4,8} [\d:.]+ +\d+ ")


class Diverged(EngineError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Run:
    """One piece of training: where it starts, what it skips, where it stops. Paths are relative to ``home``.

    ``skip`` is in batches of the training net's data layers; it is not used with several GPUs, where Caffe
    itself spreads the records.
    """

    home: Path
    solver: str
    until: int
    weights: str | None = None
    state: str | None = None
    skip: int = 0
    gpus: tuple[str, ...] = ()
    threads: int = 1


def train(caffe: Caffe, run: Run, progress: Callable[[int, float], None]) -> None:
    """Train and snapshot; ``progress`` hears (iteration, loss) as Caffe displays them.

    Raises Diverged where the loss becomes NaN or infinite, EngineError with the tail of Caffe's log where
    Caffe stops otherwise. An interrupt ends the child first.
    """
    command, request = _command(caffe, run)
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
                preexec_fn=_die_with_parent,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise EngineError(f"{command[0]}: cannot be run: {error.strerror}") from None
    tail: deque[str] = deque(maxlen=TAIL)
    assert child.stderr is not None
    try:
        for line in child.stderr:
            text = _LOG_PREFIX.sub("", line).strip()
            if text and not text.startswith("@ "):
                tail.append(text)
            seen = _PROGRESS.search(line)
            if seen is not None:
                loss = _number(seen.group(2))
                if not math.isfinite(loss):
                    raise Diverged(
                        f"{run.solver}: the loss became {seen.group(2)} at iteration {seen.group(1)}"
                    )
                progress(int(seen.group(1)), loss)
        status = child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stderr.close()
    if status != 0:
        fatal = [text for text in tail if "Check failed" in text or "Error" in text]
        said = fatal[-1] if fatal else " | ".join(tail)
        raise EngineError(f"{run.solver}: Caffe stopped with status {status}: {said[:400]}")


def _die_with_parent() -> None:
    """In the child: a killed parent must not leave a training behind that writes into its directory."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _command(caffe: Caffe, run: Run) -> tuple[list[str], str]:
    """The child's command line and what it reads."""
    if len(run.gpus) > 1 or run.gpus == ("all",) or caffe.python is None:
        if caffe.binary is None:
            raise EngineError(
                "several GPUs need the caffe command, and this Caffe has only its Python module"
            )
        start = ["-snapshot", run.state] if run.state else ["-weights", run.weights] if run.weights else []
        gpus = ["-gpu", ",".join(run.gpus)] if run.gpus else []
        return [str(caffe.binary), "train", "-solver", run.solver, *start, *gpus], ""
    request = {
        "solver": run.solver,
        "weights": run.weights,
        "state": run.state,
        "skip": run.skip,
        "until": run.until,
        "gpu": int(run.gpus[0]) if run.gpus else None,
    }
    return [str(caffe.python), str(TRAINER)], json.dumps(request) + "\n"


def snapshot_files(prefix: str, iteration: int) -> Sequence[str]:
    """What Caffe calls the weights and the state of a snapshot."""
    return f"{prefix}_iter_{iteration}.caffemodel", f"{prefix}_iter_{iteration}.solverstate"
