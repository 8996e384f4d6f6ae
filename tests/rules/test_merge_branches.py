"""Fork-join blocks: which branch goes into which, the paper's geometry, stages, and what is refused."""

import numpy as np
import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.merge import IN
from rebirth_caffe.net import TEST, Net
from rebirth_caffe.shapes import infer
from tests.nets import (
    ZOO,
    blobs_of,
    compute,
    concat,
    conv,
    difference,
    fc,
    layer,
    layers,
    lrn,
    merges,
    net,
    norm,
    offers,
    pool,
    reasons,
    rebirth,
    relu,
    shape,
    with_weights,
)

# A trunk with 32 channels, and branches that read it.
TRUNK = [conv("trunk", "data", 32, 1), relu("trunk_relu", "trunk")]


def one(name: str, n: int = 8) -> list[str]:
    """1x1."""
    return [conv(name, "trunk", n), relu(f"{name}_relu", name)]


def wide(name: str, n: int = 8, kernel: int = 3, reduce: int = 16, more: str = "") -> list[str]:
    """1x1 -> larger."""
    return [
        conv(f"{name}_reduce", "trunk", reduce),
        relu(f"{name}_reduce_relu", f"{name}_reduce"),
        conv(name, f"{name}_reduce", n, kernel, f"pad: {kernel // 2} {more}"),
        relu(f"{name}_relu", name),
    ]


def pooled(name: str, n: int = 8, kernel: int = 3) -> list[str]:
    """pool -> 1x1."""
    return [
        pool(f"{name}_pool", "trunk", kernel, 1, f"pad: {kernel // 2}"),
        conv(name, f"{name}_pool", n),
        relu(f"{name}_relu", name),
    ]


def block(
    *branches: list[str], behind: tuple[str, ...] = (), trunk: list[str] = TRUNK, size: int = 12
) -> Net:
    """The branches joined in this order, what follows, and a classifier."""
    tops = [Net.parse(branch[-1]).layers[0].top[0] if branch else "trunk" for branch in branches]
    body = [*trunk, *(x for branch in branches for x in branch), concat("join", " ".join(tops)), *behind]
    last = Net.parse(body[-1]).layers[0].top[0]
    return net(*body, fc("fc", last), size=(1, 3, size, size))


def branch_of(reborn: Net, bottom: int) -> list[str]:
    """The convolutions of a reborn block's branch, up from the Concat."""
    at = reborn.layer("join").bottom[bottom]
    found: list[str] = []
    while at != "trunk":
        at, made = next(
            (x.bottom[0], x) for x in reversed(reborn.layers) if x.top == (at,) and x.bottom != x.top
        )
        if made.type == "Convolution":
            found.insert(0, f"{made.name}: {shape(reborn, made.name)}")
    return found


def rows(proposal: plans.Proposal, name: str) -> list[str]:
    """Where the output channels of a reborn layer come from."""
    specs = [spec for merge in proposal.plan.active for spec in merge.becomes]
    return [row.layer for row in next(spec for spec in specs if spec.name == name).rows]


# ---- GoogLeNet --------------------------------------------------------------------------------------------

# 3x3 reducer, 3x3, 5x5 reducer, 5x5: what the paper's blocks become, the stride that a pool behind them gives
PAPER = {
    "3a": (48, 192, 16, 64, 1),
    "3b": (64, 320, 32, 160, 2),
    "4a": (48, 400, 16, 112, 1),
    "4b": (56, 384, 24, 128, 1),
    "4c": (64, 384, 24, 128, 1),
    "4d": (72, 400, 32, 128, 1),
    "4e": (80, 576, 32, 256, 2),
    "5a": (80, 576, 32, 256, 1),
    "5b": (96, 768, 48, 256, 1),
}


