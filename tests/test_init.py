"""Weights of reborn layers: where the absorbed kernels go, and what is drawn."""

import math
from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.caffemodel import read
from rebirth_caffe.errors import NetError
from rebirth_caffe.init.fill import fill, fill_missing, generator
from rebirth_caffe.init.rescale import pooled
from rebirth_caffe.merge import Merge, Spec
from rebirth_caffe.net import Net
from rebirth_caffe.plan import Plan
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.schema import caffe_pb2
from tests.nets import concat, conv, fc, lrn, norm, pool, relu, with_weights
from tests.nets import net as build
from tests.nets import rebirth as merge

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
    # GoogLeNet's LRN leaves small activations alone; the pool of nine is made up for.
    kernel, bias = (blob * np.float32(pooled(9)) for blob in blobs(original, "conv1/7x7_s2"))
    keep, keep_bias = blobs(rebirth(GOOGLENET, weights).net, "conv1/7x7_s2/rebirth")
    assert np.array_equal(keep, kernel)
    assert np.array_equal(keep_bias, bias)
    auto, _ = blobs(rebirth(GOOGLENET, weights, kernel="auto").net, "conv1/7x7_s2/rebirth")
    assert auto.shape == (64, 3, 8, 8)
    assert np.array_equal(auto[:, :, 1:, 1:], kernel)  # centred at 4i + 2 as conv and pool together
    assert not auto[:, :, 0].any()
    assert not auto[:, :, :, 0].any()


