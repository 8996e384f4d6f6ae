"""tools/rebirth_net.py as a person runs it: what it writes, what it refuses, what it leaves behind."""

import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from rebirth_caffe import caffemodel
from rebirth_caffe.distil import SOURCES
from rebirth_caffe.errors import RebirthError
from rebirth_caffe.init import METHODS
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Net
from rebirth_caffe.plan import SCHEDULES
from rebirth_caffe.rebirth import FILES, rebirth
from rebirth_caffe.rules import KERNELS
from rebirth_caffe.schema import caffe_pb2

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "prototxts"
TOOL = ROOT / "tools" / "rebirth_net.py"
GOOGLENET = ZOO / "bvlc_googlenet" / "deploy.prototxt"
# A GoogLeNet small enough to be reborn often.
DEPLOY = ZOO / "cifar10_googlenet" / "deploy.prototxt"
TRAIN_VAL = ZOO / "cifar10_googlenet" / "train_val.prototxt"

Command = subprocess.CompletedProcess[str]


def run(*arguments: object, cwd: Path | None = None, **options: Any) -> Command:
    return subprocess.run(
        [*options.pop("prefix", []), sys.executable, str(TOOL), *map(str, arguments)],
        cwd=cwd or "/",
        capture_output=True,
        text=True,
        **options,
    )


