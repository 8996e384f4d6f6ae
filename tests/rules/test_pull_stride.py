"""The stride of 1x1 convolutions goes up to where it saves work."""

import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.net import Net
from tests.nets import (
    ZOO,
    blobs_of,
    concat,
    conv,
    fc,
    layer,
    layers,
    merges,
    net,
    pool,
    reasons,
    rebirth,
    relu,
    shape,
    with_weights,
)

STEM = [conv("x", "data", 6, 3, "pad: 1"), relu("xr", "x")]
INNER = [
    conv("a", "x", 4, 3, "pad: 1"),
    relu("ar", "a"),
    conv("b", "a", 6, 1),
    layer("sum", "Eltwise", "x b"),
    relu("sumr", "sum"),
]
DOWN = [conv("d", "sum", 4, 1, "stride: 2"), conv("e", "sum", 5, 1, "stride: 2"), concat("j", "d e")]


def build(*body: str):
    return with_weights(net(*body, relu("end", "j", "end"), fc("fc", "end")))


def stride(proposal):
    return [m for m in merges(proposal).values() if m.kind == "stride"]


def test_up_a_residual_block():
    original = build(*STEM, *INNER, *DOWN)
    proposal, reborn = rebirth(original)
    (merge,) = stride(proposal)
    assert (merge.id, merge.exact, merge.stage) == ("stride:d", True, "")
    assert merge.absorbs == ("a", "d", "e")
    assert {spec.name for spec in merge.becomes if spec.kept} == {"ar", "b", "sum", "sumr"}
    assert shape(reborn, "a/strided") == "4 x 3x3/2 pad 1"
    assert shape(reborn, "x/strided") == "6 x 1x1/2 pad 0"
    assert shape(reborn, "d/joined") == "9 x 1x1/1 pad 0"  # now that they can be, they are siblings
    assert reborn.layer("sum").bottom == ("x/strided", "b/strided")
    assert (blobs_of(reborn, "a/strided")[0] == blobs_of(original, "a")[0]).all()
    assert (blobs_of(reborn, "x/strided")[0] == 1).all()
    assert reborn.layer("x/strided").param.param[0].lr_mult == 0
    assert not any(v.name == "sum" for v in reborn.graph.view(1).values)


def test_resnet_50_saves_a_tenth():
    net = Net.load(ZOO / "resnet_50/deploy.prototxt")
    proposal = plans.propose(net)
    assert [m.id for m in stride(proposal)] == [
        "stride:res3a_branch1",
        "stride:res4a_branch1",
        "stride:res5a_branch1",
    ]
    plan = plans.select(net, proposal.plan, only=["stride:res4a_branch1"])
    assert {m.kind for m in plan.active} == {"fold", "stride"}
    assert len(plans.apply(net, plan).layers) < len(net.layers)


PROBE = fc("probe", "sum")
D = conv("d", "sum", 4, 1, "stride: 2")
NOT = {
    "another reader": [*STEM, *INNER, D, PROBE, concat("j", "d")],
    "another stride": [*STEM, *INNER, D, conv("e", "sum", 4, 1, "stride: 3"), fc("f", "e"), concat("j", "d")],
    "a larger kernel": [*STEM, *INNER, conv("d", "sum", 4, 3, "stride: 2"), concat("j", "d")],
    "a pad": [*STEM, *INNER, conv("d", "sum", 4, 1, "stride: 2 pad: 1"), concat("j", "d")],
    "nothing to gain": [*STEM, layer("sum", "Eltwise", "x x"), D, concat("j", "d")],
    "an LRN between": [*STEM, layer("sum", "LRN", "x"), D, concat("j", "d")],
    "a pool between": [*STEM, pool("sum", "x", 3, 1), D, concat("j", "d")],
}


@pytest.mark.parametrize("name", NOT)
def test_stays(name):
    proposal, reborn = rebirth(build(*NOT[name]), exact=True)
    assert not stride(proposal)
    assert "d" in layers(reborn)


def test_refused():
    shared = 'param { name: "w" }'
    down = [
        conv("d", "sum", 4, 1, "stride: 2", extra=shared),
        conv("e", "sum", 4, 1, "stride: 2", extra=shared),
    ]
    proposal, _ = rebirth(build(*STEM, *INNER, *down, concat("j", "d e")), exact=True)
    assert reasons(proposal)[("d", "e")] == "'d' shares its weights under the name 'w'"


def test_what_is_trained_with_its_gradient_is_pulled_up_too():
    """In a train_val: every layer computes the same, forward and backward."""
    path = ZOO / "resnet_50/train_val.prototxt"
    assert len(stride(plans.propose(Net.load(path)))) == 3
