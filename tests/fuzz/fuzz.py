#!/usr/bin/env python3
"""Mutated files for every reader: each must be read, or refused in one line, soon and in little memory.

    python tests/fuzz/fuzz.py --inputs 1000000     # all readers in turn, figures at the end
    python tests/fuzz/fuzz.py --reader plan --seed 7 --inputs 5000

The kept corpus lies beside this file, a folder a reader; nets of every era are in tests/eras. An input is a
file of the corpus with one to six mutations, and follows from the seed and its number alone. What breaks a
rule is written to --crashes, and belongs into the corpus when it is mended."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rebirth_caffe import caffemodel, hdf5, plan, prototxt
from rebirth_caffe.engines.child import last_words
from rebirth_caffe.engines.training import displayed
from rebirth_caffe.errors import MAX_LENGTH, RebirthError, WeightsError
from rebirth_caffe.net import TEST, Net
from rebirth_caffe.schema import fork
from rebirth_caffe.shapes import infer
from rebirth_caffe.upgrade import upgrade, upgrade_weights

CORPUS = Path(__file__).parent / "corpus"
ERAS = Path(__file__).parents[1] / "eras"
SECONDS = 5.0  # an input may take
MEGABYTES = 1024  # the whole process may take
MAX_INPUT = 20_000  # bytes


# ---- readers: from a file to all that is made of it, as the tools do --------------------------------------


def read_prototxt(path: Path) -> None:
    text = prototxt.read_text(path)
    upgraded = upgrade(text, path)
    assert upgrade(upgraded.text, path).text == upgraded.text
    net = Net.load(path)
    assert net.converted or prototxt.encode(net.text()) == path.read_bytes()
    infer(net.graph.view(TEST))


def read_caffemodel(path: Path) -> None:
    weights = caffemodel.read(path)
    for record in weights.records:
        for blob in record.blobs:
            assert blob.array.nbytes <= 8 * path.stat().st_size
    caffemodel.write(path, *upgrade_weights(weights, path))
    assert caffemodel.read(path).storage == "current"


@contextmanager
def forked(path: Path) -> Iterator[io.BufferedReader]:
    """``hdf5.child`` without a new Python, which would take most of the time."""
    importlib.import_module("h5py")  # once, and not in every child
    out, into = os.pipe()
    if not (process := os.fork()):
        try:
            os.close(out)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            with open(into, "wb") as stream:
                hdf5.send(path, stream)
        finally:
            os._exit(0)
    os.close(into)
    try:
        with open(out, "rb") as stream:
            yield stream
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def read_hdf5(path: Path) -> None:
    with mock.patch.object(hdf5, "child", forked):
        _read_hdf5(path)


def _read_hdf5(path: Path) -> None:
    read_caffemodel(path)  # leaves what it read as a binary file
    weights = caffemodel.read(path)
    try:
        caffemodel.write_hdf5(path, weights.records)
    except WeightsError:  # a name that HDF5 has no place for
        return
    stored = caffemodel.read(path).by_name()
    assert {name: [blob.shape for blob in record.blobs] for name, record in stored.items()} == {
        name: [blob.shape for blob in record.blobs] for name, record in weights.by_name().items()
    }


def read_plan(path: Path) -> None:
    found = plan.load(path)
    path.write_text(plan.dump(found), "utf-8")
    assert plan.load(path) == found


def read_proto(path: Path) -> None:
    assert fork.load(path).descriptor.name == "LayerParameter"


def read_log(path: Path) -> None:
    said = path.read_text("utf-8", "replace")
    for line in said.splitlines():
        shown = displayed(line)
        assert shown is None or shown[0] >= 0
    assert "\n" not in last_words(said, 1)


READERS: dict[str, Callable[[Path], None]] = {
    "prototxt": read_prototxt,
    "caffemodel": read_caffemodel,
    "hdf5": read_hdf5,
    "plan": read_plan,
    "proto": read_proto,
    "log": read_log,
}


def corpus(reader: str) -> list[bytes]:
    """The kept files of a reader."""
    folders = [CORPUS / reader, *([ERAS] if reader == "prototxt" else [])]
    return [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())]


# ---- mutations --------------------------------------------------------------------------------------------

_WORDS = [
    b"{", b"}", b"<", b">", b"[", b"]", b":", b"#", b"'", b'"', b"\\", b"\n", b"\r\n", b"\0", b"-", b",",
    b"&a ", b"*a", b"layer {", b"layers { layer {", b"layers {", b'type: "', b"type: CONVOLUTION",
    b"param { }", b"blobs_lr: 1", b"input: 'x'", b"input_dim: 1", b"num_output: 4294967295",
    b"dim: 9223372036854775807", b"dim: -1", b"stride: 0", b"kernel_size: 0", b"group: 3", b"phase: TRAIN",
    b"bottom: 'a'", b"top: 'a'", b"\xff\xfe", b"\xed\xa0\x80", b"1e999", b"nan", b"-inf", b"2147483648",
    b"0x", b"08", b"\xc3", b"\x80" * 9, b"\xff" * 10, b"\x0a\x01", b"\x3a", b"\xa2\x06", b"\x12",
    b"!!python/name:os.system ", b"!!binary x", b"!!timestamp 1", b"<<: ", b"? ", b"- ", b"---\n",
    b"%YAML 9", b"2001-13-45", b"Iteration 99, loss = ", b"Iteration " + b"9" * 30, b"F1122 check failed: ",
]  # fmt: skip


def mutated(seeds: list[bytes], choose: random.Random) -> bytes:
    """One of the files with one to six changes."""
    data = bytearray(choose.choice(seeds))
    for _ in range(choose.choice((1, 1, 1, 2, 3, 6))):
        at = choose.randint(0, len(data))
        size = choose.choice((1, 1, 2, 4, 8, 32, 128))
        kind = choose.randrange(15) // 2
        if kind == 0:
            del data[at : at + size]
        elif kind == 1:
            data[at:at] = choose.choice(_WORDS)
        elif kind == 2:
            data[at : at + size] = choose.choice(_WORDS)
        elif kind == 3 and at < len(data):
            data[at] ^= 1 << choose.randrange(8)
        elif kind == 4:
            data[at:at] = data[at : at + size] * choose.choice((1, 2, 3, 50))
        elif kind == 5:
            data[at : at + size] = choose.randbytes(choose.choice((1, 2, 8)))
        elif kind == 6:
            other = choose.choice(seeds)
            start = choose.randint(0, len(other))
            data[at : at + choose.choice((0, size))] = other[start : start + choose.choice((8, 64, 512))]
        elif kind == 7:
            del data[at if choose.random() < 0.2 else len(data) :]
    return bytes(data[:MAX_INPUT])


# ---- running ----------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What became of the inputs of one reader; ``slowest`` is in processor time."""

    inputs: int = 0
    read: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    megabytes: float = 0.0  # at the most, of the whole process
    broken: int = 0


