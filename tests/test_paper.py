"""The nets of the paper come out as in the paper; what must be reached is reached."""

from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.engines import get_engine
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import rebirth

ZOO = Path(__file__).resolve().parent.parent / "prototxts"

# Block: 3x3_reduce, 3x3, 5x5_reduce, 5x5 (num_output); stride of the last two. From Szegedy et al., table 1,
# by the paper's steps: 3x3 takes in the 1x1, 5x5 the pool branch, the 3x3's reducer is halved.
BLOCKS = {
    "3a": (48, 64 + 128, 16, 32 + 32, 1),
    "3b": (64, 128 + 192, 32, 96 + 64, 2),
    "4a": (48, 192 + 208, 16, 48 + 64, 1),
    "4b": (56, 160 + 224, 24, 64 + 64, 1),
    "4c": (64, 128 + 256, 24, 64 + 64, 1),
    "4d": (72, 112 + 288, 32, 64 + 64, 1),
    "4e": (80, 256 + 320, 32, 128 + 128, 2),
    "5a": (80, 256 + 320, 32, 128 + 128, 1),
    "5b": (96, 384 + 384, 48, 128 + 128, 1),
}


def conv(net, name):
    """num_output, kernel, stride, pad of a square convolution."""
    p = net.layer(name).param.convolution_param
    return p.num_output, p.kernel_size[0], p.stride[0] if p.stride else 1, p.pad[0] if p.pad else 0


@pytest.mark.parametrize("kind", ["deploy", "train_val"])
def test_googlenet_in_nine_groups_with_the_papers_geometry(kind):
    result = rebirth(ZOO / f"bvlc_googlenet/{kind}.prototxt")
    assert result.plan.stages == ["conv1", "conv2", "3a", "3b", "4a", "4b-4d", "4e", "5a", "5b"]
    net = result.deploy
    assert conv(net, "conv1/7x7_s2/rebirth") == (64, 7, 4, 3)
    assert conv(net, "conv2/3x3_reduce") == (64, 1, 1, 0)
    assert conv(net, "conv2/3x3/rebirth") == (192, 3, 2, 1)
    for block, (reduce3, out3, reduce5, out5, stride) in BLOCKS.items():
        name = f"inception_{block}/"
        assert conv(net, name + "3x3_reduce/rebirth") == (reduce3, 1, 1, 0)
        assert conv(net, name + "3x3/rebirth") == (out3, 3, stride, 1)
        assert conv(net, name + "5x5_reduce") == (reduce5, 1, 1, 0)
        assert conv(net, name + "5x5/rebirth") == (out5, 5, stride, 2)
        joined = net.layer(name + "output")
        assert joined.bottom == (name + "3x3/rebirth", name + "5x5/rebirth")
    assert {layer.type for layer in net.layers if "pool" in layer.name} == {"Pooling"}
    assert [layer.name for layer in net.layers if layer.type in ("Pooling", "LRN")] == ["pool5/7x7_s1"]
    assert result.before.macs == 1_582_671_872
    assert result.after.macs == 693_829_120
    assert result.before.activation_bytes / result.after.activation_bytes >= 2.3


def test_auxiliary_heads_stay_for_training_and_are_not_deployed():
    result = rebirth(ZOO / "bvlc_googlenet/train_val.prototxt")
    before = {layer.name: layer.text for layer in result.original.layers if layer.name.startswith("loss")}
    after = {layer.name: layer.text for layer in result.net.layers}
    assert len(before) > 20
    assert all(after[name] == text for name, text in before.items())
    heads = [layer.name for layer in result.deploy.layers if layer.name.startswith(("loss1", "loss2"))]
    assert heads == []


@pytest.mark.parametrize("name", ["bvlc_reference_caffenet", "bvlc_alexnet"])
def test_caffenet_and_alexnet_lose_their_lrns_and_offer_their_pools(name):
    path = ZOO / name / "deploy.prototxt"
    result = rebirth(path)
    merged = [(m.id, set(m.absorbs)) for m in result.merges if not m.exact]
    assert merged == [("conv1", {"conv1", "norm1"}), ("conv2", {"conv2", "norm2"})]
    assert [x.name for x in result.deploy.layers if x.type == "Pooling"] == ["pool1", "pool2", "pool5"]
    offered = {m.id: m for m in result.plan.merges if not m.enabled}
    assert set(offered) == {"conv1+pool1", "conv2+pool2", "conv5+pool5"}
    both = rebirth(path, only=["conv1+pool1", "conv2+pool2"])
    assert [x.name for x in both.deploy.layers if x.type in ("Pooling", "LRN")] == ["pool5"]
    assert conv(both.deploy, "conv1/rebirth") == (96, 12, 8, 0)
    assert conv(both.deploy, "conv2/rebirth") == (256, 5, 2, 1)


