"""Batch normalisation while a net learns: at first it changes nothing, and what it has taught is kept."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe import caffemodel, normalise
from rebirth_caffe import plan as plans
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.calibration import spread
from rebirth_caffe.data import open_lmdb
from rebirth_caffe.derive import deploy
from rebirth_caffe.distil import Teacher, blobs, side_by_side
from rebirth_caffe.engines.caffe import CaffeEngine
from rebirth_caffe.engines.training import CaffeTrainer
from rebirth_caffe.errors import RebirthError
from rebirth_caffe.net import Net
from rebirth_caffe.retrain import Options, retrain
from tests import tiny

IN = """name: "n"
layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
"""
CONVOLUTION = """layer { name: "%s" type: "Convolution" bottom: "x" top: "%s" %s
  convolution_param { num_output: 2 kernel_size: 3 %s } }
"""
CONVOLUTIONS = {  # what is odd about each
    "plain": ("", ""),
    "frozen": ("param { lr_mult: 0 }", ""),
    "shared": ('param { name: "w" }', ""),
    "bare": ("", "bias_term: false"),
    "known": ("", ""),
}
NORM = 'layer { name: "bn" type: "BatchNorm" bottom: "known" top: "known" }\n'


def net_of(text: str) -> Net:
    """A net with weights in its convolutions."""
    net = Net.parse(text)
    for layer in net.layers:
        if layer.type == "Convolution":
            shapes = [(2, 3, 3, 3), (2,)][: 1 + layer.param.convolution_param.bias_term]
            layer.record = Record(layer.name, layer.type, [Blob(np.ones(s, np.float32)) for s in shapes])
    return net


@pytest.fixture(scope="module")
def original(trained):
    return tiny.learned(trained)


@pytest.fixture(scope="module")
def reborn(original):
    return plans.apply(original, plans.propose(original).plan)


def scores(net: Net, folder: Path, caffe, images: str) -> np.ndarray:
    """What real Caffe makes in TEST of the first 50 images, as the tiny net crops and scales them."""
    net.write(folder / "net.prototxt")
    net.write_weights(folder / "net.caffemodel")
    with (
        open_lmdb(images) as lmdb,
        CaffeEngine(caffe).open(folder / "net.prototxt", folder / "net.caffemodel", batch=50) as session,
    ):
        pixels = np.stack([lmdb[i][0] for i in range(50)])[:, :, 2:26, 2:26]
        return session.forward({"data": (pixels - np.float32(70)) * np.float32(0.02)}, ["fc"])["fc"]


def test_which_convolutions():
    text = IN + "".join(CONVOLUTION % (name, name, *odd) for name, odd in CONVOLUTIONS.items()) + NORM
    assert [layer.name for layer in normalise.convolutions(net_of(text))] == ["plain"]
    taken = text.replace('name: "bare"', 'name: "normalise/bare"')
    assert normalise.convolutions(net_of(taken)) == []


def test_at_first_it_changes_nothing(reborn, trained, caffe, tmp_path):
    """With the means and variances of the images, Scale gives back what BatchNorm takes away."""
    teacher = Teacher(reborn)
    names = [layer.name for layer in normalise.convolutions(reborn)]
    assert names == ["conv1/rebirth", "conv2/rebirth"]
    moments = normalise.measure(reborn, names, teacher.database, teacher.transform, CaffeEngine(caffe))
    for mean, variance in moments.values():
        assert (variance > 0).any()
        assert (mean != 0).any()
    with_norms = normalise.started(normalise.with_norms(deploy(reborn), names), moments)
    assert [layer.type for layer in with_norms.layers].count("BatchNorm") == 2
    test = str(trained / "test.lmdb")
    wanted, found = (scores(net, tmp_path, caffe, test) for net in (deploy(reborn), with_norms))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_moments_are_those_of_what_the_convolutions_put_out(reborn, trained, caffe, in_caffe, tmp_path):
    teacher = Teacher(reborn)
    found = normalise.measure(
        reborn, ["conv1/rebirth"], teacher.database, teacher.transform, CaffeEngine(caffe)
    )
    layer = reborn.layer("conv1/rebirth")
    alone = deploy(reborn).replace(lambda x: [x] if x.type == "Input" or x.name == layer.name else [])
    alone.write(tmp_path / "net.prototxt")
    alone.write_weights(tmp_path / "net.caffemodel")
    with (
        open_lmdb(teacher.database) as lmdb,
        CaffeEngine(caffe).open(
            tmp_path / "net.prototxt", tmp_path / "net.caffemodel", batch=normalise.IMAGES
        ) as session,
    ):
        images = teacher.transform(np.stack([lmdb[i][0] for i in spread(len(lmdb), normalise.IMAGES)]))
        out = session.forward({"data": images}, [layer.top[0]])[layer.top[0]].astype(np.float64)
    mean, variance = found["conv1/rebirth"]
    assert mean == pytest.approx(out.mean(axis=(0, 2, 3)), rel=1e-4, abs=1e-6)
    assert variance == pytest.approx(out.var(axis=(0, 2, 3)), rel=1e-4)


def test_the_files_have_the_two_layers(original, reborn, caffe):
    teacher = Teacher(original)
    merges = plans.propose(original).plan.merges
    targets = teacher.measure(blobs(reborn, merges), CaffeEngine(caffe), images=50)
    plain = side_by_side(reborn, teacher, targets, "labels", 0.0)
    net = side_by_side(reborn, teacher, targets, "labels", 0.0, ["conv2/rebirth"])
    added = [layer for layer in net.layers if layer.name.startswith("normalise/")]
    assert [layer.type for layer in added] == ["BatchNorm", "Scale"]
    assert [p.lr_mult for p in added[0].param.param] == [0, 0, 0]
    conv = net.layer("conv2/rebirth")
    assert (conv.top, added[0].bottom) == (("normalise/conv2/rebirth",), ("normalise/conv2/rebirth",))
    assert added[1].top == reborn.layer("conv2/rebirth").top
    assert len(net.layers) == len(plain.layers) + 2


@pytest.mark.parametrize("source", ["labels", "images"])
def test_what_was_learned_with_it_is_in_the_convolutions(source, trained, caffe, tmp_path):
    """The net that is written computes what the trained one, norms and all, computes in TEST."""
    home = tiny.reborn(
        trained,
        tmp_path / "home",
        solver=None,
        iterations=40,
        learning={"distil": source, "engine": CaffeEngine(caffe)},
    )
    options = Options(40, segment=20, distil=source, normalise=True, schedule="joint", test_interval=20)
    outcome = retrain(home, options, CaffeTrainer(caffe))
    assert outcome is not None
    (snapshot,) = (home / "retrain/01-joint").glob("*_iter_40.caffemodel")
    records = caffemodel.read(snapshot).by_name()
    final = Net.load(home / "final/deploy.prototxt", home / "final/weights.caffemodel")
    names = [layer.name for layer in final.layers if layer.type == "Convolution"]
    assert len(names) == 2
    assert not [layer.name for layer in final.layers if "normalise" in layer.name]
    assert "normalise" not in (home / "final/train_val.prototxt").read_text()
    learned = {name: [blob.array for blob in record.blobs] for name, record in records.items()}
    trained_so = normalise.with_norms(final, names).with_blobs(learned)
    test = str(trained / "test.lmdb")
    found, wanted = (scores(net, tmp_path, caffe, test) for net in (final, trained_so))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    # It has learned something, mean and variance among it.
    assert not np.allclose(records[f"normalise/{names[1]}/scale"].blobs[0].array, 1)
    assert records[f"normalise/{names[1]}"].blobs[2].array.ravel()[0] > 10
    assert [e["iteration"] for e in outcome.curve] == [0, 20]


def test_a_run_that_began_otherwise(trained, caffe, tmp_path):
    """An older run's journal knows nothing of it; nor can a run change its mind."""
    learning = {"distil": "images", "engine": CaffeEngine(caffe)}
    home = tiny.reborn(trained, tmp_path / "home", solver=None, iterations=4, learning=learning)
    plain = Options(4, segment=4, distil="images", schedule="joint")
    retrain(home, plain, CaffeTrainer(caffe))
    journal = home / "retrain/journal.jsonl"
    text = journal.read_text()
    assert '"normalise": false' in text
    journal.write_text(re.sub(r', "normalise": false', "", text))
    retrain(home, plain, CaffeTrainer(caffe))
    with pytest.raises(RebirthError, match=r"this run began without --normalise; go on like that"):
        retrain(
            home,
            Options(4, segment=4, distil="images", schedule="joint", normalise=True),
            CaffeTrainer(caffe),
        )
    journal.write_text(text.replace('"normalise": false', '"normalise": true'))
    with pytest.raises(RebirthError, match=r"this run began with --normalise; go on like that"):
        retrain(home, plain, CaffeTrainer(caffe))


def test_the_command_normalises_what_learns_from_its_original_alone(trained, caffe, tmp_path):
    learning = {"distil": "labels", "engine": CaffeEngine(caffe)}
    home = tiny.reborn(trained, tmp_path / "home", solver=None, iterations=4, learning=learning)
    command = [sys.executable, str(tiny.ROOT / "tools/retrain.py"), str(home), "--segment", "4"]
    for option in (["--normalise"], ["--scores", "16"]):
        done = subprocess.run(
            [*command, "--distil", "no", *option], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr == f"error: {option[0]} is for learning from the original; give --distil, too\n"
    for more, there in (([], True), (["--no-normalise", "--scores", "16"], False)):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        learned_with = (home / "retrain/01-joint/train_val.prototxt").read_text()
        assert ("BatchNorm" in learned_with) is there
        assert tiny.journal(home)[0]["options"]["scores"] == (4 if there else 16)
        shutil.rmtree(home / "retrain")
