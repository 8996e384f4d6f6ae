"""Nets that train and their solvers: what is written is what was asked, and real Caffe takes it."""

from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe import prototxt
from rebirth_caffe.data import Images, write_lmdb
from rebirth_caffe.errors import NetError, PrototxtError
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import TEST, TRAIN, Net
from rebirth_caffe.schema import caffe_pb2
from rebirth_caffe.solver import (
    TEMPLATE,
    Schedule,
    TrainData,
    data_layer,
    read_template,
    solver_text,
    trainable,
    with_rates,
)

ZOO = Path(__file__).parents[1] / "prototxts"
FORWARD = """
net = caffe.Net(path, 1, weights=weights)
net.forward()
scores = net.blobs[score].data
result = {n: float(net.blobs[n].data) for n in net.outputs}, scores.tolist(), net.blobs["label"].data.tolist()
"""


def database(path: Path, channels: int, size: int, count: int = 8) -> Path:
    shape = (count, size, size, 3) if channels == 3 else (count, size, size)
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    import cv2

    load = lambda i: cv2.imencode(".png", pixels[i])[1].tobytes() if channels == 3 else pixels[i]  # noqa: E731
    write_lmdb(path, Images([str(i) for i in range(count)], np.arange(count) % 10, load, tuple("0123456789")))
    return path


@pytest.fixture(scope="session")
def lmdbs(tmp_path_factory):
    """Databases by (channels, size)."""
    folder = tmp_path_factory.mktemp("lmdbs")
    made: dict[tuple[int, int], str] = {}

    def get(channels: int, size: int) -> str:
        if (channels, size) not in made:
            made[channels, size] = str(database(folder / f"{channels}x{size}.lmdb", channels, size))
        return made[channels, size]

    return get


def solver(text: str) -> caffe_pb2.SolverParameter:
    param = caffe_pb2.SolverParameter()
    assert prototxt.to_message(prototxt.parse(text), param) == []
    return param


# ------------------------------------------------------------------------------------------- deploy -> train


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ZOO.glob("*/deploy.prototxt")))
def test_every_deploy_of_the_zoo_trains_in_caffe(name, lmdbs, tmp_path, in_caffe):
    net = Net.load(ZOO / name / "deploy.prototxt")
    layer = next(layer for layer in net.layers if layer.type == "Input")
    _, channels, size, _ = layer.param.input_param.shape[0].dim
    source = lmdbs(channels, 256 if size > 64 else size)
    made = trainable(net, TrainData(source, source, crop=size, mean_values=(100,), mirror=True, batch=1))
    path = tmp_path / "train_val.prototxt"
    path.write_text(made.text().replace("batch_size: 50", "batch_size: 2"))
    train, test = (in_caffe.net(path, phase) for phase in (0, 1))
    kept = [[x.name, x.type] for x in net.layers if x.type not in ("Input", "Softmax")]
    assert train["layers"] == [["data", "Data"], *kept, ["loss", "SoftmaxWithLoss"]]
    accuracies = [["accuracy/top-1", "Accuracy"], ["accuracy/top-5", "Accuracy"]]
    assert test["layers"] == [["data", "Data"], *kept, ["loss", "SoftmaxWithLoss"], *accuracies]
    assert train["blobs"][layer.top[0]] == [1, channels, size, size]
    assert test["blobs"][layer.top[0]] == [2, channels, size, size]
    assert train["params"] == test["params"] | {"accuracy/top-1": [], "accuracy/top-5": []} or all(
        train["params"][k] == v for k, v in test["params"].items() if not k.startswith("accuracy")
    )


@pytest.mark.parametrize("name", ["cifar10_full", "fashion_googlenet"])
def test_the_accuracies_and_the_loss_are_right(name, lmdbs, tmp_path, in_caffe):
    net = Net.load(ZOO / name / "deploy.prototxt")
    channels, size = (1, 28) if name.startswith("fashion") else (3, 32)
    source = lmdbs(channels, size)
    made = trainable(net, TrainData(source, source, mean_values=(128,), scale=0.02))
    made.image = (channels, size, size)
    fill_missing(made, seed=3)
    (tmp_path / "net.prototxt").write_text(made.text().replace("batch_size: 50", "batch_size: 8"))
    made.write_weights(tmp_path / "w")
    head = next(layer for layer in made.layers if layer.type == "SoftmaxWithLoss")
    found, scores, labels = in_caffe(
        FORWARD, path=str(tmp_path / "net.prototxt"), weights=str(tmp_path / "w"), score=head.bottom[0]
    )
    logits = np.array(scores).reshape(8, -1)
    order = np.argsort(-logits, axis=1)
    hits = order == np.array(labels, int)[:, None]
    assert found["accuracy/top-1"] == pytest.approx(hits[:, 0].mean())
    assert found["accuracy/top-5"] == pytest.approx(hits[:, :5].any(axis=1).mean())
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(chances[range(8), np.array(labels, int)]).mean(), rel=1e-4)