def good(*arguments: object, **options: Any) -> str:
    """What a run that succeeds prints."""
    done = run(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything in a folder: names, modes, contents."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
        if not path.is_fifo()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_weights(prototxt: Path, weights: Path) -> Path:
    net = Net.load(prototxt)
    fill_missing(net)
    net.write_weights(weights)
    return weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights that several tests read."""
    folder = tmp_path_factory.mktemp("made")
    with_weights(DEPLOY, folder / "w.caffemodel")
    with_weights(TRAIN_VAL, folder / "tv.caffemodel")
    with_weights(ZOO / "cifar10_full" / "deploy.prototxt", folder / "other.caffemodel")
    return folder


# ---- good input -------------------------------------------------------------------------------------------


def test_a_deploy_net_without_weights(tmp_path):
    said = good(DEPLOY, cwd=tmp_path)
    out = tmp_path / "cifar10_googlenet_rebirth"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert sorted(contents(out)) == ["deploy.prototxt", "plan.yaml", "report.json"]
    assert said.endswith(f"\nwrote {out.name}/: deploy.prototxt, plan.yaml, report.json\n")
    assert "conv1/5x5/rebirth" in (out / "deploy.prototxt").read_text()
    assert Net.load(out / "deploy.prototxt").graph.views


def test_a_deploy_net_with_weights(tmp_path, made):
    good(DEPLOY, "--weights", made / "w.caffemodel", "--out", tmp_path / "deep" / "er" / "out")
    out = tmp_path / "deep" / "er" / "out"
    assert sorted(contents(out)) == ["deploy.prototxt", "plan.yaml", "report.json", "weights.caffemodel"]
    before = Net.load(DEPLOY, made / "w.caffemodel")
    after = Net.load(out / "deploy.prototxt", out / "weights.caffemodel")
    same = [x for x in after.layers if x.blobs and not x.name.endswith("/rebirth")]
    assert len(same) == 6
    for layer in same:
        assert [bytes(b.array) for b in layer.blobs] == [
            bytes(b.array) for b in before.layer(layer.name).blobs
        ]
    assert sum(layer.name.endswith("/rebirth") and bool(layer.blobs) for layer in after.layers) == 14


def test_a_train_val_net(tmp_path, made):
    out = tmp_path / "out"
    said = good(TRAIN_VAL, "--weights", made / "tv.caffemodel", "--out", out)
    assert sorted(contents(out)) == sorted(FILES)
    assert f"wrote {out}/: {', '.join(FILES)}\n" in said
    train_val, deploy = Net.load(out / "train_val.prototxt"), Net.load(out / "deploy.prototxt")
    types = [layer.type for layer in deploy.layers]
    assert (types[0], types[-1]) == ("Input", "Softmax")
    assert not {"Data", "Dropout", "Accuracy", "SoftmaxWithLoss"} & set(types)
    assert {"Data", "Accuracy", "SoftmaxWithLoss"} <= {layer.type for layer in train_val.layers}
    for net in ("train_val.prototxt", "deploy.prototxt"):
        loaded = Net.load(out / net, out / "weights.caffemodel")
        assert [x.name for x in loaded.layers if x.type == "Convolution" and not x.blobs] == []


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("crop_size: ", "min_side: ", "image size is not in the file; give it a crop_size, or --image"),
        ("SoftmaxWithLoss", "CenterLoss", "CenterLoss is a loss stock Caffe does not know"),
    ],
)
def test_a_train_val_that_no_deploy_net_can_be_derived_from(old, new, why, tmp_path):
    (tmp_path / "in.prototxt").write_text(TRAIN_VAL.read_text().replace(old, new))
    said = " ".join(good("in.prototxt", "--out", "out", cwd=tmp_path).split())
    assert "no deploy net could be derived: in.prototxt:" in said
    assert why in said
    assert sorted(contents(tmp_path / "out")) == ["plan.yaml", "report.json", "train_val.prototxt"]


def test_files_have_ordinary_modes(tmp_path):
    good(DEPLOY, "--out", tmp_path / "out", preexec_fn=lambda: os.umask(0o027))
    assert {oct(mode & 0o777) for mode, data in snapshot(tmp_path).values() if data is None} == {"0o750"}
    assert {oct(mode & 0o777) for mode, data in snapshot(tmp_path).values() if data} == {"0o640"}


def test_force_replaces_what_we_wrote_and_nothing_else(tmp_path, made):
    out = tmp_path / "out"
    good(TRAIN_VAL, "--weights", made / "tv.caffemodel", "--out", out)
    (out / "notes.txt").write_text("mine")
    (out / "solver.prototxt").write_text("mine, too")
    good(DEPLOY, "--out", out, "--force", "--only", "3a")
    fresh = tmp_path / "fresh"
    good(DEPLOY, "--out", fresh, "--only", "3a")
    # No train_val and no weights of the earlier run beside another run's deploy net.
    mine = {"notes.txt": b"mine", "solver.prototxt": b"mine, too"}
    assert contents(out) == {**contents(fresh), **mine}


def test_force_removes_nothing_from_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "weights.caffemodel").write_bytes(b"a person's own")
    good(DEPLOY, "--out", tmp_path, "--force")
    assert (tmp_path / "weights.caffemodel").read_bytes() == b"a person's own"
    assert sorted(contents(tmp_path)) == ["deploy.prototxt", "plan.yaml", "report.json", "weights.caffemodel"]


def test_force_makes_the_folder_where_there_is_none(tmp_path):
    good(DEPLOY, "--out", tmp_path / "new", "--force")
    assert sorted(contents(tmp_path / "new")) == ["deploy.prototxt", "plan.yaml", "report.json"]


def test_a_dry_run_prints_the_same_and_writes_nothing(tmp_path, made):
    weights = ("--weights", made / "w.caffemodel")
    dry = good(DEPLOY, *weights, "--dry-run", cwd=tmp_path)
    assert snapshot(tmp_path) == {}
    wet = good(DEPLOY, *weights, cwd=tmp_path)
    assert wet.startswith(dry)
    assert wet[len(dry) :].startswith("wrote cifar10_googlenet_rebirth/: ")
    # An existing folder does not matter where nothing is written.
    assert good(DEPLOY, *weights, "--dry-run", cwd=tmp_path) == dry


def test_json_is_the_report_and_nothing_else(tmp_path):
    printed = json.loads(good(GOOGLENET, "--json", cwd=tmp_path))
    assert json.loads((tmp_path / "GoogleNet_rebirth" / "report.json").read_text()) == printed
    assert json.loads(good(GOOGLENET, "--json", "--dry-run", cwd=tmp_path)) == printed
    assert list(printed) == ["before", "after", "merges", "refused"]
    costs = ["layers", "macs", "params", "activation_bytes", "peak_activation_bytes"]
    assert list(printed["before"]) == list(printed["after"]) == costs
    assert all(type(printed[when][cost]) is int for when in ("before", "after") for cost in costs)
    assert printed["before"]["activation_bytes"] / printed["after"]["activation_bytes"] >= 2.3
    for merge in printed["merges"]:
        assert list(merge) == ["id", "kind", "exact", "absorbs", "becomes", "stage"]
    for refusal in printed["refused"]:
        assert list(refusal) == ["layers", "reason"]
    by_id = {merge["id"]: merge for merge in printed["merges"]}
    assert by_id["conv2"] == {
        "id": "conv2",
        "kind": "streamline",
        "exact": False,
        "absorbs": ["conv2/3x3", "conv2/norm2", "pool2/3x3_s2"],
        "becomes": ["conv2/3x3/rebirth"],
        "stage": "conv2",
    }
    assert by_id["4c"]["stage"] == "4b-4d"
    dropout = next(merge for merge in printed["merges"] if merge["exact"])
    assert (dropout["absorbs"], dropout["becomes"], dropout["stage"]) == (["pool5/drop_7x7_s1"], [], None)
    assert {
        "layers": ["inception_5b/output", "pool5/7x7_s1"],
        "reason": "'pool5/7x7_s1' is the global pool",
    } in printed["refused"]


def merged(*arguments: object) -> list[str]:
    """The ids of the merges that a run makes and that need training."""
    report = json.loads(good(GOOGLENET, "--dry-run", "--json", *arguments))
    return [merge["id"] for merge in report["merges"] if not merge["exact"]]


ALL = ["conv1", "conv2", "3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ((), ALL),
        (("--only", "3a"), ["3a"]),
        (("--only", "3a, 4b-4d,"), ["3a", "4b", "4c", "4d"]),
        (("--only", "4c"), ["4c"]),
        (("--skip", "4b-4d,conv1"), ["conv2", "3a", "3b", "4a", "4e", "5a", "5b"]),
        (("--skip", "4c"), [id_ for id_ in ALL if id_ != "4c"]),
        (("--exact",), []),
    ],
)
def test_which_merges_are_made(flags, ids):
    assert merged(*flags) == ids


def test_exact_leaves_what_must_be_retrained(tmp_path):
    good(ZOO / "resnet_50" / "deploy.prototxt", "--exact", "--out", tmp_path / "out")
    types = {layer.type for layer in Net.load(tmp_path / "out" / "deploy.prototxt").layers}
    assert "Pooling" in types
    assert not types & {"BatchNorm", "Scale"}


def test_reduce_and_kernel_reach_the_net(tmp_path):
    def geometry(name: str, *flags: object) -> tuple[int, list[int], list[int]]:
        out = tmp_path / "_".join(map(str, flags or ("plain",)))
        if not out.exists():
            good(DEPLOY, *flags, "--out", out)
        conv = Net.load(out / "deploy.prototxt").layer(f"{name}/rebirth").param.convolution_param
        return conv.num_output, list(conv.kernel_size), list(conv.pad)

    reducer, conv1 = "inception_3a/3x3_reduce", "conv1/5x5"
    assert geometry(reducer)[0] == 24
    assert geometry(reducer, "--reduce", "0.25")[0] == 16  # 12, rounded up to a multiple of 8
    assert geometry(conv1)[1:] == ([5], [2])
    assert geometry(conv1, "--kernel", "cover")[1] > [5]
    assert geometry(conv1, "--kernel", "auto")[1] > [5]


def test_a_plan_given_back_makes_the_same_files(tmp_path, made):
    for flags in ((), ("--kernel", "auto", "--reduce", "0.25"), ("--only", "3a,conv1"), ("--exact",)):
        first, second = tmp_path / "first", tmp_path / "second"
        weights = ("--weights", made / "tv.caffemodel", "--out")
        good(TRAIN_VAL, *flags, *weights, first)
        good(TRAIN_VAL, "--plan", first / "plan.yaml", *weights, second)
        one, two = contents(first), contents(second)
        assert sorted(one) == sorted(FILES)
        # The rules were not asked again, so nothing was refused.
        assert json.loads(one.pop("report.json"))["after"] == json.loads(two.pop("report.json"))["after"]
        assert one == two
        shutil.rmtree(first)
        shutil.rmtree(second)


def test_an_edited_plan(tmp_path):
    good(DEPLOY, "--out", tmp_path / "out")
    plan = tmp_path / "out" / "plan.yaml"
    text = plan.read_text()
    assert "kind: branches\n" in text
    plan.write_text(text.replace("kind: branches\n", "kind: branches\n  enabled: false\n"))
    # Into the folder that it came from, as one does.
    said = good(DEPLOY, "--plan", plan, "--out", tmp_path / "out", "--force")
    assert "2 merges to retrain in 2 steps" in said
    assert plan.read_text() != text


def test_init_and_seed(tmp_path, made):
    def weights(*flags: object) -> bytes:
        out = tmp_path / "out"
        good(DEPLOY, "--weights", made / "w.caffemodel", *flags, "--out", out, "--force")
        return contents(out)["weights.caffemodel"]

    inherit, xavier = weights(), weights("--init", "xavier")
    assert weights("--init", "inherit", "--seed", "0") == inherit != xavier
    assert weights("--init", "xavier") == xavier
    assert weights("--init", "xavier", "--seed", "1") not in (inherit, xavier)


def test_a_filter_that_died_in_training(tmp_path):
    """A reducer's filter that is almost zero makes no reborn weight huge."""
    net = Net.load(DEPLOY)
    fill_missing(net)
    reducer = net.layer("inception_3a/5x5_reduce")
    assert reducer.record is not None
    weight = reducer.blobs[0].array.copy()
    weight[0] *= 1e-6
    reducer.record = caffemodel.Record(
        reducer.name, reducer.type, [caffemodel.Blob(weight), reducer.blobs[1]]
    )
    net.write_weights(tmp_path / "w.caffemodel")
    reborn = rebirth(DEPLOY, tmp_path / "w.caffemodel").net.layer("inception_3a/5x5/rebirth")
    assert abs(reborn.blobs[0].array).max() < 10


@pytest.mark.parametrize("value", ["nan", "inf", "-1e38"])
def test_weights_of_a_training_that_diverged(value, tmp_path):
    net = Net.load(DEPLOY)
    fill_missing(net)
    conv = net.layer("conv1/5x5")
    assert conv.record is not None
    weight = conv.blobs[0].array.copy()
    weight[3, 1] = float(value)
    conv.record = caffemodel.Record(conv.name, conv.type, [caffemodel.Blob(weight), conv.blobs[1]])
    net.write_weights(tmp_path / "w.caffemodel")
    flags = (DEPLOY, "--weights", "w.caffemodel", "--dry-run")
    if value == "-1e38":  # too large, but a number
        good(*flags, cwd=tmp_path)
        return
    said = bad(*flags, cwd=tmp_path)
    assert said.startswith("w.caffemodel: weights that are NaN or infinite in 'conv1/5x5' (25); ")


def test_layers_of_a_fork_that_work_in_place(tmp_path):
    text = changed('name: "conv1/relu_5x5"\n  type: "ReLU"', 'name: "conv1/relu_5x5"\n  type: "ForkReLU"')
    (tmp_path / "in.prototxt").write_text(text)
    merges = json.loads(good("in.prototxt", "--json", cwd=tmp_path))["merges"]
    assert {"conv2", "3a", "3b", "4a", "4b"} <= {merge["id"] for merge in merges}
    assert 'type: "ForkReLU"' in (tmp_path / "cifar10_googlenet_rebirth" / "deploy.prototxt").read_text()


def test_a_second_rebirth(tmp_path, made):
    """What the tool wrote is an input like any other."""
    good(DEPLOY, "--weights", made / "w.caffemodel", "--only", "3a", "--out", tmp_path / "a")
    again = ("--weights", tmp_path / "a" / "weights.caffemodel", "--out", tmp_path / "b")
    said = good(tmp_path / "a" / "deploy.prototxt", *again)
    assert "merges to retrain" in said
    assert (tmp_path / "b" / "weights.caffemodel").exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("a/../b c", "a_.._b_c_rebirth"),
        ("été", "été_rebirth"),
        ("\\000", "__rebirth"),
        ("N" * 300, "N" * 60 + "_rebirth"),
        ("", "net_rebirth"),
    ],
)
def test_any_name_of_a_net_makes_a_folder(name, folder, tmp_path):
    text = changed('name: "cifar10_googlenet"', f'name: "{name}"')
    (tmp_path / "net.prototxt").write_text(text)
    good("net.prototxt", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["net.prototxt", folder])


