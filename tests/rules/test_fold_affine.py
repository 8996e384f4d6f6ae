"""conv -> BatchNorm -> Scale => conv: as real Caffe computes it, and what is refused."""

from collections import Counter

import numpy as np
import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.errors import WeightsError
from rebirth_caffe.net import Net
from tests.nets import (
    ZOO,
    compute,
    conv,
    difference,
    fc,
    layer,
    layers,
    merges,
    net,
    norm,
    pool,
    reasons,
    rebirth,
    relu,
    scale,
    with_weights,
)

BIAS = "scale_param { bias_term: true }"
NETS = {
    "batch norm and scale": [conv("c", "data", 6, 3), norm("n", "c"), scale("s", "c")],
    "no bias": [conv("c", "data", 6, 3, "bias_term: false"), norm("n", "c"), scale("s", "c")],
    "not in place": [conv("c", "data", 6, 3), norm("n", "c", "n"), scale("s", "n", "s")],
    "batch norm alone": [conv("c", "data", 6, 3), norm("n", "c")],
    "scale alone": [conv("c", "data", 6, 3), scale("s", "c")],
    "scale without bias": [conv("c", "data", 6, 3), norm("n", "c"), scale("s", "c", more="")],
    "scale first": [conv("c", "data", 6, 3), scale("s", "c"), norm("n", "c")],
    "twice": [conv("c", "data", 6, 3), norm("n", "c"), scale("s", "c"), norm("m", "c"), scale("t", "c")],
    "another eps": [conv("c", "data", 6, 3), norm("n", "c", more="batch_norm_param { eps: 0.1 }")],
    "stored statistics": [
        conv("c", "data", 6, 3),
        norm("n", "c", more="batch_norm_param { use_global_stats: true }"),
        scale("s", "c"),
    ],
    "groups": [conv("c", "data", 6, 3, "group: 3 stride: 2 pad: 1"), norm("n", "c"), scale("s", "c")],
    "inner product": [fc("c", "data", 6), norm("n", "c"), scale("s", "c")],
    "transposed": [fc("c", "data", 6, "transpose: true bias_term: false"), norm("n", "c"), scale("s", "c")],
}


def build(*body: str) -> Net:
    """The layers, ReLU and a classifier that reads the last one's top."""
    last = Net.parse(body[-1]).layers[0].top[0]
    return net(*body, relu("r", last, "r"), fc("fc", "r"))


@pytest.mark.parametrize("name", NETS)
def test_folds_and_keeps_the_rest(name):
    original = with_weights(build(*NETS[name]))
    proposal, reborn = rebirth(original, exact=True)
    gone = [x.name for x in original.layers if x.type in ("BatchNorm", "Scale")]
    assert [(m.id, m.kind, m.exact, m.absorbs) for m in merges(proposal).values()] == [
        ("fold:c", "fold", True, ("c", *gone))
    ]
    assert layers(reborn) == [
        {"c": "c/folded"}.get(name, name) for name in layers(original) if name not in gone
    ]
    folded = reborn.layer("c/folded")
    assert folded.top == original.layer(gone[-1]).top
    assert [b.shape for b in folded.blobs] == [original.layer("c").blobs[0].shape, (6,)]
    assert not proposal.refused


def test_as_real_caffe_computes_it(in_caffe, tmp_path):
    pairs = []
    for body in NETS.values():
        original = with_weights(build(*body))
        pairs += [original, rebirth(original, exact=True)[1]]
    found = compute(in_caffe, tmp_path, pairs)
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert difference(before["fc"], after["fc"]) < 1e-5
        assert difference(before["r"], after["r"]) < 1e-5


