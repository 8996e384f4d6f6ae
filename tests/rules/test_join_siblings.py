"""x -> [conv | conv] => x -> conv, with a Slice or without."""

import pytest

from tests.nets import (
    blobs_of,
    concat,
    conv,
    fc,
    layers,
    merges,
    net,
    reasons,
    rebirth,
    relu,
    shape,
    with_weights,
)

X = [conv("x", "data", 24, 3), relu("xr", "x")]


def build(*body: str):
    return with_weights(net(*body, relu("end", "j", "end"), fc("fc", "end")))


def pair(name: str, n: int, more: str = "", *, extra: str = "", on: bool = True) -> list[str]:
    """A 1x1 and its ReLU, and a convolution that goes on."""
    first = [conv(name, "x", n, 1, more, extra=extra), relu(f"{name}r", name)]
    return [*first, conv(f"{name}2", name, 4, 1)] if on else first


def join(proposal):
    return [m for m in merges(proposal).values() if m.kind == "join"]


def test_with_a_slice():
    original = build(*X, *pair("a", 3), *pair("b", 5), concat("j", "a2 b2"))
    proposal, reborn = rebirth(original, exact=True)
    (merge,) = join(proposal)
    assert merge.absorbs == ("a", "b", "br")
    assert layers(reborn) == ["x", "xr", "a/joined", "ar", "a/slice", "a2", "b2", "j", "end", "fc"]
    assert shape(reborn, "a/joined") == "8 x 1x1/1 pad 0"
    assert reborn.layer("a/slice").top == ("a", "b")
    assert list(reborn.layer("a/slice").param.slice_param.slice_point) == [3]
    assert (blobs_of(reborn, "a/joined")[0][3:] == blobs_of(original, "b")[0]).all()


def test_by_default_there_is_no_slice():
    proposal, _ = rebirth(build(*X, *pair("a", 3), *pair("b", 5), concat("j", "a2 b2")))
    assert not join(proposal)


@pytest.mark.parametrize(
    ("order", "left"),
    [("a b", None), ("a b other", ("a/joined", "other")), ("other b a", ("other", "b/joined"))],
)
def test_neighbours_in_a_concat_need_no_slice(order, left):
    other = [conv("other", "x", 4, 3, "pad: 1")]
    body = [
        *X,
        *pair("a", 3, on=False),
        *pair("b", 5, on=False),
        *other * ("other" in order),
        concat("j", order),
    ]
    proposal, reborn = rebirth(build(*body), exact=True)
    (merge,) = join(proposal)
    assert [row.layer for row in merge.becomes[0].rows] == [x for x in order.split() if x != "other"]
    assert "Slice" not in [x.type for x in reborn.layers]
    if left is None:
        assert reborn.layer("a/joined").top == ("j",)
        assert "j" not in layers(reborn)
    else:
        assert reborn.layer("j").bottom == left


def test_what_is_not_side_by_side_keeps_its_order():
    body = [*X, *pair("a", 3, on=False), conv("other", "x", 4, 3, "pad: 1"), *pair("b", 5, on=False)]
    proposal, reborn = rebirth(build(*body, concat("j", "a other b")), exact=True)
    assert reborn.layer("j").bottom == ("a", "other", "b")
    assert reborn.layer("a/slice").top == ("a", "b")
    assert len(join(proposal)) == 1


def test_other_activations_stay_behind_the_slice():
    body = [*X, conv("a", "x", 3), relu("ar", "a"), conv("b", "x", 5), relu("br", "b", kind="TanH")]
    body += [conv("a2", "a", 4), conv("b2", "b", 4), concat("j", "a2 b2")]
    _, reborn = rebirth(build(*body), exact=True)
    assert layers(reborn)[2:6] == ["a/joined", "a/slice", "ar", "br"]


NOT = {
    "another geometry": [*pair("a", 3), *pair("b", 5, "stride: 1 pad: 1"), concat("j", "a2 a2")],
    "groups": [*pair("a", 4, "group: 2"), *pair("b", 4, "group: 2"), concat("j", "a2 b2")],
    "other rates": [*pair("a", 3, extra="param { lr_mult: 0 }"), *pair("b", 5), concat("j", "a2 b2")],
    "other phases": [*pair("a", 3), conv("b", "x", 5, extra="include { phase: TEST }"), concat("j", "a2 a2")],
}


@pytest.mark.parametrize("name", NOT)
def test_stays(name):
    assert not join(rebirth(build(*X, *NOT[name]), exact=True)[0])


def test_refused():
    shared = 'param { name: "w" }'
    both = [*pair("a", 3, extra=shared), *pair("b", 3, extra=shared), concat("j", "a2 b2")]
    proposal, _ = rebirth(build(*X, *both), exact=True)
    assert reasons(proposal)[("a", "b")] == "'a' shares its weights under the name 'w'"
    proposal, _ = rebirth(build(*X, *pair("a", 30), *pair("b", 5), concat("j", "a2 b2")), exact=True)
    assert reasons(proposal)[("a", "b")] == "a Slice would copy more than one convolution reads less"
