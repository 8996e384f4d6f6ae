"""The files of training: complete, and ordinary ones that Caffe trains by hand."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.data import Images, write_lmdb
from rebirth_caffe.engines.training import CaffeTrainer
from rebirth_caffe.errors import NetError, RebirthError
from rebirth_caffe.net import TEST, TRAIN, Net
from rebirth_caffe.rebirth import Result, rebirth
from rebirth_caffe.retrain import Options, retrain
from rebirth_caffe.schema.caffe_pb2 import BlobProto
from rebirth_caffe.solver import TrainData
from rebirth_caffe.stages import Training
from tests import tiny

ZOO = tiny.ROOT / "prototxts"
STAGES = ["conv1", "conv2", "3a", "3b", "4a", "4b-4d", "4e", "5a", "5b"]


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A database for GoogLeNet."""
    path = tmp_path_factory.mktemp("large") / "large.lmdb"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 256, 256)).astype(np.uint8)
    import cv2

    load = lambda i: cv2.imencode(".png", np.stack([pixels[i]] * 3, 2))[1].tobytes()  # noqa: E731
    write_lmdb(path, Images(["a", "b"], np.array([0, 999]), load, ("x",) * 1000))
    return path


def googlenet(large: Path, name: str, **options: Any) -> Result:
    data = TrainData(str(large), str(large), mean_values=(104, 117, 123), crop=224, batch=1)
    return rebirth(
        ZOO / "bvlc_googlenet" / f"{name}.prototxt", training=Training(data, iterations=90), **options
    )


@pytest.fixture(scope="session")
def home(tmp_path_factory, large):
    """GoogLeNet's files, without weights."""
    out = tmp_path_factory.mktemp("googlenet") / "home"
    googlenet(large, "train_val").write(out)
    return out


class TestGoogLeNet:
    def test_every_step_has_its_folder(self, home):
        assert sorted(p.name for p in (home / "stages").iterdir()) == [
            f"{i:02d}-{stage}" for i, stage in enumerate(STAGES, 1)
        ]
        for folder in (home / "stages").iterdir():
            assert {p.name for p in folder.iterdir()} == {"train_val.prototxt", "solver.prototxt"}

    @pytest.mark.parametrize("number", range(1, 10))
    def test_every_step_builds_in_caffe_in_both_phases(self, home, in_caffe, tmp_path, number):
        path = next((home / "stages").glob(f"{number:02d}-*")) / "train_val.prototxt"
        text = path.read_text().replace("batch_size: 50", "batch_size: 1")
        (tmp_path / "net.prototxt").write_text(text)
        net = plans.apply(Net.load(home / "original/train_val.prototxt"), self.until(home, number))
        for phase in (TRAIN, TEST):
            built = in_caffe.net(tmp_path / "net.prototxt", int(phase))
            names = [name for name, _ in built["layers"]]
            assert names == [layer.name for layer in net.graph.view(phase).layers]
            assert {"loss1/fc", "loss2/fc", "loss3/classifier"} <= set(names)  # the auxiliary heads stay
            assert built["blobs"]["data"] == [1, 3, 224, 224]

    def until(self, home: Path, number: int) -> plans.Plan:
        plan = plans.load(home / "plan.yaml")
        return plan.only(merge for merge in plan.merges if merge.stage in STAGES[:number])

    def test_ten_times_the_rate_for_what_is_reborn_in_the_step_and_nothing_else(self, home):
        plan = plans.load(home / "plan.yaml")
        original = Net.load(home / "original/train_val.prototxt")
        usual = {layer.name: [p.lr_mult for p in layer.param.param] for layer in original.layers}
        for number, stage in enumerate(STAGES, 1):
            folder = next((home / "stages").glob(f"{number:02d}-*"))
            net = Net.load(folder / "train_val.prototxt")
            new = {s.name for m in plan.active if m.stage == stage for s in m.becomes if not s.kept}
            like = {s.name: s.like for m in plan.active for s in m.becomes}
            assert new
            for layer in net.layers:
                before = usual[like.get(layer.name, layer.name)]
                factor = 10 if layer.name in new else 1
                assert [p.lr_mult for p in layer.param.param] == [factor * lr for lr in before]
                decays = original.layer(like.get(layer.name, layer.name)) if before else None
                if decays is not None:
                    assert [p.decay_mult for p in layer.param.param] == [
                        p.decay_mult for p in decays.param.param
                    ]

    def test_auxiliary_heads_are_absent_from_deploy(self, home):
        names = {layer.name for layer in Net.load(home / "deploy.prototxt").layers}
        assert not [name for name in names if name.startswith(("loss1", "loss2", "label"))]
        assert "prob" in names or "loss3/loss3" in names

    def test_its_solvers(self, home):
        text = (home / "stages/03-3a/solver.prototxt").read_text()
        for line in (
            *('net: "stages/03-3a/train_val.prototxt"', 'snapshot_prefix: "stages/03-3a/snapshot"'),
            *("max_iter: 90", "stepsize: 40", "momentum: 0.9", 'lr_policy: "step"', "random_seed: 0"),
            *("test_iter: 1", "snapshot: 1000"),
        ):
            assert f"{line}\n" in text

    def test_a_deploy_net_gets_what_it_lacks(self, large, tmp_path, in_caffe):
        googlenet(large, "deploy", only=["conv1"]).write(tmp_path / "out")
        path = tmp_path / "out/stages/01-conv1/train_val.prototxt"
        path.write_text(path.read_text().replace("batch_size: 50", "batch_size: 1"))
        built = in_caffe.net(path, 1)
        assert [name for name, kind in built["layers"] if kind in ("SoftmaxWithLoss", "Accuracy")] == [
            *("loss", "accuracy/top-1", "accuracy/top-5")
        ]


