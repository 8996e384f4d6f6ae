"""Files made to do harm: one clear line, exit status 2, nothing written, little time and memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rebirth_caffe.errors import MAX_LENGTH, RebirthError
from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.schema import caffe_pb2
from tests.test_caffemodel import TEXT, current

ROOT = Path(__file__).parents[1]
INPUT = 'input: "data" input_shape { dim: 1 dim: 3 dim: 9 dim: 9 }\n'
NET = INPUT + 'layer { name: "r" type: "ReLU" bottom: "data" top: "r" }\n'


def conv(options: str) -> str:
    given = {"num_output": "4", "kernel_size": "3", **dict([options.split(": ")])}
    inner = " ".join(f"{name}: {value}" for name, value in given.items())
    return one("Convolution", f"convolution_param {{ {inner} }}")


def one(kind: str, rest: str, bottoms: str = 'bottom: "data"') -> str:
    return f'{INPUT}layer {{ name: "x" type: "{kind}" {bottoms} top: "x" {rest} }}'


RELU = NET.removeprefix(INPUT)
STATES = "".join(
    RELU.replace('"r"', f'"{i}"').replace(" }", f' include {{ stage: "{i}" min_level: {i} }} }}')
    for i in range(300)
)
# (text; what stands in the message, or None where the net is a net)
TEXTS = {
    "depth bomb": ("a {" * 200_000, "messages nested more than 100 deep"),
    "depth bomb of lists": ("a: [{" * 200_000, "messages nested more than 100 deep"),
    "megabyte token": (f'name: "{"x" * 2**20}"\n{NET}', None),
    "megabyte word": ("x" * 2**20, "expected ':' or '{'"),
    "megabyte of escapes": (f'name: "{chr(92)}n{chr(92) * 2**20}"\n{NET}', None),
    "megabyte name": (NET.replace('"data" top', f'"{"x" * 2**20}" top'), "is the top of no"),
    "unterminated string": (f"{NET}name: 'x\n", ":3: a string without its closing quote"),
    "NUL": (f"{NET}\0", "binary data, not a prototxt"),
    "invalid UTF-8 in a name": (NET.replace('"r"', r'"\377"'), "not valid UTF-8"),
    "bytes of no encoding in a comment": (f"# \udcff\udcfe\n{NET}", None),
    "16 MB": ("\n" * (2**24 + 1), "larger than 16 MB"),
    "a million fields": ("a{}" * 1_000_001, "more than 1000000 fields"),
    "a million lines": ("#\n" * 2**20, "holds no layer"),
    "20,000 bottoms": (one("Concat", "", 'bottom: "data" ' * 100_000), None),
    "300 levels and stages": (INPUT + STATES, "meant for 300 levels and 301 sets of stages"),
    "cycle": (one("Eltwise", "", 'bottom: "data" bottom: "y"') + RELU.replace('"r"', '"y"'), None),
    "own bottom": ('layer { name: "a" type: "ReLU" bottom: "a" top: "a" }', "a cycle, or layers"),
    "same top twice": (NET + RELU.replace('name: "r"', 'name: "s"'), "is already a top of"),
    "same name twice": (NET + RELU.replace('top: "r"', 'top: "s"'), None),
    "num_output of 2^31": (conv("num_output: 2147483648"), "would be 1x2147483648x7x7; correct"),
    "num_output of 2^32": (conv("num_output: 4294967296"), "4294967296 is outside 0..4294967295"),
    "negative num_output": (conv("num_output: -1"), "-1 is outside 0..4294967295"),
    "kernel of 2^31": (conv("kernel_size: 2147483648"), "exceeds its input 9x9"),
    "pad of 2^31": (conv("pad: 2147483648"), "its output would be"),
    "stride of 0": (conv("stride: 0"), "stride is 0; it must be at least 1"),
    "group of 0": (conv("group: 0"), "group is 0; it must be at least 1"),
    "fc of 2^31": (one("InnerProduct", "inner_product_param { num_output: 2147483648 }"), "1x21474"),
    "overflowing shape": (NET.replace("dim: 9 ", f"dim: {2**63 - 1} "), "correct the sizes"),
    "negative shape": (NET.replace("dim: 9 ", "dim: -9 "), ": input 'data' would be 1x3x-9x-9; correct"),
    "negative input_dim": (
        NET.replace("input_shape {", "").replace("9 }", "9").replace("dim: ", "input_dim: -"),
        ": input 'data' would be -1x-3x-9x-9; correct the sizes",
    ),
    "negative Input layer": (
        'layer { name: "i" type: "Input" top: "data" input_param { shape { dim: -1 dim: 0 } } }' + RELU,
        ":1: layer 'i': its output would be -1x0; correct the sizes",
    ),
    "reshape": (
        one("Reshape", f"reshape_param {{ shape {{ dim: {2**63 - 1} dim: -1 }} }}"),
        "243 values do not divide into",
    ),
    "tiles of 2^31": (one("Tile", "tile_param { tiles: 2147483647 }"), "would be 1x6442450941x9x9"),
    "pyramid of 2^32": (one("SPP", "spp_param { pyramid_height: 4294967295 }"), "pyramid_height is 429"),
    "slice beyond the end": (one("Slice", 'slice_param { slice_point: 9 } top: "y"'), "its slice points do"),
    "axis of -2^31": (one("Concat", "concat_param { axis: -2147483648 }"), "of a 4-D bottom"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), TEXTS.values(), ids=TEXTS.keys())
def test_a_hostile_net_is_refused_in_one_line_soon_and_in_little_memory(text, said, tmp_path, grown):
    path = tmp_path / "net.prototxt"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    start = time.process_time()
    try:
        rebirth(path).report()
        found = ""
    except RebirthError as error:
        found = str(error)
    assert (said or "") in found
    assert "\n" not in found
    assert len(found) < 4 * MAX_LENGTH
    assert said is None or found.startswith((str(path), "layer '"))
    assert time.process_time() - start < 15
    assert grown() < 800


def tool(name: str, *arguments: object, before: str = "", **options) -> subprocess.CompletedProcess[str]:
    """A command of tools/, with code run before it in its process."""
    path = ROOT / "tools" / name
    code = f"import runpy, sys, resource; sys.argv[0] = {str(path)!r}; {before}\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    """Exit status 2 and one line."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with a net and its weights."""
    (tmp_path / "net.prototxt").write_text(TEXT)
    (tmp_path / "net.caffemodel").write_bytes(current())
    return tmp_path


