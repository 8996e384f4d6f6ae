"""What the rules ask of a graph: names, readers, the global pool, classifiers, the main loss, chains."""

import pytest

from rebirth_caffe.net import TRAIN, Net
from rebirth_caffe.rules.match import FOLDED, REBIRTH, Matcher, follow, main_output
from tests.nets import ZOO, concat, conv, fc, layer, lrn, net, norm, pool, relu, scale

DATA = layer(
    "data", "DummyData", "", "data label", "dummy_data_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } "
    "shape { dim: 1 } }",
)  # fmt: skip
IN_TRAIN, IN_TEST = "include { phase: TRAIN }", "include { phase: TEST }"


def matcher(*body: str, size: tuple[int, ...] = (1, 3, 16, 16)) -> Matcher:
    return Matcher(net(*body, size=size))


def chain(m: Matcher, start: str, *met: str) -> list[str]:
    return [x.name for x in follow(m, m.net.layer(start), map(m.net.layer, met)).layers]


# ---- names ------------------------------------------------------------------------------------------------


def test_a_reborn_layer_gets_a_name_that_no_weights_file_knows():
    m = matcher(conv("c", "data", 4), conv("c/rebirth", "c", 4), fc("fc", "c/rebirth"))
    assert m.fresh(m.net.layer("c"), FOLDED) == "c/folded"
    assert m.fresh(m.net.layer("c"), REBIRTH) == "c/rebirth2"
    assert m.fresh(m.net.layer("c"), REBIRTH) == "c/rebirth2"  # one layer, one name
    assert m.fresh(m.net.layer("c/rebirth"), REBIRTH) == "c/rebirth3"


def test_nor_the_name_of_a_blob():
    m = matcher(conv("c", "data", 4).replace('top: "c"', 'top: "c/rebirth"'), fc("fc", "c/rebirth"))
    assert m.fresh(m.net.layer("c"), REBIRTH) == "c/rebirth2"


# ---- readers ----------------------------------------------------------------------------------------------


def test_readers_of_every_phase_count():
    m = matcher(
        conv("c", "data", 4),
        fc("fc", "c"),
        layer("seen", "Silence", "c", "", IN_TRAIN),
        fc("other", "fc", extra=IN_TEST),
    )
    c, seen = m.net.layer("c"), m.net.layer("seen")
    assert [x.name for x in m.readers(c)] == ["fc", "seen"]
    assert m.only_reader(c) is None
    assert m.why_not_only(c, seen) == "blob 'c' has a second reader, 'fc'"
    assert m.only_reader(m.net.layer("fc")) is None
    reason = m.why_not_only(m.net.layer("fc"), m.net.layer("other"))
    assert reason == "'fc' and 'other' are not in the same phases"


def test_one_that_reads_twice_is_not_the_only_reader():
    m = matcher(conv("c", "data", 4), layer("sum", "Eltwise", "c c"))
    assert m.only_reader(m.net.layer("c")) is None
    assert m.why_not_only(m.net.layer("c"), m.net.layer("sum")) == "'sum' reads 'c' twice"


# ---- what must stay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "params", "is_global"),
    [
        (16, "global_pooling: true", True),
        (1, "global_pooling: true", True),
        (7, "kernel_size: 7", True),
        (7, "kernel_size: 7 stride: 7", True),
        (3, "kernel_size: 3 stride: 2", True),
        (8, "kernel_size: 7 stride: 1", False),
        (1, "kernel_size: 1", False),  # nothing to take in
        (2, "kernel_size: 3 stride: 1 pad: 1", False),  # as large as its input, but moves
        (3, "kernel_size: 3 stride: 1 pad: 1", False),
        (7, "kernel_size: 5 stride: 5 round_mode: FLOOR", False),  # one pixel, not of everything
    ],
)
def test_the_global_pool(size, params, is_global):
    m = matcher(layer("p", "Pooling", "data", None, f"pooling_param {{ {params} }}"), size=(1, 3, size, size))
    assert m.is_global(m.net.layer("p")) == is_global


