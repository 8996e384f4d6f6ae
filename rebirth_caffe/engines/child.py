"""The parent's side of a session: starts worker.py in a runtime's Python and talks to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError
from .worker import receive, send

WORKER = Path(__file__).with_name("worker.py")
SECONDS_TO_END = 5

Array = np.ndarray[Any, np.dtype[np.float32]]


def worker_command(python: Path | str) -> list[str]:
    """The command line of the worker in this Python."""
    return [str(python), str(WORKER)]


def thread_variables(threads: int) -> dict[str, str]:
    """What BLAS and OpenMP libraries read to decide how many threads to use."""
    return {f"{library}_NUM_THREADS": str(threads) for library in ("OPENBLAS", "OMP", "MKL", "BLIS")}


def check_files(prototxt: Path, weights: Path | None) -> None:
    """Raise EngineError for a file that is not there: runtimes say it less clearly."""
    for path in (prototxt, weights):
        if path is not None and not path.is_file():
            raise EngineError(f"{path}: no such file; check the path")


class ChildSession:
    """One net open in a child process; see ``engines.Session``."""

    def __init__(
        self, engine: str, command: Sequence[str], environment: Mapping[str, str], request: dict[str, Any]
    ) -> None:
        """Start the worker, open the net of ``request``. Raises EngineError, the child ended."""
        self._what = f"{request['prototxt']}: {engine}"
        self._ended = ""  # why the child is no more
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the session
        try:
            self._child = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=dict(environment),
            )
        except OSError as error:
            self._log.close()
            raise EngineError(f"{command[0]}: cannot be run: {error.strerror}") from None
        try:
            self._ask("open", **request)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ChildSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child: it ends by itself when its input closes, else it is killed."""
        if self._log.closed:
            return
        self._ended = self._ended or "the session is closed"
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(OSError):  # the child may have gone before it read everything
                pipe.close()
        try:
            self._child.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()

    def blobs(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in self._ask("blobs")[0]}

    def forward(
        self, inputs: Mapping[str, Array] | None = None, outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        names = None if outputs is None else list(outputs)
        return self._ask("forward", list((inputs or {}).items()), outputs=names)[1]

    def time_forward(self) -> float:
        return float(self._ask("time_forward")[0])

    def time_layers(self) -> list[tuple[str, str, float]]:
        return [(name, kind, seconds) for name, kind, seconds in self._ask("time_layers")[0]]

    def memory(self) -> dict[str, int]:
        return {name: int(size) for name, size in self._ask("memory")[0].items()}

    def _ask(
        self, do: str, arrays: Sequence[tuple[str, Array]] = (), **arguments: Any
    ) -> tuple[Any, dict[str, Array]]:
        """One request and its reply: (result, arrays). Raises EngineError with what the runtime said."""
        if self._ended:
            raise EngineError(f"{self._what} cannot go on: {self._ended}")
        what = self._what + (" refuses it" if do == "open" else "")
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            send(self._child.stdin, {"do": do, **arguments}, arrays)
            reply, values = receive(self._child.stdout)
        except (EOFError, OSError):
            status = self._child.wait()
            self._ended = last_words(self._said(), status)
            raise EngineError(f"{what}: {self._ended}") from None
        if "error" in reply:
            raise EngineError(f"{what}: {reply['error']}{_parse_error(self._said())}")
        return reply["result"], values

    def _said(self) -> str:
        """What the child has said on stderr; its place in the file, which it shares, stays."""
        log = self._log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")


_FATAL = re.compile(r"^F\d{4} [^\]]*\] (.*?)(?=^\*\*\* Check failure|^[IWEF]\d{4} |\Z)", re.M | re.S)
_CREATING = re.compile(r"^I\d{4} [^\]]*\] Creating layer (.*)$", re.M)
_LISTING = re.compile(r" \(known types: .*\)")
_INITIALISED = "Network initialization done"
_PARSE_ERROR = re.compile(r"^\[libprotobuf ERROR [^\]]*\] (.*)$", re.M)


def last_words(said: str, status: int) -> str:
    """One line of why a runtime's process ended, from its stderr and exit status (negative: a signal).

    Caffe ends itself with a ``Check failed: ...`` line in glog's format; before that it names the layer it
    is creating, and protobuf says where a prototxt is wrong.
    """
    fatal = _FATAL.findall(said)
    if fatal:
        layers = _CREATING.findall(said)
        where = f"layer '{layers[-1]}': " if layers and _INITIALISED not in said else ""
        return where + _LISTING.sub("", " ".join(fatal[-1].split())) + _parse_error(said)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if status < 0:
        try:
            ended = f"ended by {signal.Signals(-status).name}"
        except ValueError:
            ended = f"ended by signal {-status}"
        if -status == signal.SIGKILL:
            ended += " (out of memory?)"
    else:
        ended = f"ended with exit status {status}"
    return f"{ended}: {lines[-1]}" if lines else ended


def _parse_error(said: str) -> str:
    """Where protobuf could not read a file, in brackets; empty where it could."""
    found = _PARSE_ERROR.findall(said)
    return f" ({found[-1]})" if found else ""