class TooSlow(Exception):
    """An input that hangs its reader."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"more than {SECONDS} s of processor time")


def one(read: Callable[[Path], None], data: bytes, path: Path) -> bool:
    """Whether an input is read; it is refused otherwise. Any other end is an exception."""
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it would be printed, beside the one line
            read(path)
        return True
    except RebirthError as error:
        said = str(error)
        assert "\n" not in said, "an error of several lines"
        assert len(said) < 4 * MAX_LENGTH, "an error without end"
        assert said, "an error without words"
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def run(
    reader: str,
    seed: int,
    numbers: range,
    figures: Figures,
    crashes: Path | None = None,
    seconds: float = math.inf,
) -> None:
    """Try the inputs with these numbers, and add to the figures.

    What breaks a rule goes into ``crashes``; without it it is an AssertionError.
    """
    seeds = corpus(reader)
    signal.signal(signal.SIGVTALRM, _too_slow)
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="rebirth-fuzz-") as folder:
        path = Path(folder, "input")
        for number in numbers:
            start = time.monotonic()
            if start > until:
                break
            data = mutated(seeds, random.Random(f"{reader} {seed} {number}"))
            spent = time.process_time()
            try:
                figures.read += one(READERS[reader], data, path)
            except Exception:
                if crashes is None:
                    raise AssertionError(f"{reader} {seed} {number}: {data!r}") from None
                figures.broken += 1
                crashes.mkdir(exist_ok=True)
                (crashes / f"{reader}-{seed}-{number}").write_bytes(data)
                (crashes / f"{reader}-{seed}-{number}.txt").write_text(traceback.format_exc())
            figures.inputs += 1
            figures.slowest = max(figures.slowest, time.process_time() - spent)
            figures.seconds += time.monotonic() - start
        figures.megabytes = max(figures.megabytes, peak_megabytes())


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reader", choices=READERS, action="append", help="default: all of them, in turn")
    p.add_argument("--inputs", type=int, default=10_000, help="of all readers together (default: 10000)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--crashes", type=Path, default=Path("crashes"), help="where to write what breaks a rule")
    p.add_argument("--figures", type=Path, metavar="JSON",
                   help="the figures so far; with those of a run that was stopped it goes on")  # fmt: skip
    args = p.parse_args()
    readers = args.reader or list(READERS)
    each = args.inputs // len(readers)
    figures = {reader: Figures() for reader in readers}
    if args.figures and args.figures.exists():
        figures = {reader: Figures(**f) for reader, f in json.loads(args.figures.read_text()).items()}
    while any(f.inputs < each for f in figures.values()):
        for reader, f in figures.items():
            run(reader, args.seed, range(f.inputs, min(f.inputs + 500, each)), f, args.crashes)
        if args.figures:
            args.figures.write_text(json.dumps({reader: vars(f) for reader, f in figures.items()}, indent=1))
    print(f"{'reader':<12}{'inputs':>9}{'read':>9}{'seconds':>9}{'slowest':>10}{'memory':>9}{'broken':>8}")
    for reader, f in figures.items():
        print(
            f"{reader:<12}{f.inputs:>9}{f.read:>9}{f.seconds:>9.0f}{f.slowest:>8.3f} s"
            f"{f.megabytes:>6.0f} MB{f.broken:>8}"
        )
    sys.exit(any(f.broken or f.megabytes > MEGABYTES for f in figures.values()))


if __name__ == "__main__":
    main()