def names(layers: object) -> set[str]:
    return {x.name for x in layers}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("net_name", "classifiers"),
    [
        ("bvlc_googlenet", {"loss3/classifier", "loss1/classifier", "loss2/classifier"}),
        ("bvlc_reference_caffenet", {"fc8"}),
        ("resnet_50", {"fc1000"}),
    ],
)
def test_last_classifiers_of_the_zoo(net_name, classifiers):
    assert names(Matcher(Net.load(ZOO / net_name / "train_val.prototxt")).classifiers) == classifiers


def test_every_way_to_an_output_has_its_classifier():
    m = matcher(
        conv("trunk", "data", 4),
        conv("boxes", "trunk", 4),
        norm("n", "boxes"),
        conv("scores", "trunk", 4),
        pool("p", "scores", 0, 0, "global_pooling: true"),
    )
    assert names(m.classifiers) == {"boxes", "scores"}


def test_auxiliary_heads_are_not_deployed():
    m = Matcher(Net.load(ZOO / "bvlc_googlenet" / "train_val.prototxt"))
    outside = [x.name for x in m.net.layers if x not in m.deployed and x.type != "Data"]
    assert {name.split("/")[0] for name in outside} == {"loss1", "loss2", "loss3"}
    assert m.net.layer("loss3/classifier") in m.deployed


# ---- the main loss ----------------------------------------------------------------------------------------


def loss(name: str, bottom: str, more: str = "") -> str:
    return layer(name, "SoftmaxWithLoss", f"{bottom} label", None, more)


def accuracy(name: str, bottom: str, more: str = "") -> str:
    return layer(name, "Accuracy", f"{bottom} label", None, more)


@pytest.mark.parametrize(
    ("body", "head", "scores"),
    [
        ([fc("a", "data"), fc("b", "data"), loss("x", "a"), loss("y", "b")], "y", ["b"]),
        ([fc("a", "data"), fc("b", "data"), loss("x", "a"), loss("y", "b", "loss_weight: 0.3")], "x", ["a"]),
        ([fc("a", "data"), loss("x", "a", IN_TRAIN), accuracy("y", "a", IN_TEST)], "x", ["a"]),
        ([fc("a", "data"), accuracy("y", "a")], "y", ["a"]),
        ([fc("a", "data"), accuracy("y", "a", IN_TEST), fc("b", "data", extra=IN_TRAIN)], "y", ["a"]),
        ([fc("a", "data")], None, ["label", "a"]),
    ],
)
def test_the_main_output(body, head, scores):
    found, view, values = main_output(net(DATA, *body, size=()).graph)
    assert (found and found.name, [value.name for value in values]) == (head, scores)
    assert all(value in list(view.values) for value in values)


def test_a_score_of_training_only():
    one = net(DATA, fc("a", "data", extra=IN_TRAIN), loss("x", "a", IN_TRAIN), fc("b", "data"), size=())
    found, view, values = main_output(one.graph)
    assert found is one.layer("x")
    assert view.state.phase == TRAIN
    assert values[0].producer is one.layer("a")


# ---- chains -----------------------------------------------------------------------------------------------

C = conv("c", "data", 4, 3)


