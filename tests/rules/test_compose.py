"""conv -> conv => conv, where that is cheaper; the numbers are in test_exact_rules.py."""

import pytest

from rebirth_caffe.errors import WeightsError
from rebirth_caffe.rules.compose import Taps
from tests.nets import (
    blobs_of,
    conv,
    fc,
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

WIDE = conv("a", "data", 60, 3, "pad: 1 stride: 2")


def build(*body: str):
    return with_weights(net(*body, relu("end", body[-1].split('"')[1], "end"), fc("fc", "end")))


def test_windows_over_windows():
    assert Taps(3, 2, 1, 1).then(Taps(3, 1, 0, 1)) == Taps(7, 2, 1, 1)
    assert Taps(1, 2, 0, 1).then(Taps(3, 1, 1, 1)) == Taps(3, 2, 2, 2)  # every second pixel: dilated
    assert Taps(3, 1, 0, 2).then(Taps(2, 1, 0, 4)) == Taps(5, 1, 0, 2)
    assert Taps(3, 1, 0, 2).then(Taps(1, 3, 0, 1)) == Taps(3, 3, 0, 2)


@pytest.mark.parametrize(
    ("body", "name", "geometry"),
    [
        ([WIDE, conv("c", "a", 6, 1)], "c/composed", "6 x 3x3/2 pad 1"),
        ([WIDE, conv("c", "a", 6, 2)], "c/composed", "6 x 5x5/2 pad 1"),
        ([conv("a", "data", 6, 3), pool("p", "a", 2, 2, "pool: AVE")], "a/composed", "6 x 4x4/2 pad 0"),
        ([pool("p", "data", 1, 3, "pool: MAX"), conv("c", "p", 6, 3)], "c/composed", "6 x 3x3/3 pad 0"),
    ],
)
def test_composes(body, name, geometry):
    proposal, reborn = rebirth(build(*body), exact=True)
    (merge,) = merges(proposal).values()
    assert (merge.kind, merge.exact, len(merge.absorbs)) == ("compose", True, 2)
    assert layers(reborn) == [name, "end", "fc"]
    assert shape(reborn, name) == geometry
    assert len(blobs_of(reborn, name)) == 2
    assert not proposal.refused


def test_three_in_a_row_are_composed_one_after_the_other():
    body = [conv("a", "data", 40, 1), conv("b", "a", 50, 1), conv("c", "b", 6, 3)]
    proposal, reborn = rebirth(build(*body), exact=True)
    assert len(merges(proposal)) == 2
    assert layers(reborn) == ["c/composed", "end", "fc"]


def test_inner_products():
    _, reborn = rebirth(build(fc("a", "data", 900), fc("c", "a", 6)), exact=True)
    assert layers(reborn) == ["c/composed", "end", "fc"]
    assert [b.shape for b in blobs_of(reborn, "c/composed")] == [(6, 768), (6,)]


SHARED = 'param { name: "w" }'
REFUSED = {
    "dearer": (
        [conv("a", "data", 2, 1), conv("c", "a", 60, 3)],
        "one layer would take 0.318 instead of 0.213 M multiply-adds",
    ),
    "a low rank": (
        [fc("a", "data", 3), fc("c", "a", 500)],
        "one layer would take 0.384 instead of 0.0038 M multiply-adds",
    ),
    "padding over a bias": (
        [conv("a", "data", 60, 1), conv("c", "a", 6, 3, "pad: 1")],
        "'c' pads what 'a' gives with zeros",
    ),
    "padding over a window": (
        [conv("a", "data", 60, 3, "bias_term: false"), conv("c", "a", 6, 3, "pad: 1")],
        "'c' pads what 'a' gives with zeros",
    ),
    "shared weights": (
        [
            *(conv("d", "data", 60, 3, extra=SHARED), fc("other", "d")),
            *(conv("a", "data", 60, 3, extra=SHARED), conv("c", "a", 6, 1)),
        ],
        "'a' shares its weights under the name 'w'",
    ),
    "clipped windows": (
        [conv("a", "data", 6, 3), pool("p", "a", 3, 2, "pool: AVE")],
        "the last windows of 'p' are clipped",
    ),
    "the last classifier": ([WIDE, conv("c", "a", 6, 1)], "'c' is the last classifier"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    body, reason = REFUSED[name]
    original = with_weights(net(*body)) if "classifier" in reason else build(*body)
    proposal, _ = rebirth(original, exact=True)
    assert reason in reasons(proposal).values()
    assert not [m for m in merges(proposal).values() if m.kind == "compose"]


@pytest.mark.parametrize(
    "body",
    [
        [WIDE, relu("r", "a"), conv("c", "a", 6, 1)],
        [WIDE, fc("second", "a"), conv("c", "a", 6, 1)],
        [WIDE, pool("p", "a", 3, 2)],
        [WIDE, pool("p", "a", 0, 0, "pool: AVE global_pooling: true")],
    ],
)
def test_what_is_not_looked_at(body):
    proposal, reborn = rebirth(build(*body), exact=True)
    assert not [m for m in proposal.plan.merges if m.kind == "compose"]
    assert "a" in layers(reborn)


def test_every_blob_must_be_there():
    original = build(WIDE, conv("c", "a", 6, 1))
    original.layer("a").record = None
    with pytest.raises(WeightsError, match="layer 'a' has no weights in the file, so 'a' cannot be composed"):
        rebirth(original, exact=True)