class TestByHand:
    def test_caffe_train_takes_them_from_that_directory(self, tmp_path, trained, caffe):
        """As the README shows it, with the reborn layers' first weights, too."""
        home = tiny.reborn(trained, tmp_path / "a b", iterations=4)
        for stage, weights in (
            ("01-conv1", "original/weights.caffemodel"),
            ("02-conv2", "original/weights.caffemodel,weights.caffemodel"),
        ):
            done = subprocess.run(
                [
                    *(str(caffe.binary), "train", "-solver", f"stages/{stage}/solver.prototxt"),
                    *("-weights", weights),
                ],
                cwd=home,
                env=caffe.environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-500:]
            assert re.search(r"Iteration 4, Testing net \(#0\)|Optimization Done", done.stderr)
            assert "accuracy5" in done.stderr
            assert (home / f"stages/{stage}/snapshot_iter_4.caffemodel").exists()

    def test_settings_are_kept_for_retraining(self, tmp_path, trained):
        home = tiny.reborn(trained, tmp_path / "home", iterations=4, init="xavier", seed=3)
        assert json.loads((home / "original/settings.json").read_text()) == {
            "init": "xavier",
            "seed": 3,
            "iterations": 4,
            "schedule": "steps",
            "distil": "",
            "calibration": "",
            "images": 0,
        }
        assert (home / "original/solver.prototxt").read_text() == tiny.SOLVER
        original = Net.load(home / "original/train_val.prototxt", home / "original/weights.caffemodel")
        assert [x.param.data_param.source for x in original.layers if x.type == "Data"] == [
            str(trained / "train.lmdb"),
            str(trained / "test.lmdb"),
        ]
        solver = (home / "stages/01-conv1/solver.prototxt").read_text()
        assert f"test_iter: {tiny.TEST_IMAGES // 50}\n" in solver

    def test_the_test_covers_every_image(self, tmp_path, trained):
        text = (trained / "train_val.prototxt").read_text().replace("batch_size: 50", "batch_size: 60")
        (tmp_path / "net.prototxt").write_text(text)
        data = TrainData(str(trained / "train.lmdb"), str(trained / "test.lmdb"))
        rebirth(tmp_path / "net.prototxt", training=Training(data)).write(tmp_path / "out")
        assert "test_iter: 4\n" in (tmp_path / "out/stages/01-conv1/solver.prototxt").read_text()