def test_names_of_files_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/n\xff.prototxt"
    text = changed('name: "cifar10_googlenet"', "")
    Path(os.fsdecode(path)).write_text(text)
    out = tmp_path / os.fsdecode(b"\xfeout")
    weights = with_weights(DEPLOY, tmp_path / "w.caffemodel")
    good(os.fsdecode(path), "--weights", weights, "--out", out)
    assert len(contents(out)) == 4


def test_three_lines_of_python(tmp_path, made):
    from rebirth_caffe.rebirth import rebirth

    result = rebirth(DEPLOY, weights=made / "w.caffemodel")
    result.write(tmp_path / "api")

    good(DEPLOY, "--weights", made / "w.caffemodel", "--out", tmp_path / "command")
    assert contents(tmp_path / "api") == contents(tmp_path / "command")
    assert result.report()["before"]["layers"] > result.report()["after"]["layers"]


# ---- bad input --------------------------------------------------------------------------------------------


def bad(*arguments: object, cwd: Path, **options: Any) -> str:
    """What is said about bad input: one line, nothing else, and nothing written."""
    before = snapshot(cwd)
    done = run(*arguments, cwd=cwd, **options)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert snapshot(cwd) == before
    return done.stderr.removeprefix("error: ").rstrip("\n")


INPUT = (
    'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }\n'
)


