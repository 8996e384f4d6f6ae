"""Learning from the original: under real Caffe its half stands still, the reborn half comes closer to it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rebirth_caffe import caffemodel, distil
from rebirth_caffe import plan as plans
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.data import UNLABELLED, Images, open_lmdb, write_lmdb
from rebirth_caffe.distil import Teacher, blobs, side_by_side
from rebirth_caffe.engines.caffe import CaffeEngine
from rebirth_caffe.engines.training import CaffeTrainer
from rebirth_caffe.errors import NetError, RebirthError
from rebirth_caffe.net import TRAIN, Net
from rebirth_caffe.retrain import Options, retrain
from tests import tiny

# Both halves on the same images: every blob that the loss compares, and what Caffe made of it.
FORWARD = """
net = caffe.Net(path, 0, weights=weights)
net.forward()
result = {name: [list(blob.data.shape), blob.data.ravel().tolist()] for name, blob in net.blobs.items()
          if name.split("/")[0] in ("distil", "teacher") or name in wanted}
"""


@pytest.fixture(scope="session")
def original(trained):
    return tiny.learned(trained)


@pytest.fixture(scope="session")
def plan(original):
    return plans.propose(original).plan


@pytest.fixture(scope="session")
def reborn(original, plan):
    return plans.apply(original, plan)


@pytest.fixture(scope="session")
def teacher(original):
    return Teacher(original)


@pytest.fixture(scope="session")
def targets(teacher, reborn, plan, caffe):
    return teacher.measure(blobs(reborn, plan.merges), CaffeEngine(caffe), images=tiny.TRAIN_IMAGES)


class Computed:
    """The blobs of a train net in real Caffe, for one batch."""

    def __init__(self, in_caffe: Any, folder: Path, net: Net, wanted: list[str]) -> None:
        net.write(folder / "net.prototxt")
        net.write_weights(folder / "net.caffemodel")
        paths = {"path": str(folder / "net.prototxt"), "weights": str(folder / "net.caffemodel")}
        found = in_caffe(FORWARD, **paths, wanted=wanted)
        self.blobs = {name: np.array(values).reshape(shape) for name, (shape, values) in found.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.blobs[name]


def test_what_is_compared(reborn, plan, targets):
    assert blobs(reborn, plan.merges) == ["norm1", "pool2", "fc"]
    assert blobs(reborn, [m for m in plan.merges if m.stage == "conv2"]) == ["pool2", "fc"]
    assert [(t.blob, t.size) for t in targets] == [("norm1", 8 * 12 * 12), ("pool2", 12 * 6 * 6), ("fc", 10)]


def test_the_variances_are_those_of_the_original_in_use(original, targets, in_caffe, tmp_path):
    """Against the TEST net itself, on the same images (all of the data)."""
    original.write_weights(tmp_path / "net.caffemodel")
    code = """
net = caffe.Net(path, 1, weights=weights)
values = {name: [] for name in wanted}
for _ in range(11):
    net.forward()
    for name in wanted: values[name].append(net.blobs[name].data.astype("float64").copy())
result = {name: float(np.concatenate(v).var()) for name, v in values.items()}
"""
    train = next(layer for layer in original.layers if layer.type == "Data").param.data_param.source
    test = str(Path(train).with_name("test.lmdb"))
    (tmp_path / "net.prototxt").write_text(
        original.text()
        .replace(test, train)
        .replace("batch_size: 50", f"batch_size: {tiny.TRAIN_IMAGES // 11}")
    )
    paths = {"path": str(tmp_path / "net.prototxt"), "weights": str(tmp_path / "net.caffemodel")}
    found = in_caffe(code, **paths, wanted=[target.blob for target in targets])
    for target in targets:
        assert target.variance == pytest.approx(found[target.blob], rel=1e-4)


@pytest.mark.parametrize("scores", [4.0, 16.0])
def test_the_loss_is_the_formula(reborn, teacher, targets, in_caffe, tmp_path, scores):
    """Every term from the two blobs themselves, in float64; and the labels' losses keep their weights."""
    given = {} if scores == distil.SCORES else {"scores": scores}
    net = side_by_side(reborn, teacher, targets, "labels", 0.5, **given)
    computed = Computed(in_caffe, tmp_path, net, [target.blob for target in targets])
    assert distil.weight(0.5) == pytest.approx(0.525)
    weights = {layer.name: list(layer.param.loss_weight) for layer in net.layers}
    for target in targets:
        student, original = computed[target.blob], computed[f"teacher/{target.blob}"]
        w = scores if target.blob == "fc" else 0.525
        wanted = w * np.square(student - original).mean() / target.variance
        assert wanted > 1e-3
        assert computed[f"distil/{target.blob}"] * weights[f"distil/{target.blob}"][0] == pytest.approx(
            wanted, rel=1e-4
        )
    assert weights["loss"] == []
    assert weights["aux/loss"] == pytest.approx([0.1])