@pytest.mark.parametrize("count", [0, 1, 999.98, -3])
def test_the_statistics_factor(count, in_caffe, tmp_path):
    """Blob 3 divides mean and variance; 0, a BatchNorm that has seen nothing, makes both 0."""
    original = with_weights(build(*NETS["another eps"]))
    statistics = [b.array / 999.98 * (count or 1) for b in original.layer("n").blobs[:2]]
    arrays = [*statistics, np.full(1, count, "f4")]
    original.layer("n").record = Record("n", "BatchNorm", [Blob(a) for a in arrays])
    found = compute(in_caffe, tmp_path, [original, rebirth(original, exact=True)[1]])
    assert difference(found[0]["c"], found[1]["c"]) < 1e-5
    assert difference(found[0]["c"], 0 * found[0]["c"]) == 1  # there is something to compare


def test_legacy_blobs_fold_too(in_caffe, tmp_path):
    """Old files store an InnerProduct's weight as 1x1xNxK and every vector as 1x1x1xN."""
    original = with_weights(build(*NETS["inner product"]))
    modern = rebirth(original, exact=True)[1].layer("c/folded").blobs
    for name in ("c", "n", "s"):
        old = original.layer(name)
        shapes = [(1,) * (4 - len(b.shape)) + b.shape for b in old.blobs]
        blobs = [Blob(b.array.reshape(s)) for b, s in zip(old.blobs, shapes, strict=True)]
        old.record = Record(name, old.type, blobs)
    legacy = rebirth(original, exact=True)[1].layer("c/folded").blobs
    for a, b in zip(legacy, modern, strict=True):
        assert np.array_equal(a.array.reshape(-1), b.array.reshape(-1))


def test_resnet_50_keeps_its_function_and_no_batch_norm(in_caffe, tmp_path):
    original = with_weights(Net.load(ZOO / "resnet_50" / "deploy.prototxt"), seed=3)
    proposal, reborn = rebirth(original, exact=True)
    kinds = Counter(m.kind for m in proposal.plan.active)
    assert kinds == {"fold": 53, "stride": 3, "reorder": 1}
    assert not {x.type for x in reborn.layers} & {"BatchNorm", "Scale"}
    assert len(original.layers) - len(reborn.layers) == 2 * 53 - 3
    found = compute(in_caffe, tmp_path, [original, reborn])
    for blob in ("res2a", "res3c", "res4e", "res5c", "fc1000"):
        assert 0.05 < found[0][blob].std() < 50  # neither died nor exploded
        assert difference(found[0][blob], found[1][blob]) < 1e-5