OLD = """name: "old"  # a name
input: "data"
input_dim: 1 input_dim: 3 input_dim: 32 input_dim: 32
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc"
  inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
"""


class TestFromDeploy:
    def test_old_inputs_and_few_classes_and_no_softmax(self, lmdbs, tmp_path, in_caffe):
        source = lmdbs(3, 32)
        made = trainable(Net.parse(OLD), TrainData(source, source))
        made.write(tmp_path / "net.prototxt")
        assert 'name: "old"  # a name\n' in made.text()
        assert "input_dim" not in made.text()
        built = in_caffe.net(tmp_path / "net.prototxt", 1)
        assert [name for name, _ in built["layers"]] == ["data", "fc", "loss", "accuracy/top-1"]

    def test_a_blob_called_label_is_not_in_the_way(self, lmdbs, tmp_path, in_caffe):
        source = lmdbs(3, 32)
        made = trainable(Net.parse(OLD.replace('top: "fc"', 'top: "label"')), TrainData(source, source))
        made.write(tmp_path / "net.prototxt")
        assert in_caffe.net(tmp_path / "net.prototxt", 0)["blobs"]["rebirth_label"] == [32]

    def test_the_transformation_is_the_one_given(self):
        data = TrainData("a b.lmdb", 'c".lmdb', "m.binaryproto", None, 0.5, 24, True, 7)
        made = trainable(Net.parse(OLD), data)
        train, test = data_layer(made, TRAIN), data_layer(made, TEST)
        assert train is not None
        assert test is not None
        assert (train.param.data_param.source, test.param.data_param.source) == ("a b.lmdb", 'c".lmdb')
        assert (train.param.data_param.batch_size, test.param.data_param.batch_size) == (7, 50)
        assert (train.param.transform_param.mirror, test.param.transform_param.mirror) == (True, False)
        for layer in (train, test):
            t = layer.param.transform_param
            assert (t.crop_size, t.scale, t.mean_file) == (24, 0.5, "m.binaryproto")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                OLD.replace('input: "data"', 'input: "data" input: "b"').replace("input_dim: 1 ", ""),
                "2 inputs",
            ),
            (OLD + 'layer { name: "r" type: "ReLU" bottom: "data" top: "r" }', "2 outputs"),
        ],
    )
    def test_one_input_and_one_output(self, text, said):
        if "2 inputs" in said:
            text = OLD.replace("input_dim: 32\nlayer", 'input_dim: 32 input: "b" input_dim: 1 input_dim: 3 '
                               "input_dim: 32 input_dim: 32\nlayer")  # fmt: skip
            text += 'layer { name: "s" type: "Eltwise" bottom: "fc" bottom: "b" top: "s" }'
        with pytest.raises(NetError, match=said):
            trainable(Net.parse(text), TrainData("a", "b"))


# ------------------------------------------------------------------------------------------------ train_val