def test_a_net_that_was_not_changed_has_nothing_to_learn(original, teacher, targets, in_caffe, tmp_path):
    net = side_by_side(original, teacher, targets, "labels", 0.0)
    computed = Computed(in_caffe, tmp_path, net, [])
    assert [float(computed[f"distil/{target.blob}"]) for target in targets] == [0.0] * len(targets)


def test_without_labels_none_are_read(reborn, teacher, targets, in_caffe, tmp_path):
    with pytest.raises(RebirthError, match="--distil scores: give one of labels, images"):
        side_by_side(reborn, teacher, targets, "scores", 0.9)
    net = side_by_side(reborn, teacher, targets, "images", 0.9)
    assert {layer.type for layer in net.layers if "Loss" in layer.type} == {"EuclideanLoss"}
    assert not [layer for layer in net.layers if "label" in (*layer.bottom, *layer.top)]
    assert "aux" not in {layer.name for layer in net.layers}
    full = {layer.name: layer for layer in side_by_side(reborn, teacher, targets, "labels", 0.9).layers}
    for target in targets:
        name = f"distil/{target.blob}"
        assert net.layer(name).param.loss_weight == full[name].param.loss_weight
    assert Computed(in_caffe, tmp_path, net, ["fc"])["fc"].shape == (16, 10)


def test_what_was_given_for_training_and_the_names_are_kept(reborn, teacher, targets):
    net = side_by_side(reborn, teacher, targets, "labels", 0.0)
    mine = {layer.name: layer.text for layer in net.layers}
    for layer in reborn.graph.view(TRAIN).layers:
        if layer.type in ("Data", "Convolution", "InnerProduct", "ReLU"):
            assert mine[layer.name] == layer.text
    assert not [layer for layer in net.layers if layer.type == "Dropout"]


def test_names_that_are_taken():
    text = """name: "n" input: "data" input_shape { dim: 1 dim: 1 dim: 4 dim: 4 }"""
    data = 'layer { name: "d" type: "Data" top: "data" top: "label" data_param { source: "x" batch_size: 1 } '
    net = Net.parse(
        f"""name: "n" {data} transform_param {{ crop_size: 4 mean_value: 1 }} }}
        layer {{ name: "teacher/c" type: "Convolution" bottom: "data" top: "distil/c"
          convolution_param {{ num_output: 2 kernel_size: 4 }} }}
        layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "distil/c" bottom: "label" }}"""
    )
    made = Teacher(net)
    assert (made.prefix, made.loss) == ("_teacher/", "_distil/")
    assert [layer.name for layer in made.frozen()] == ["_teacher/teacher/c"]
    assert made.frozen()[0].bottom == ("data",)
    with pytest.raises(NetError, match="reads no database"):
        Teacher(Net.parse(text + 'layer { name: "r" type: "ReLU" bottom: "data" top: "r" }'))


def test_batchnorm_uses_what_it_has_learned(original):
    norm = 'layer { name: "bn" type: "BatchNorm" bottom: "fc" top: "bn" param { lr_mult: 0 } }\n'
    text = original.text().replace('layer { name: "accuracy"', norm + 'layer { name: "accuracy"')
    net = Net.parse(text.replace('bottom: "fc" bottom: "label"', 'bottom: "bn" bottom: "label"'))
    statistics = [Blob(np.ones(n, np.float32)) for n in (10, 10, 1)]
    net.layer("bn").record = Record("bn", "BatchNorm", statistics)
    (made,) = [layer for layer in Teacher(net).frozen() if layer.type == "BatchNorm"]
    assert made.param.batch_norm_param.use_global_stats
    assert [p.lr_mult for p in made.param.param] == [0, 0, 0]


