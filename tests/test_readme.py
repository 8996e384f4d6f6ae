"""The README tells the truth: its commands run, its example output is what they print."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe.data import write_lmdb
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Net
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
# make is what runs the tests, and its demo is tools/demo.py; the image has tools/image_check.sh, torchrun
# tests/test_torch_training.py.
ELSEWHERE = ("make ", "docker ", "pip ", "torchrun ")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory that looks like the repository to someone who types the README's commands."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("tools", "prototxts", ".caffe"):
        (here / name).symlink_to(ROOT / name)
    net = Net.load(ROOT / "prototxts/bvlc_googlenet/deploy.prototxt")
    fill_missing(net)
    net.write_weights(here / "bvlc_googlenet.caffemodel")
    return here


def quick(command):
    """A command of the README with training that takes seconds."""
    command = re.sub(r"(--(?:final-)?iterations) \d+", r"\1 2", command)
    if "train_original" in command:
        command += " --iterations 2"
    return command


def run(command, place):
    if command.startswith("cd "):  # training by hand: a few iterations of the 1000
        folder, command = command.removeprefix("cd ").split(" && ")
        place = place / folder
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    settings = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(words, cwd=place, env=settings, capture_output=True, text=True, check=False)


def test_every_command_runs(caffe, place):
    """In the README's order, because later ones use what earlier ones made."""
    here = [c for c in COMMANDS if not c.startswith(ELSEWHERE)]
    assert len(here) >= 6
    printed = {}
    for command in here:
        done = run(quick(command), place)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed[command] = done.stdout
        if "fetch_data" in command:  # fewer images from here on: there are seven tests to come
            for part, seed in (("train", 1), ("test", 2)):
                small = tiny.synthetic(300, seed)
                write_lmdb(place / f"data/fashion_mnist_{part}.lmdb", small, order=np.arange(300), force=True)
    examples = re.findall(r"```sh\n([^\n]+)\n```\n\n```\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 1
    for command, output in examples:
        assert printed[command] == output


def test_commands_run_elsewhere_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    check = (ROOT / "tools/image_check.sh").read_text("utf-8")
    elsewhere = [c for c in COMMANDS if c.startswith(ELSEWHERE)]
    assert len(elsewhere) >= 4
    for command in elsewhere:
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
    assert "bud" in check
    assert "tools/rebirth_net.py" in check


def test_the_tour_runs(caffe, tmp_path):
    out = shlex.quote(str(tmp_path / "demo"))
    done = run(f"python tools/demo.py --runs 1 --iterations 2 --engine caffe --out {out}", ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"final +\d+\.\d\d%", done.stdout)
    assert done.stdout.count("reborn_auto") >= 4
    assert (tmp_path / "demo/bvlc_googlenet/reborn/deploy.prototxt").exists()


def test_python_example(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "prototxts").symlink_to(ROOT / "prototxts")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "googlenet_auto/deploy.prototxt").exists()


def test_the_plan_shown_is_what_the_tool_writes(place):
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    done = run(
        "python tools/rebirth_net.py prototxts/bvlc_googlenet/deploy.prototxt --only conv1 --out only", place
    )
    assert done.returncode == 0, done.stderr
    assert shown in (place / "only/plan.yaml").read_text("utf-8")


def test_every_flag_of_the_command_is_there():
    help_text = run("python tools/rebirth_net.py --help", ROOT).stdout
    flags = set(re.findall(r"(--[a-z-]+)", help_text)) - {"--help", "--no-mirror"}
    missing = [flag for flag in sorted(flags) if flag not in README]
    assert not missing