def relu(name: str, bottom: str, top: str) -> str:
    return f'layer {{ name: "{name}" type: "ReLU" bottom: "{bottom}" top: "{top}" }}\n'


def changed(old: str, new: str) -> str:
    text = DEPLOY.read_text()
    assert old in text
    return text.replace(old, new, 1)


BAD_NETS = {
    "README": ((ZOO / "README.md").read_text(), r":\d+: .* not a prototxt"),
    "JSON": ('{"layers": [1, 2]}\n', r":1: expected a field name, found '{'; .* not a prototxt"),
    "YAML": ("version: 1\nnet: x\n", ": holds no layer .*'version' at line 1.* give a deploy or train_val"),
    "a word": ("hello", r":1: expected ':' or '{' after 'hello', found the end of the file; "),
    "a solver": (
        (ZOO / "cifar10_googlenet" / "solver.prototxt").read_text(),
        r": holds no layer .*'net' at line \d+.* give a deploy or train_val prototxt",
    ),
    "noise": (
        bytes(range(256)) * 20,
        r":1: binary data, not a prototxt; weights go to --weights",
    ),
    "noise without zeros": (bytes(range(200, 256)) * 20, r":1: .* not a prototxt"),
    "UTF-16": (DEPLOY.read_text().encode("utf-16"), r":1: binary data, not a prototxt"),
    "empty": ("", ": holds no layer; give a deploy or train_val prototxt"),
    "only comments": ("\n# nothing\n", ": holds no layer; give a deploy or train_val prototxt"),
    "cut short": (DEPLOY.read_text()[:-20], r":\d+: "),
    "a brace too many": (
        DEPLOY.read_text() + "}\n",
        r":\d+: expected a field name, found '}'; a brace or quote",
    ),
    "a template": (changed("num_output: 32", "num_output: ${N}"), r":18: '\$' .* template with placeholders"),
    "V1": ('layers { name: "x" type: RELU }\n', ":1: layer 'x': ReLU has 0 bottoms, too few"),
    "a missing bottom": (
        changed('bottom: "pool1/norm1"', 'bottom: "pool1/typo"'),
        r":53: layer 'conv2/3x3_reduce': bottom 'pool1/typo' is the top of no layer .*; correct the name",
    ),
    "a cycle": (
        INPUT
        + 'layer { name: "sum" type: "Eltwise" bottom: "data" bottom: "back" top: "sum" }\n'
        + relu("back", "sum", "back"),
        ":2: layer 'sum': bottom 'back' is produced only below, by .*:3: layer 'back'; a cycle, or",
    ),
    "out of order": (
        INPUT + relu("b", "a", "b") + relu("a", "data", "a"),
        ":2: layer 'b': bottom 'a' is produced only below, by .*:3: layer 'a'; .* move the producer up",
    ),
    "a top written twice": (
        INPUT + relu("a", "data", "x") + relu("b", "data", "x"),
        ":3: layer 'b': top 'x' is already a top of .*:2: layer 'a'; rename one",
    ),
    "no type": (INPUT + 'layer { name: "x" bottom: "data" top: "y" }\n', ":2: layer 'x': has no type; give"),
    "a huge kernel": (
        changed("kernel_size: 5", "kernel_size: 500"),
        r":10: layer 'conv1/5x5': its window 500x500 exceeds its input 32x32",
    ),
    "a kernel of 0": (
        changed("kernel_size: 5", "kernel_size: 0"),
        r"layer 'conv1/5x5'.*: kernel_size is 0; ",
    ),
    "a number in quotes": (
        changed("kernel_size: 5", 'kernel_size: "5"'),
        ":20: kernel_size: expected a number or word, found the string",
    ),
    "num_output of -1": (changed("num_output: 32", "num_output: -1"), ":18: num_output: -1 is outside 0"),
    "an image of less than no size": (
        changed("dim: 3 dim: 32 dim: 32", "dim: 3 dim: -1 dim: 32"),
        ":4: layer 'data': its output would be 1x3x-1x32; correct the sizes",
    ),
    "a thousand levels": ("a {" * 1000, ":1: messages nested more than 100 deep; not a net"),
}