@pytest.mark.parametrize("correlation", [0, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("taps", [1, 4, 9])
def test_what_a_max_pool_is_expected_to_do(taps, correlation):
    """Against a million of them, as correlated as neighbours may be."""
    random = np.random.default_rng(0)
    common = random.normal(0, 1, (100_000, 1))
    x = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * random.normal(0, 1, (100_000, taps))
    p, y = np.maximum(x[:, 0], 0), np.maximum(x.max(axis=1), 0)
    found = (y * p).mean() / (p * p).mean()
    assert pooled(taps) == pytest.approx(found, abs=0.02 if correlation == 0 else 0.07)


def test_only_what_the_merge_drops_behind_a_relu_is_made_up_for():
    """Not a pool of linear outputs, whose mean is not raised so; of LRN what it does to small activations."""
    tail = [lrn("n", "p", "k: 2 beta: 0.75"), fc("fc", "n")]
    for middle, factor in (
        ([relu("r", "a"), pool("p", "a", 2, 2)], pooled(4) * 2**-0.75),
        ([pool("p", "a", 2, 2), relu("r", "p")], pooled(4) * 2**-0.75),
        ([relu("r", "a"), pool("p", "a", 2, 2, "pool: AVE")], 2**-0.75),
        ([pool("p", "a", 2, 2)], 1),
    ):
        one = with_weights(build(conv("a", "data", 6, 3), *middle, *tail))
        reborn = merge(one)[1]
        for new, old in zip(blobs(reborn, "a/rebirth"), blobs(one, "a"), strict=True):
            assert np.allclose(new, np.float32(factor) * old, atol=1e-7)


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


def test_untouched_layers_keep_their_bytes_through_the_files(weights, tmp_path):
    """From caffemodel to caffemodel: the whole record, whatever its layer's neighbours became."""
    result = rebirth(GOOGLENET, weights)
    result.write(tmp_path / "out")
    before, after = read(weights).by_name(), read(tmp_path / "out" / "weights.caffemodel").by_name()
    merged = {name for m in result.merges for name in m.layers}
    made = {spec.name for m in result.merges for spec in m.becomes if not spec.kept}
    kept = [name for name, record in before.items() if record.blobs and name not in merged]
    assert {"conv2/3x3_reduce", "loss3/classifier"} <= set(kept)
    for name in kept:
        assert after[name].raw == before[name].raw
    for name in (f"inception_{block}/5x5_reduce" for block in ("3a", "4e", "5b")):  # kept in a merge
        assert [b.wire() for b in after[name].blobs] == [b.wire() for b in before[name].blobs]
    assert {name for name, record in after.items() if record.blobs and name not in before} == made


def test_the_same_seed_gives_the_same_bytes(weights, tmp_path):
    files: list[bytes] = []
    for seed in (0, 0, 1):
        path = tmp_path / str(len(files))
        rebirth(GOOGLENET, weights, init="xavier", seed=seed).net.write_weights(path)
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]


def block(*branches):
    """A trunk of 8 channels, these branches of it and a classifier; the last layer of each gives its name."""
    tops = " ".join(Net.parse(branch[-1]).layers[0].top[0] for branch in branches)
    body = [conv("trunk", "data", 8), relu("r", "trunk"), *(x for branch in branches for x in branch)]
    return with_weights(build(*body, concat("join", tops), fc("fc", "join")))


def joined(one):
    """The block merged, were it only an offer."""
    (offer,) = (m for m in plans.propose(one).plan.merges if m.kind == "branches")
    return merge(one, only=[offer.id])[1]


def test_a_pool_without_a_projection_passes_its_input_on():
    """Its rows are the identity, seen through what reduces the absorber's input."""
    passed = [pool("p", "trunk", 3, 1, "pad: 1")]
    direct = block([conv("b", "trunk", 6, 3, "pad: 1")], passed)
    weight, bias = blobs(joined(direct), "b/rebirth")
    assert np.array_equal(weight[:6], blobs(direct, "b")[0])
    assert np.array_equal(weight[6:, :, 1, 1], np.eye(8))
    assert np.count_nonzero(weight[6:]) == 8
    assert not bias[6:].any()
    before = block(passed, [conv("b", "trunk", 6, 3, "pad: 1")])
    weight, _ = blobs(joined(before), "b/rebirth")
    assert np.array_equal(weight[:8, :, 1, 1], np.eye(8))
    assert np.array_equal(weight[8:], blobs(before, "b")[0])
    reduced = block([conv("a", "trunk", 12), conv("b", "a", 6, 3, "pad: 1")], passed)
    weight, bias = blobs(joined(reduced), "b/rebirth")
    reducer, shift = blobs(reduced, "a")
    assert np.allclose(weight[6:, :, 1, 1] @ reducer[:, :, 0, 0], np.eye(8), atol=1e-4)
    assert np.allclose(bias[6:], -weight[6:, :, 1, 1] @ shift, atol=1e-5)


def test_a_longer_absorbed_branch_is_one_matrix():
    """1x1 -> 1x1 beside 3x3: the product, and the biases through it."""
    one = block([conv("a1", "trunk", 5), conv("a2", "a1", 4)], [conv("b", "trunk", 6, 3, "pad: 1")])
    weight, bias = blobs(joined(one), "b/rebirth")
    (w1, b1), (w2, b2) = blobs(one, "a1"), blobs(one, "a2")
    assert np.allclose(weight[:4, :, 1, 1], w2[:, :, 0, 0] @ w1[:, :, 0, 0], atol=1e-6)
    assert np.allclose(bias[:4], w2[:, :, 0, 0] @ b1 + b2, atol=1e-6)


def test_what_cannot_be_inherited_is_drawn_in_its_place():
    """Through groups nothing is inherited: the rows of the absorbed branch come from the filler."""
    grouped = [conv("a", "trunk", 16, 1, "group: 2"), conv("b", "a", 6, 3, "pad: 1"), relu("b_relu", "b")]
    one = block([conv("c", "trunk", 4), relu("c_relu", "c")], grouped)
    weight, bias = blobs(joined(one), "b/rebirth")
    assert np.array_equal(weight[4:], blobs(one, "b")[0])
    limit = math.sqrt(3 / (16 * 9))
    assert 0.8 * limit < np.abs(weight[:4]).max() <= limit
    assert not bias[:4].any()


def test_layers_without_weights_stay_without():
    one = block([conv("c", "trunk", 4)], [conv("a", "trunk", 16), conv("b", "a", 6, 3, "pad: 1")])
    one.layer("b").record = None
    reborn = joined(one)
    assert not reborn.layer("b/rebirth").blobs
    assert reborn.layer("a/rebirth").blobs
    one = block([conv("c", "trunk", 4)], [conv("a", "trunk", 16), conv("b", "a", 6, 3, "pad: 1")])
    one.layer("c").record = None  # then its rows are drawn
    weight, _ = blobs(joined(one), "b/rebirth")
    assert weight[:4].any()


def test_no_bias_stays_no_bias():
    body = [conv("c", "data", 4, 3, "bias_term: false"), lrn("n", "c"), fc("fc", "n")]
    for init in ("inherit", "xavier"):
        reborn = merge(with_weights(build(*body)), init)[1].layer("c/rebirth")
        assert len(reborn.blobs) == 1
        assert not reborn.param.convolution_param.bias_term


@pytest.mark.parametrize("more", ["", "transpose: true"])
def test_an_inner_product_keeps_its_matrix(more):
    body = [fc("c", "data", 6, more), relu("r", "c"), norm("n", "c"), fc("fc", "c")]
    one = with_weights(build(*body))
    weight, bias = blobs(merge(one)[1], "c/rebirth")
    assert np.array_equal(weight, blobs(one, "c")[0])
    assert np.array_equal(bias, blobs(one, "c")[1])
    drawn, _ = blobs(merge(one, "xavier")[1], "c/rebirth")
    assert drawn.shape == weight.shape
    assert np.abs(drawn).max() <= math.sqrt(3 / (3 * 16 * 16))


def test_a_wider_layer_by_hand_keeps_what_it_had():
    one = with_weights(build(conv("c", "data", 4, 3), lrn("n", "c"), conv("d", "n", 4), fc("fc", "d")))
    (m,) = plans.propose(one).plan.merges
    wide = Spec("c/rebirth", "c", ("@in",), ("c/rebirth",), 6, rows=m.becomes[0].rows)
    back = Spec("d/rebirth", "d", ("c/rebirth",), ("@out",), 4)
    plan = Plan("x", (Merge("m", "streamline", "m", ("c", "n", "d"), (wide, back)),))
    reborn = plans.apply(one, plan)
    assert np.array_equal(blobs(reborn, "c/rebirth")[0][:4], blobs(one, "c")[0])
    assert blobs(reborn, "c/rebirth")[0][4:].any()
    assert blobs(reborn, "d/rebirth")[0].shape == (4, 6, 1, 1)


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