@pytest.mark.parametrize("kind", ["deploy", "train_val"])
def test_googlenet_as_in_the_paper(kind):
    original = Net.load(ZOO / "bvlc_googlenet" / f"{kind}.prototxt")
    proposal, reborn = rebirth(original)
    for name, (reducer, three, five_reducer, five, stride) in PAPER.items():
        b = f"inception_{name}/"
        assert shape(reborn, f"{b}3x3_reduce/rebirth") == f"{reducer} x 1x1/1 pad 0"
        assert shape(reborn, f"{b}3x3/rebirth") == f"{three} x 3x3/{stride} pad 1"
        assert shape(reborn, f"{b}5x5_reduce") == f"{five_reducer} x 1x1/1 pad 0"
        assert shape(reborn, f"{b}5x5/rebirth") == f"{five} x 5x5/{stride} pad 2"
        assert reborn.layer(f"{b}output").bottom == (f"{b}3x3/rebirth", f"{b}5x5/rebirth")
        assert rows(proposal, f"{b}3x3/rebirth") == [f"{b}1x1", f"{b}3x3"]
        assert rows(proposal, f"{b}5x5/rebirth") == [f"{b}5x5", f"{b}pool_proj"]
        gone = {"3b": ("pool3/3x3_s2",), "4e": ("pool4/3x3_s2",)}.get(name, ())
        parts = ("1x1", "relu_1x1", "3x3_reduce", "3x3", "5x5", "pool", "pool_proj", "relu_pool_proj")
        assert merges(proposal)[name].absorbs == (*(b + part for part in parts), *gone)
        kept = ("relu_3x3_reduce", "relu_3x3", "5x5_reduce", "relu_5x5_reduce", "relu_5x5", "output")
        assert {s.name for s in merges(proposal)[name].becomes if s.kept} == {b + part for part in kept}
    assert not [x.name for x in reborn.layers if x.type in ("LRN", "Pooling") and "loss" not in x.name][1:]


def test_googlenets_nine_steps_and_the_stages():
    proposal, _ = rebirth(Net.load(ZOO / "bvlc_googlenet" / "deploy.prototxt"))
    steps = ["conv1", "conv2", "3a", "3b", "4a", "4b-4d", "4e", "5a", "5b"]
    assert proposal.plan.stages == steps
    kinds = [m.kind for m in proposal.plan.active if not m.exact]
    assert kinds == ["streamline"] * 2 + ["branches"] * 9
    assert [m.id for m in proposal.plan.active if m.stage == "4b-4d"] == ["4b", "4c", "4d"]
    assert reasons(proposal) == {("inception_5b/output", "pool5/7x7_s1"): "'pool5/7x7_s1' is the global pool"}


@pytest.mark.parametrize(
    ("kernel", "three", "five"),
    [("auto", "320 x 4x4/2 pad 1", "160 x 6x6/2 pad 2"), ("cover", "320 x 6x6/2 pad 2", "160 x 8x8/2 pad 3")],
)
def test_googlenets_pools_with_another_kernel(kernel, three, five):
    _, reborn = rebirth(Net.load(ZOO / "bvlc_googlenet" / "deploy.prototxt"), kernel=kernel)
    assert shape(reborn, "inception_3b/3x3/rebirth") == three
    assert shape(reborn, "inception_3b/5x5/rebirth") == five
    assert shape(reborn, "inception_3a/3x3/rebirth") == "192 x 3x3/1 pad 1"


@pytest.mark.parametrize(("reduce", "wanted"), [(1, 96), (0.5, 48), (0.25, 24), (0.3, 32), (0.01, 8)])
def test_reduce_rounds_up_to_eight(reduce, wanted):
    _, reborn = rebirth(Net.load(ZOO / "bvlc_googlenet" / "deploy.prototxt"), reduce=reduce)
    assert shape(reborn, "inception_3a/3x3/rebirth") == "192 x 3x3/1 pad 1"
    name = "inception_3a/3x3_reduce"
    assert shape(reborn, name if reduce == 1 else f"{name}/rebirth") == f"{wanted} x 1x1/1 pad 0"
    assert shape(reborn, "inception_3a/5x5_reduce") == "16 x 1x1/1 pad 0"  # fed by no absorbed 1x1