@pytest.mark.parametrize("name", BAD_NETS)
def test_a_bad_net(name, tmp_path):
    data, message = BAD_NETS[name]
    (tmp_path / "in.prototxt").write_bytes(data.encode() if isinstance(data, str) else data)
    said = bad("in.prototxt", cwd=tmp_path)
    assert re.match(
        f"in.prototxt{message}" if message.startswith(":") else f"(in.prototxt.*)?({message})", said
    ), said


def test_nets_that_are_no_files(tmp_path, made):
    assert bad("none.prototxt", cwd=tmp_path) == "none.prototxt: no such file; check the path"
    assert bad("", cwd=tmp_path) == ".: is a directory; give the prototxt file in it"
    (tmp_path / "folder").mkdir()
    assert bad("folder", cwd=tmp_path) == "folder: is a directory; give the prototxt file in it"
    assert bad("x" * 300, cwd=tmp_path).endswith(
        ": cannot be read: File name too long; check its permissions"
    )
    weights = shutil.copy(made / "w.caffemodel", tmp_path)
    assert "binary data, not a prototxt; weights go to --weights" in bad(weights, cwd=tmp_path)


def bad_weights(data: bytes, tmp_path: Path) -> str:
    (tmp_path / "w.caffemodel").write_bytes(data)
    said = bad(DEPLOY, "--weights", "w.caffemodel", "--out", "a/b", cwd=tmp_path)
    assert said.startswith("w.caffemodel: ")
    return said.removeprefix("w.caffemodel: ")


@pytest.mark.parametrize("kept", [0, 1, 10, 30, 200, 5000, 0.3, 0.7, -20, -1])
def test_weights_cut_short(kept, tmp_path, made):
    data = (made / "w.caffemodel").read_bytes()
    kept = int(len(data) * kept) if isinstance(kept, float) else kept
    said = bad_weights(data[:kept], tmp_path)
    assert ("cut short" if kept else "holds no layers") in said
    assert said.endswith("copy or download it again")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff" * 1000, "no number at byte 10; not a caffemodel, or damaged: copy or download it again"),
        (bytes(1000), "no field at byte 1; not a caffemodel, or damaged: copy or download it again"),
        (b"PK\x03\x04" + b"\xaa" * 100, ""),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 that cannot be read: "),
        (DEPLOY.read_bytes(), "is text, not a caffemodel; the prototxt, or a download that failed?"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "is text, not a caffemodel; "),
        (b"version https://example.org/spec/v1\nsize 53533754\n", "is text, not a caffemodel; "),
    ],
    ids=["ones", "zeros", "a zip file", "HDF5", "the prototxt", "a web page", "a pointer"],
)
def test_weights_that_are_none(data, message, tmp_path):
    assert bad_weights(data, tmp_path).startswith(message)


def test_weights_of_something_else(tmp_path, made):
    said = bad(DEPLOY, "--weights", made / "other.caffemodel", cwd=tmp_path)
    assert said.startswith(f"{made}/other.caffemodel: ")
    assert "no layer with weights is called as one of" in said or "the net needs" in said
    (tmp_path / "in.prototxt").write_text(changed("num_output: 32", "num_output: 40"))
    said = bad("in.prototxt", "--weights", made / "w.caffemodel", cwd=tmp_path)
    assert "layer 'conv1/5x5' blob 0 is 32x3x5x5, the net needs 40x3x5x5; weights of another net" in said
    assert (
        bad(DEPLOY, "--weights", "none", cwd=tmp_path) == "none: no such file; check the path of the weights"
    )
    said = bad(DEPLOY, "--weights", ".", cwd=tmp_path)
    assert said == ".: is a directory; give the .caffemodel file in it"


PLAN = "version: 1\nnet: cifar10_googlenet\nmerges:\n"
MERGE = "- {id: a, kind: streamline, absorbs: [conv1/5x5], becomes: []}\n"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "the file is no mapping"),
        ("[1, 2]", "the file is no mapping"),
        (b"\xb4\x00\xff", "not YAML: "),
        (DEPLOY.read_text(), "not YAML: "),
        ("version: 1\nmerges: [\n", "not YAML: "),
        ("version: 3\nmerges: []\n", "version is 3; this tool reads version 1"),
        ("version: 2001-99-99\n", "not YAML: month must be in 1..12"),
        ("version: !!bool maybe\n", "the tag tag:yaml.org,2002:bool has no place in a plan; remove it"),
        ("version: !!int ''\n", "the tag tag:yaml.org,2002:int has no place in a plan"),
        (
            "version: !!python/object/apply:os.system [ls]\n",
            "the tag tag:yaml.org,2002:python/object/apply:os.system has no place in a plan",
        ),
        ("[" * 100_000, "lists or mappings more than 20 deep; not a plan"),
        (
            PLAN.replace("merges", "mergez"),
            "the file has an unknown key 'mergez'; known are merges, net, version",
        ),
        (PLAN, "merges is no list"),
        (PLAN + "- 1\n", "merge 1 is no mapping"),
        (PLAN + MERGE.replace("kind", "kid"), "merge 1 has an unknown key 'kid'; known are "),
        (PLAN + MERGE.replace("streamline", "magic"), "merge 'a': kind 'magic'; known are "),
        (PLAN + MERGE.replace("[conv1/5x5]", "[]"), "merge 'a': absorbs no layer"),
        (PLAN + MERGE + MERGE, "two merges are called 'a'; ids must differ"),
    ],
)
def test_a_bad_plan(plan, message, tmp_path):
    (tmp_path / "plan.yaml").write_bytes(plan.encode() if isinstance(plan, str) else plan)
    said = bad(DEPLOY, "--plan", "plan.yaml", cwd=tmp_path)
    assert re.match(rf"plan.yaml(:\d+)?: {re.escape(message)}", said), said


