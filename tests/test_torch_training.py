"""Training on torch: what Caffe's solvers learn, and what a killed or divided run ends with."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rebirth_caffe import caffemodel
from rebirth_caffe.data import open_lmdb
from rebirth_caffe.engines.training import Diverged, Run, train
from rebirth_caffe.errors import EngineError
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Net
from rebirth_caffe.originals import begin
from tests import tiny
from tests.conftest import torch_or_skip
from tests.nets import conv, fc, layer, norm, pool, relu, scale

torch = torch_or_skip()

from rebirth_caffe.engines.torch.data import Batches  # noqa: E402
from rebirth_caffe.engines.torch.trainer import TorchTrainer  # noqa: E402

BATCH = 16
# Everything that has a state or multipliers of its own: BatchNorm, a frozen layer, a fast bias, three losses,
# one of which teaches one of its two sides.
NET = """name: "small"
layer {{ name: "data" type: "Data" top: "data" top: "label"
  transform_param {{ {transform} mean_value: 70 scale: 0.02 }}
  data_param {{ source: "{source}" batch_size: {batch} backend: LMDB }} }}
{layers}
"""
LAYERS = (
    conv("frozen", "data", 4, 3, "stride: 2 weight_filler { type: 'xavier' }",
         extra="param { lr_mult: 0 } param { lr_mult: 0 }"),
    relu("relu0", "frozen"),
    conv("conv", "frozen", 6, 3, "bias_term: false weight_filler { type: 'xavier' }",
         extra="param { lr_mult: 1 decay_mult: 1 }"),  # a bias would have no gradient but rounding
    norm("norm", "conv"),
    scale("scale", "conv"),
    relu("relu1", "conv"),
    pool("pool", "conv"),
    fc("aux", "pool", 10, "weight_filler { type: 'xavier' }"),
    layer("aux/loss", "SoftmaxWithLoss", "aux label", more="loss_weight: 0.3"),
    fc("fc", "pool", 10, "weight_filler { type: 'xavier' }",
       extra="param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }"),
    layer("near", "EuclideanLoss", "aux fc",
          more="loss_weight: 0.1 propagate_down: true propagate_down: false"),
    layer("loss", "SoftmaxWithLoss", "fc label"),
)  # fmt: skip
SGD = 'base_lr: 0.02 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.001'
SOLVERS = [
    'base_lr: 0.05 lr_policy: "step" gamma: 0.5 stepsize: 3 momentum: 0.9 weight_decay: 0.01 iter_size: 2',
    'base_lr: 0.05 lr_policy: "sigmoid" gamma: 0.5 stepsize: 4 momentum: 0.5 clip_gradients: 0.4',
    'type: "Nesterov" base_lr: 0.02 lr_policy: "multistep" gamma: 0.3 stepvalue: 2 stepvalue: 6 '
    'momentum: 0.9 weight_decay: 0.005 regularization_type: "L1"',
    'type: "AdaGrad" base_lr: 0.01 lr_policy: "inv" gamma: 0.1 power: 0.75 weight_decay: 0.001 delta: 1e-4',
    'type: "RMSProp" base_lr: 0.002 lr_policy: "exp" gamma: 0.9 rms_decay: 0.9 delta: 1e-4 momentum: 0',
    'type: "AdaDelta" base_lr: 1 lr_policy: "fixed" momentum: 0.95 delta: 1e-4 weight_decay: 0.001',
    'type: "Adam" base_lr: 0.003 lr_policy: "poly" power: 1 momentum: 0.9 momentum2: 0.999 delta: 1e-4',
]


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.databases(folder)
    return folder


def prepared(
    folder: Path,
    databases: Path,
    solver: str,
    batch: int = BATCH,
    transform: str = "",
    layers: tuple[str, ...] = LAYERS,
) -> Path:
    """A folder with a net, its first weights and a solver of ten iterations."""
    folder.mkdir(exist_ok=True)
    source = databases / "train.lmdb"
    text = NET.format(source=source, batch=batch, transform=transform, layers="\n".join(layers))
    one = Net.parse(text, "net.prototxt")
    one.image = (1, 24, 24) if transform else (1, 28, 28)
    fill_missing(one, 3)
    one.write(folder / "net.prototxt")
    one.write_weights(folder / "start.caffemodel")
    rest = 'net: "net.prototxt" max_iter: 20 snapshot_prefix: "s" random_seed: 1 display: 1'
    (folder / "solver.prototxt").write_text(f"{solver} {rest}\n")
    return folder


def run(home: Path, until: int = 10, **more: Any) -> Run:
    return Run(home, "solver.prototxt", until, weights="start.caffemodel", **more)


def weights(path: Path) -> dict[str, list[Any]]:
    return {r.name: [b.array.astype("f8") for b in r.blobs] for r in caffemodel.read(path).records if r.blobs}


def apart(a: Path, b: Path) -> float:
    """The largest distance of a blob in one from that in the other, relative to its size."""
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    pairs = [(x.ravel(), y.ravel()) for name in one for x, y in zip(one[name], other[name], strict=True)]
    return max(float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-6) for x, y in pairs)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda text: text.split()[1].strip('"'))
def test_ten_iterations_give_caffes_weights(tmp_path, databases, caffe, solver):
    home = prepared(tmp_path / "home", databases, solver)
    told: dict[str, list[Any]] = {"caffe": [], "torch": []}
    train(caffe, run(home), lambda *x: told["caffe"].append(x))
    (home / "s_iter_10.caffemodel").rename(home / "caffe.caffemodel")
    TorchTrainer().train(run(home), lambda *x: told["torch"].append(x))
    assert apart(home / "start.caffemodel", home / "s_iter_10.caffemodel") > 1e-3  # it has learned
    assert apart(home / "caffe.caffemodel", home / "s_iter_10.caffemodel") < 1e-4
    assert [i for i, _ in told["torch"]] == [i for i, _ in told["caffe"]] == list(range(10))
    np.testing.assert_allclose([x for _, x in told["torch"]], [x for _, x in told["caffe"]], rtol=1e-4)


@pytest.mark.parametrize("solver", [SOLVERS[0], SOLVERS[-1]], ids=["SGD", "Adam"])
@pytest.mark.parametrize("first", ["caffe", "torch"])
def test_either_engine_goes_on_from_the_others_snapshot(tmp_path, databases, caffe, solver, first):
    home = prepared(tmp_path / "home", databases, solver)
    engines = {
        "caffe": lambda r: train(caffe, r, lambda *_: None),
        "torch": lambda r: TorchTrainer().train(r, lambda *_: None),
    }
    engines[first](run(home))
    (home / "s_iter_10.caffemodel").rename(home / "whole.caffemodel")
    second = next(name for name in engines if name != first)
    engines[first](run(home, 5))
    skip = 10 if "iter_size: 2" in solver else 5
    engines[second](run(home, state="s_iter_5.solverstate", skip=skip))
    assert apart(home / "whole.caffemodel", home / "s_iter_10.caffemodel") < 1e-4


CROPPED = "crop_size: 24 mirror: true"

# ---- data -------------------------------------------------------------------------------------------------


def batches(databases: Path, batch: int = 8, transform: str = CROPPED, **more: Any) -> Batches:
    source = f'source: "{databases / "train.lmdb"}" batch_size: {batch} backend: LMDB'
    text = f"transform_param {{ {transform} mean_value: 70 scale: 0.02 }} data_param {{ {source} }}"
    return Batches(Net.parse(layer("data", "Data", "", "data label", text)).layers[0], 7, **more)


def test_worker_processes_read_the_same(databases):
    alone, ahead = (list(batches(databases).read(6, workers)) for workers in (0, 2))
    for (images, labels), (again, same) in zip(alone, ahead, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
        assert images.shape == (8, 1, 24, 24)
        assert labels.dtype == torch.int64


def test_several_processes_share_a_larger_batch(databases):
    whole = batches(databases, 16, skip=20)
    parts = [batches(databases, 8, skip=20, rank=rank, size=2) for rank in (0, 1)]
    for i in range(3):  # over the end of the database
        for both, one in zip(zip(*(part[i] for part in parts), strict=True), whole[i], strict=True):
            np.testing.assert_array_equal(np.concatenate(both), one)


def test_crops_and_mirrors_are_drawn_for_a_place_and_a_seed(databases):
    with open_lmdb(databases / "train.lmdb") as images:
        image = (images[19][0].astype("f4") - 70) * np.float32(0.02)
    np.testing.assert_allclose(batches(databases, transform="")[2][0][3], image, rtol=1e-6)
    drawn = batches(databases)[2][0]
    np.testing.assert_array_equal(drawn, batches(databases)[2][0])
    windows = [
        image[:, i : i + 24, j : j + 24][:, :, ::turn] for i in range(5) for j in range(5) for turn in (1, -1)
    ]
    assert sum(np.allclose(window, drawn[3]) for window in windows) == 1
    seeds = {tuple(Batches(batches(databases).layer, seed)[2][0][3].ravel()) for seed in range(12)}
    assert len(seeds) > 6


# ---- runs -------------------------------------------------------------------------------------------------

PLAIN = (
    conv("conv", "data", 6, 3, "weight_filler { type: 'xavier' }"),
    relu("relu", "conv"),
    pool("pool", "conv"),
    fc("fc", "pool", 10, "weight_filler { type: 'xavier' }"),
    layer("loss", "SoftmaxWithLoss", "fc label"),
)
RETRAIN = ("-m", "rebirth_caffe.retrain")
# Fails where threads of gloo's still run: one that does when Python ends may abort the process.
WATCHED = """import sys
from pathlib import Path
from rebirth_caffe.retrain_command import main
main()
names = [status.read_text().strip() for status in Path("/proc/self/task").glob("*/comm")]
sys.exit([name for name in names if "gloo" in name] or 0)
"""
FLAGS = ("--engine", "torch", "--iterations", "1", "--final-iterations", "9", "--segment", "3")


def directory(folder: Path, databases: Path, batch: int, layers: Any = PLAIN) -> Path:
    """A directory in which a small net is trained from its fillers."""
    prepared(folder / "net", databases, SGD, batch, CROPPED, layers)
    (folder / "net/net.prototxt").rename(folder / "net/train_val.prototxt")
    train_data, test_data = (str(databases / f"{part}.lmdb") for part in ("train", "test"))
    begin(folder / "net", folder / "home", train_data, test_data, iterations=9)
    return folder / "home"


def command(home: Path, processes: int = 1, program: tuple[str, ...] = RETRAIN) -> subprocess.Popen[str]:
    """The command that trains there, alone or under torchrun."""
    start = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes)) if processes > 1 else ()
    return subprocess.Popen(
        [sys.executable, *start, *program, str(home), *FLAGS],
        cwd=tiny.ROOT,
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


def wait_for(process: subprocess.Popen[str], home: Path, event: str) -> None:
    journal, deadline = home / "retrain/journal.jsonl", time.monotonic() + 300
    while not (journal.exists() and f'"{event}"' in journal.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def final(home: Path) -> Path:
    return home / "final/weights.caffemodel"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, databases):
    """One process, undisturbed, with the whole batch."""
    home = directory(tmp_path_factory.mktemp("alone"), databases, 16)
    code, said = ended(command(home))
    assert code == 0, said
    return home


def test_killed_it_ends_as_if_it_had_not_been(tmp_path, databases, alone):
    home = directory(tmp_path, databases, 16)
    process = command(home)
    wait_for(process, home, "segment")
    process.kill()
    process.wait()
    assert not final(home).exists()
    code, said = ended(command(home))
    assert code == 0, said
    assert final(home).read_bytes() == final(alone).read_bytes()
    assert not list((home / "retrain").rglob("*.solverstate"))


def test_two_processes_learn_as_one_does_and_survive_a_death(tmp_path, databases, alone):
    """Killed in the middle, then ended by two processes as by one with twice the batch, and by one alone."""
    home = directory(tmp_path, databases, 8)
    process = command(home, 2)
    wait_for(process, home, "segment")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    code, said = ended(process)
    assert code != 0
    assert not final(home).exists()
    assert not re.search(r'File ".*/rebirth_caffe/', said), said  # torchrun tells its own story
    shutil.copytree(home, tmp_path / "other")
    (tmp_path / "watched.py").write_text(WATCHED)
    code, said = ended(command(home, 2, (str(tmp_path / "watched.py"),)))
    assert code == 0, said
    assert apart(final(alone), final(home)) < 1e-5
    code, said = ended(command(tmp_path / "other"))
    assert code == 0, said
    assert final(tmp_path / "other").exists()


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


# ---- refusals ---------------------------------------------------------------------------------------------


def test_a_net_that_diverges_says_when(tmp_path, databases):
    home = prepared(tmp_path / "home", databases, 'base_lr: 1e30 lr_policy: "fixed" momentum: 0.9')
    with pytest.raises(Diverged, match=r"the loss became (nan|inf) at iteration [12]$"):
        TorchTrainer().train(run(home), lambda iteration, loss: None)


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        ('base_lr: 1 lr_policy: "plateau"', "no lr_policy is called 'plateau'; give one of exp, fixed"),
        (
            'base_lr: 1 lr_policy: "fixed" type: "Lion"',
            "no solver is called 'Lion'; give one of SGD, Nesterov",
        ),
        ('base_lr: 1 lr_policy: "step"', "lr_policy 'step' needs a stepsize of 1 or more"),
    ],
)
def test_a_solver_that_is_not_known(tmp_path, databases, solver, said):
    home = prepared(tmp_path / "home", databases, solver)
    with pytest.raises(EngineError, match=said):
        TorchTrainer().train(run(home), lambda iteration, loss: None)


def test_labels_beyond_the_classes_are_one_line(tmp_path, databases):
    layers = (fc("fc", "data", 3), layer("loss", "SoftmaxWithLoss", "fc label"))
    home = prepared(tmp_path / "home", databases, SGD, layers=layers)
    with pytest.raises(EngineError, match=r"solver\.prototxt: torch failed: Target \d is out of bounds"):
        TorchTrainer().train(run(home), lambda iteration, loss: None)


def test_a_state_of_another_solver(tmp_path, databases):
    home = prepared(tmp_path / "home", databases, SGD)
    TorchTrainer().train(run(home, 1), lambda iteration, loss: None)
    text = (home / "solver.prototxt").read_text()
    (home / "solver.prototxt").write_text(f'type: "Adam" {text}')
    with pytest.raises(EngineError, match="the state of another net, or of another type of solver"):
        TorchTrainer().train(run(home, 2, state="s_iter_1.solverstate"), lambda iteration, loss: None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--engine", "torch", "--gpu", "0"), "--gpu is Caffe's; with --engine torch give --device cuda"),
        (("--amp", "bf16"), "--device, --amp, --workers and torchrun want --engine torch"),
    ],
)
def test_options_of_the_other_engine(tmp_path, flags, said):
    command = [sys.executable, *RETRAIN, str(tmp_path), *flags]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {said}\n"