def test_a_net_that_says_nothing(original, caffe):
    dead = original.without_weights()
    for layer in dead.layers:
        mine = original.layer(layer.name) if layer.type in ("Convolution", "InnerProduct") else None
        if mine is not None:
            layer.record = Record(layer.name, layer.type, [Blob(np.zeros_like(b.array)) for b in mine.blobs])
    with pytest.raises(RebirthError, match="gives the same for every image"):
        Teacher(dead).measure(["norm1", "fc"], CaffeEngine(caffe), images=20)


# ------------------------------------------------------------------------------------------------- training


def learn(trained: Path, out: Path, caffe: Any, source: str, **options: Any) -> dict[str, np.ndarray]:
    """Retrain with ``distil``; the weights it ends with."""
    engine = CaffeEngine(caffe)
    learning = {"distil": source, "engine": engine}
    tiny.reborn(trained, out, solver=None, iterations=40, learning=learning)
    chosen = Options(iterations=40, segment=20, distil=source, **{"schedule": "joint", **options})
    assert retrain(out, chosen, CaffeTrainer(caffe)) is not None
    return {
        r.name: r.blobs[0].array for r in caffemodel.read(out / "final/weights.caffemodel").records if r.blobs
    }


def distance(folder: Path, net: Net, caffe: Any, teacher: Teacher) -> float:
    """Mean squared difference of the scores of ``net`` and its original, over 100 images, in float64."""
    from rebirth_caffe.derive import deploy

    scores = []
    for name, each in (("net", deploy(net)), ("teacher", teacher.net)):
        each.write(folder / f"{name}.prototxt")
        each.write_weights(folder / f"{name}.caffemodel")
        files = folder / f"{name}.prototxt", folder / f"{name}.caffemodel"
        with CaffeEngine(caffe).open(*files, batch=100) as session, open_lmdb(teacher.database) as images:
            values = teacher.transform(np.stack([images[i][0] for i in range(100)]))
            scores.append(session.forward({"data": values}, ["fc"])["fc"].astype(np.float64))
    return float(np.square(scores[0] - scores[1]).mean())


@pytest.mark.parametrize("source", ["labels", "images"])
def test_it_learns_from_its_original(source, trained, tmp_path, caffe, original, plan, teacher):
    learned = learn(trained, tmp_path / "home", caffe, source)
    started = plans.apply(original, plan)
    ended = started.with_weights(tmp_path / "home/final/weights.caffemodel")
    (tmp_path / "compare").mkdir()
    before, after = (distance(tmp_path / "compare", net, caffe, teacher) for net in (started, ended))
    assert after < 0.7 * before
    assert not [name for name in learned if "teacher" in name]
    snapshots = list((tmp_path / "home/retrain/01-joint").glob("*_iter_40.caffemodel"))
    halves = {r.name: r for r in caffemodel.read(snapshots[0]).records if r.blobs}
    for layer in (layer for layer in teacher.net.layers if layer.blobs):  # not a bit of it has moved
        for blob, kept in zip(layer.blobs, halves[f"teacher/{layer.name}"].blobs, strict=True):
            assert np.array_equal(blob.array.ravel(), kept.array.ravel())
    assert not np.array_equal(learned["fc"], original.layer("fc").blobs[0].array)
    text = (tmp_path / "home/final/deploy.prototxt").read_text()
    assert "teacher" not in text
    assert "distil" not in text


def test_weights_shift_from_the_groups_to_the_scores(trained, tmp_path, caffe):
    learn(trained, tmp_path / "home", caffe, "labels")
    net = Net.load(tmp_path / "home/retrain/01-joint/train_val.prototxt")  # of the last segment: 20 to 40
    targets = next(e["targets"] for e in tiny.journal(tmp_path / "home") if e["event"] == "targets")
    weights = {t["blob"]: 2 / (t["size"] * t["variance"]) for t in targets}
    for blob, w in {"norm1": 0.2875, "pool2": 0.2875, "fc": 4}.items():  # 0.2875: at three quarters
        found = net.layer(f"distil/{blob}").param.loss_weight[0]
        assert found == pytest.approx(w * weights[blob], rel=1e-5)


def test_all_at_once_and_then_group_by_group(trained, tmp_path, caffe):
    learn(trained, tmp_path / "home", caffe, "labels", schedule="joint-then-steps")
    steps = [e for e in tiny.journal(tmp_path / "home") if e["event"] == "step"]
    assert [(e["stage"], e["kept"]) for e in steps] == [("joint", True), ("conv1", True), ("conv2", True)]
    compared = [e["targets"] for e in tiny.journal(tmp_path / "home") if e["event"] == "targets"]
    assert [[t["blob"] for t in targets] for targets in compared] == [
        *(["norm1", "pool2", "fc"], ["norm1", "fc"], ["pool2", "fc"])
    ]
    assert len({e["macs"] for e in steps}) == 1
    assert steps[0]["macs_before"] > steps[0]["macs"] == steps[1]["macs_before"]


