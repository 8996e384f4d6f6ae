"""What several test files need."""

import importlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rebirth_caffe.engines.caffe import Caffe, find_caffe
from rebirth_caffe.errors import EngineError
from tests import tiny

# A shell's background job ignores these, and so would every child that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def caffe() -> Caffe:
    """Real Caffe. Where there is none the test is skipped, and fails in CI."""
    try:
        return find_caffe()
    except EngineError as error:
        missing(str(error))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, caffe: Caffe) -> Path:
    """The folder of the tiny net, its databases and what real Caffe has taught it."""
    return tiny.trained(tmp_path_factory, caffe)


def missing(runtime: str) -> NoReturn:
    """A runtime is not there: a visible skip, but a failure in CI."""
    if os.environ.get("CI"):
        pytest.fail(runtime)
    pytest.skip(runtime)


def torch_or_skip() -> Any:
    """PyTorch, for a whole file of tests. Without it they are skipped, and fail in CI."""
    return importlib.import_module("torch") if os.environ.get("CI") else pytest.importorskip("torch")


@pytest.fixture
def grown() -> Callable[[], int]:
    """How many megabytes more than at the start of the test this process has held at its peak since then.

    ``ru_maxrss`` would tell of the tests before it.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        return int(line.split()[1]) >> 10

    before = resident("VmRSS")
    return lambda: resident("VmHWM") - before


class Refused(Exception):
    """What real Caffe said where it refused."""


class InCaffe:
    """Code in pycaffe's Python, in one child process for all tests: importing caffe takes a second."""

    Refused = Refused

    def __init__(self, caffe: Caffe) -> None:
        self.child = subprocess.Popen(
            [str(caffe.python), str(Path(__file__).with_name("in_caffe.py"))],
            env={**caffe.environment(), "GLOG_minloglevel": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str, **arguments: Any) -> Any:
        """What ``code`` leaves in ``result``; Refused where it raises or Caffe aborts."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps([code, arguments]) + "\n")
        self.child.stdin.flush()
        reply = json.loads(self.child.stdout.readline())
        if "refused" in reply:
            raise Refused(reply["refused"])
        return reply["result"]

    def net(self, path: Path, phase: int = 1, **options: Any) -> dict[str, Any]:
        """What Caffe makes of a net: see ``describe`` in in_caffe.py."""
        what = {"path": str(path), "phase": phase, **options}
        return dict(self("result = describe(**what)", what=what))


@pytest.fixture(scope="session")
def in_caffe(caffe: Caffe) -> Iterator[InCaffe]:
    """Real Caffe, to be asked about nets."""
    if caffe.python is None:
        missing(f"{caffe.binary} has no pycaffe beside it")
    child = InCaffe(caffe)
    yield child
    child.child.communicate()
