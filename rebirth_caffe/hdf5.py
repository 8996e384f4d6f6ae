"""Weights in HDF5, as Net::ToHDF5 of Caffe writes them: a group ``data`` with a group a layer, in which the
blobs are called 0, 1, ...

On some damaged files HDF5's own library runs for ever, takes all memory there is or crashes. It reads in a
process of its own, with little time and memory, which sends what it finds blob by blob.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import WeightsError

Array = NDArray[np.float32]

MAX_DEPTH = 16  # of groups
SECONDS = 3  # of a processor to read a small file in; SPEED for a large one
SPEED = 50_000_000  # bytes a second, at least
MEMORY = 1 << 28  # bytes, besides five times the file
_AGAIN = "damaged: copy or download it again"


def read(path: Path) -> dict[str, list[Array]]:
    """The blobs of every layer. Raises WeightsError where the file is damaged or no caffemodel."""
    found: dict[str, dict[int, Array]] = {}
    with child(path) as stream:
        while (news := json.loads(stream.readline() or "null")) != "end":
            if news is None:
                raise WeightsError(f"{path}: HDF5 that cannot be read: its library came to no end; {_AGAIN}")
            if "error" in news:
                raise WeightsError(f"{path}: {news['error']}")
            blobs = found.setdefault(news["layer"], {})
            if "blob" in news:
                array = np.empty(news["shape"], np.float32)
                if stream.readinto(_bytes(array)) != array.nbytes:
                    raise WeightsError(f"{path}: HDF5 whose reader has died; try again")
                blobs[news["blob"]] = array
    for layer, blobs in found.items():
        if sorted(blobs) != list(range(len(blobs))):
            raise WeightsError(f"{path}: layer '{layer}': a blob is missing; {_AGAIN}")
    if not any(found.values()):
        raise WeightsError(f"{path}: holds no layers; not a caffemodel, or an empty one")
    return {layer: [blobs[i] for i in range(len(blobs))] for layer, blobs in found.items()}


def write(path: Path, layers: Mapping[str, Sequence[Array]]) -> None:
    """Write the blobs of every layer. Raises WeightsError for a name that HDF5 has no place for, OSError."""
    import h5py

    for name in layers:
        if not name or "/" in name or name == "." or "\0" in name:
            raise WeightsError(
                f"{path}: HDF5 has no place for a layer called '{name}'; write a binary .caffemodel"
            )
    with _Kept(path, "w+") as out:
        with h5py.File(out, "w") as file:
            data = file.create_group("data")
            for name, blobs in layers.items():
                group = data.create_group(name)
                for i, blob in enumerate(blobs):
                    group.create_dataset(str(i), data=blob)
        if out.error is not None:
            raise out.error
        os.fsync(out.fileno())


class _Kept(io.FileIO):
    """A file that keeps its first failure for later: HDF5's library crashes where a write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while left and self.error is None:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


# ---- the process that reads -------------------------------------------------------------------------------


@contextmanager
def child(path: Path) -> Iterator[io.BufferedReader]:
    """What ``send`` writes, in another process."""
    command = [sys.executable, "-m", __name__, str(path.absolute())]
    # From where this package is imported; threads of its own would only take memory.
    root, environment = Path(__file__).parents[1], {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert isinstance(process.stdout, io.BufferedReader)
        try:
            yield process.stdout
        finally:
            process.kill()


def send(path: Path, out: IO[bytes]) -> None:
    """Read a file within its limits: a line of JSON for each layer and blob, its values, and a last line."""
    _limit(path.stat().st_size)
    try:
        for layer, blob, array in _walk(path):
            news = {"layer": layer} if array is None else {"layer": layer, "blob": blob, "shape": array.shape}
            out.write(json.dumps(news).encode() + b"\n")
            if array is not None:
                out.write(_bytes(array))
        last: object = "end"
    except WeightsError as error:
        last = {"error": str(error)}
    out.write(json.dumps(last).encode() + b"\n")
    out.flush()


def _limit(size: int) -> None:
    """Bound what this process may take from here on to read a file of ``size`` bytes."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    seconds = math.ceil(spent + SECONDS + size / SPEED)
    with suppress(OSError, ValueError):  # not every system has them
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY + 5 * size,) * 2)


def _walk(path: Path) -> Iterator[tuple[str, int, Array | None]]:
    """Every layer (with no array) and its blobs. Raises WeightsError, which does not name the file."""
    import h5py

    left = 4 * path.stat().st_size + 2**20  # bytes: compressed or never written values cost a file nothing

    def walk(group: Any, name: str, depth: int) -> Iterator[tuple[str, int, Array | None]]:
        nonlocal left
        where = f"layer '{name}'"
        if depth > MAX_DEPTH:
            raise WeightsError(f"{where}: groups more than {MAX_DEPTH} deep; not a caffemodel")
        if name:
            yield name, 0, None
        for key in group:
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise WeightsError(f"{where}: '{key}' is a link to elsewhere; not a caffemodel")
            item = group[key]
            if isinstance(item, h5py.Group):  # a name with a slash
                yield from walk(item, f"{name}/{key}" if name else key, depth + 1)
                continue
            if not isinstance(item, h5py.Dataset) or item.dtype.kind != "f" or not key.isdecimal():
                raise WeightsError(f"{where}: '{key}' is no blob of numbers; not a caffemodel")
            if item.is_virtual or item.external or item.shape is None:
                raise WeightsError(f"{where}: blob {key} has its values elsewhere; not a caffemodel")
            left -= math.prod(item.shape) * max(4, item.dtype.itemsize)
            if left < 0:
                raise WeightsError(f"{where}: blob {key} of {item.shape} is larger than the file; {_AGAIN}")
            array = np.empty(item.shape, np.float32)
            if array.size:
                item.read_direct(array)
            yield name, int(key), array

    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("data"), h5py.Group):
                raise WeightsError("HDF5 without a group 'data'; not a caffemodel")
            yield from walk(file["data"], "", 0)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise WeightsError(f"HDF5 that cannot be read: {error}; {_AGAIN}") from None


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


if __name__ == "__main__":
    send(Path(sys.argv[1]), sys.stdout.buffer)