def test_killed_it_ends_like_a_run_that_was_not(trained, tmp_path, caffe):
    """Between two segments: the loss weights of the second are those of its place, not of a beginning."""
    whole = learn(trained, tmp_path / "whole", caffe, "labels")
    engine = CaffeEngine(caffe)
    home = tiny.reborn(
        trained,
        tmp_path / "home",
        solver=None,
        iterations=40,
        learning={"distil": "labels", "engine": engine},
    )
    journal = home / "retrain/journal.jsonl"
    code = f"""if True:
        import os, signal, sys
        from pathlib import Path
        from rebirth_caffe.engines.caffe import find_caffe
        from rebirth_caffe.engines.training import CaffeTrainer
        from rebirth_caffe.journal import Journal
        from rebirth_caffe.retrain import Options, retrain
        add = Journal.add
        def dying(self, event, **details):
            done = add(self, event, **details)
            if event == "segment":
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        Journal.add = dying
        options = Options(iterations=40, segment=20, distil="labels", schedule="joint")
        retrain(Path({str(home)!r}), options, CaffeTrainer(find_caffe()))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, check=False)
    assert done.returncode == -9
    assert journal.read_text().count('"segment"') >= 1
    options = Options(iterations=40, segment=20, distil="labels", schedule="joint")
    retrain(home, options, CaffeTrainer(caffe))
    found = caffemodel.read(home / "final/weights.caffemodel").records
    assert {r.name: r.blobs[0].array.tobytes() for r in found if r.blobs} == {
        name: array.tobytes() for name, array in whole.items()
    }


def test_caffe_train_takes_it_by_hand(trained, tmp_path, caffe):
    learning = {"distil": "labels", "engine": CaffeEngine(caffe)}
    home = tiny.reborn(trained, tmp_path / "home", solver=None, iterations=4, learning=learning)
    assert [path.name for path in (home / "stages").iterdir()] == ["01-joint"]
    done = subprocess.run(
        [
            *(str(caffe.binary), "train", "-solver", "stages/01-joint/solver.prototxt"),
            *("-weights", "original/teacher.caffemodel,original/weights.caffemodel,weights.caffemodel"),
        ],
        cwd=home,
        env=caffe.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "teacher/conv1 does not need backward computation" in done.stderr
    assert "Solver type: Adam" in done.stderr or 'type: "Adam"' in done.stderr


def test_with_images_alone_the_original_says_what_is_right(trained, tmp_path, caffe):
    """No label anywhere: accuracy is how often the two agree."""
    for name, count in (("train", 64), ("test", 50)):
        with open_lmdb(trained / f"{name}.lmdb") as images:
            found = [images[i][0][0] for i in range(count)]
        none = np.full(count, UNLABELLED)
        unlabelled = Images(list(map(str, range(count))), none, found.__getitem__, ())
        write_lmdb(tmp_path / f"{name}.lmdb", unlabelled)
    for name in ("train_val.prototxt", "original.caffemodel"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(RebirthError, match="have no labels; learn with --distil images"):
        tiny.reborn(tmp_path, tmp_path / "home")
    learn(tmp_path, tmp_path / "home", caffe, "images")
    found = json.loads((tmp_path / "home/final/accuracy.json").read_text())
    assert (found["original"]["top1"], found["original"]["images"]) == (1.0, 50)
    assert found["right"] == "what the original says"
    assert 0.2 < found["final"]["top1"] < 1.0
    (tmp_path / "home/retrain/journal.jsonl").unlink()
    with pytest.raises(RebirthError, match="have no labels; learn with --distil images"):
        retrain(tmp_path / "home", Options(iterations=40, segment=20), CaffeTrainer(caffe))
    assert not (tmp_path / "home/retrain/journal.jsonl").exists()
    done = subprocess.run(
        [
            *(sys.executable, tiny.ROOT / "tools/evaluate.py", tmp_path / "home/final/deploy.prototxt"),
            *(tmp_path / "home/final/weights.caffemodel", "--data", tmp_path / "test.lmdb", "--crop", "24"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/test.lmdb: its images have no labels; give some that have\n"