def test_a_plan_of_something_else(tmp_path):
    assert bad(DEPLOY, "--plan", "none", cwd=tmp_path) == "none: no such file; check the path of the plan"
    assert bad(DEPLOY, "--plan", ".", cwd=tmp_path) == ".: is a directory; give the plan.yaml in it"
    (tmp_path / "plan.yaml").write_text(PLAN + MERGE.replace("conv1/5x5", "fc9"))
    said = bad(DEPLOY, "--plan", "plan.yaml", cwd=tmp_path)
    assert said.startswith("merge 'a': the net has no layer 'fc9' at this point; is the plan for this net")
    good(DEPLOY, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("like: conv1/5x5\n", "like: inception_3a/5x5\n", 1))
    said = bad(DEPLOY, "--plan", "plan.yaml", cwd=tmp_path)
    assert said.startswith(
        "merge 'conv1': layer 'conv1/5x5/rebirth' is made after 'inception_3a/5x5', no layer of"
    )
    (tmp_path / "plan.yaml").write_text(PLAN.replace("merges:", "merges: []"))
    said = bad(DEPLOY, "--plan", "plan.yaml", "--only", "3a", cwd=tmp_path)
    assert said == "no merge is called '3a'; there are none"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reduce", "0"), "--reduce 0: give a ratio above 0 and at most 1"),
        (("--reduce", "2"), "--reduce 2: give a ratio above 0 and at most 1"),
        (("--reduce=-0.5",), "--reduce -0.5: give a ratio above 0 and at most 1"),
        (("--reduce", "nan"), "argument --reduce: 'nan' is no number; see rebirth_net.py --help"),
        (("--reduce", "half"), "argument --reduce: 'half' is no number; see rebirth_net.py --help"),
        (("--seed", "-1"), "argument --seed: "),
        (("--seed", "1.5"), "argument --seed: '1.5' is no whole number from 0; see "),
        (("--kernel", "big"), "argument --kernel: invalid choice: 'big' (choose from "),
        (("--init", "zero"), "argument --init: invalid choice: 'zero' (choose from "),
        (("--only", ","), "argument --only: names no merge; give ids like conv1,4b-4d; see "),
        (("--only", ""), "argument --only: names no merge; "),
        (("--only", "3a", "--skip", "3b"), "argument --skip: not allowed with argument --only; see "),
        (("--only", "3a,conv9"), "no merge is called 'conv9'; there are 3a, 3b, "),
        (("--skip", "conv9"), "no merge is called 'conv9'; there are 3a, 3b, "),
        (("--image", "3x0x32"), "argument --image: '3x0x32' is no CxHxW; give channels, height and width: "),
        (("--train-data", "a"), "--train-data and --test-data go together; see "),
        (("--train-data", "a", "--test-data", "b"), ""),
        (
            ("--scale", "0.1"),
            "--scale is of no use without --train-data and --test-data, or --calibration; see ",
        ),
        (
            ("--exact", "--calibration", "a"),
            "--calibration is of no use with --exact, which leaves nothing to re-train; see ",
        ),
        (("--exact", "--init", "lsq", "--train-data", "a", "--test-data", "b"), "--init lsq is of no use wi"),
        (
            ("--exact", "--kernel", "auto"),
            "--kernel is of no use with --exact, which leaves nothing to re-train; ",
        ),
        (
            ("--exact", "--train-data", "a", "--test-data", "b", "--distil"),
            "--distil is of no use with --exact",
        ),
        (("--plan", "plan.yaml", "--reduce", "1"), "--reduce is of no use with --plan, which has its own; "),
        (("--mean-value", "1,,2"), "argument --mean-value: '1,,2' is not numbers, like 104,117,123; see "),
        (("--crop", "0"), "argument --crop: '0' is no whole number from 1; see "),
        (("--fast",), "unrecognized arguments: --fast; see rebirth_net.py --help"),
        (("--out",), "argument --out: expected one argument; see "),
        (("other.prototxt",), "unrecognized arguments: other.prototxt; see "),
    ],
)
def test_a_bad_flag(flags, message, tmp_path):
    assert bad(DEPLOY, *flags, cwd=tmp_path).startswith(message)


def test_no_arguments(tmp_path):
    assert bad(cwd=tmp_path).startswith("the following arguments are required: IN.prototxt; see ")


def test_the_choices_are_those_of_the_package():
    said = good("--help")
    for words in (KERNELS, METHODS, SCHEDULES, (*SOURCES, "no")):
        assert f"{{{','.join(words)}}}" in said


def test_the_same_of_the_python_api():
    wrongs = ({"kernel": "big"}, {"init": "zero"}, {"seed": -1}, {"reduce": 0}, {"reduce": float("nan")})
    for wrong in wrongs:
        with pytest.raises(RebirthError, match=f"--{next(iter(wrong))} "):
            rebirth(DEPLOY, **wrong)


# ---- output that cannot be written ------------------------------------------------------------------------


def test_an_output_that_is_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deploy.prototxt").write_text("mine")
    said = bad(DEPLOY, "--out", "out", cwd=tmp_path)
    assert said == "out: exists already; give another --out, or --force to replace its files"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        for force in ((), ("--force",)):
            said = bad(DEPLOY, "--out", name, *force, cwd=tmp_path)
            assert said == f"{name}: exists and is no directory; give another --out"
    (tmp_path / "out" / "report.json").mkdir()
    said = bad(DEPLOY, "--out", "out", "--force", cwd=tmp_path)
    assert said == "out/report.json: is a directory; give another --out"
    assert bad(DEPLOY, "--out", "", cwd=tmp_path).startswith(".: exists already; ")


