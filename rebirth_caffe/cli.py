"""What every command shares: errors become one line and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from .errors import RebirthError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line like all others."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see {self.prog} --help")


def whole(text: str) -> int:
    """An argument that is a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0")
    return int(text)


def positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1")
    return int(text)


def above_zero(text: str) -> float:
    """An argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return value


def fraction(text: str) -> float:
    """An argument that is a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a fraction between 0 and 1, like 0.1")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """An argument that is one or more finite numbers between commas."""
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"'{text}' is not numbers, like 104,117,123")
    return values


def run(main: Callable[[], object]) -> NoReturn:
    """Run a command's ``main`` and exit.

    Bad input (RebirthError, OSError) prints ``error: ...`` on one line and exits with 2, an interrupt exits
    with 130, being told to stop with 128 and the signal's number, and a closed pipe ends quietly.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # not at once: what is half written is removed first
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if sys.stdout is not None:
            _escape_what_cannot_be_printed(sys.stdout)
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except RebirthError as error:
        fail(str(error))
    except BrokenPipeError:
        _silence(sys.stdout)
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            _silence(sys.stdout)
            what = error.strerror or error
            fail(f"standard output or a temporary file: {what}; check the free space")
        fail(f"{error.filename}: {error.strerror or error}; check the path, its permissions and free space")
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing in this Python; run make setup and use .venv/bin/python")
    except MemoryError:
        fail("out of memory; close other programs or use a larger machine")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def fail(message: str) -> NoReturn:
    """Print ``error: message`` as one line on stderr and exit with 2."""
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)


def printable(text: str) -> str:
    """``text`` in one line and harmless for a terminal: names in files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _escape_what_cannot_be_printed(stream: TextIO) -> None:
    """A layer's name in another alphabet than the terminal's is no reason to stop."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _silence(stream: TextIO) -> None:
    """Keep Python from complaining about ``stream`` once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def learning(group: argparse._ActionsContainer, schedule: str, distil: str) -> None:
    """Add what decides how a reborn net learns; None where it is not given. Said to be the default: these."""
    group.add_argument(
        "--schedule", choices=("steps", "joint", "joint-then-steps"),
        help=f"the plan's steps one after the other, all at once, or both (default: {schedule})",
    )  # fmt: skip
    group.add_argument(
        "--distil", metavar="{labels,images,no}", nargs="?", type=_source, const="labels",
        help="learn from what the original gives: from that and the labels, or from that alone, which needs "
        f"images only (default: {distil})",
    )  # fmt: skip


def _source(text: str) -> str:
    if text not in ("labels", "images", "no"):
        raise argparse.ArgumentTypeError(f"'{text}' is none of labels, images, no")
    return "" if text == "no" else text
