"""What every command shares, tried on commands of a few lines, as whole processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAD = "import os, signal, sys; from rebirth_caffe import cli, errors\n"


def command(body: str) -> list[str]:
    """A command whose ``main`` is ``body``."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return [sys.executable, "-c", f"{HEAD}def main():\n{lines}cli.run(main)"]


def run(body: str, **options) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.run(command(body), cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("raise errors.NetError('a:1: b; c')", 2, "error: a:1: b; c\n"),
        ("raise errors.PlanError('a\\nb\\t c')", 2, "error: a\\nb\\t c\n"),
        ("cli.fail('a\\n b')", 2, "error: a b\n"),
        (
            "open('/nowhere/file')",
            2,
            "error: /nowhere/file: No such file or directory; check the path, its permissions and free ",
        ),
        (
            "raise OSError(28, 'No space left on device')",
            2,
            "error: standard output or a temporary file: No space left on device; check the free space\n",
        ),
        (
            "raise OSError('only words')",
            2,
            "error: standard output or a temporary file: only words; check the ",
        ),
        ("raise MemoryError", 2, "error: out of memory; "),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise BrokenPipeError", 141, ""),
    ],
)
def test_an_error_is_one_line_and_a_status(body, status, said):
    done = run(body)
    assert done.returncode == status
    assert done.stderr.startswith(said) if said else done.stderr == ""
    assert done.stderr.count("\n") == (said != "")
    assert done.stdout == ""


def test_a_bug_is_no_bad_input():
    """What nobody foresaw keeps its traceback, or it could not be reported."""
    done = run("[][0]")
    assert done.returncode == 1
    assert "IndexError" in done.stderr


def test_a_terminal_is_safe_from_what_names_hold():
    done = run("cli.fail('layer \\x1b[31m\\u202e\\udcff é')")
    assert done.stderr == "error: layer \\x1b[31m\\u202e\\udcff é\n"


def test_a_name_the_output_cannot_show_is_escaped():
    done = run("print('é\\udcff')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe9\\udcff\n", "")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_quiet(lines):
    read, write = os.pipe()
    os.close(read)
    done = run(f"for i in range({lines}): print(i)", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_full_disk_behind_standard_output(lines):
    with open("/dev/full", "w") as full:
        done = run(f"for i in range({lines}): print(i)", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output or a temporary file: No space left on device")
    assert done.stderr.count("\n") == 1


def test_without_standard_output():
    assert run("print(1)", stdout=None, preexec_fn=lambda: os.close(1)).returncode == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_it_quietly_and_tidily(number, status, tmp_path):
    """Whatever waits in a ``finally`` is done."""
    mark = tmp_path / "tidied"
    body = f"try:\n    print('go', flush=True)\n    signal.pause()\nfinally:\n    open({str(mark)!r}, 'w')"
    child = subprocess.Popen(
        command(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    child.send_signal(number)
    said = child.communicate(timeout=20)[1]
    assert (child.returncode, said) == (status, "")
    assert mark.exists()


def test_what_nohup_ignores_stays_ignored():
    body = "os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    done = run(body, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "alive\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: the following arguments are required: FILE; see tool --help\n"),
        (["a", "--count", "b"], "error: argument --count: invalid int value: 'b'; see tool --help\n"),
        (["a", "--none"], "error: unrecognized arguments: --none; see tool --help\n"),
    ],
)
def test_arguments_are_complained_about_in_one_line(arguments, said):
    body = (
        "p = cli.Parser('tool')\n"
        "p.add_argument('file', metavar='FILE')\n"
        "p.add_argument('--count', type=int)\n"
        f"p.parse_args({arguments})"
    )
    done = run(body)
    assert (done.returncode, done.stderr, done.stdout) == (2, said, "")