@pytest.mark.parametrize("out", ["x", None])
def test_an_output_that_is_there_is_noticed_before_anything_takes_long(out, tmp_path, made):
    (tmp_path / (out or "cifar10_googlenet_rebirth")).mkdir()
    images = ["--weights", made / "w.caffemodel", "--init", "lsq", "--calibration", "none-of-these-are-read"]
    said = bad(DEPLOY, *images, *(("--out", out) if out else ()), cwd=tmp_path)
    assert said.endswith("exists already; give another --out, or --force to replace its files")


def test_an_output_that_would_replace_the_input(tmp_path):
    shutil.copy(DEPLOY, tmp_path / "deploy.prototxt")
    said = bad("deploy.prototxt", "--out", ".", "--force", cwd=tmp_path)
    assert said == "deploy.prototxt: was read as input and would be replaced; give another --out"
    weights = with_weights(DEPLOY, tmp_path / "weights.caffemodel")
    (tmp_path / "deploy.prototxt").unlink()
    said = bad(DEPLOY, "--weights", weights, "--out", ".", "--force", cwd=tmp_path)
    assert said == "weights.caffemodel: was read as input and would be replaced; give another --out"


def unprivileged() -> list[str]:
    """What to put before a command so that permissions hold, also for root."""
    if os.geteuid():
        return []
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("root here cannot give up its rights: no setpriv")
    return prefix


def test_an_output_where_nobody_may_write(tmp_path):
    closed = tmp_path / "closed"
    (closed / "out").mkdir(parents=True)
    (closed / "out").chmod(0o555)
    closed.chmod(0o555)
    prefix = unprivileged()
    wrong = "cannot be written: Permission denied; nothing was, check its permissions and free space"
    try:
        for out in ("closed/new", "closed/a/b/c"):
            assert bad(DEPLOY, "--out", out, cwd=tmp_path, prefix=prefix).startswith(f"{out}: {wrong}")
        said = bad(DEPLOY, "--out", "closed/out", "--force", cwd=tmp_path, prefix=prefix)
        assert said.startswith(f"closed/out: {wrong}")
        assert bad(DEPLOY, cwd=closed, prefix=prefix).startswith(f"cifar10_googlenet_rebirth: {wrong}")
    finally:
        closed.chmod(0o755)
        (closed / "out").chmod(0o755)


def test_input_that_nobody_may_read(tmp_path):
    prefix = unprivileged()
    folder = tmp_path / "folder"
    folder.mkdir()
    wrong = "cannot be read: Permission denied; check its permissions"
    for flag, name in (("", "net.prototxt"), ("--weights", "w.caffemodel"), ("--plan", "plan.yaml")):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0)
        arguments = [DEPLOY, flag, f"../{name}"] if flag else [f"../{name}"]
        assert bad(*arguments, cwd=folder, prefix=prefix) == f"../{name}: {wrong}"


def test_an_output_under_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file/out", "file/a/b", "x" * 300, "a/" + "x" * 300):
        said = bad(DEPLOY, "--out", out, cwd=tmp_path)
        assert said.startswith(f"{out}: cannot be written: ")


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_disk_that_is_full(limit, tmp_path, made):
    """A limit on the size of files stops the writing in the middle, as a full disk does."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = (DEPLOY, "--weights", made / "w.caffemodel", "--out")
    said = bad(*flags, "new/out", cwd=tmp_path, preexec_fn=full)
    assert said.startswith(
        "new/out: cannot be written: File too large; nothing was, check its permissions and"
    )
    good(DEPLOY, "--out", tmp_path / "old", "--only", "3a")
    said = bad(*flags, "old", "--force", cwd=tmp_path, preexec_fn=full)
    assert said.startswith("old: cannot be written: File too large; nothing was")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", range(12))
def test_a_failure_while_files_are_exchanged(call, error, tmp_path, monkeypatch):
    """With --force the old files are all there again, wherever it stops."""
    out = tmp_path / "out"
    rebirth(TRAIN_VAL).write(out)
    (out / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    result = rebirth(DEPLOY, only=["3a"])
    calls = itertools.count()
    real: Callable[..., Path] = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if next(calls) == call:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    replaced = 7  # four old files out of the way, three new ones in
    if call < replaced:
        with pytest.raises((RebirthError, KeyboardInterrupt)):
            result.write(out, force=True)
        assert snapshot(tmp_path) == before
    else:
        result.write(out, force=True)
        assert not (out / "train_val.prototxt").exists()


def test_a_failure_after_each_file(tmp_path, monkeypatch):
    result = rebirth(DEPLOY)
    for step in ("is_trainable", "plans.dump", "_cost", "_umask"):
        monkeypatch.setattr(f"rebirth_caffe.rebirth.{step}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            result.write(tmp_path / "a" / "out")
        monkeypatch.undo()
        assert snapshot(tmp_path) == {}


# ---- stopped in the middle --------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_reading(number, status, tmp_path):
    pipe = tmp_path / "net.prototxt"
    os.mkfifo(pipe)
    child = start(pipe, "--out", tmp_path / "a" / "out")
    with pipe.open("wb"):  # opens when the child does
        child.send_signal(number)
        said = child.communicate(timeout=20)
    assert (child.returncode, *said) == (status, "", "")
    assert snapshot(tmp_path) == {}


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_writing(number, tmp_path, made):
    """All or nothing: where it is too late to stop, everything is there."""
    out = tmp_path / "a" / "out"
    child = start(DEPLOY, "--weights", made / "w.caffemodel", "--out", out)
    while child.poll() is None and not (tmp_path / "a").exists():
        time.sleep(0.001)
    child.send_signal(number)
    _, errors = child.communicate(timeout=20)
    assert errors == ""
    if out.exists():
        assert len(contents(out)) == 4
        assert sorted(snapshot(tmp_path)) == [
            "a",
            "a/out",
            *(f"a/out/{name}" for name in sorted(contents(out))),
        ]
    else:
        assert child.returncode == (130 if number == signal.SIGINT else 143)
        assert snapshot(tmp_path) == {}


def test_a_closed_pipe(tmp_path):
    """``| head -1`` ends it quietly, and what it wrote is whole."""
    for flags in ((), ("--json",)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [
                sys.executable,
                str(TOOL),
                str(DEPLOY),
                *flags,
                "--out",
                str(tmp_path / "-".join(["out", *flags])),
            ],
            stdout=write,
            stderr=subprocess.PIPE,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b"")
    assert contents(tmp_path / "out") == contents(tmp_path / "out---json")
    assert len(contents(tmp_path / "out")) == 3


# ---- time -------------------------------------------------------------------------------------------------


def cpu_seconds(*arguments: object) -> float:
    """The least processor time of three runs."""
    spent = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, str(TOOL), *map(str, arguments)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        spent.append(usage.ru_utime + usage.ru_stime)
    return min(spent)


def test_googlenet_with_weights_takes_less_than_a_second_and_a_half(tmp_path):
    weights = with_weights(GOOGLENET, tmp_path / "w.caffemodel")
    assert cpu_seconds(GOOGLENET, "--weights", weights, "--out", tmp_path / "out", "--force") < 1.5


def test_help_answers_at_once():
    assert cpu_seconds("--help") < 0.2
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(TOOL), "--help"], capture_output=True, text=True, check=True
    )
    for heavy in ("numpy", "google.protobuf", "yaml", "rich"):
        assert f" {heavy}\n" not in done.stderr


# ---- real Caffe -------------------------------------------------------------------------------------------

IN_CAFFE = """
net = caffe.Net(path, phase, weights=weights)
for name in net.inputs:
    net.blobs[name].data[...] = np.random.RandomState(1).randn(*net.blobs[name].shape) * 50