class TestRefusals:
    def given(self, folder: Path, **changes: Any) -> TrainData:
        given: dict[str, Any] = {"train": str(folder / "train.lmdb"), "test": str(folder / "test.lmdb")}
        return TrainData(**{**given, **changes})

    def refuse(self, trained: Path, said: str, net: str = "train_val.prototxt", **changes: Any) -> None:
        path = trained / net if "/" not in net else Path(net)
        with pytest.raises(RebirthError, match=said) as caught:
            rebirth(path, training=Training(self.given(trained, **changes)))
        assert "\n" not in str(caught.value)

    def test_a_database_that_is_not_there(self, trained):
        self.refuse(trained, "/none: no such database", train="/none")
        self.refuse(trained, "/none: no such database", test="/none")

    def test_crops_and_means_that_do_not_fit_the_images(self, trained, tmp_path):
        self.refuse(
            trained,
            r"train.lmdb \(--train-data\): crop 29 of 28x28 images; give larger ones, or a smaller --crop",
            crop=29,
        )
        self.refuse(
            trained, "2 mean values for images of 1 channel; give other images", mean_values=(1.0, 2.0)
        )
        blob = BlobProto(num=1, channels=1, height=9, width=9, data=[0.0] * 81)
        (tmp_path / "mean").write_bytes(blob.SerializeToString())
        self.refuse(
            trained, "mean: a mean of 1x9x9, but the images are 1x28x28", mean_file=str(tmp_path / "mean")
        )
        (tmp_path / "none").write_bytes(b"\xff")
        self.refuse(trained, "none: no mean image of Caffe's", mean_file=str(tmp_path / "none"))
        with pytest.raises(OSError, match="No such file"):
            rebirth(trained / "train_val.prototxt", training=Training(self.given(trained, mean_file="/none")))

    def test_images_of_another_size_than_the_deploy_net_takes(self, trained):
        net = str(ZOO / "cifar10_full/deploy.prototxt")
        self.refuse(
            trained,
            r"takes 3x32x32, the images of .* \(--train-data\) are 1x28x28; give the images it was "
            "trained for, or make the database again without make_lmdb.py's --gray and with --resize 32x32",
            net,
        )

    def test_two_databases_of_different_images(self, trained, tmp_path):
        small = Images(["a"] * 9, np.zeros(9, np.int64), lambda i: np.zeros((20, 28), np.uint8), ("x",))
        write_lmdb(tmp_path / "small.lmdb", small)
        self.refuse(
            trained,
            r"train.lmdb \(--train-data\): its images are 1x24x24, those of .*small.lmdb .* 1x20x28; give",
            test=str(tmp_path / "small.lmdb"),
            net=str(self.uncropped(trained, tmp_path)),
        )

    def uncropped(self, trained: Path, tmp_path: Path) -> Path:
        """The net without its crop in TEST."""
        before, last = (trained / "train_val.prototxt").read_text().split("{ crop_size: 24")
        path = tmp_path / "net.prototxt"
        path.write_text(f"{before}{{ {last}")
        return path

    def test_a_net_that_has_nothing_to_teach(self, trained):
        with pytest.raises(RebirthError, match=r"has learned nothing to learn from it; give its --weights"):
            rebirth(trained / "train_val.prototxt", training=Training(self.given(trained), distil="images"))

    def test_weights_that_do_not_fit_the_images(self, trained):
        data = self.given(trained, crop=28)
        with pytest.raises(RebirthError, match=r"layer 'fc' blob 0 is .* images of another size: see --crop"):
            rebirth(trained / "train_val.prototxt", trained / "original.caffemodel", training=Training(data))

    def test_a_template_that_is_a_net(self, trained, tmp_path):
        for path, said in (
            (trained / "train_val.prototxt", "a net, not a solver"),
            (tmp_path / "x", "no such file"),
        ):
            with pytest.raises(RebirthError, match=said):
                rebirth(trained / "train_val.prototxt", training=Training(self.given(trained), path))

    def test_a_net_that_reads_other_data(self, trained, tmp_path):
        text = (trained / "train_val.prototxt").read_text().replace('type: "Data"', 'type: "ImageData"')
        (tmp_path / "net.prototxt").write_text(text)
        with pytest.raises(
            NetError, match=r"its data comes from ImageData\), and a database needs exactly one"
        ):
            rebirth(tmp_path / "net.prototxt", training=Training(self.given(trained)))


def test_nothing_to_retrain(trained, tmp_path, caffe):
    """Exact merges alone, or none: there is nothing to learn, from the original or without it."""
    for distil in ("", "images"):
        home = tiny.reborn(trained, tmp_path / f"x{distil}", exact=True, learning={"distil": distil})
        assert not (home / "stages").exists()
        assert not (home / "original/teacher.caffemodel").exists()
        outcome = retrain(home, Options(iterations=4, distil=distil), CaffeTrainer(caffe))
        assert outcome is not None
        assert outcome.final == outcome.original
        assert (home / "final/deploy.prototxt").exists()


def test_what_comes_next_is_said_and_works_as_typed(trained, tmp_path):
    """The last line is a command, but without weights, from which nothing can be retrained."""
    home = tmp_path / "a home"
    data = ["--train-data", "train.lmdb", "--test-data", "test.lmdb"]
    weights = ["--weights", "original.caffemodel"]

    def last_line(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, tiny.ROOT / "tools/rebirth_net.py", "train_val.prototxt", *data, *more],
            cwd=trained,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()[-1]

    said = last_line("--out", str(tmp_path / "bare"))
    assert said == "next: make it again with the original's --weights, to retrain it"
    said = last_line("--out", str(home), *weights, "--iterations", "2")
    python, *words = shlex.split(said.removeprefix("next: "))
    assert (python, words) == ("python", ["tools/retrain.py", str(home)])
    subprocess.run([sys.executable, *words], cwd=tiny.ROOT, check=True)
    assert (home / "final/weights.caffemodel").exists()
    assert last_line("--out", str(tmp_path / "exact"), *weights, "--exact").startswith("wrote ")


def test_paths_hold_from_anywhere(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    mean = BlobProto(num=1, channels=1, height=28, width=28, data=[70.0] * 784)
    (tmp_path / "m.binaryproto").write_bytes(mean.SerializeToString())
    (trained / "m.binaryproto").write_bytes(mean.SerializeToString())
    result = rebirth(
        "train_val.prototxt", training=Training(TrainData("train.lmdb", "test.lmdb", "m.binaryproto"))
    )
    result.write(tmp_path / "out")
    net = Net.load(tmp_path / "out/original/train_val.prototxt")
    for layer in net.layers:
        if layer.type == "Data":
            assert layer.param.data_param.source in (f"{trained}/train.lmdb", f"{trained}/test.lmdb")
            assert layer.param.transform_param.mean_file == f"{trained}/m.binaryproto"
            assert not layer.param.transform_param.mean_value
