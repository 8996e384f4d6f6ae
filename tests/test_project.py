"""What holds for the project's files as a whole."""

import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Where packages come from is the user's configuration, never the project's.
REGISTRIES = (
    r"debian\.org|ubuntu\.com|pypi\.(org|python)|pythonhosted\.org|(ana|)conda\.(org|com)|(docker|quay)\.io"
)
# These exist on one person's machine only.
PLACES = r"/home/\w|/Users/\w|/work/\w|/opt/(wheels|pypi)"


def tracked() -> list[str]:
    """The files in version control that are still there."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def make(*arguments: str) -> str:
    """What make says."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_file_names_a_package_registry_or_a_place_of_one_machine():
    pattern = re.compile(f"{REGISTRIES}|{PLACES}")
    files = tracked()
    found = []
    for name in files:
        data = (ROOT / name).read_bytes()
        if b"\0" not in data:
            lines = data.decode(errors="replace").splitlines()
            found += [f"{name}:{n}: {line}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert "tools/install_caffe.sh" in files
    assert found == []


def test_every_requirement_is_pinned_and_says_why_it_is_there():
    reasons: dict[str, str] = {}
    lines = [(ROOT / f"requirements{what}.txt").read_text().splitlines() for what in ("", "-torch")]
    for line in chain(*lines):
        if line and not line.startswith(("#", "-r ")):
            requirement, _, reason = line.partition("#")
            assert re.fullmatch(r"[\w-]+==[\w.]+(; .+)?", requirement.strip()), line
            name = requirement.split("==")[0]
            reasons[name] = reasons.get(name, "") + reason.strip()  # once for a package of several lines
    assert reasons
    assert all(reasons.values()), reasons
    for line in (ROOT / "requirements-dev.txt").read_text().splitlines():
        assert re.match(r"[\w-]+==[\w.]+(\s|$)|-r requirements-torch\.txt$|#|$", line), line


def test_tools_can_be_run_as_they_are():
    tools = [name for name in tracked() if name.startswith("tools/") and name.endswith((".py", ".sh"))]
    assert "tools/install_caffe.sh" in tools
    for name in [*tools, ".ci/run"]:
        assert os.access(ROOT / name, os.X_OK), f"chmod +x {name}"
        assert (ROOT / name).read_text().startswith("#!"), name


def test_continuous_integration_runs_make_test(tmp_path):
    """.ci/run ends in `make test`, at the root, told that this is CI, and with make's status."""
    stand_in = tmp_path / "make"
    stand_in.write_text('#!/bin/sh\necho "make $* in $PWD with CI=$CI"\nexit 7\n')
    stand_in.chmod(0o755)
    settings = {name: value for name, value in os.environ.items() if name != "CI"}
    settings["PATH"] = f"{tmp_path}:{settings['PATH']}"
    for given, seen in (({}, "true"), ({"CI": "1"}, "1")):
        done = subprocess.run(
            ["bash", str(ROOT / ".ci/run")],
            cwd=tmp_path,
            env={**settings, **given},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 7
        assert done.stdout == f"make test in {ROOT} with CI={seen}\n"


class TestMake:
    def test_test_checks_everything(self):
        steps = make("--dry-run", "test", "lint")
        for step in ("-m ruff check .", "-m mypy", "-m pytest"):
            assert step in steps

    def test_demo_needs_no_development_requirements(self):
        steps = make("--dry-run", "--always-make", "demo")
        assert "tools/install_caffe.sh .caffe" in steps
        assert "--requirement requirements.txt" in steps
        assert "requirements-dev" not in steps
        assert "tools/demo.py" in steps

    def test_help_lists_every_target(self):
        text = make("help")
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert phony
        for target in phony[1].split():
            assert f"make {target} " in text

    @pytest.mark.parametrize("python", ["false", "missing-python"])
    def test_an_unsuitable_python_is_one_line(self, tmp_path, python):
        """Told before anything is created."""
        (tmp_path / "requirements.txt").touch()
        done = subprocess.run(
            ["make", "-f", str(ROOT / "Makefile"), ".venv/requirements.stamp", f"PYTHON={python}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert lines == [
            f"error: '{python}' is not Python 3.10 or newer: make PYTHON=/path/to/a/newer/python3"
        ]
        assert not (tmp_path / ".venv").exists()


class TestImageEntry:
    """The Docker image's entry point, outside of an image."""

    def entry(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "tools/image_entry.sh"), *arguments]
        return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=False)

    def test_without_arguments_it_lists_the_tools(self):
        for arguments in ((), ("--help",)):
            done = self.entry(*arguments)
            assert done.returncode == 0
            assert "  tools/rebirth_net.py\n" in done.stdout

    def test_an_unknown_tool_is_one_line(self):
        done = self.entry("tools/nonsense.py")
        assert done.returncode == 2
        assert done.stderr.startswith("error: there is no tools/nonsense.py")
        assert done.stderr.count("\n") == 1

    def test_anything_else_is_run(self):
        assert self.entry(sys.executable, "-c", "print('so')").stdout == "so\n"
