"""Runtimes that compute nets, behind one small interface. Nothing else in the package touches a runtime.

Every engine opens a net in a child process, so a runtime that aborts, or lives in another Python, does no
harm here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import EngineError, RebirthError
from .child import Array

if TYPE_CHECKING:
    from ..net import Net

__all__ = [
    "Array",
    "Engine",
    "Session",
    "any_engine",
    "available_engines",
    "get_engine",
    "known_engines",
    "running",
]


class Session(Protocol):
    """One net open in an engine; a context manager. Every method raises EngineError, in one line."""

    def __enter__(self) -> Session: ...

    def __exit__(self, *error: object) -> None: ...

    def close(self) -> None:
        """End the session and its child process; may be called again."""

    def blobs(self) -> dict[str, tuple[int, ...]]:
        """The shape of every blob of the built net, in the net's order."""

    def forward(
        self, inputs: Mapping[str, Array] | None = None, outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Compute the net; the values (float32) of the blobs named by ``outputs``, or of the net's outputs.

        ``inputs`` holds every input of the net in its full shape; without it the inputs are normal noise,
        always the same and the same in every engine. A blob written in place has its last value.
        """

    def time_forward(self) -> float:
        """Seconds of one forward. The first, in which a runtime allocates its memory, is never the one."""

    def time_layers(self) -> list[tuple[str, str, float]]:
        """(layer, type, seconds) of each layer in one forward, in the order computed.

        Caffe's own Split layers are among them; what an engine has fused into another layer takes 0.
        """

    def memory(self) -> dict[str, int]:
        """``weights_bytes`` and ``activation_bytes`` of the blobs as the engine reports them, and
        ``peak_rss_bytes``: the most memory resident until now, loading included, less what was resident
        before the net was opened."""


class Engine(Protocol):
    """A runtime."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def open(
        self,
        prototxt: Path,
        weights: Path | None,
        *,
        threads: int = 1,
        batch: int | None = None,
        phase: str = "TEST",
    ) -> Session:
        """Build a net. ``batch`` replaces the first dimension of every input.

        Raises EngineError where the runtime refuses the net or its weights.
        """


@contextmanager
def running(engine: Engine, net: Net, *, threads: int = 1, batch: int | None = None) -> Iterator[Session]:
    """A net with its weights open in an engine; arguments and errors as of ``Engine.open``."""
    with tempfile.TemporaryDirectory(prefix="rebirth-") as folder:
        files = Path(folder, "net.prototxt"), Path(folder, "net.caffemodel")
        net.write(files[0])
        net.write_weights(files[1])
        with engine.open(*files, threads=threads, batch=batch) as session:
            yield session


def known_engines() -> tuple[str, ...]:
    """The engines' names, whether or not this machine has them."""
    return ("caffe", "opencv", "torch")


def get_engine(name: str, caffe: str | None = None) -> Engine:
    """The engine called ``name``, on the CPU; ``caffe`` says where Caffe is, as in ``find_caffe``.

    Raises RebirthError for an unknown name, EngineError where the runtime is missing or does not work.
    """
    if name == "caffe":
        from .caffe import CaffeEngine, find_caffe

        return CaffeEngine(find_caffe(caffe))
    if name == "opencv":
        from .opencv import OpenCVEngine

        return OpenCVEngine()
    if name == "torch":
        from .torch import TorchEngine

        return TorchEngine()
    raise RebirthError(f"engine '{name}' is not known; known are {', '.join(known_engines())}")


def any_engine(caffe: str | None = None) -> Engine:
    """Caffe where there is one, and only if none was asked for another engine that works here.

    Raises EngineError where none does.
    """
    try:
        return get_engine("caffe", caffe)
    except EngineError:
        others = [] if caffe else available_engines()
        if not others:
            raise
        return get_engine(others[0])


def available_engines(caffe: str | None = None) -> list[str]:
    """The names of the engines that work on this machine."""
    available = []
    for name in known_engines():
        try:
            get_engine(name, caffe)
        except EngineError:
            continue
        available.append(name)
    return available