TRAIN_VAL = """
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }  # images
  transform_param { mirror: true crop_size: 20 mean_file: "old.binaryproto" scale: 0.5 }
  data_param { source: "old" batch_size: 64 backend: LEVELDB prefetch: 2 } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  transform_param { mirror: false crop_size: 20 mean_value: 1 mean_value: 2 mean_value: 3 }
  data_param { source: "old" batch_size: 10 backend: LEVELDB } }
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc"  # kept
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""


def both(net: Net) -> list[caffe_pb2.LayerParameter]:
    layers = [data_layer(net, phase) for phase in (TRAIN, TEST)]
    return [layer.param for layer in layers if layer is not None]


class TestTrainVal:
    def test_its_own_data_layers_are_kept(self):
        made = trainable(Net.parse(TRAIN_VAL), TrainData("a", "b"))
        train, test = both(made)
        assert (train.data_param.source, test.data_param.source) == ("a", "b")
        assert (train.data_param.batch_size, test.data_param.batch_size) == (64, 10)
        assert train.data_param.backend == test.data_param.backend == caffe_pb2.DataParameter.LMDB
        assert train.data_param.prefetch == 2
        before, _ = both(Net.parse(TRAIN_VAL))
        assert train.transform_param == before.transform_param
        assert "# images" not in made.text() or "# kept" in made.text()
        assert made.text().endswith(TRAIN_VAL[TRAIN_VAL.index('layer { name: "fc"') :])

    @pytest.mark.parametrize(
        ("given", "train", "test"),
        [
            ({"mean_file": "m"}, {"mean_file": "m"}, {"mean_file": "m", "mean_value": []}),
            ({"mean_values": (7.5,)}, {"mean_value": [7.5], "mean_file": ""}, {"mean_value": [7.5]}),
            ({"scale": 0.25}, {"scale": 0.25}, {"scale": 0.25}),
            ({"crop": 16}, {"crop_size": 16}, {"crop_size": 16}),
            ({"mirror": False}, {"mirror": False}, {"mirror": False}),
            ({"mirror": True}, {"mirror": True}, {"mirror": False}),
            ({"batch": 5}, {}, {}),
        ],
    )
    def test_each_is_overridden_as_asked_and_nothing_else(self, given, train, test):
        net = Net.parse(TRAIN_VAL)
        made = both(trainable(net, TrainData("a", "b", **given)))
        for param, before, wanted in zip(made, both(net), (train, test), strict=True):
            expected = caffe_pb2.TransformationParameter()
            expected.CopyFrom(before.transform_param)
            for name, value in wanted.items():
                expected.ClearField(name)
                if isinstance(value, list):
                    getattr(expected, name).extend(value)
                elif value != "":
                    setattr(expected, name, value)
            assert param.transform_param == expected
        assert [p.data_param.batch_size for p in made] == [given.get("batch", 64), 10]

    def test_a_net_that_only_trains_gets_a_layer_to_test(self):
        start = TRAIN_VAL.index(
            'layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TE'
        )
        text = TRAIN_VAL[:start] + TRAIN_VAL[TRAIN_VAL.index('layer { name: "fc"') :]
        train, test = both(trainable(Net.parse(text), TrainData("a", "b")))
        assert (train.data_param.source, test.data_param.source) == ("a", "b")
        assert (train.transform_param.mirror, test.transform_param.mirror) == (True, False)

    def test_one_data_layer_for_both_phases_becomes_two(self, lmdbs, tmp_path, in_caffe):
        """Or it would be tested on the images it is trained on."""
        text = TRAIN_VAL.replace(" include { phase: TRAIN }", "").replace('"old.binaryproto"', '"x"')
        text = (
            text[: text.index('layer { name: "data" type: "Data" top: "data" top: "label" include')]
            + text[text.index('layer { name: "fc"') :]
        )
        source = lmdbs(3, 32)
        made = trainable(Net.parse(text), TrainData("a", source, mean_values=(1,)))
        train, test = both(made)
        assert (train.data_param.source, test.data_param.source) == ("a", source)
        made.write(tmp_path / "net.prototxt")
        assert in_caffe.net(tmp_path / "net.prototxt", 1)["blobs"]["data"] == [64, 3, 20, 20]

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ('type: "Data"', 'type: "DummyData"', r"0 Data layers in TRAIN \(its data comes from DummyD"),
            ('layer { name: "fc"', 'layer { name: "d2" type: "Data" top: "2" }\nlayer { name: "fc"', "2 D"),
        ],
    )  # fmt: skip
    def test_each_phase_needs_one_data_layer(self, old, new, said):
        with pytest.raises(NetError, match=said):
            trainable(Net.parse(TRAIN_VAL.replace(old, new)), TrainData("a", "b"))


# ---------------------------------------------------------------------------------------------------- rates


class TestRates:
    NET = """
input: "data" input_dim: 1 input_dim: 1 input_dim: 8 input_dim: 8
# bare
layer { name: "a" type: "Convolution" bottom: "data" top: "a"
  convolution_param { num_output: 2 kernel_size: 3 } }
layer { name: "b" type: "Convolution" bottom: "a" top: "b"
  param { name: "shared" lr_mult: 0.1 decay_mult: 3 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 2 kernel_size: 3 } }