def test_a_ratio_that_is_not_a_binary_fraction_is_not_rounded_twice():
    """160 x 0.55 is 88, and a little more in floating point."""
    _, reborn = rebirth(block(one("a"), wide("b", reduce=160), trunk=TRUNK), reduce=0.55)
    assert shape(reborn, "b_reduce/rebirth") == "88 x 1x1/1 pad 0"


# ---- any block --------------------------------------------------------------------------------------------


def test_by_shape_not_by_name():
    names = iter(["q7", "zz", "x", "m", "left", "k1", "k2", "y", "v", "w3", "t", "s"])
    given = {}
    original = block(one("a"), wide("b"), wide("c", kernel=5), pooled("d"))
    text = original.text()
    for name in ("a_relu", "a", "b_reduce_relu", "b_reduce", "b_relu", "c_relu", "d_pool", "d_relu"):
        given[name] = next(names)
        text = text.replace(f'"{name}"', f'"{given[name]}"')
    proposal, reborn = rebirth(Net.parse(text))
    (merge,) = proposal.plan.active
    assert (merge.kind, merge.id) == ("branches", "join")
    assert branch_of(reborn, 0) == [
        f"{given['b_reduce']}/rebirth: 8 x 1x1/1 pad 0",
        "b/rebirth: 16 x 3x3/1 pad 1",
    ]
    assert branch_of(reborn, 1) == ["c_reduce: 16 x 1x1/1 pad 0", "c/rebirth: 16 x 5x5/1 pad 2"]


