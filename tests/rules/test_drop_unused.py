"""What makes no difference is removed."""

import pytest

from tests.nets import concat, conv, fc, layer, layers, merges, net, reasons, rebirth, relu, with_weights

C = conv("c", "data", 4, 3)
DEAD = [conv("dead", "c", 4), relu("deadr", "dead"), layer("quiet", "Silence", "dead", "")]
IN_TRAIN = "include { phase: TRAIN }"


def test_a_branch_that_ends_in_a_silence():
    original = with_weights(net(C, *DEAD, fc("fc", "c")))
    proposal, reborn = rebirth(original)
    (merge,) = merges(proposal).values()
    assert (merge.id, merge.kind, merge.absorbs) == ("unused:quiet", "drop", ("dead", "deadr", "quiet"))
    assert layers(reborn) == ["c", "fc"]
    assert [v.name for v in reborn.graph.view(1).outputs] == ["fc"]


@pytest.mark.parametrize(
    "idle",
    [
        concat("i", "c"),
        layer("i", "Slice", "c"),
        layer("i", "Power", "c"),
        layer("i", "Power", "c", "c"),
        layer("i", "Split", "c"),
    ],
)
def test_what_passes_its_input_on(idle):
    at = idle.split('top: "')[1].split('"')[0]
    original = with_weights(net(C, idle, relu("r", at), fc("fc", at)))
    proposal, reborn = rebirth(original)
    assert list(merges(proposal)) == ["unused:i"]
    assert layers(reborn) == ["c", "r", "fc"]


REFUSED = {
    "an output": (
        [C, fc("fc", "c"), concat("i", "fc")],
        ("i",),
        "'i' is an output of the net, its name must stay",
    ),
    "in place on it": (
        [C, concat("i", "c"), relu("r", "i"), fc("fc", "i"), fc("other", "c")],
        ("i",),
        "'r' works in place on it, and 'c' has other readers",
    ),
    "all that reads a blob": (
        [layer("s", "Slice", "data", "a b", "slice_param { slice_point: 1 }"),
         layer("quiet", "Silence", "a", ""), fc("fc", "b")],
        ("quiet",),
        "'a' would become an output of the net",
    ),
    "one name twice": (
        [C, relu("dead", "c", "dead"), layer("dead", "Silence", "dead", ""), fc("fc", "c")],
        ("dead", "dead"),
        "'dead' is a name that is not its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    body, group, reason = REFUSED[name]
    original = with_weights(net(*body))
    proposal, reborn = rebirth(original)
    assert reasons(proposal)[group] == reason
    assert not proposal.plan.merges
    assert reborn.text() == original.text()


@pytest.mark.parametrize(
    "alive",
    [
        [conv("other", "c", 4)],  # an output
        [layer("other", "HDF5Output", "c data", "")],  # a file
        [layer("other", "Python", "c", "")],  # who knows
        [conv("other", "c", 4, extra=IN_TRAIN)],  # an output in training
        [layer("i", "Power", "c", "i", "power_param { scale: 2 }")],
    ],
)
def test_stays(alive):
    original = with_weights(net(C, *alive, fc("fc", "c")))
    proposal, reborn = rebirth(original)
    assert not proposal.plan.merges
    assert reborn.text() == original.text()


def test_a_train_val_keeps_its_silences():
    """Which of its blobs are outputs in one phase is its own affair."""
    shapes = "shape { dim: 1 dim: 3 dim: 8 dim: 8 } shape { dim: 1 }"
    data = layer("data", "DummyData", "", "data label", f"dummy_data_param {{ {shapes} }}")
    body = [data, C, *DEAD, fc("fc", "c"), layer("loss", "SoftmaxWithLoss", "fc label")]
    assert not rebirth(net(*body, size=()))[0].plan.merges


def test_a_blob_that_only_dead_layers_read_keeps_one_of_them():
    """Together they would make it an output; a net of nothing else keeps a layer."""
    dead = []
    for i in "abc":
        dead += [relu(f"r{i}", "data", f"o{i}"), layer(f"s{i}", "Silence", f"o{i}", "")]
    proposal, reborn = rebirth(net(*dead), exact=True)
    assert [merge.absorbs for merge in merges(proposal).values()] == [("ra", "sa"), ("rb", "sb")]
    assert reasons(proposal) == {("rc", "sc"): "'data' would become an output of the net"}
    assert layers(reborn) == ["rc", "sc"]