def behind(*body: str) -> Matcher:
    """c, these layers, and a convolution that reads the last one's top."""
    last = Net.parse(body[-1]).layers[0].top[0]
    return matcher(C, *body, conv("end", last, 4), fc("fc", "end"))


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ([relu("r", "c")], []),
        ([pool("p", "c")], ["p"]),
        ([relu("r", "c"), pool("p", "c")], ["r", "p"]),
        ([pool("p", "c"), relu("r", "p")], ["p"]),  # stays behind what is reborn
        ([pool("p", "c"), relu("r", "p"), lrn("n", "p")], ["p", "r", "n"]),
        ([relu("r", "c"), pool("p", "c"), relu("q", "p")], ["r", "p", "q"]),  # once is enough
        ([relu("r", "c"), lrn("n", "c"), relu("q", "n"), pool("p", "n")], ["r", "n", "q", "p"]),
        ([relu("r", "c", kind="PReLU"), pool("p", "c"), relu("q", "p"), lrn("n", "p")], ["r", "p"]),
        ([relu("r", "c", more="relu_param { negative_slope: 0.1 }"), lrn("n", "c"), relu("q", "n")],
         ["r", "n"]),
        ([relu("r", "c"), lrn("n", "c"), relu("q", "n", kind="Sigmoid"), pool("p", "n")], ["r", "n"]),
        ([norm("n", "c"), scale("s", "c"), relu("r", "c"), pool("p", "c"), lrn("l", "p")],
         ["n", "s", "r", "p", "l"]),
        ([lrn("n", "c"), layer("d", "Dropout", "n", "n"), pool("p", "n")], ["n"]),
        ([lrn("n", "c"), layer("d", "Power", "n")], ["n"]),
        ([concat("j", "c"), pool("p", "j")], []),
    ],
)  # fmt: skip
def test_chains(body, wanted):
    assert chain(behind(*body), "c") == wanted


def test_an_activation_met_before_counts():
    m = behind(pool("p", "c"), relu("r", "p"), lrn("n", "p"), relu("q", "n", kind="TanH"))
    relus = matcher(relu("r", "data"), relu("t", "data", kind="TanH"))
    c, (r, t) = m.net.layer("c"), (relus.net.layer(name) for name in "rt")
    assert [x.name for x in follow(m, c, [r]).layers] == ["p", "r", "n"]
    assert [x.name for x in follow(m, c, [t]).layers] == ["p"]
    assert [x.name for x in follow(m, c, [r, t]).layers] == ["p"]


@pytest.mark.parametrize(
    ("body", "refusal", "beyond"),
    [
        ([pool("p", "c"), fc("other", "c"), lrn("n", "p")], "blob 'c' has a second reader, 'other'", "p"),
        ([pool("p", "c", 0, 0, "global_pooling: true")], "'p' is the global pool", "p"),
        ([pool("p", "c", 3, 2, "pool: STOCHASTIC")], "'p' pools stochastically", "p"),
        ([layer("s", "Scale", "c d"), pool("p", "s")],
         "'s' has several bottoms or tops, or a name that is not its own", "s"),
        ([layer("p", "Pooling", "c", "x y", "pooling_param { kernel_size: 2 stride: 2 }"), relu("r", "x")],
         "'p' has several bottoms or tops, or a name that is not its own", "p"),
    ],
)  # fmt: skip
def test_why_a_chain_ends(body, refusal, beyond):
    m = behind(conv("d", "data", 4, 3), *body)
    found = follow(m, m.net.layer("c"))
    assert (found.refusal, [x.name for x in found.beyond]) == (refusal, [beyond])


def test_views_of_a_chain():
    m = behind(norm("n", "c"), relu("r", "c"), pool("p", "c"), pool("q", "p", 2))
    found = follow(m, m.net.layer("c"))
    assert [x.name for x in found.pools] == ["p", "q"]
    assert [x.name for x in found.normalising] == ["n"]
    assert [x.name for x in found.activations] == ["r"]


@pytest.mark.parametrize(
    ("kinds", "followed"),
    [(("ReLU", "ReLU"), ["behind", "p"]), (("PReLU", "ReLU"), []), (("ReLU", "PReLU"), [])],
)
def test_an_activation_is_idle_only_behind_plain_ones(kinds, followed):
    met = [relu(f"met{i}", "b", kind=kind) for i, kind in enumerate(kinds)]
    m = matcher(conv("a", "data", 4), relu("behind", "a"), pool("p", "a"), conv("b", "data", 4), *met)
    assert chain(m, "a", "met0", "met1") == followed