out = net.forward()
result = {
    "finite": all(bool(np.isfinite(blob.data).all()) for blob in net.blobs.values()),
    "spread": {name: float(value.std()) for name, value in out.items()},
    "layers": list(net._layer_names),
}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of one image and its mean, for the Data layers."""
    folder = tmp_path_factory.mktemp("images")
    pixels = bytes(i * 7 % 256 for i in range(3 * 256 * 256))
    datum = caffe_pb2.Datum(channels=3, height=256, width=256, data=pixels, label=1)
    with lmdb.open(str(folder / "lmdb")) as database, database.begin(write=True) as transaction:
        transaction.put(b"0", datum.SerializeToString())
    mean = caffe_pb2.BlobProto(num=1, channels=3, height=256, width=256, data=[100] * len(pixels))
    (folder / "mean.binaryproto").write_bytes(mean.SerializeToString())
    return folder


@pytest.mark.parametrize("kind", ["deploy", "train_val"])
@pytest.mark.parametrize("name", ["bvlc_googlenet", "bvlc_reference_caffenet", "bvlc_alexnet", "resnet_50"])
def test_the_zoo_reborn_runs_in_real_caffe(name, kind, in_caffe, images, tmp_path):
    """The net builds, every weight has its place, and what comes out is finite and not all the same.

    One image, not ten; and fc6 and fc7 with 256 outputs, not 4096: the same graph and a tenth of the bytes.
    """
    text = (ZOO / name / f"{kind}.prototxt").read_text()
    text = text.replace("num_output: 4096", "num_output: 256").replace("dim: 10 dim: 3", "dim: 1 dim: 3")
    text = re.sub(r'source: "[^"]*"', f'source: "{images}/lmdb"', text)
    text = re.sub(r'mean_file: "[^"]*"', f'mean_file: "{images}/mean.binaryproto"', text)
    text = re.sub(r"batch_size: \d+", "batch_size: 1", text)
    (tmp_path / "in.prototxt").write_text(text)
    weights = with_weights(tmp_path / "in.prototxt", tmp_path / "w.caffemodel")
    out = tmp_path / "out"
    good("in.prototxt", "--weights", weights, "--out", out, cwd=tmp_path)
    records = caffemodel.read(out / "weights.caffemodel").by_name()
    for file, phase in [("deploy", 1)] + [("train_val", 0), ("train_val", 1)] * (kind == "train_val"):
        path = out / f"{file}.prototxt"
        said = in_caffe(IN_CAFFE, path=str(path), phase=phase, weights=str(out / "weights.caffemodel"))
        assert said["finite"]
        assert (said["spread"].get("prob", 0) > 0) == (file == "deploy")
        assert any(layer.endswith(("/rebirth", "/folded")) for layer in said["layers"])
        for layer in Net.load(path).layers:
            if layer.type in ("Convolution", "InnerProduct"):
                assert len(records[layer.name].blobs) == 1 + layer.param.convolution_param.bias_term
    shutil.rmtree(tmp_path)


def test_force_does_not_replace_what_somebody_else_wrote(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/deploy.prototxt").write_text("mine")
    said = bad(DEPLOY, "--out", "mine", "--force", cwd=tmp_path)
    assert said.startswith("mine/deploy.prototxt: is not from an earlier run; give another --out")
    assert (tmp_path / "mine/deploy.prototxt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["deploy.prototxt"]