A, B, C5, P = one("a"), wide("b"), wide("c", kernel=5), pooled("d")
ORDERS = {
    # Concat order -> (what each remaining branch's last convolution is made of)
    "googlenet": ([A, B, C5, P], [["a", "b"], ["c", "d"]]),
    "mirrored": ([P, C5, B, A], [["d", "c"], ["b", "a"]]),
    "pool between": ([A, B, P, C5], [["a", "b"], ["d", "c"]]),
    "both into one": ([A, C5, P], [["a", "c", "d"]]),
    "small first": ([P, A, C5], [["d", "a", "c"]]),
    "two small": ([one("a"), one("e"), B], [["a", "e", "b"]]),
    "two small around": ([one("a"), B, one("e")], [["a", "b", "e"]]),
    "three small": ([B, one("a"), one("e"), one("f")], [["b", "a", "e", "f"]]),
    "two pools": ([pooled("d"), B, pooled("e")], [["d", "b", "e"]]),
    "a pool alone": ([A, B, C5, [pool("p", "trunk", 3, 1, "pad: 1")]], [["a", "b"], ["c", IN]]),
    "without reducers": ([A, [conv("b", "trunk", 8, 3, "pad: 1"), relu("b_relu", "b")]], [["a", "b"]]),
    "no activations": ([A[:1], [conv("b", "trunk", 8, 3, "pad: 1")]], [["a", "b"]]),
    "pool prefers the larger": ([B, P, C5], [["b"], ["d", "c"]]),
    "1x1 prefers the smaller": ([B, A, C5], [["b", "a"], ["c"]]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_the_concat(name):
    branches, wanted = ORDERS[name]
    original = with_weights(block(*branches))
    proposal = plans.propose(original)
    proposal, reborn = rebirth(original, only=[m.id for m in proposal.plan.merges])  # offers, too
    found = []
    for i, made_of in enumerate(wanted):
        last = branch_of(reborn, i)[-1].split(":")[0] if len(wanted) > 1 else "b/rebirth"
        if len(wanted) == 1:
            last = next(x.name for x in reborn.layers if x.top == ("join",) and x.bottom != x.top)
        found.append(rows(proposal, last) if "/" in last else [last])
        n = sum(32 if source == IN else 8 for source in made_of)
        assert reborn.layer(last).param.convolution_param.num_output == n
    assert found == wanted
    assert ("join" in layers(reborn)) == (len(wanted) > 1)
    channels = sum(32 if source == IN else 8 for made_of in wanted for source in made_of)
    assert {v.name: s for v, s in infer(reborn.graph.view(TEST)).items()}["join"] == (1, channels, 12, 12)


def test_a_branch_that_reads_the_fork_itself():
    """[x | 1x1 | 3x3]: the first is passed on as it was."""
    proposal, reborn = rebirth(block([], A, B))
    assert reborn.layer("join").bottom == ("trunk", "b/rebirth")
    assert list(merges(proposal)) == ["join"]


def test_nested_blocks_are_blocks():
    inner = [*TRUNK, *A, *B, concat("mid", "a b")]
    outer = [x.replace('"trunk"', '"mid"') for x in (*one("e"), *wide("f"))]
    proposal, reborn = rebirth(net(*inner, *outer, concat("join", "e f"), fc("fc", "join")))
    assert [(m.id, m.stage) for m in proposal.plan.active] == [("mid", "mid"), ("join", "join")]
    assert layers(reborn)[-1] == "fc"
    assert {"b/rebirth", "f/rebirth"} < set(layers(reborn))


def test_a_reducer_keeps_the_channels_that_others_count_on():
    slopes = [x.replace('"ReLU"', '"PReLU"') if "reduce_relu" in x else x for x in B]
    _, reborn = rebirth(with_weights(block(A, slopes)), only=["join"])
    assert branch_of_single(reborn) == ["b_reduce: 16 x 1x1/1 pad 0", "b/rebirth: 16 x 3x3/1 pad 1"]
    grouped = [
        conv("r", "trunk", 16), conv("g", "r", 16, 3, "pad: 1 group: 16"), conv("b", "g", 8, 3, "pad: 1"),
        relu("b_relu", "b"),
    ]  # fmt: skip
    _, reborn = rebirth(with_weights(block(A, grouped)))
    assert [shape(reborn, name) for name in ("r", "g", "b/rebirth")] == [
        "16 x 1x1/1 pad 0", "16 x 3x3/1 pad 1", "16 x 3x3/1 pad 1",
    ]  # fmt: skip


def branch_of_single(reborn: Net) -> list[str]:
    """The convolutions of a block of which one branch remains."""
    return [f"{x.name}: {shape(reborn, x.name)}" for x in reborn.layers if x.type == "Convolution"][1:]


def test_a_squeezenet_fire_is_offered_and_not_made():
    """1x1 beside 3x3 on the same blob: without a reducer to shrink the merge only adds multiply-adds."""
    fire = [
        *TRUNK, conv("fire2/squeeze1x1", "trunk", 16), relu("r1", "fire2/squeeze1x1"),
        conv("fire2/expand1x1", "fire2/squeeze1x1", 64), relu("r2", "fire2/expand1x1"),
        conv("fire2/expand3x3", "fire2/squeeze1x1", 64, 3, "pad: 1"), relu("r3", "fire2/expand3x3"),
        concat("fire2/concat", "fire2/expand1x1 fire2/expand3x3"), fc("fc", "fire2/concat"),
    ]  # fmt: skip
    proposal, reborn = rebirth(net(*fire))
    assert not proposal.plan.active
    assert layers(reborn) == layers(net(*fire))
    (offer,) = offers(proposal).values()
    note = "takes 1.8 times the multiply-adds: no reducer to shrink"
    assert (offer.id, offer.note, offer.instead_of) == ("fire2", note, "")
    wanted = ("fire2/expand1x1", "r2", "fire2/expand3x3", "fire2/concat")
    assert offer.absorbs == wanted
    assert reasons(proposal) == {wanted: f"{note}; enable 'fire2' in the plan"}
    _, reborn = rebirth(net(*fire), only=["fire2"])
    assert shape(reborn, "fire2/expand3x3/rebirth") == "128 x 3x3/1 pad 1"
    assert reborn.layer("r3").top == ("fire2/concat",)


# ---- what follows the Concat ------------------------------------------------------------------------------

DOWN = pool("down", "join", 3, 2)


def test_a_pool_behind_becomes_every_branchs_stride():
    proposal, reborn = rebirth(block(A, B, C5, P, behind=(DOWN,)))
    assert branch_of_last(reborn) == ["16 x 3x3/2 pad 1", "16 x 5x5/2 pad 2"]
    assert reborn.layer("join").top == ("down",)
    assert "down" in merges(proposal)["join"].absorbs


def branch_of_last(reborn: Net) -> list[str]:
    return [branch_of(reborn, i)[-1].split(": ")[1] for i in range(len(reborn.layer("join").bottom))]


def test_into_branches_that_do_not_merge_too():
    """All 3x3: nothing is small enough to move, and the pool still goes."""
    proposal, reborn = rebirth(block(B, wide("e"), behind=(DOWN,)))
    assert branch_of_last(reborn) == ["8 x 3x3/2 pad 1"] * 2
    assert reborn.layer("b_reduce").text == block(B, wide("e")).layer("b_reduce").text
    (merge,) = proposal.plan.active
    assert (merge.kind, merge.absorbs) == ("streamline", ("b", "e", "down"))


def test_lrn_and_a_relu_behind():
    tail = (relu("late", "join"), lrn("n", "join"))
    proposal, reborn = rebirth(block(A[:1], B[:3], behind=tail))
    assert layers(reborn)[-2:] == ["late", "fc"]  # no branch had one of its own
    assert merges(proposal)["join"].absorbs[-2:] == ("join", "n")
    proposal, reborn = rebirth(block(A, B, behind=tail))
    assert "late" not in layers(reborn)  # every branch ends with it
    _, reborn = rebirth(block(A, B, C5[:3], behind=tail))
    assert "late" in layers(reborn)


def test_a_batch_norm_inside_goes():
    body = [*B[:3], norm("n", "b", "n", "batch_norm_param { use_global_stats: false }"), relu("b_relu", "n")]
    proposal, reborn = rebirth(block(A, body))
    assert "n" in merges(proposal)["join"].absorbs
    assert "n" not in layers(reborn)


def test_a_tail_that_does_not_fit_stays_and_the_block_merges():
    narrow = ("join", "down")
    proposal, reborn = rebirth(block(A, B, C5, P, behind=(pool("down", "join", 2, 2, "pad: 1"),)))
    assert reasons(proposal)[narrow] == (
        "a pool behind it would need another kernel or pad; ask for --kernel auto or cover"
    )
    assert "down" in layers(reborn)
    assert branch_of_last(reborn) == ["16 x 3x3/1 pad 1", "16 x 5x5/1 pad 2"]
    _, reborn = rebirth(block(A, B, C5, P, behind=(pool("down", "join", 2, 2, "pad: 1"),)), kernel="cover")
    assert "down" not in layers(reborn)

    for behind in (DOWN, lrn("n", "join")):
        last = Net.parse(behind).layers[0].name
        proposal, reborn = rebirth(block([], A, B, behind=(behind,)))
        assert reasons(proposal)["join", last] == (
            "branch 'the input' does not end in a convolution that could take in what follows"
        )
        assert last in layers(reborn)
    proposal, reborn = rebirth(block(B, [*wide("e"), pool("p", "e", 3, 1, "pad: 1")], behind=(DOWN,)))
    assert reasons(proposal)["join", "down"] == (
        "branch 'e' does not end in a convolution that could take in what follows"
    )

    proposal, reborn = rebirth(
        block(B, wide("e"), behind=(pool("down", "join", 1, 7),), size=10), kernel="auto"
    )
    assert reasons(proposal)["join", "down"] == "no kernel of stride 7 gives the 3 outputs needed"
    assert layers(reborn) == layers(block(B, wide("e"), behind=(DOWN,)))


def test_a_second_reader_of_the_concat_keeps_the_pool():
    behind = (conv("other", "join", 4), fc("fc2", "other"), DOWN)
    proposal, reborn = rebirth(block(A, B, behind=behind))
    assert reasons(proposal) == {("join", "down"): "blob 'join' has a second reader, 'other'"}
    assert "down" in layers(reborn)
    assert "b/rebirth" in layers(reborn)


def test_the_global_pool_stays():
    proposal, reborn = rebirth(block(A, B, behind=(pool("down", "join", 0, 0, "global_pooling: true"),)))
    assert reasons(proposal) == {("join", "down"): "'down' is the global pool"}
    assert "down" in layers(reborn)


# ---- refusals ---------------------------------------------------------------------------------------------

LEAKY = [A[0], relu("a_relu", "a", more="relu_param { negative_slope: 0.1 }")]
IN_TRAIN, IN_TEST = "include { phase: TRAIN }", "include { phase: TEST }"
STAYS = {
    # (branches, the layers of the refusal, the reason): the block stays as it is
    "1x1 beside nothing larger": (
        [A, [], B], ("a", "a_relu"), "no neighbour of 'a' in the Concat has a kernel of 2x2 or more"),
    "pool beside a smaller kernel": (
        [pooled("d", kernel=5), B], ("d_pool", "d", "d_relu"),
        "no neighbour of 'd' in the Concat has a kernel of 5x5 or more"),
    "pool beside a narrow kernel": (
        [P, [conv("b", "trunk", 8, 0, "kernel_h: 1 kernel_w: 7 pad_h: 0 pad_w: 3"), relu("b_relu", "b")]],
        ("d_pool", "d", "d_relu"), "no neighbour of 'd' in the Concat has a kernel of 3x3 or more"),
    "different ends": ([A[:1], B], ("a",), "'a' and 'b' end in different functions"),
    "another slope": ([LEAKY, B], ("a", "a_relu"), "'a' and 'b' end in different functions"),
    "a slope for each channel": (
        [[A[0], relu("a_relu", "a", kind="PReLU")], [*B[:3], relu("b_relu", "b", kind="PReLU")]],
        ("a", "a_relu"), "'a' and 'b' end in different functions"),
    "a pool into a bounded function": (
        [[pool("p", "trunk", 3, 1, "pad: 1")], [*B[:3], relu("b_relu", "b", kind="TanH")]],
        ("p",), "'p' and 'b' end in different functions"),
    "grouped absorber": (
        [A, wide("b", more="group: 2")], ("a", "a_relu"),
        "'b' is grouped and cannot take in another branch's channels"),
    "stochastic pooling": (
        [[pool("p", "trunk", 3, 1, "pad: 1 pool: STOCHASTIC"), conv("d", "p", 8), relu("d_relu", "d")], B],
        ("p", "d", "d_relu"), "'p' pools stochastically"),
    "nothing small": ([B, wide("e")], ("join",), "no branch is small enough for another to take it in"),
    "shared weights": (
        [A[:1], *([conv(name, "trunk", 8, 3, "pad: 1", extra='param { name: "w" }')] for name in "be")],
        ("a", "b", "e"), "'b' shares its weights under the name 'w'"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_refused_branches(name):
    branches, group, reason = STAYS[name]
    proposal = plans.propose(block(*branches))
    assert reasons(proposal)[group] == reason
    assert not [m for m in proposal.plan.merges if "join" in m.layers]


def test_a_global_pool_in_a_branch_stays():
    branches = [[pool("p", "trunk", 3, 1), conv("d", "p", 8), relu("d_relu", "d")],
                [conv("b", "trunk", 8, 3), relu("b_relu", "b")]]  # fmt: skip
    proposal, _ = rebirth(block(*branches, size=3))
    assert reasons(proposal)["p", "d", "d_relu"] == "'p' is the global pool"
    assert reasons(proposal)["p", "d"] == "'p' is the global pool"
    assert not proposal.plan.merges


OTHER = {
    "another axis": (
        [*TRUNK, *A, *B, concat("join", "a b", "concat_param { axis: 2 }")], "it does not join channels"),
    "the old field": (
        [*TRUNK, *A, *B, concat("join", "a b", "concat_param { concat_dim: 2 }")],
        "it does not join channels"),
    "one name twice": (
        [*TRUNK, *A, *B, concat("join", "a b"), conv("join", "data", 4).replace('top: "join"', 'top: "j2"')],
        "it has no name of its own, or several tops"),
    "different forks": (
        [*TRUNK, fc("other", "trunk"), *A, *[x.replace('"trunk"', '"data"') for x in B],
         concat("join", "a b")],
        "its branches start from different layers: data, trunk_relu"),
    "two dimensions": (
        [fc("a", "data", 8), fc("b", "data", 8), conv("c", "a", 4, 0), concat("join", "c b")],
        "the size of 'c' is not known, or not 2-D"),
    "a producer in each phase": (
        [*TRUNK, *A, *B[:3],
         layer("b_relu", "ReLU", "b", "e", IN_TRAIN), layer("b_elu", "ELU", "b", "e", IN_TEST),
         concat("join", "a e")],
        "its bottom 1 has different producers in different phases"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_refused_joins(name):
    body, reason = OTHER[name]
    proposal = plans.propose(net(*body, fc("fc", "join")))
    assert reasons(proposal)[("join",)] == reason
    assert not proposal.plan.merges


def test_a_concat_of_no_convolutions_is_no_block():
    body = [*TRUNK, relu("r", "trunk", "r"), pool("p", "trunk", 3, 1, "pad: 1"), concat("join", "r p")]
    proposal = plans.propose(net(*body, fc("fc", "join")))
    assert reasons(proposal) == {("trunk", "p"): "blob 'trunk' has a second reader, 'r'"}
    assert not proposal.plan.merges


def test_the_last_classifier_is_no_branch():
    body = [*TRUNK, *A, *B, concat("join", "a b")]
    proposal = plans.propose(net(*body))
    assert reasons(proposal) == {("a", "b_reduce", "b"): "'a' is the last classifier"}


def test_what_another_merge_has_taken():
    """A pool is the tail of one block and, alone behind a Concat of one, in a branch of another."""
    behind = (DOWN, conv("e", "down", 8, 3), relu("e_relu", "e"), concat("second", "e"), lrn("n", "second"))
    proposal, reborn = rebirth(block(A, B, behind=behind), skip=["unused:second"])
    assert reasons(proposal)[("e",)] == "another merge has taken its layers"
    assert {"second", "n"} < set(layers(reborn))


def test_a_block_of_auxiliary_heads_is_no_candidate():
    data = layer(
        "data", "DummyData", "", "data label",
        "dummy_data_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } shape { dim: 1 } }",
    )  # fmt: skip
    aux = [
        *(x.replace('"trunk"', '"join"') for x in (*one("x"), *wide("y"))),
        concat("side", "x y"),
        fc("fa", "side"),
    ]
    body = [
        *TRUNK,
        *A,
        *B,
        concat("join", "a b"),
        *aux,
        layer("aux", "SoftmaxWithLoss", "fa label", None, "loss_weight: 0.3"),
    ]
    proposal, reborn = rebirth(
        net(data, *body, fc("fc", "join"), layer("loss", "SoftmaxWithLoss", "fc label"), size=())
    )
    assert list(merges(proposal)) == ["join"]
    assert not proposal.refused
    assert {"x", "y", "side"} < set(layers(reborn))


# ---- steps ------------------------------------------------------------------------------------------------


def chain_of(names: list[str], downs: tuple[str, ...] = ()) -> Net:
    """Like blocks in a row, all of 16 channels; a pool behind those in ``downs``."""
    body, at = list(TRUNK), "trunk"
    for name in names:
        layers_ = [*one(f"{name}/a"), *wide(f"{name}/b")]
        body += [x.replace('"trunk"', f'"{at}"') for x in layers_]
        body.append(concat(f"{name}/out", f"{name}/a {name}/b"))
        at = f"{name}/out"
        if name in downs:
            body.append(pool(f"{name}/down", at))
            at = f"{name}/down"
    return net(*body, fc("fc", at), size=(1, 3, 48, 48))


def test_three_like_blocks_in_a_row_are_one_step():
    stages = {m.id: m.stage for m in plans.propose(chain_of(["s1", "s2", "s3", "s4"])).plan.active}
    assert stages == {"s1": "s1", "s2": "s2-s4", "s3": "s2-s4", "s4": "s2-s4"}
    stages = {m.id: m.stage for m in plans.propose(chain_of(["s1", "s2", "s3"])).plan.active}
    assert stages == {"s1": "s1", "s2": "s2", "s3": "s3"}
    stages = {m.id: m.stage for m in plans.propose(chain_of(["s1", "s2", "s3", "s4"], ("s2",))).plan.active}
    assert stages == {"s1": "s1", "s2": "s2", "s3": "s3", "s4": "s4"}


def test_ids_leave_out_what_all_names_begin_with():
    assert list(merges(plans.propose(chain_of(["net/mixed_a", "net/mixed_b"])))) == ["a", "b"]
    assert list(merges(plans.propose(chain_of(["only"])))) == ["only"]
    body = chain_of(["m1", "m2"]).text().replace("m1/", "m/1_").replace("m2/", "m/2_")
    assert list(merges(plans.propose(Net.parse(body)))) == ["m/1_out", "m/2_out"]


# ---- what inherit makes of it -----------------------------------------------------------------------------


def test_channels_keep_their_order_in_real_caffe(in_caffe, tmp_path):
    """With reducers that lose nothing a 1x1 branch is represented exactly: the outputs stay the same."""
    branches = [A, wide("b", reduce=40), wide("c", kernel=5), one("e"), one("f")]
    pairs = []
    for order in ([0, 1, 2], [1, 0, 2], [3, 4, 1], [3, 1, 4], [2, 1, 0]):
        original = with_weights(block(*(branches[i] for i in order)))
        random = np.random.default_rng(5)
        eye = np.concatenate([np.eye(32), random.random((8, 32))])[random.permutation(40)]
        weight = eye.astype(np.float32)[:, :, None, None] * np.float32(0.5)
        bias = random.random(40, np.float32)
        original.layer("b_reduce").record = Record("b_reduce", "Convolution", [Blob(weight), Blob(bias)])
        names = [m.id for m in plans.propose(original, reduce=1).plan.merges]
        pairs += [original, rebirth(original, reduce=1, only=names)[1]]
        assert len(pairs[-1].layers) < len(pairs[-2].layers)
    found = compute(in_caffe, tmp_path, pairs)
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert difference(before["join"], after["join"]) < 1e-4
        assert difference(before["fc"], after["fc"]) < 1e-4


def test_absorbed_rows_are_pseudo_inverse_of_the_reducer():
    """W_1x1 pinv(W_reduce) at the centre, in the 1x1 branch's place in the Concat."""
    original = with_weights(block(A, B))
    _, reborn = rebirth(original, reduce=1, only=["join"])
    weight = blobs_of(reborn, "b/rebirth")[0]
    assert weight.shape == (16, 16, 3, 3)
    one, reducer = (blobs_of(original, name)[0][:, :, 0, 0] for name in ("a", "b_reduce"))
    wanted = one @ np.linalg.pinv(reducer, rcond=1e-2)
    assert np.allclose(weight[:8, :, 1, 1], wanted, atol=1e-5)
    assert np.count_nonzero(weight[:8]) == wanted.size
    assert np.array_equal(weight[8:], blobs_of(original, "b")[0])
