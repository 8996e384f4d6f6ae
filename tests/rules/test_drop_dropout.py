"""x -> Dropout -> y => x -> y, in nets that are never trained again."""

import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe import rebirth as api
from rebirth_caffe.derive import deploy
from rebirth_caffe.net import Net
from tests.nets import (
    ZOO,
    compute,
    conv,
    difference,
    dropout,
    fc,
    layer,
    layers,
    merges,
    net,
    reasons,
    rebirth,
    relu,
    with_weights,
)

C = conv("c", "data", 4, 3)
NETS = {
    "in place": ([C, dropout("d", "c"), relu("r", "c"), fc("fc", "c")], ["r", "fc"]),
    "not in place": ([C, dropout("d", "c", "d"), relu("r", "d", "r"), fc("fc", "r")], ["r", "fc"]),
    "read by an in-place layer": ([C, dropout("d", "c", "d"), relu("r", "d"), fc("fc", "d")], ["r", "fc"]),
    "several readers": (
        [C, dropout("d", "c", "d"), fc("a", "d"), fc("b", "d"), layer("fc", "Eltwise", "a b")],
        ["a", "b", "fc"],
    ),
    "its bottom has other readers": (
        [C, dropout("d", "c", "d"), fc("a", "d"), fc("b", "c"), layer("fc", "Eltwise", "a b")],
        ["a", "b", "fc"],
    ),
    "the net's input": ([dropout("d", "data", "d"), conv("c", "d", 4, 3), fc("fc", "c")], ["c", "fc"]),
    "an output, in place": ([C, fc("fc", "c"), dropout("d", "fc")], ["c", "fc"]),
}


@pytest.mark.parametrize("name", NETS)
def test_drops(name):
    body, kept = NETS[name]
    original = with_weights(net(*body))
    proposal, reborn = rebirth(original, exact=True)
    assert [(m.id, m.kind, m.exact, m.absorbs, m.becomes, m.stage) for m in merges(proposal).values()] == [
        ("drop:d", "drop", True, ("d",), (), "")
    ]
    assert layers(reborn) == [x for x in layers(original) if x != "d"]
    assert set(kept) < set(layers(original))
    assert not proposal.refused
    assert [v.name for v in reborn.graph.view(1).outputs] == ["fc"]


def test_two_in_a_row():
    body = [C, dropout("d", "c", "d"), dropout("e", "d", "e"), relu("r", "e"), fc("fc", "e")]
    _, reborn = rebirth(with_weights(net(*body)), exact=True)
    assert layers(reborn) == ["c", "r", "fc"]
    assert reborn.layer("r").bottom == ("c",)


def test_as_real_caffe_computes_it(in_caffe, tmp_path):
    pairs = []
    for body, _ in NETS.values():
        original = with_weights(net(*body))
        pairs += [original, rebirth(original, exact=True)[1]]
    found = compute(in_caffe, tmp_path, pairs)
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert difference(before["fc"], after["fc"]) == 0


REFUSED = {
    "an output": (
        [C, fc("fc", "c"), dropout("d", "fc", "d")],
        "'d' is an output of the net, its name must stay",
    ),
    "one name twice": (
        [C, dropout("d", "c"), relu("d", "c", "r"), fc("fc", "r")],
        "'d' has several bottoms or tops, or a name that is not its own",
    ),
    "of a fork that drops in TEST, too": (
        [C, layer("d", "Dropout", "c", "c", "dropout_param { sample_weights_test: true }"), fc("fc", "c")],
        "'d' has a field stock Caffe does not know, sample_weights_test",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    body, reason = REFUSED[name]
    proposal = plans.propose(net(*body), exact=True)
    assert reasons(proposal) == {("d",): reason}
    assert not proposal.plan.merges


@pytest.mark.parametrize("name", ["bvlc_reference_caffenet", "bvlc_googlenet"])
def test_a_train_val_keeps_it_and_its_deploy_net_does_not(name):
    result = api.rebirth(ZOO / name / "train_val.prototxt", exact=True)
    kept = [x.name for x in Net.load(ZOO / name / "train_val.prototxt").layers if x.type == "Dropout"]
    assert kept
    assert [x.name for x in result.net.layers if x.type == "Dropout"] == kept
    assert not [merge.id for merge in result.merges if merge.kind == "drop"]
    assert "Dropout" not in [x.type for x in result.deploy.layers]
    assert "Dropout" in [x.type for x in deploy(result.net).layers]


def test_thousands_in_a_row_are_removed_together():
    """More than Python calls functions in each other."""
    body = [dropout(f"d{i}", f"d{i - 1}" if i else "c", f"d{i}") for i in range(1500)]
    _, reborn = rebirth(net(conv("c", "data", 4), *body, fc("fc", "d1499")))
    assert layers(reborn) == ["c", "fc"]
    assert reborn.layer("fc").bottom == ("c",)
