"""The nets in prototxts/ against the published figures of their architectures."""

from pathlib import Path

import pytest

from rebirth_caffe.cost import cost
from rebirth_caffe.net import TEST, TRAIN, Net
from rebirth_caffe.prototxt import parse, to_message
from rebirth_caffe.schema import caffe_pb2
from rebirth_caffe.shapes import all_param_shapes, infer

ZOO = Path(__file__).parent.parent / "prototxts"
NETS = ["bvlc_googlenet", "bvlc_reference_caffenet", "bvlc_alexnet", "resnet_50"]


def load(name: str, kind: str = "deploy") -> Net:
    return Net.load(ZOO / name / f"{kind}.prototxt")


def param_shapes(net: Net) -> dict[str, list[tuple[int, ...]]]:
    return {layer.name: shapes for layer, shapes in all_param_shapes(net).items() if shapes}


def image_shapes(net: Net, phase: int) -> dict[str, tuple[int, ...] | None]:
    return {value.name: shape and shape[1:] for value, shape in infer(net.graph.view(phase)).items()}


@pytest.mark.parametrize(
    ("name", "layers", "macs", "params"),
    [
        ("bvlc_googlenet", 143, 1_582_671_872, 6_998_552),
        ("bvlc_reference_caffenet", 24, 724_406_816, 60_965_224),
        ("bvlc_alexnet", 24, 724_406_816, 60_965_224),
        # ResNet-50's 25,557,032, a bias of 64 on conv1, and the statistics of 53 BatchNorms.
        ("resnet_50", 229, 3_857_973_248, 25_557_032 + 64 + 2 * 26_560 + 53),
    ],
)
def test_cost_is_the_published_one(name, layers, macs, params):
    found = cost(load(name))
    assert (found.layers, found.macs, found.params) == (layers, macs, params)
    assert found.unknown == ()


def test_googlenet_with_its_auxiliary_heads_has_13_million_parameters():
    assert cost(load("bvlc_googlenet", "train_val"), TRAIN).params == 13_378_280


@pytest.mark.parametrize("name", NETS)
def test_train_val_holds_deploys_weights_and_blobs(name):
    deploy, train_val = load(name), load(name, "train_val")
    inside, whole = param_shapes(deploy), param_shapes(train_val)
    assert [(n, whole[n]) for n in whole if n in inside] == list(inside.items())
    heads = {f"{head}/{layer}" for head in ("loss1", "loss2") for layer in ("conv", "fc", "classifier")}
    assert whole.keys() - inside.keys() == (heads if name == "bvlc_googlenet" else set())

    expected = image_shapes(deploy, TEST)
    del expected["prob"]
    for phase in (TRAIN, TEST):
        found = image_shapes(train_val, phase)
        assert {blob: found[blob] for blob in expected} == expected


def test_googlenets_inception_table():
    shapes = param_shapes(load("bvlc_googlenet"))
    parts = ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")
    table = {
        block: tuple(shapes[f"inception_{block}/{part}"][0][0] for part in parts)
        for block in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    }
    assert table == {
        "3a": (64, 96, 128, 16, 32, 32),
        "3b": (128, 128, 192, 32, 96, 64),
        "4a": (192, 96, 208, 16, 48, 64),
        "4b": (160, 112, 224, 24, 64, 64),
        "4c": (128, 128, 256, 24, 64, 64),
        "4d": (112, 144, 288, 32, 64, 64),
        "4e": (256, 160, 320, 32, 128, 128),
        "5a": (256, 160, 320, 32, 128, 128),
        "5b": (384, 192, 384, 48, 128, 128),
    }


def test_googlenets_outputs_by_phase():
    net = load("bvlc_googlenet", "train_val")
    losses = {"loss1/loss1", "loss2/loss2", "loss3/loss3"}
    accuracies = {f"loss{i}/top-{k}" for i in (1, 2, 3) for k in (1, 5)}
    assert {v.name for v in net.graph.view(TRAIN).outputs} == losses
    assert {v.name for v in net.graph.view(TEST).outputs} == losses | accuracies
    weights = [list(layer.param.loss_weight) for layer in net.layers if layer.type == "SoftmaxWithLoss"]
    assert weights == [[pytest.approx(0.3)], [pytest.approx(0.3)], [1]]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("bvlc_reference_caffenet", "conv1 pool1 norm1 conv2 pool2 norm2"),
        ("bvlc_alexnet", "conv1 norm1 pool1 conv2 norm2 pool2"),
    ],
)
def test_caffenet_pools_first_and_alexnet_normalises_first(name, order):
    layers = [layer for layer in load(name).layers if layer.type in ("Convolution", "LRN", "Pooling")]
    assert [layer.name for layer in layers[:6]] == order.split()
    groups = {layer.name: layer.param.convolution_param.group for layer in layers if "conv" in layer.name}
    assert groups == {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "conv5": 2}


@pytest.mark.parametrize("name", NETS)
def test_multipliers_of_train_val(name):
    net = load(name, "train_val")
    wanted = {"BatchNorm": [(0, 0)] * 3, "Scale": [(1, 0)] * 2}
    for layer, blobs in all_param_shapes(net).items():
        if blobs:
            found = [(layer.spec(i).lr_mult, layer.spec(i).decay_mult) for i in range(len(blobs))]
            assert found == wanted.get(layer.type, [(1, 1), (2, 0)][: len(blobs)]), layer.name


def test_resnets_batch_norm_uses_stored_statistics_in_deploy_only():
    for kind, stored in (("deploy", True), ("train_val", False)):
        norms = [layer for layer in load("resnet_50", kind).layers if layer.type == "BatchNorm"]
        assert len(norms) == 53
        assert {layer.param.batch_norm_param.use_global_stats for layer in norms} == {stored}
        assert all(layer.bottom == layer.top for layer in norms)


@pytest.mark.parametrize("name", NETS)
def test_solver_trains_the_net_beside_it(name):
    path = ZOO / name / "solver.prototxt"
    solver = caffe_pb2.SolverParameter()
    unknown = to_message(parse(path.read_text(encoding="utf-8"), path), solver, path)
    assert not unknown
    assert ZOO.parent / solver.net == ZOO / name / "train_val.prototxt"
    assert solver.lr_policy == ("poly" if name == "bvlc_googlenet" else "step")
    assert solver.max_iter * solver.iter_size > 0
