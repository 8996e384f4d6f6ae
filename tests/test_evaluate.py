"""Accuracy: the same counts and the same loss as Caffe's own layers have, for any net, in both engines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rebirth_caffe import evaluate as module
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.data import Images, write_lmdb
from rebirth_caffe.engines.caffe import CaffeEngine
from rebirth_caffe.engines.opencv import OpenCVEngine
from rebirth_caffe.errors import RebirthError
from rebirth_caffe.evaluate import NotFinite, evaluate, evaluate_net
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Net
from rebirth_caffe.schema.caffe_pb2 import BlobProto
from rebirth_caffe.transform import Transform
from tests import tiny

TOOL = tiny.ROOT / "tools" / "evaluate.py"
TEST_NET = """
net = caffe.Net(path, 1, weights=weights)
sums = {}
for _ in range(batches):
    for name, value in net.forward().items():
        sums[name] = sums.get(name, 0.0) + float(value)
result = {name: value / batches for name, value in sums.items()}
"""


@pytest.fixture(scope="session")
def by_caffe(trained, in_caffe):
    """What Caffe's Accuracy and SoftmaxWithLoss say of the tiny net."""
    text = tiny.NET.replace("test.lmdb", str(trained / "test.lmdb"))
    net = trained / "by_caffe.prototxt"
    net.write_text(text)
    weights = str(trained / "original.caffemodel")
    return in_caffe(TEST_NET, path=str(net), weights=weights, batches=tiny.TEST_IMAGES // 50)


@pytest.fixture(scope="session")
def engine(caffe):
    return CaffeEngine(caffe)


def net_of(trained: Path) -> Net:
    return Net.load(trained / "train_val.prototxt", trained / "original.caffemodel", (1, 28, 28))


def fill_with(net: Net, name: str, value: float) -> None:
    """Set every weight of a layer."""
    layer = net.layer(name)
    layer.record = Record(name, layer.type, [Blob(np.full_like(b.array, value)) for b in layer.blobs])


TRANSFORM = Transform(crop=24, mean_values=(70,), scale=0.02)


def tool(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class TestLikeCaffe:
    def test_the_counts_are_the_same(self, trained, by_caffe, engine):
        found = evaluate_net(net_of(trained), trained / "test.lmdb", engine, TRANSFORM)
        assert found.images == tiny.TEST_IMAGES
        assert round(found.top1 * 200) == round(by_caffe["accuracy"] * 200)
        assert round(found.top5 * 200) == round(by_caffe["accuracy5"] * 200)
        assert found.top1 == pytest.approx(by_caffe["accuracy"], abs=1e-6)
        assert found.loss == pytest.approx(by_caffe["loss"], rel=1e-5)
        assert 0.3 < found.top1 < found.top5 <= 1

    @pytest.mark.parametrize("batch", [1, 7, 64, 1000])
    def test_whatever_the_batch(self, trained, by_caffe, engine, monkeypatch, batch):
        monkeypatch.setattr(module, "BATCH", batch)
        seen: list[tuple[int, int]] = []
        found = evaluate_net(
            net_of(trained), trained / "test.lmdb", engine, TRANSFORM, 1, lambda d, t: seen.append((d, t))
        )
        assert found.top1 == pytest.approx(by_caffe["accuracy"], abs=1e-6)
        assert found.loss == pytest.approx(by_caffe["loss"], rel=1e-5)
        assert seen[-1] == (200, 200)
        assert [d for d, _ in seen] == [*range(batch, 200, batch), 200]

    def test_opencv_agrees(self, trained, by_caffe):
        found = evaluate_net(net_of(trained), trained / "test.lmdb", OpenCVEngine(), TRANSFORM)
        assert found.top1 == pytest.approx(by_caffe["accuracy"], abs=0.011)
        assert found.loss == pytest.approx(by_caffe["loss"], rel=1e-3)

    def test_scores_that_are_equal(self, trained, in_caffe, engine, tmp_path):
        """A dead net says the same of every class; that is no hit for each of them."""
        net = net_of(trained)
        fill_with(net, "fc", 0.0)
        net.write_weights(tmp_path / "dead")
        theirs = in_caffe(TEST_NET, path=str(self.path(trained)), weights=str(tmp_path / "dead"), batches=4)
        found = evaluate_net(
            Net.load(trained / "train_val.prototxt", tmp_path / "dead", (1, 28, 28)),
            trained / "test.lmdb",
            engine,
            TRANSFORM,
        )
        assert found.top1 == pytest.approx(theirs["accuracy"], abs=1e-6)
        assert found.top5 == pytest.approx(theirs["accuracy5"], abs=1e-6)
        assert found.top1 < 0.3
        assert found.loss == pytest.approx(np.log(10))

    def path(self, trained: Path) -> Path:
        path = trained / "equal.prototxt"
        path.write_text(tiny.NET.replace("test.lmdb", str(trained / "test.lmdb")))
        return path

    def test_a_loss_beyond_what_a_float_holds(self):
        scores = np.array([[0, 1000], [2000, 0]], np.float32)
        loss = module._loss(scores, np.array([0, 0]), "scores")
        assert loss == pytest.approx(87.3365, abs=1e-3)
        assert module._loss(np.array([[0.25, 0.75]], np.float32), np.array([0]), "probabilities") == (
            pytest.approx(np.log(4))
        )

    @pytest.mark.parametrize(
        ("end", "loss"),
        [
            ("", "scores"),
            ('layer { name: "p" type: "Softmax" bottom: "fc" top: "fc" }', "probabilities"),
            ('layer { name: "p" type: "Softmax" bottom: "fc" top: "p" }', "scores"),
        ],
    )
    def test_softmax_or_none_or_in_place(self, trained, engine, by_caffe, tmp_path, end, loss):
        from rebirth_caffe.derive import deploy

        deployed = deploy(net_of(trained))
        text = deployed.text()
        text = text[: text.index('layer {\n  name: "prob"')] + end
        (tmp_path / "net").write_text(text)
        deployed.write_weights(tmp_path / "w")
        found = evaluate(tmp_path / "net", tmp_path / "w", trained / "test.lmdb", engine, TRANSFORM)
        assert found.top1 == pytest.approx(by_caffe["accuracy"], abs=1e-6)
        assert found.loss == pytest.approx(by_caffe["loss"], rel=1e-4)
        assert module._ends(Net.load(tmp_path / "net"), "")[2] == loss


DATA = """
layer { name: "data" type: "Data" top: "data" top: "label"
  transform_param { %s } data_param { source: "%s" backend: LMDB batch_size: 5 } }
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Odd sizes, three channels."""
    folder = tmp_path_factory.mktemp("odd")
    pixels = np.random.default_rng(4).integers(0, 256, (5, 13, 18, 3)).astype(np.uint8)
    source = Images(list("abcde"), np.arange(5), lambda i: cv2.imencode(".png", pixels[i])[1].tobytes(), ())
    write_lmdb(folder / "odd.lmdb", source)
    mean = np.random.default_rng(5).random((3, 13, 18)).astype(np.float32) * 255
    blob = BlobProto(num=1, channels=3, height=13, width=18, data=mean.ravel().tolist())
    (folder / "mean").write_bytes(blob.SerializeToString())
    return folder, pixels.transpose(0, 3, 1, 2)


class TestTransform:
    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"crop": 8},
            {"crop": 13, "scale": 0.017},
            {"crop": 9, "mean_values": (10.5, 20.25, 30.0)},
            {"mean_values": (7.0,), "scale": 0.5},
            {"crop": 6, "mean_file": "mean"},
            {"mean_file": "mean", "scale": 2.0},
        ],
    )
    def test_it_is_what_caffe_s_data_layer_does_in_test(self, images, in_caffe, tmp_path, given):
        folder, pixels = images
        if "mean_file" in given:
            given = {**given, "mean_file": str(folder / "mean")}
        words = [f"crop_size: {given['crop']}"] if "crop" in given else []
        words += [f'mean_file: "{given["mean_file"]}"'] if "mean_file" in given else []
        words += [f"mean_value: {v}" for v in given.get("mean_values", ())]
        words += [f"scale: {given['scale']}"] if "scale" in given else []
        (tmp_path / "net").write_text(DATA % (" ".join(words), folder / "odd.lmdb"))
        theirs = in_caffe(
            "net = caffe.Net(path, 1)\nnet.forward()\nresult = net.blobs['data'].data.tolist()",
            path=str(tmp_path / "net"),
        )
        net = Net.load(tmp_path / "net")
        assert np.array_equal(Transform.of(net.layers[0])(pixels), np.array(theirs, np.float32))
        assert np.array_equal(Transform(**given)(pixels[2]), np.array(theirs[2], np.float32))

    def test_what_does_not_fit_is_named(self, images):
        folder, pixels = images
        for given, said in (
            ({"crop": 14}, "crop 14 of 13x18 images; give larger ones, or a smaller --crop"),
            ({"mean_values": (1.0, 2.0)}, "2 mean values for images of 3 channels"),
            ({"mean_file": str(folder / "odd.lmdb/data.mdb")}, "no mean image"),
        ):
            with pytest.raises(RebirthError, match=said):
                Transform(**given)(pixels)
        with pytest.raises(RebirthError, match="a mean of 3x13x18, but the images are 3x13x13"):
            Transform(mean_file=str(folder / "mean"))(pixels[..., :13])


