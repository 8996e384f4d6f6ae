"""The table a person reads: what it says, that it fits, and that a terminal is safe from it."""

import os
import pty
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import Result, rebirth
from rebirth_caffe.report import show

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "prototxts"
TOOL = ROOT / "tools" / "rebirth_net.py"
GOOGLENET = ZOO / "bvlc_googlenet" / "deploy.prototxt"
CAFFENET = ZOO / "bvlc_reference_caffenet" / "deploy.prototxt"
RESNET = ZOO / "resnet_50" / "deploy.prototxt"

SMALL = """
layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ dim: 1 dim: 3 dim: 8 dim: 8 }} }} }}
layer {{ name: "{conv}" type: "Convolution" bottom: "data" top: "conv"
  convolution_param {{ num_output: 4 kernel_size: 3 pad: 1 }} }}
layer {{ name: "norm" type: "{norm}" bottom: "conv" top: "norm" }}
layer {{ name: "ip" type: "InnerProduct" bottom: "norm" top: "ip" inner_product_param {{ num_output: 2 }} }}
"""


def text(result: Result, width: int = 120) -> str:
    """What ``show`` prints, without the blanks that fill its columns."""
    out = StringIO()
    show(result, Console(file=out, width=width, highlight=False, emoji=False, markup=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return "\n".join(line.rstrip() for line in lines)


def words(result: Result, width: int = 120) -> str:
    """The same with one space between words."""
    return re.sub(r"[ \n]+", " ", text(result, width))


def small(folder: Path, conv: str = "conv", norm: str = "LRN") -> Path:
    path = folder / "small.prototxt"
    path.write_text(SMALL.format(conv=conv, norm=norm))
    return path


def test_googlenet_on_a_screen():
    result = rebirth(GOOGLENET)
    wide = text(result)
    assert len(wide.splitlines()) <= 36
    assert len(text(result, 80).splitlines()) <= 48
    lines = [" ".join(line.split()) for line in wide.splitlines()]
    assert lines[0] == "GoogleNet: 11 merges to retrain in 9 steps, 1 exact"
    assert lines[2] == "step in merged into (outputs, stride)"
    assert lines[4:7] == [
        "conv1 conv1 pool1/3x3_s2, pool1/norm1 7x7_s2 (stride 2->4)",
        "conv2 conv2 norm2, pool2/3x3_s2 3x3 (stride 1->2)",
        "3a inception_3a 1x1, pool, pool_proj 3x3_reduce (96->48), 3x3 (128->192), 5x5 (32->64)",
    ]
    # A step of several merges is named once.
    assert (
        "4b-4d inception_4b 1x1, pool, pool_proj 3x3_reduce (112->56), 3x3 (224->384), 5x5 (64->128)" in lines
    )
    assert "inception_4c 1x1, pool, pool_proj 3x3_reduce (128->64), 3x3 (256->384), 5x5 (64->128)" in lines
    assert "exact: Dropout removed (pool5/drop_7x7_s1)" in lines
    assert "inception_5b/output + pool5/7x7_s1 'pool5/7x7_s1' is the global pool" in lines
    assert "multiply-adds 1,582.7 M 693.8 M 2.28x" in lines
    assert "activations 27.34 MB 10.37 MB 2.64x" in lines


def test_what_changes_in_a_kernel():
    said = words(rebirth(CAFFENET, kernel="cover", only=["conv1"]))
    assert re.search(r"conv1 pool1, norm1 conv1 \(11x11->\d+x\d+, stride 4->8(, pad 0->\d)?\)", said)


def test_layers_keep_their_own_names():
    """Not those an exact merge before gave them."""
    said = text(rebirth(RESNET))
    assert "folded" not in said.replace("layers folded into the 53 layers below them", "")
    assert "exact: 106 BatchNorm, Scale and like layers folded into the 53 layers below them" in said


def test_nothing_to_retrain():
    said = text(rebirth(RESNET, exact=True))
    assert said.startswith("ResNet-50: 57 exact, nothing to retrain\n")
    assert "step" not in said


def test_nothing_to_do(tmp_path):
    said = text(rebirth(small(tmp_path, norm="ReLU")))
    assert said.startswith("small: nothing merged, the net stays as it is\n")


def test_what_is_left_out_and_why():
    assert "left out by --skip: 4b, 4c, 4d\n" in text(rebirth(GOOGLENET, skip=["4b-4d"]))
    said = text(rebirth(GOOGLENET, only=["3a"]))
    assert "GoogleNet: 1 merge to retrain in 1 step\n" in said
    assert re.search(r"left out by --only: .*conv1, conv2, 3b.* and \d more\n", said)
    reasons = words(rebirth(CAFFENET))
    assert "conv1 + pool1 the kernel or pad would change" in reasons


def test_what_is_not_counted_and_what_has_no_weights(tmp_path):
    path = small(tmp_path, norm="ForkNorm")
    assert "cost not known, so not counted: norm, ip\n" in text(rebirth(path)) + "\n"
    path = small(tmp_path)
    weights = tmp_path / "w.caffemodel"
    net = Net.load(path)
    from rebirth_caffe.init.fill import fill_missing

    fill_missing(net)
    net.write_weights(weights)
    path.write_text(path.read_text().replace('name: "ip"', 'name: "other"'))
    said = text(rebirth(path, weights))
    assert "weights of layers this net does not have, not written: ip\n" in said
    assert said.endswith("layers without weights, the file has none for them: other")


def test_a_terminal_is_safe_from_names(tmp_path):
    said = text(rebirth(small(tmp_path, conv="[bold]conv\\033[31m\\n:smile:")))
    assert "\x1b" not in said
    assert "[bold]conv\\x1b[31m\\n:smile: (same size)" in said


# ---- where it is printed ----------------------------------------------------------------------------------


def piped(**environment: str) -> str:
    """What the tool prints into a pipe, with no terminal anywhere."""
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")}
    done = subprocess.run(
        [sys.executable, str(TOOL), str(GOOGLENET), "--dry-run"],
        env={**environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    return done.stdout


def test_a_pipe_is_wide_and_has_no_colours():
    assert max(map(len, piped().splitlines())) == 120
    assert max(map(len, piped(COLUMNS="80").splitlines())) == 80


def test_letters_the_output_cannot_show():
    assert "conv1" in piped(PYTHONIOENCODING="ascii")


def test_a_terminal_is_filled_and_has_colours():
    parent, child = pty.openpty()
    try:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 90, 0, 0))
        environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        done = subprocess.Popen(
            [sys.executable, str(TOOL), str(CAFFENET), "--dry-run"],
            env={**environ, "TERM": "xterm-256color"},
            stdin=child,
            stdout=child,
            stderr=child,
        )
        os.close(child)
        said = b""
        while True:
            try:
                piece = os.read(parent, 1 << 16)
            except OSError:  # how Linux says that the other side is closed
                break
            if not piece:
                break
            said += piece
        assert done.wait() == 0
    finally:
        os.close(parent)
    assert b"\x1b[1m" in said
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said.decode())
    assert max(map(len, plain.splitlines())) == 90


@pytest.mark.parametrize("net", [GOOGLENET, CAFFENET, RESNET], ids=lambda path: path.parent.name)
@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_it_fits_whatever_the_width(net, width):
    assert text(rebirth(net), width).count("\n") < 120
