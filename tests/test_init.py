"""Weights of reborn layers: where the absorbed kernels go, and what is drawn."""

import math
from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe.errors import NetError
from rebirth_caffe.init.fill import fill, fill_missing, generator
from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.schema import caffe_pb2

ZOO = Path(__file__).resolve().parent.parent / "prototxts"
GOOGLENET = ZOO / "bvlc_googlenet/deploy.prototxt"
Filler = caffe_pb2.FillerParameter


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("init") / "googlenet.caffemodel"
    net = Net.load(GOOGLENET)
    fill_missing(net, 3)
    net.write_weights(path)
    return path


def blobs(net, name):
    """Weight and bias of a layer."""
    return [blob.array for blob in net.layer(name).blobs]


def test_the_first_kernel_is_the_originals_and_sits_where_its_window_looks(weights):
    original = Net.load(GOOGLENET, weights)
    kernel, bias = blobs(original, "conv1/7x7_s2")
    keep, keep_bias = blobs(rebirth(GOOGLENET, weights).net, "conv1/7x7_s2/rebirth")
    assert np.array_equal(keep, kernel)
    assert np.array_equal(keep_bias, bias)
    auto, _ = blobs(rebirth(GOOGLENET, weights, kernel="auto").net, "conv1/7x7_s2/rebirth")
    assert auto.shape == (64, 3, 8, 8)
    assert np.array_equal(auto[:, :, 1:, 1:], kernel)  # centred at 4i + 2 as conv and pool together
    assert not auto[:, :, 0].any()
    assert not auto[:, :, :, 0].any()


def test_a_halved_reducer_keeps_its_strongest_channels_and_its_reader_their_columns(weights):
    original, net = Net.load(GOOGLENET, weights), rebirth(GOOGLENET, weights).net
    old, _ = blobs(original, "inception_3a/3x3_reduce")
    new, _ = blobs(net, "inception_3a/3x3_reduce/rebirth")
    chosen = [int(np.flatnonzero((old == row).all(axis=(1, 2, 3)))[0]) for row in new]
    assert len(chosen) == 48
    assert chosen == sorted(set(chosen))
    old3, bias3 = blobs(original, "inception_3a/3x3")
    new3, new_bias3 = blobs(net, "inception_3a/3x3/rebirth")
    assert new3.shape == (64 + 128, 48, 3, 3)
    assert np.array_equal(new3[64:], old3[:, chosen])
    assert np.array_equal(new_bias3[64:], bias3)
    strength = np.linalg.norm(old.reshape(96, -1), axis=1) * np.linalg.norm(
        old3.transpose(1, 0, 2, 3).reshape(96, -1), axis=1
    )
    assert min(strength[chosen]) >= max(np.delete(strength, chosen))


def test_an_absorbed_1x1_is_seen_through_the_reducer_at_the_centre_tap(weights):
    original, net = Net.load(GOOGLENET, weights), rebirth(GOOGLENET, weights).net
    reducer, shift = blobs(net, "inception_3a/3x3_reduce/rebirth")
    reducer = reducer[:, :, 0, 0].astype(np.float64)
    branch, bias = blobs(original, "inception_3a/1x1")
    merged, merged_bias = blobs(net, "inception_3a/3x3/rebirth")
    rows = merged[:64]
    assert not np.delete(rows.reshape(64, 48, 9), 4, axis=2).any()
    expected = branch[:, :, 0, 0].astype(np.float64) @ np.linalg.pinv(reducer)
    assert np.abs(rows[:, :, 1, 1] - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.allclose(
        merged_bias[:64], bias - expected @ shift, atol=1e-4
    )  # what the reducer's bias adds goes


def test_xavier_draws_what_the_paper_starts_from(weights):
    net = rebirth(GOOGLENET, weights, init="xavier").net
    weight, bias = blobs(net, "inception_4e/3x3/rebirth")
    limit = math.sqrt(3 / (80 * 9))
    assert np.abs(weight).max() <= limit
    assert np.abs(weight).max() > 0.99 * limit
    assert abs(weight.mean()) < 0.01 * limit
    assert (bias == np.float32(0.2)).all()  # GoogLeNet's own bias filler
    again = rebirth(GOOGLENET, weights, init="xavier").net
    other = rebirth(GOOGLENET, weights, init="xavier", seed=1).net
    assert np.array_equal(blobs(again, "inception_4e/3x3/rebirth")[0], weight)
    assert not np.array_equal(blobs(other, "inception_4e/3x3/rebirth")[0], weight)


def test_without_weights_there_are_none():
    assert not any(layer.blobs for layer in rebirth(GOOGLENET).net.layers)


@pytest.mark.parametrize(
    ("filler", "check"),
    [
        (Filler(type="constant", value=3), lambda a: (a == 3).all()),
        (Filler(type="uniform", min=-2, max=4), lambda a: -2 <= a.min() < -1.9 and 3.9 < a.max() <= 4),
        (
            Filler(type="gaussian", mean=5, std=2),
            lambda a: abs(a.mean() - 5) < 0.1 and abs(a.std() - 2) < 0.1,
        ),
        (Filler(type="xavier"), lambda a: 0.99 < np.abs(a).max() / math.sqrt(3 / 90) <= 1),
        (Filler(type="xavier", variance_norm=Filler.FAN_OUT), lambda a: np.abs(a).max() > math.sqrt(3 / 410)),
        (Filler(type="msra"), lambda a: abs(a.std() - math.sqrt(2 / 90)) < 0.005),
        (Filler(type="positive_unitball"), lambda a: np.allclose(a.reshape(40, -1).sum(axis=1), 1)),
    ],
)
def test_fillers(filler, check):
    values = fill(filler, (40, 10, 3, 3), generator(0, "x"))
    assert values.dtype == np.float32
    assert values.shape == (40, 10, 3, 3)
    assert check(values)


def test_a_bilinear_filler_interpolates():
    kernel = fill(Filler(type="bilinear"), (1, 1, 4, 4), generator(0, "x"))[0, 0]
    assert np.allclose(kernel[0], [0.0625, 0.1875, 0.1875, 0.0625])
    assert np.allclose(kernel, kernel.T)


def test_an_unknown_filler_is_refused():
    with pytest.raises(NetError, match="no filler is called 'magic'"):
        fill(Filler(type="magic"), (2, 2), generator(0, "x"))