class TestRefusals:
    def refuse(self, trained: Path, engine: CaffeEngine, net: Net, said: str, **options: Any) -> None:
        with pytest.raises(RebirthError, match=said) as caught:
            evaluate_net(net, trained / "test.lmdb", engine, options.get("transform", TRANSFORM))
        assert "\n" not in str(caught.value)

    def test_a_net_without_weights(self, trained, engine):
        net = Net.load(trained / "train_val.prototxt", None, (1, 28, 28))
        self.refuse(
            trained, engine, net, "train_val.prototxt: has no weights; an untrained net has no accuracy"
        )

    def test_images_of_another_size(self, trained, engine):
        said = (
            r"train_val.prototxt: takes 1x24x24, the images of .* are 1x28x28 after the transformation; give"
        )
        self.refuse(trained, engine, net_of(trained), said, transform=Transform())

    def test_weights_that_are_no_numbers(self, trained, engine):
        net = net_of(trained)
        fill_with(net, "fc", np.nan)
        with pytest.raises(NotFinite, match="the net's output is not finite; its weights have diverged"):
            evaluate_net(net, trained / "test.lmdb", engine, TRANSFORM)

    @pytest.mark.parametrize(("old", "new", "said"), [
        ("num_output: 10", "num_output: 3", "label 9, but .* knows 3 classes"),
        ('top: "fc"', 'top: "fc" } layer { name: "r" type: "ReLU" bottom: "conv1" top: "r"', "has 2 outputs"),
    ])  # fmt: skip
    def test_nets_that_do_not_fit_the_labels(self, trained, engine, tmp_path, old, new, said):
        text = """input: "data" input_dim: 1 input_dim: 1 input_dim: 24 input_dim: 24
        layer { name: "conv1" type: "ReLU" bottom: "data" top: "conv1" }
        layer { name: "fc" type: "InnerProduct" bottom: "conv1" inner_product_param { num_output: 10 }
          top: "fc" }""".replace(old, new)
        net = Net.parse(text)
        fill_missing(net, seed=0)
        self.refuse(trained, engine, net, said)