POWER = "power_param { scale: 0.017 shift: -1.5 }"
IN_FRONT = {
    "a scaled image": [layer("p", "Power", "data", "p", POWER), conv("c", "p", 6, 3)],
    "statistics": [norm("n", "data", "n"), scale("s", "n"), conv("c", "n", 6, 3, "stride: 2")],
    "a bias": [layer("b", "Bias", "data"), conv("c", "b", 6, 3, "bias_term: false")],
    "groups": [scale("s", "data", "s"), conv("c", "s", 6, 3, "group: 3")],
    "a factor in front of padding": [
        scale("s", "data", "s", "scale_param { bias_term: false }"),
        layer("p", "Power", "s", "p", "power_param { scale: 2 }"),
        conv("c", "p", 6, 3, "pad: 1"),
    ],
    "inner product": [norm("n", "data", "n"), fc("c", "n", 6)],
    "transposed": [norm("n", "data", "n"), scale("s", "n"), fc("c", "n", 6, "transpose: true")],
    "on both sides": [scale("s", "data", "s"), conv("c", "s", 6, 3), norm("n", "c"), layer("b", "Bias", "c")],
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_what_is_in_front_goes_into_the_convolution_behind_it(name, in_caffe, tmp_path):
    original = with_weights(build(*IN_FRONT[name]))
    proposal, reborn = rebirth(original, exact=True)
    (merge,) = merges(proposal).values()
    assert (merge.id, merge.absorbs) == ("fold:c", tuple(layers(original)[:-2]))
    assert layers(reborn) == ["c/folded", "r", "fc"]
    found = compute(in_caffe, tmp_path, [original, reborn])
    assert difference(found[0]["fc"], found[1]["fc"]) < 1e-5


def test_between_two_convolutions_it_goes_into_the_first():
    body = [conv("a", "data", 4, 3, "pad: 1"), norm("n", "a"), conv("c", "a", 60, 3, "pad: 1")]
    proposal, _ = rebirth(with_weights(build(*body)), exact=True)
    assert merges(proposal)["fold:a"].absorbs == ("a", "n")
    body.insert(1, pool("p", "a", 2, 2))
    proposal, _ = rebirth(with_weights(build(*body[:2], norm("n", "p"), conv("c", "p", 60, 3))), exact=True)
    assert merges(proposal)["fold:c"].absorbs == ("n", "c")


C = conv("c", "data", 6, 3)
IN_TEST = "include { phase: TEST }"
SHARED = 'param { name: "gamma" } scale_param { bias_term: false }'
REFUSED = {
    "a second reader": (
        [C, norm("n", "c", "n"), pool("p", "c")],
        ("c", "n"),
        "blob 'c' has a second reader, 'p'",
    ),
    "a second reader further up": (
        [C, norm("n", "c", "n"), fc("other", "n"), scale("s", "n", "s")],
        ("c", "s"),
        "blob 'n' has a second reader, 'other'",
    ),
    "a reader in training": (
        [C, layer("loss", "EuclideanLoss", "c c", None, "include { phase: TRAIN }"), norm("n", "c", "n")],
        ("c", "n"),
        "blob 'c' has a second reader, 'loss'",
    ),
    "another in each phase": (
        [
            C,
            norm("n", "c", "n", "batch_norm_param { use_global_stats: true } include { phase: TEST }"),
            norm("m", "c", "n", "batch_norm_param { use_global_stats: false } include { phase: TRAIN }"),
        ],
        ("c", "n"),
        "blob 'c' has a second reader, 'm'",
    ),
    "in one phase only": (
        [C, norm("n", "c", "n", IN_TEST), fc("probe", "n", extra=IN_TEST), conv("d", "data", 4)],
        ("c", "n"),
        "'c' and 'n' are not in the same phases",
    ),
    "two outputs": (
        [layer("c", "Convolution", "data data", "x y", "convolution_param { num_output: 4 kernel_size: 3 }"),
         norm("n", "x", "n"), relu("q", "y")],
        ("c", "n"),
        "'c' has several bottoms or tops",
    ),
    "a factor that is computed": (
        [C, pool("p", "c", 3, 1, "pad: 1"), layer("s", "Scale", "c p")],
        ("c", "s"),
        "blob 'c' has a second reader, 'p'",
    ),
    "its own factor": ([C, layer("s", "Scale", "c c")], ("c", "s"), "'s' reads 'c' twice"),
    "a factor from elsewhere": (
        [conv("d", "data", 6, 3), C, layer("s", "Scale", "c d")],
        ("c", "s"),
        "'s' has several bottoms or tops, or a name that is not its own",
    ),
    "shared blobs": (
        [C, scale("s", "c", "s", SHARED), conv("d", "s", 6), scale("t", "d", "t", SHARED)],
        ("c", "s"),
        "'s' shares its blobs under the name 'gamma'",
    ),
    "batch statistics": (
        [C, norm("n", "c", "n", "batch_norm_param { use_global_stats: false }")],
        ("c", "n"),
        "'n' normalises by the batch it sees (use_global_stats: false)",
    ),
    "a factor for each row": (
        [C, scale("s", "c", "s", "scale_param { axis: 2 }")],
        ("c", "s"),
        "'s' does not scale by channel",
    ),
    "a factor for each value": (
        [C, scale("s", "c", "s", "scale_param { num_axes: -1 }")],
        ("c", "s"),
        "'s' does not scale by channel",
    ),
    "shared weights": (
        [conv("c", "data", 6, 3, extra='param { name: "w" }'), norm("n", "c"),
         conv("d", "data", 6, 3, extra='param { name: "w" }')],
        ("c", "n"),
        "'c' shares its weights under the name 'w'",
    ),
    "no name": ([C.replace('name: "c"', 'name: ""'), norm("n", "c")], ("", "n"), "it has no name"),
    "one name twice": (
        [C, norm("n", "c"), conv("c", "data", 6, 3).replace('top: "c"', 'top: "d"')],
        ("c", "n"),
        "2 layers are called 'c'",
    ),
    "a shift in front of padding": (
        [scale("s", "data", "s"), conv("c", "s", 6, 3, "pad: 1")],
        ("c", "s"),
        "'c' pads with zeros, which 's' would have shifted",
    ),
    "a second reader in front": (
        [scale("s", "data", "s"), conv("d", "s", 6), conv("c", "s", 6, 3)],
        ("c", "s"),
        "blob 's' has a second reader, 'd'",
    ),
    "another axis": (
        [fc("c", "data", 6, "axis: 2"), norm("n", "c")],
        ("c", "n"),
        "'c' has its outputs on another axis than the channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    body, group, reason = REFUSED[name]
    original = build(*body)
    proposal = plans.propose(original, exact=True)
    reborn = plans.apply(original, proposal.plan)
    assert reasons(proposal)[group] == reason
    assert not any(group[-1] in m.absorbs for m in proposal.plan.merges)
    if not proposal.plan.merges:
        assert reborn.text() == original.text()


def test_what_is_below_a_refused_layer_is_folded():
    original = with_weights(build(*REFUSED["a second reader further up"][0]))
    proposal, reborn = rebirth(original, exact=True)
    assert merges(proposal)["fold:c"].absorbs == ("c", "n")
    assert "s" in layers(reborn)


def test_the_last_classifier_is_not_touched():
    proposal, _ = rebirth(with_weights(net(conv("c", "data", 6, 3), norm("n", "c"))), exact=True)
    assert reasons(proposal) == {("c", "n"): "'c' is the last classifier"}
    assert not proposal.plan.merges


def test_a_layer_of_which_only_the_size_is_read_is_no_classifier():
    """SSD makes its boxes by the size of a feature map."""
    below = [conv("c", "data", 6, 3), norm("n", "c"), relu("r", "c")]
    original = with_weights(net(*below, conv("head", "c", 4, 3), layer("boxes", "PriorBox", "c data")))
    proposal, _ = rebirth(original, exact=True)
    assert list(merges(proposal)) == ["fold:c"]


def test_every_blob_must_be_there():
    original = with_weights(build(*NETS["batch norm and scale"]))
    original.layer("s").record = None
    with pytest.raises(WeightsError, match="layer 's' has no weights in the file, so 'c' cannot be folded"):
        rebirth(original, exact=True)
    rebirth(original, exact=True, skip=["fold:c"])


def test_without_weights_the_structure_folds():
    _, reborn = rebirth(build(*NETS["no bias"]), exact=True)
    assert layers(reborn) == ["c/folded", "r", "fc"]
    assert "bias_term" not in reborn.layer("c/folded").text
    assert not any(x.blobs for x in reborn.layers)


def test_fields_and_comments_of_the_convolution_stay():
    commented = "# the first one\n" + conv(
        "c", "data", 4, 3, "engine: NEON bias_term: false", extra="param { lr_mult: 3 dialect: 7 }"
    )
    _, reborn = rebirth(build(commented, norm("n", "c")))
    folded = reborn.layer("c/folded")
    assert folded.comments == "# the first one\n"
    assert folded.param.param[0].lr_mult == 3
    assert folded.param.convolution_param.bias_term
    assert {f.name for f in folded.unknown} == {"dialect", "engine"}


@pytest.mark.parametrize(
    ("layers", "strange"),
    [
        ([conv("c", "data", 4, 3, "fuse_type: FUSED_CONV_RELU"), norm("n", "c")], "'c' has a field"),
        ([conv("c", "data", 4, 3), layer("n", "BatchNorm", "c", "c", "momentum: 0.9")], "'n' has a field"),
    ],
)
def test_a_field_of_a_fork_stops_it(layers, strange):
    proposal, _ = rebirth(build(*layers))
    assert not proposal.plan.merges
    assert reasons(proposal)["c", "n"].startswith(f"{strange} stock Caffe does not know, ")