@pytest.mark.parametrize(
    ("kernel", "conv1", "conv2"),
    [("keep", (7, 4, 3), (3, 2, 1)), ("auto", (8, 4, 2), (4, 2, 1)), ("cover", (12, 4, 4), (6, 2, 2))],
)
def test_kernels_of_googlenets_first_convolutions(kernel, conv1, conv2):
    net = rebirth(ZOO / "bvlc_googlenet/deploy.prototxt", kernel=kernel).deploy
    assert conv(net, "conv1/7x7_s2/rebirth")[1:] == conv1
    assert conv(net, "conv2/3x3/rebirth")[1:] == conv2


def test_caffenets_first_kernel_where_the_whole_field_is_seen():
    net = rebirth(ZOO / "bvlc_reference_caffenet/deploy.prototxt", kernel="cover").deploy
    assert conv(net, "conv1/rebirth") == (96, 19, 8, 0)


def test_the_plan_given_back_is_the_same_rebirth(tmp_path):
    first = rebirth(ZOO / "bvlc_googlenet/deploy.prototxt", kernel="auto", reduce=0.25)
    (tmp_path / "plan.yaml").write_text(plans.dump(first.plan))
    again = rebirth(ZOO / "bvlc_googlenet/deploy.prototxt", plan=tmp_path / "plan.yaml")
    assert again.net.text() == first.net.text()


def realistic(net, seed=0):
    """Random weights with BatchNorm statistics as training leaves them (factor 999.98, branches tamed)."""
    fill_missing(net, seed)
    random = np.random.default_rng(seed)
    for layer in net.layers:
        if layer.type == "BatchNorm":
            n, factor = layer.blobs[0].shape[0], 999.98
            arrays = [
                random.normal(0, 0.3, n) * factor,
                random.uniform(0.5, 2, n) * factor,
                np.array([factor]),
            ]
        elif layer.type == "Scale":
            n = layer.blobs[0].shape[0]
            tame = 0.3 if "branch2c" in layer.name else 1.0
            arrays = [random.uniform(0.7, 1.3, n) * tame, random.normal(0, 0.1, n)]
        else:
            continue
        layer.record = Record(layer.name, layer.type, [Blob(a.astype(np.float32)) for a in arrays])


def test_resnet_50_exact_computes_the_same_in_caffe(caffe, tmp_path):
    original = ZOO / "resnet_50/deploy.prototxt"
    net = Net.load(original)
    realistic(net)
    net.write_weights(tmp_path / "w.caffemodel")
    result = rebirth(original, tmp_path / "w.caffemodel", exact=True)
    assert len(result.merges) == 53 + 3 + 1  # folds, strides and a ReLU behind its pool
    assert all(m.exact for m in result.merges)
    assert not [x for x in result.deploy.layers if x.type in ("BatchNorm", "Scale")]
    result.write(tmp_path / "out")
    engine, blobs = get_engine("caffe"), ["res2a", "res5c", "fc1000", "prob"]
    image = np.random.default_rng(1).normal(0, 60, (1, 3, 224, 224)).astype(np.float32)
    values = []
    for path, weights in (
        (original, tmp_path / "w.caffemodel"),
        (tmp_path / "out/deploy.prototxt", tmp_path / "out/weights.caffemodel"),
    ):
        with engine.open(path, weights) as session:
            values.append(session.forward({"data": image}, blobs))
    for blob in blobs:
        assert np.abs(values[0][blob]).max() > 0.01
        difference = np.abs(values[0][blob] - values[1][blob]).max() / np.abs(values[0][blob]).max()
        assert difference < 1e-4, blob


def test_untouched_layers_keep_their_bytes_and_their_blobs(tmp_path):
    path = ZOO / "bvlc_googlenet/deploy.prototxt"
    net = Net.load(path)
    fill_missing(net)
    net.write_weights(tmp_path / "w.caffemodel")
    result = rebirth(path, tmp_path / "w.caffemodel")
    result.write(tmp_path / "out")
    after = Net.load(tmp_path / "out/deploy.prototxt", tmp_path / "out/weights.caffemodel")
    rewritten = {name for m in result.merges for name in m.layers}
    rest = [layer for layer in result.original.layers if layer.name not in rewritten]
    assert "loss3/classifier" in {layer.name for layer in rest}
    for layer in rest:
        same = after.layer(layer.name)
        assert same.text == layer.text
        for old, new in zip(layer.blobs, same.blobs, strict=True):
            assert np.array_equal(old.array, new.array)