def test_large_nets_run_in_small_batches():
    zoo = tiny.ROOT / "prototxts"
    small = Net.load(zoo / "fashion_googlenet/deploy.prototxt")
    large = Net.load(zoo / "resnet_50/deploy.prototxt")
    assert module.batch_size(small) == module.BATCH
    assert 1 <= module.batch_size(large) < 10


class TestTool:
    def test_a_train_val_needs_to_be_told_nothing(self, trained, by_caffe):
        done = tool(
            trained / "train_val.prototxt", trained / "original.caffemodel", "--data", trained / "test.lmdb"
        )
        assert done.stderr == ""
        top1, top5, loss = (by_caffe[name] for name in ("accuracy", "accuracy5", "loss"))
        assert done.stdout == f"top-1 {top1:.2%}, top-5 {top5:.2%}, loss {loss:.4f}, 200 images, caffe\n"

    def test_what_is_given_goes_before_its_own(self, trained, by_caffe, tmp_path):
        files = (trained / "train_val.prototxt", trained / "original.caffemodel")
        blob = BlobProto(num=1, channels=1, height=28, width=28, data=[70.0] * 784)
        (tmp_path / "mean").write_bytes(blob.SerializeToString())
        same = json.loads(
            tool(*files, "--data", trained / "test.lmdb", "--json", "--mean-file", tmp_path / "mean").stdout
        )
        assert same["top1"] == pytest.approx(by_caffe["accuracy"])
        assert same["images"] == 200
        other = json.loads(tool(*files, "--data", trained / "test.lmdb", "--json", "--scale", "0.001").stdout)
        assert other["loss"] != pytest.approx(same["loss"], rel=0.01)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--data", "/none"], "/none: no such database"),
            (["--data", "DATA", "--crop", "40"], "crop 40 of 28x28 images"),
            (["--data", "DATA", "--crop", "20"], "takes 1x24x24, the images"),
            (["--data", "DATA", "--mean-value", "a"], "'a' is not numbers, like 104,117,123"),
            (["--data", "DATA", "--threads", "0"], "'0' is no whole number from 1"),
            (["--data", "DATA", "--caffe", "/none"], "--caffe /none: no such file or directory"),
            ([], "--data"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, trained, arguments, said):
        arguments = [str(trained / "test.lmdb") if a == "DATA" else a for a in arguments]
        done = tool(trained / "train_val.prototxt", trained / "original.caffemodel", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1

    def test_help_is_quick(self):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(TOOL), "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert " numpy\n" not in done.stderr