def test_values_beyond_float32_are_infinite_and_told_of_in_one_line(given):
    message = caffe_pb2.NetParameter.FromString(current())
    blob = message.layer[1].blobs[1]
    blob.double_data[:] = [1e300] * len(blob.data)
    del blob.data[:]
    weights = given / "net.caffemodel"
    weights.write_bytes(message.SerializeToString())
    net = given / "net.prototxt"
    refused(tool("rebirth_net.py", net, "--weights", weights), "NaN or infinite in 'conv' (6); the training")


SKIP = ("--skip", "fold:conv")  # its variances are not all above zero
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"  # what is longer cannot be written


@pytest.mark.parametrize("out", ["out", "a/b/out"])
def test_a_full_disk_leaves_nothing_behind(given, out):
    before = sorted(given.rglob("*"))
    net = given / "net.prototxt", "--weights", given / "net.caffemodel", *SKIP
    refused(tool("rebirth_net.py", *net, "--out", given / out, before=FULL), "File too large; nothing was")
    weights = given / "net.caffemodel"
    refused(tool("upgrade.py", weights, given / "new.caffemodel", before=FULL), "File too large")
    refused(tool("upgrade.py", weights, given / "new.h5", before=FULL), "File too large")
    assert sorted(given.rglob("*")) == before


def test_a_full_disk_leaves_what_was_there(given):
    net = given / "net.prototxt", "--weights", given / "net.caffemodel", *SKIP, "--out", given / "out"
    assert tool("rebirth_net.py", *net).returncode == 0
    before = {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    refused(tool("rebirth_net.py", *net, "--force", before=FULL), "File too large; nothing was")
    assert {path: path.read_bytes() for path in given.rglob("*") if path.is_file()} == before


def test_places_that_cannot_be_written(given):
    """A file system that takes nothing, links, and what is there already."""
    elsewhere = given / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (given / "link").symlink_to(elsewhere)
    (given / "dangling").symlink_to(given / "nowhere")
    net, weights = given / "net.prototxt", given / "net.caffemodel"
    for out, said in (
        ("/proc/out", "cannot be written"),
        (given / "link", "exists already"),
        (given / "dangling", "exists and is no directory"),
        (net, "exists and is no directory"),
    ):
        refused(tool("rebirth_net.py", net, "--out", out), said)
        if out != "/proc/out":
            refused(tool("upgrade.py", weights, out), "exists already")
    refused(tool("upgrade.py", weights, "/proc/out"), "/proc/out: ")
    weights.write_bytes(current().replace(b"conv", b"a/bc"))
    refused(tool("upgrade.py", weights, given / "new.h5"), f"{given}/new.h5: HDF5 has no place for a layer")
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]
    assert net.read_text() == TEXT


def test_a_link_among_our_files_is_replaced_and_not_followed(given):
    net = given / "net.prototxt", "--out", given / "out"
    assert tool("rebirth_net.py", *net).returncode == 0
    mine = given / "mine"
    (given / "out/deploy.prototxt").replace(mine)
    (given / "out/deploy.prototxt").symlink_to(mine)
    mine.write_text("mine")
    assert tool("rebirth_net.py", *net, "--force").returncode == 0
    assert mine.read_text() == "mine"
    assert not (given / "out/deploy.prototxt").is_symlink()


def test_paths_in_data_layers_are_never_opened(tmp_path):
    """A pipe nobody writes into: opening it would hang."""
    (tmp_path / "db").mkdir()
    for name in ("list.txt", "mean", "db/data.mdb"):
        os.mkfifo(tmp_path / name)
    transform = f'transform_param {{ mean_file: "{tmp_path}/mean" crop_size: 9 }}'
    kinds = {
        "Data": f'data_param {{ source: "{tmp_path}/db" batch_size: 2 backend: LMDB }} {transform}',
        "ImageData": f'image_data_param {{ source: "{tmp_path}/list.txt" batch_size: 2 }} {transform}',
        "HDF5Data": f'hdf5_data_param {{ source: "{tmp_path}/list.txt" batch_size: 2 }}',
        "WindowData": f'window_data_param {{ source: "{tmp_path}/list.txt" batch_size: 2 }} {transform}',
    }
    for kind, rest in kinds.items():
        path = tmp_path / f"{kind}.prototxt"
        data = one(kind, f'{rest} top: "label"', "").removeprefix(INPUT)
        loss = one("SoftmaxWithLoss", "", 'bottom: "x" bottom: "label"').removeprefix(INPUT)
        loss = loss.replace('top: "x"', 'top: "l"')
        path.write_text(f"{data}\n{loss}")
        assert Net.load(path).graph.views
        assert tool("upgrade.py", path, tmp_path / f"{kind}.new").returncode == 0
        done = tool("rebirth_net.py", path, "--dry-run")
        assert done.returncode in (0, 2), done.stderr