layer { name: "c" type: "Convolution" bottom: "b" top: "c" param { decay_mult: 5 }
  convolution_param { num_output: 2 kernel_size: 1 bias_term: false } }
layer { name: "d" type: "InnerProduct" bottom: "c" top: "d" param { lr_mult: 0 }
  inner_product_param { num_output: 2 } }
layer { name: "e" type: "ReLU" bottom: "d" top: "e" }
"""

    def specs(self, net: Net, name: str) -> list[tuple[float, float]]:
        return [(round(p.lr_mult, 6), p.decay_mult) for p in net.layer(name).param.param]

    def test_ten_times_the_rate_and_decay_untouched(self):
        made = with_rates(Net.parse(self.NET), ["a", "b", "c", "d", "e"])
        assert self.specs(made, "a") == [(10, 1), (10, 1)]
        assert self.specs(made, "b") == [(1, 3), (20, 0)]
        assert made.layer("b").param.param[0].name == "shared"
        assert self.specs(made, "c") == [(10, 5)]
        assert self.specs(made, "d") == [(0, 1), (10, 1)]
        assert made.layer("e").text == Net.parse(self.NET).layer("e").text

    def test_only_the_layers_named(self):
        net = Net.parse(self.NET)
        made = with_rates(net, ["b"])
        for name in "acde":
            assert made.layer(name).text == net.layer(name).text
        assert with_rates(net, []).text() == net.text()
        assert "# bare" in with_rates(net, ["a"]).text()

    def test_caffe_reads_them_so(self, tmp_path, in_caffe):
        with_rates(Net.parse(self.NET), ["a", "c", "d"]).write(tmp_path / "net.prototxt")
        assert in_caffe.net(tmp_path / "net.prototxt", 0)["params"]["a"] == [[2, 1, 3, 3], [2]]

    def test_a_net_whose_image_nobody_knows(self):
        """Its shapes are not known, but its weights are."""
        net = Net.parse(TRAIN_VAL.replace("crop_size: 20", ""))
        assert with_rates(net, ["fc"]).text() == net.text()
        net.image = (3, 20, 20)
        fill_missing(net, seed=0)
        net.image = None
        assert [p.lr_mult for p in with_rates(net, ["fc"]).layer("fc").param.param] == [10, 10]


# --------------------------------------------------------------------------------------------------- solvers


MINE = """# mine
net: "elsewhere" test_iter: 3 test_iter: 4 test_interval: 77
test_state { stage: "a" } test_state { stage: "b" }
base_lr: 0.05 lr_policy: "multistep" stepvalue: 10 stepvalue: 20 gamma: 0.5 momentum: 0.8
weight_decay: 0.001 regularization_type: "L1" clip_gradients: 35 iter_size: 2 average_loss: 20
max_iter: 9 random_seed: 42 snapshot: 5 snapshot_prefix: "x" snapshot_format: HDF5 snapshot_diff: true
snapshot_after_train: false type: "Nesterov" display: 7 solver_mode: GPU
"""
STEP = Schedule(100, 6, "stages/a b/net", "stages/a b/snap", 13)


class TestSolver:
    def test_the_papers(self):
        made = solver(solver_text(TEMPLATE, Schedule(90_000, 0, "n", "p")))
        assert (made.base_lr, made.momentum, made.gamma) == pytest.approx((0.001, 0.9, 0.1))
        assert (made.lr_policy, made.stepsize, made.max_iter) == ("step", 40_000, 90_000)
        assert made.type == "SGD"
        assert solver(solver_text(TEMPLATE, Schedule(1, 0, "n", "p"))).stepsize == 1
        assert read_template(None) == TEMPLATE

    def test_a_template_keeps_its_own_fields(self):
        made = solver(solver_text(MINE, STEP))
        wanted = solver(MINE)
        wanted.ClearField("test_iter")
        wanted.ClearField("test_state")
        for name, value in (
            *(("net", "stages/a b/net"), ("max_iter", 100), ("random_seed", 6)),
            *(("snapshot_prefix", "stages/a b/snap"), ("test_interval", 77), ("test_initialization", False)),
        ):
            setattr(wanted, name, value)
        wanted.test_iter.append(13)
        assert made == wanted

    def test_without_a_test_net(self):
        made = solver(solver_text(MINE, Schedule(100, 6, "n", "p")))
        assert not made.test_iter
        assert not made.HasField("test_interval")
        assert not made.test_state

    def test_nets_of_every_kind_in_it_give_way(self):
        more = 'train_net: "a" test_net: "b" test_net: "c" net_param { name: "d" } train_net_param { } '
        made = solver(solver_text(more + TEMPLATE, STEP))
        assert made.net == "stages/a b/net"
        for name in ("train_net", "net_param", "train_net_param"):
            assert not made.HasField(name)
        assert not made.test_net

    def test_one_that_is_driven_writes_just_the_snapshot_that_is_waited_for(self):
        given = Schedule(100, 6, "n", "p", lr_factor=0.1, driven=True, display=3)
        made = solver(solver_text(MINE + 'weights: "w"', given))
        for name in ("snapshot", "snapshot_format", "snapshot_diff", "snapshot_after_train", "test_interval"):
            assert not made.HasField(name), name
        for name in ("test_iter", "test_state", "weights"):
            assert not getattr(made, name), name
        assert made.base_lr == pytest.approx(0.005)
        assert made.display == 3
        assert (made.clip_gradients, made.iter_size, made.type) == (35, 2, "Nesterov")
        assert solver(solver_text(MINE, Schedule(9, 0, "n", "p", driven=True, display=50))).display == 7
        silent = MINE.replace("display: 7", "display: 0")
        assert solver(solver_text(silent, Schedule(9, 0, "n", "p", driven=True, display=50))).display == 50
        assert solver(solver_text(MINE, Schedule(9, 0, "n", "p", driven=True, snapshot=4))).snapshot == 4

    def test_caffe_takes_it(self, tmp_path, in_caffe):
        net = tmp_path / "net.prototxt"
        net.write_text(
            'layer { name: "d" type: "DummyData" top: "d" top: "l" dummy_data_param { '
            "shape { dim: 2 dim: 3 } shape { dim: 2 } } } "
            'layer { name: "f" type: "InnerProduct" bottom: "d" top: "f" '
            "inner_product_param { num_output: 4 } } "
            'layer { name: "s" type: "SoftmaxWithLoss" bottom: "f" bottom: "l" top: "s" }'
        )
        path = tmp_path / "solver.prototxt"
        code = "s = caffe.get_solver(path)\ns.step(2)\nresult = [s.iter, len(s.test_nets)]"
        for schedule, tests in (
            (Schedule(5, 1, str(net), "p", 1), 1),
            (Schedule(5, 1, str(net), "p", driven=True, display=2), 0),
        ):
            path.write_text(solver_text(MINE, schedule))
            assert in_caffe(code, path=str(path)) == [2, tests]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (OLD, "<solver>:4: a net, not a solver; give a solver prototxt"),
            ("", "has no base_lr; give a whole solver prototxt"),
            ('net: "x"', "has no base_lr"),
            ("base_lr: fast", "<solver>:1: "),
            ("base_lr: 0.1 }", "<solver>:1: "),
            ("nonsense", "<solver>:1"),
        ],
    )
    def test_a_net_or_garbage_is_refused_in_one_line(self, text, said):
        with pytest.raises(PrototxtError) as caught:
            solver_text(text, STEP)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", sorted(path.parent.name for path in ZOO.glob("*/solver.prototxt")))
    def test_the_zoo_s_solvers_are_templates(self, name):
        made = solver(solver_text(read_template(ZOO / name / "solver.prototxt"), STEP))
        own = solver((ZOO / name / "solver.prototxt").read_text())
        assert made.base_lr == own.base_lr
        assert made.lr_policy == own.lr_policy
        assert (made.net, made.max_iter, made.random_seed) == ("stages/a b/net", 100, 6)

    def test_what_is_no_text_is_refused(self, tmp_path):
        (tmp_path / "w").write_bytes(b"\0\1")
        for path, said in ((tmp_path / "w", "binary data"), (tmp_path / "none", "no such file")):
            with pytest.raises(PrototxtError, match=said):
                read_template(path)


def test_a_template_of_an_older_caffe_is_upgraded(tmp_path):
    path = tmp_path / "solver.prototxt"
    path.write_text("solver_type: ADAM  # of 2015\nbase_lr: 0.1\n")
    assert read_template(path) == 'type: "Adam"  # of 2015\nbase_lr: 0.1\n'
