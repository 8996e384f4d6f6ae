"""Caffe itself: finding one, and running nets in its pycaffe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import EngineError
from . import Session
from .child import ChildSession, check_files, thread_variables, worker_command

INSTALL = "tools/install_caffe.sh"
ROOT = Path(__file__).resolve().parents[2]

# Where a Caffe's parts lie under its directory: what install_caffe.sh makes, an install prefix, a built tree.
_BINARIES = ("bin/caffe", "build/tools/caffe", "build/tools/caffe.bin")
_PYTHONS = ("bin/python", "bin/python3")
_MODULES = "python"
# What a Python says in which nobody ever installed a Caffe: no news.
_ABSENT = re.compile("No module named '(caffe|numpy)'")


@dataclass(frozen=True)
class Caffe:
    """A Caffe that works: its command, a Python that can ``import caffe``, or both."""

    binary: Path | None
    python: Path | None
    modules: Path | None = None  # directory the Python needs on its path for ``import caffe``
    version: str = "unknown"

    def environment(self, threads: int = 1) -> dict[str, str]:
        """Environment variables for its processes, for CPU work on so many threads."""
        path = [str(self.modules)] if self.modules else []
        path += [value] if (value := os.environ.get("PYTHONPATH")) else []
        return {
            **os.environ,
            **({"PYTHONPATH": os.pathsep.join(path)} if path else {}),
            **thread_variables(threads),
            # Errors are read from the log: all of it, on stderr.
            "GLOG_logtostderr": "1",
            "GLOG_minloglevel": "0",
        }


def find_caffe(explicit: str | None = None) -> Caffe:
    """The Caffe to use: ``explicit`` (a command's --caffe), the variable REBIRTH_CAFFE, ``.caffe/`` beside
    this package, ``caffe`` on PATH, a Python that can import caffe; the first there is.

    What is given may be a directory with ``bin/caffe`` and ``bin/python``, an install prefix, a built source
    tree, or the caffe command itself. What is given and does not work is an error and not passed over.
    Raises EngineError in one line.
    """
    for origin, given in (("--caffe", explicit), ("REBIRTH_CAFFE", os.environ.get("REBIRTH_CAFFE"))):
        if given:
            return _caffe_at(Path(given).expanduser().absolute(), f"{origin} {given}")
    installed = ROOT / ".caffe"
    if (installed / "bin" / "python").exists():
        return _caffe_at(installed, f"{installed} (run {INSTALL} again)")
    return _search()


def _caffe_at(path: Path, origin: str) -> Caffe:
    """The Caffe in this place. Raises EngineError saying what is wrong with it."""
    if not path.exists():
        raise EngineError(f"{origin}: no such file or directory; give a Caffe's directory or command")
    roots = [path] if path.is_dir() else list(path.parents[1:3])  # of ROOT/bin/caffe, ROOT/build/tools/caffe
    binaries = [path / name for name in _BINARIES] if path.is_dir() else [path]
    binary = next((b for b in binaries if b.exists()), None)
    version = "unknown"
    try:
        if binary is not None:
            version = _binary_version(binary)
        for root in roots:
            modules = root / _MODULES if (root / _MODULES / "caffe").is_dir() else None
            pythons = [root / name for name in _PYTHONS if (root / name).exists()]
            if modules is not None:
                pythons += _host_pythons()
            try:
                found = _first_python(pythons, modules)
            except EngineError:
                if path.is_dir():
                    raise
                continue  # beside a command there may well be a Python without Caffe
            if found is not None:
                python, version = found
                return Caffe(binary, python, modules, version)
    except EngineError as error:
        raise EngineError(f"{origin}: {error}") from None
    if binary is None:
        wanted = ", ".join((*_BINARIES[:2], _PYTHONS[0], _MODULES + "/caffe"))
        raise EngineError(f"{origin}: holds no Caffe (none of {wanted}); give a built Caffe's directory")
    return Caffe(binary, None, None, version)


def _search() -> Caffe:
    """The Caffe this machine offers by itself. Raises EngineError where there is none."""
    problems = []
    found: Caffe | None = None
    command = shutil.which("caffe")
    if command is not None:
        try:
            found = _caffe_at(Path(command).absolute(), f"{command} on PATH")
        except EngineError as error:
            problems.append(str(error))
    if found is not None and found.python is not None:
        return found
    try:
        imported = _first_python(_host_pythons(), None)
    except EngineError as error:
        imported = None
        if not _ABSENT.search(str(error)):
            problems.append(str(error))
    if imported is not None:
        return Caffe(found.binary if found else None, imported[0], None, imported[1])
    if found is not None:
        return found
    why = f" ({'; '.join(problems)})" if problems else ""
    raise EngineError(f"no Caffe was found{why}; give one with --caffe or REBIRTH_CAFFE, or run {INSTALL}")


def _host_pythons() -> list[Path]:
    """The Pythons a user's own pycaffe may be built for."""
    names = [sys.executable, shutil.which("python3"), shutil.which("python")]
    return list(dict.fromkeys(Path(name) for name in names if name))


def _first_python(pythons: Iterable[Path], modules: Path | None) -> tuple[Path, str] | None:
    """The first of these that imports caffe, and Caffe's version; None where there is none to try.

    Raises EngineError with the most telling reason where none of them can.
    """
    problems = []
    for python in pythons:
        try:
            return python, _module_version(python, modules)
        except EngineError as error:
            problems.append(error)
    if problems:
        raise next((problem for problem in problems if not _ABSENT.search(str(problem))), problems[0])
    return None


@lru_cache
def _module_version(python: Path, modules: Path | None) -> str:
    """The version of the pycaffe this Python imports. Raises EngineError where it cannot."""
    environment = Caffe(None, python, modules).environment()
    return _output([*worker_command(python), "--probe"], environment, f"{python} cannot import caffe")


@lru_cache
def _binary_version(binary: Path) -> str:
    """The version the caffe command names. Raises EngineError where it does not run."""
    said = _output([str(binary), "--version"], dict(os.environ), f"{binary} does not run")
    if "caffe" not in said.lower():
        raise EngineError(f"{binary} is not Caffe's command; give a Caffe's directory or command")
    version = re.search(r"version (\S+)", said)
    return version.group(1) if version else "unknown"


def _output(command: list[str], environment: dict[str, str], complaint: str) -> str:
    """What a command prints. Raises EngineError: the complaint and the last line it said instead."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise EngineError(f"{complaint}: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise EngineError(f"{complaint}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stdout.strip()


class CaffeEngine:
    """Caffe on the CPU. Layers without weights get them from their fillers."""

    name = "caffe"

    def __init__(self, caffe: Caffe) -> None:
        """Raises EngineError where this Caffe came without a Python that can import it."""
        if caffe.python is None:
            raise EngineError(
                f"{caffe.binary} has no pycaffe beside it, which runs nets here; build it or run {INSTALL}"
            )
        self.caffe = caffe
        self.python = caffe.python
        self.version = caffe.version

    def open(
        self,
        prototxt: Path,
        weights: Path | None,
        *,
        threads: int = 1,
        batch: int | None = None,
        phase: str = "TEST",
    ) -> Session:
        """Build a net; see ``engines.Engine``. Data layers read their databases as they always do."""
        check_files(prototxt, weights)
        request = {
            "backend": "caffe",
            "prototxt": str(prototxt),
            "weights": None if weights is None else str(weights),
            "batch": batch,
            "phase": phase,
        }
        return ChildSession("Caffe", worker_command(self.python), self.caffe.environment(threads), request)
