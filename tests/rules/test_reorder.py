"""ReLU -> MAX pool => MAX pool -> ReLU, and 1x1 convolutions around average pools."""

import pytest

from tests.nets import conv, fc, layers, merges, net, pool, rebirth, relu, with_weights

C = conv("c", "data", 6, 3)
AVERAGE = "pool: AVE"


def build(*body: str):
    return with_weights(net(*body, fc("fc", body[-1].split('top: "')[-1].split('"')[0])))


@pytest.mark.parametrize(
    ("body", "order"),
    [
        ([C, relu("r", "c"), pool("p", "c")], ["c", "p", "r", "fc"]),
        ([C, relu("r", "c", "r", "relu_param { negative_slope: 0.2 }"), pool("p", "r")],
         ["c", "p", "r", "fc"]),
        ([conv("c", "data", 6, 1), pool("p", "c", 2, 2, AVERAGE)], ["p", "c", "fc"]),
        ([conv("c", "data", 6, 1), pool("p", "c", 0, 0, f"{AVERAGE} global_pooling: true")],
         ["p", "c", "fc"]),
        ([conv("c", "data", 6, 1, "bias_term: false"), pool("p", "c", 3, 2, f"{AVERAGE} pad: 1")],
         ["p", "c", "fc"]),
        ([pool("p", "data", 3, 1, AVERAGE + " pad: 1"), conv("c", "p", 2, 1, "bias_term: false")],
         ["c", "p", "fc"]),
    ],
)  # fmt: skip
def test_changes_places(body, order):
    original = build(*body)
    proposal, reborn = rebirth(original, exact=True)
    (merge,) = merges(proposal).values()
    assert (merge.kind, merge.absorbs) == ("reorder", ())
    assert layers(reborn) == order
    first, second = (reborn.layer(name) for name in order[-3:-1])
    assert second.bottom == first.top
    assert second.top == original.layer(order[-3]).top or second.top == reborn.layer("fc").bottom
    assert [b.array.tobytes() for b in reborn.layer("c").blobs] == [
        b.array.tobytes() for b in original.layer("c").blobs
    ]


def test_by_default_only_what_every_engine_gains_by():
    proposal, _ = rebirth(build(C, relu("r", "c"), pool("p", "c")), kernel="keep")
    assert not [m for m in proposal.plan.merges if m.kind == "reorder"]


@pytest.mark.parametrize(
    "body",
    [
        [C, relu("r", "c"), pool("p", "c", 3, 1, "pad: 1")],  # as many pixels behind it
        [C, relu("r", "c"), pool("p", "c", 2, 2, AVERAGE)],
        [C, relu("r", "c", more="relu_param { negative_slope: -1 }"), pool("p", "c")],
        [C, relu("r", "c", "r"), fc("other", "r"), pool("p", "r")],
        [C, relu("r", "c"), pool("p", "c", 1, 3)],  # Caffe leaves windows empty
        [C, pool("p", "c", 2, 2, AVERAGE)],  # composed instead
        [conv("c", "data", 6, 1), relu("r", "c"), pool("p", "c", 2, 2, AVERAGE)],
        [pool("p", "data", 2, 2, AVERAGE), conv("c", "p", 2, 1)],
    ],
)
def test_stays(body):
    assert not [m for m in rebirth(build(*body), exact=True)[0].plan.merges if m.kind == "reorder"]


def test_a_padded_average_takes_part_of_a_bias_away():
    proposal, reborn = rebirth(
        build(conv("c", "data", 6, 1), pool("p", "c", 3, 2, AVERAGE + " pad: 1")), exact=True
    )
    assert "'p' pads, and 'c' has a bias" in {refusal.reason for refusal in proposal.refused}
    assert layers(reborn) == ["c", "p", "fc"]
