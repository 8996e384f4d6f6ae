"""conv -> pool, LRN, BatchNorm, Scale => conv: what goes and stays, the geometry, and what is refused."""

from itertools import permutations

import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.net import TEST, TRAIN, Net
from rebirth_caffe.shapes import infer
from tests.nets import (
    ZOO,
    assert_rest_is_untouched,
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
    scale,
    shape,
    with_weights,
)

C = conv("c", "data", 8, 3, "pad: 1")


def build(*body: str, size: tuple[int, ...] = (1, 3, 16, 16)) -> Net:
    """The layers and a classifier behind the last of them."""
    return net(*body, fc("fc", Net.parse(body[-1]).layers[0].top[0]), size=size)


def wire(first: str, steps: tuple[str, ...]) -> list[str]:
    """These non-tensor layers one behind the other, each named like its kind."""
    makers = {
        "pool": lambda at: pool("pool", at),
        "lrn": lambda at: lrn("lrn", at),
        "within": lambda at: lrn("within", at, "norm_region: WITHIN_CHANNEL"),
        "norm": lambda at: norm("norm", at),
        "scale": lambda at: scale("scale", at, "scale"),
        "relu": lambda at: relu("relu", at),
    }
    at, body = first, []
    for step in steps:
        body.append(makers[step](at))
        at = Net.parse(body[-1]).layers[0].top[0]
    return body


# ---- every order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lrn_kind", ["lrn", "within"])
@pytest.mark.parametrize("steps", [*permutations(["pool", "LRN", "norm", "relu"])], ids="-".join)
def test_every_order_behind_a_convolution(steps, lrn_kind):
    steps = tuple(lrn_kind if step == "LRN" else step for step in steps)
    original = with_weights(build(C, *wire("c", steps)))
    proposal, reborn = rebirth(original)
    assert layers(reborn) == ["c/rebirth", "relu", "fc"]
    assert shape(reborn, "c/rebirth") == "8 x 3x3/2 pad 1"
    assert reborn.layer("relu").bottom == reborn.layer("relu").top
    folded = steps[0] == "norm"
    assert list(merges(proposal)) == ["fold:c", "c"][not folded :]
    last = max(i for i, step in enumerate(steps) if step != "relu")  # the ReLU behind all others stays
    gone = ["c/folded" if folded else "c", *(s for s in steps[folded : last + 1] if s != "relu")]
    assert sorted(merges(proposal)["c"].absorbs) == sorted(gone)
    assert merges(proposal)["c"].kind == "streamline"
    assert merges(proposal)["c"].stage == "c"
    assert not merges(proposal)["c"].exact
    assert infer(reborn.graph.view(TEST))[reborn.graph.view(TEST).outputs[0]] == (1, 5)
    assert not proposal.refused


@pytest.mark.parametrize("steps", [*permutations(["norm", "scale", "relu"])], ids="-".join)
def test_every_order_behind_an_inner_product(steps):
    original = with_weights(build(fc("c", "data", 6), *wire("c", steps)))
    proposal, reborn = rebirth(original)
    exact = steps[2] == "relu"  # then all of it folds
    assert layers(reborn) == ["c/folded" if exact else "c/rebirth", "relu", "fc"]
    assert [m.kind for m in merges(proposal).values()] == (
        ["fold"] if exact else ["streamline"] if steps[0] == "relu" else ["fold", "streamline"]
    )


def test_many_of_each():
    body = [
        C, *wire("c", ("relu", "pool", "lrn")),
        norm("n2", "lrn", "n2"), pool("p2", "n2", 2), relu("r2", "p2"), lrn("l2", "p2"), pool("p3", "l2", 2),
    ]  # fmt: skip
    proposal, reborn = rebirth(with_weights(build(*body, size=(1, 3, 64, 64))))
    assert layers(reborn) == ["c/rebirth", "relu", "fc"]
    assert shape(reborn, "c/rebirth") == "8 x 3x3/8 pad 1"
    assert merges(proposal)["c"].absorbs == ("c", "pool", "lrn", "n2", "p2", "r2", "l2", "p3")


def test_average_pools_too():
    _, reborn = rebirth(build(C, pool("p", "c", 2, 2, "pool: AVE")))
    assert layers(reborn) == ["c/rebirth", "fc"]


@pytest.mark.parametrize(
    ("activation", "kept"),
    [
        (relu("a", "c", more="relu_param { negative_slope: 0.1 }"), "ReLU"),
        (relu("a", "c", kind="PReLU"), "PReLU"),
        (relu("a", "c", kind="ELU"), "ELU"),
        (relu("a", "c", kind="TanH"), "TanH"),
    ],
)
def test_other_activations_are_kept_and_never_merged_twice(activation, kept):
    body = [C, activation, pool("p", "c"), relu("b", "p", kind=kept), lrn("n", "p")]
    original = with_weights(build(*body))
    proposal, reborn = rebirth(original)
    assert merges(proposal)["c"].absorbs == ("c", "p")
    assert layers(reborn) == ["c/rebirth", "a", "b", "n", "fc"]
    assert reborn.layer("a").type == kept
    assert reborn.layer("a").text.count("negative_slope") == activation.count("negative_slope")
    assert [b.array.tobytes() for b in reborn.layer("a").blobs] == [
        b.array.tobytes() for b in original.layer("a").blobs
    ]


def test_a_relu_that_is_not_in_place_becomes_so():
    _, reborn = rebirth(build(C, relu("r", "c", "r"), pool("p", "r")))
    assert layers(reborn) == ["c/rebirth", "r", "fc"]
    assert reborn.layer("c/rebirth").top == reborn.layer("r").bottom == reborn.layer("r").top == ("p",)


# ---- geometry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "conv1", "conv2"),
    [
        ("keep", "64 x 7x7/4 pad 3", "192 x 3x3/2 pad 1"),
        ("auto", "64 x 8x8/4 pad 2", "192 x 4x4/2 pad 1"),
        ("cover", "64 x 12x12/4 pad 4", "192 x 6x6/2 pad 2"),
    ],
)
def test_googlenet(kernel, conv1, conv2):
    original = Net.load(ZOO / "bvlc_googlenet" / "deploy.prototxt")
    proposal, reborn = rebirth(original, kernel=kernel)
    assert shape(reborn, "conv1/7x7_s2/rebirth") == conv1
    assert shape(reborn, "conv2/3x3/rebirth") == conv2
    assert merges(proposal)["conv1"].absorbs == ("conv1/7x7_s2", "pool1/3x3_s2", "pool1/norm1")
    assert merges(proposal)["conv2"].absorbs == ("conv2/3x3", "conv2/norm2", "pool2/3x3_s2")
    assert not offers(proposal)


@pytest.mark.parametrize("name", ["bvlc_reference_caffenet", "bvlc_alexnet"])
@pytest.mark.parametrize("kind", ["deploy", "train_val"])
def test_caffenet_loses_its_lrns_and_offers_its_pools(name, kind):
    original = Net.load(ZOO / name / f"{kind}.prototxt")
    proposal, reborn = rebirth(original)
    streamlined = {id_: m for id_, m in merges(proposal).items() if not m.exact}
    assert {id_: m.absorbs for id_, m in streamlined.items()} == {
        "conv1": ("conv1", "norm1"),
        "conv2": ("conv2", "norm2"),
    }
    assert shape(reborn, "conv1/rebirth") == "96 x 11x11/4 pad 0"
    assert shape(reborn, "conv2/rebirth") == "256 x 5x5/1 pad 2"
    assert reborn.layer("conv2/rebirth").param.convolution_param.group == 2
    assert [x for x in layers(reborn) if "1" in x or "2" in x][:6] == [
        "conv1/rebirth", "relu1", "pool1", "conv2/rebirth", "relu2", "pool2",
    ]  # fmt: skip
    wanted = {
        "conv1+pool1": ("conv1", "takes 12x12/8 pad 0 where 11x11/4 pad 0 and the pool were"),
        "conv2+pool2": ("conv2", "takes 5x5/2 pad 1 where 5x5/1 pad 2 and the pool were"),
        "conv5+pool5": ("", "takes 3x3/2 pad 0 where 3x3/1 pad 1 and the pool were"),
    }
    assert {id_: (m.instead_of, m.note) for id_, m in offers(proposal).items()} == wanted
    advice = "in the plan, or ask for --kernel auto or cover"
    assert reasons(proposal) == {
        tuple(id_.split("+")): f"the kernel or pad would change ({note}); enable '{id_}' {advice}"
        for id_, (_, note) in wanted.items()
    }


@pytest.mark.parametrize(
    ("kernel", "conv1"), [("auto", "96 x 18x18/8 pad 0"), ("cover", "96 x 19x19/8 pad 0")]
)
def test_caffenet_with_another_kernel(kernel, conv1):
    proposal, reborn = rebirth(Net.load(ZOO / "bvlc_reference_caffenet" / "deploy.prototxt"), kernel=kernel)
    assert shape(reborn, "conv1/rebirth") == conv1
    assert not {"pool1", "pool2", "pool5"} & set(layers(reborn))
    assert not offers(proposal)
    values = {v.name: s for v, s in infer(reborn.graph.view(TEST)).items()}
    assert (values["norm1"], values["norm2"], values["pool5"]) == (
        (10, 96, 27, 27), (10, 256, 13, 13), (10, 256, 6, 6),
    )  # fmt: skip


def test_an_offer_takes_the_place_of_its_merge():
    original = Net.load(ZOO / "bvlc_reference_caffenet" / "deploy.prototxt")
    proposal, reborn = rebirth(original, only=["conv1+pool1", "conv5+pool5"])
    assert list(merges(proposal)) == ["conv1+pool1", "conv5+pool5"]
    assert proposal.plan.stages == ["conv1", "conv5+pool5"]
    assert shape(reborn, "conv1/rebirth") == "96 x 12x12/8 pad 0"
    assert shape(reborn, "conv5/rebirth") == "256 x 3x3/2 pad 0"
    assert {"norm2", "conv2", "pool2"} < set(layers(reborn))
    assert not {"norm1", "pool1", "pool5"} & set(layers(reborn))


def test_one_axis_at_a_time():
    tall = conv("c", "data", 8, 0, "kernel_h: 5 kernel_w: 1 pad_h: 2 pad_w: 0")
    wide = layer(
        "p", "Pooling", "c", None, "pooling_param { kernel_h: 1 kernel_w: 2 stride_h: 1 stride_w: 2 }"
    )
    _, reborn = rebirth(build(tall, wide))
    assert shape(reborn, "c/rebirth") == "8 x 5x1/1x2 pad 2x0"


def test_groups_and_dilation_stay():
    body = conv("c", "data", 8, 3, "group: 2 dilation: 2 pad: 2")
    _, reborn = rebirth(build(body, pool("p", "c", 2), size=(1, 4, 16, 16)))
    p = reborn.layer("c/rebirth").param.convolution_param
    assert (p.group, list(p.dilation), list(p.stride), list(p.pad)) == (2, [2], [2], [2])


def test_without_a_known_size_what_needs_none_goes():
    """A Data layer that does not say how large its images are."""
    data = layer("data", "Data", "", "data label", 'data_param { source: "db" batch_size: 2 }')
    body = [conv("c", "data", 8, 3), lrn("n", "c"), conv("d", "n", 8, 3), pool("p", "d"), conv("e", "p", 4)]
    end = [fc("fc", "e"), layer("loss", "SoftmaxWithLoss", "fc label")]
    proposal, reborn = rebirth(net(data, *body, *end, size=()))
    assert list(merges(proposal)) == ["c"]
    assert shape(reborn, "c/rebirth") == "8 x 3x3/1 pad 0"
    assert reasons(proposal) == {
        ("d", "p"): "the size of 'n' is not known",
        ("p", "e"): "the size of 'd' is not known",
    }


def test_three_axes_are_left_as_they_are():
    body = conv("c", "data", 8, 0, "kernel_size: 3 kernel_size: 2 kernel_size: 3")
    original = with_weights(build(body, relu("r", "c"), norm("n", "c"), size=(1, 2, 5, 5, 5)))
    _, reborn = rebirth(original)
    assert list(reborn.layer("c/rebirth").param.convolution_param.kernel_size) == [3, 2, 3]
    assert [b.shape for b in reborn.layer("c/rebirth").blobs] == [(8, 2, 3, 2, 3), (8,)]


# ---- what it computes at first -----------------------------------------------------------------------------


def test_inherit_looks_where_the_group_looked(in_caffe, tmp_path):
    """In real Caffe: the reborn convolution is the original one, at every second pixel."""
    body = [C, pool("p", "c")]
    original = with_weights(build(*body))
    nets = [original, *(rebirth(original, kernel=kernel)[1] for kernel in ("keep", "auto", "cover"))]
    plain, keep, auto, cover = compute(in_caffe, tmp_path, nets)
    assert [shape(one, "c/rebirth") for one in nets[1:]] == [
        "8 x 3x3/2 pad 1", "8 x 4x4/2 pad 1", "8 x 6x6/2 pad 2",
    ]  # fmt: skip
    assert difference(plain["c"][:, :, ::2, ::2], keep["p"]) < 1e-5
    for centred in (auto, cover):  # the pool's windows are centred at 2i + 1
        assert difference(plain["c"][:, :, 1::2, 1::2], centred["p"]) < 1e-5


# ---- a pool in front --------------------------------------------------------------------------------------

FRONT = [pool("p", "data", 3, 2, "pad: 1"), conv("c", "p", 8, 3, "pad: 1")]


def test_a_pool_in_front():
    proposal, reborn = rebirth(with_weights(build(*FRONT, size=(1, 3, 15, 15))))
    assert layers(reborn) == ["c/rebirth", "fc"]
    assert shape(reborn, "c/rebirth") == "8 x 3x3/2 pad 1"
    assert merges(proposal)["c"].absorbs == ("p", "c")


def test_a_pool_in_front_that_would_change_the_kernel_is_an_offer():
    proposal, reborn = rebirth(build(*FRONT))
    assert layers(reborn) == ["p", "c", "fc"]
    (offer,) = offers(proposal).values()
    assert (offer.id, offer.absorbs, offer.instead_of) == ("p+c", ("p", "c"), "")
    assert offer.note == "takes 3x3/2 pad 2 where the pool and 3x3/1 pad 1 were"
    assert reasons(proposal) == {
        ("p", "c"): f"the kernel or pad would change ({offer.note}); enable 'p+c' in the plan, "
        "or ask for --kernel auto or cover"
    }
    _, reborn = rebirth(build(*FRONT), only=["p+c"])
    assert shape(reborn, "c/rebirth") == "8 x 3x3/2 pad 2"
    _, reborn = rebirth(build(*FRONT), kernel="cover")
    assert shape(reborn, "c/rebirth") == "8 x 8x8/2 pad 4"


def test_a_pool_behind_goes_before_a_pool_in_front():
    body = [conv("a", "data", 4, 3, "pad: 1"), pool("p", "a", 2), conv("b", "p", 4, 3, "pad: 1")]
    proposal, reborn = rebirth(build(*body))
    assert list(merges(proposal)) == ["a"]
    assert layers(reborn) == ["a/rebirth", "b", "fc"]


# ---- what stays -------------------------------------------------------------------------------------------


def test_the_global_pool_and_the_classifier_stay():
    body = [C, relu("r", "c"), pool("p", "c", 0, 0, "global_pooling: true pool: AVE")]
    proposal, reborn = rebirth(build(*body))
    assert layers(reborn) == ["c", "r", "p", "fc"]
    assert reasons(proposal) == {("c", "p"): "'p' is the global pool"}


def test_a_global_pool_in_front_of_a_convolution_stays():
    proposal, reborn = rebirth(build(pool("p", "data", 16, 1), conv("c", "p", 8)))
    assert reasons(proposal) == {("p", "c"): "'p' is the global pool"}
    assert layers(reborn) == ["p", "c", "fc"]


def test_the_rest_of_a_net_is_the_same_to_the_byte():
    """Every call of rebirth here asserts it; see that this can fail."""
    original = with_weights(build(C, lrn("n", "c")))
    proposal, reborn = rebirth(original)
    other = Net.parse(reborn.text().replace("num_output: 5", "num_output:  5"))
    with pytest.raises(AssertionError):
        assert_rest_is_untouched(original, other, proposal.plan)


IN_TRAIN = "include { phase: TRAIN }"
REFUSED = {
    "a second reader": (
        [C, pool("p", "c"), conv("other", "c", 4), fc("fc2", "other"), relu("r", "p")],
        {("c", "p"): "blob 'c' has a second reader, 'other'"},
    ),
    "a second reader behind the ReLU": (
        [C, relu("r", "c"), fc("s", "c"), pool("p", "c")],
        {("c", "p"): "blob 'c' has a second reader, 's'"},
    ),
    "a reader in training": (
        [C, layer("s", "HDF5Output", "c data", "", IN_TRAIN), lrn("n", "c")],
        {("c", "n"): "blob 'c' has a second reader, 's'"},
    ),
    "its mask": (
        [C, layer("p", "Pooling", "c", "p mask", "pooling_param { kernel_size: 2 stride: 2 }")],
        {("c", "p"): "'p' has several bottoms or tops, or a name that is not its own"},
    ),
    "stochastic pooling": (
        [C, pool("p", "c", 3, 2, "pool: STOCHASTIC")],
        {("c", "p"): "'p' pools stochastically"},
    ),
    "shared weights": (
        [
            conv("c", "data", 8, 3, extra='param { name: "w" }'),
            conv("d", "data", 8, 3, extra='param { name: "w" }'),
            fc("fc2", "d"),
            lrn("n", "c"),
        ],
        {("c", "n"): "'c' shares its weights under the name 'w'"},
    ),
    "two inputs": (
        [layer("c", "Convolution", "data data", "c d", "convolution_param { num_output: 4 kernel_size: 3 }"),
         relu("q", "d"), lrn("n", "c")],
        {("c", "n"): "'c' has several bottoms or tops"},
    ),
    "another axis": (
        [fc("c", "data", 6, "axis: 2"), relu("r", "c"), norm("n", "c")],
        {("c", "n"): "'c' has its outputs on another axis than the channels"},
    ),
    "stochastic pooling in front": (
        [pool("p", "data", 2, 2, "pool: STOCHASTIC"), C.replace('"data"', '"p"')],
        {("p", "c"): "'p' pools stochastically"},
    ),
    "shared weights behind a pool": (
        [
            pool("p", "data", 2),
            conv("c", "p", 8, 3, extra='param { name: "w" }'),
            conv("d", "data", 8, 3, extra='param { name: "w" }'),
            fc("fc2", "d"),
            relu("r", "c"),
        ],
        {("p", "c"): "'c' shares its weights under the name 'w'"},
    ),
    "dilated behind a pool": (
        [pool("p", "data", 2), conv("c", "p", 8, 3, "dilation: 2 pad: 2")],
        {("p", "c"): "'c' is dilated: its taps would not fit the new grid"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    body, wanted = REFUSED[name]
    original = build(*body)
    proposal, reborn = rebirth(original)
    assert {k: v for k, v in reasons(proposal).items() if k in wanted} == wanted
    assert not proposal.plan.merges
    assert reborn.text() == original.text()


def test_a_chain_with_an_output_in_one_phase():
    c = conv("c", "data", 8, 3)
    body = [c, lrn("n", "c"), fc("fc2", "n", extra=IN_TRAIN), conv("d", "data", 8, 3)]
    body[1] = layer("n", "LRN", "c", None, IN_TRAIN)
    proposal = plans.propose(build(*body))
    assert reasons(proposal) == {}  # what only training has is no part of the deployed net
    body[1:3] = [
        layer("n", "LRN", "c", None, "include { phase: TEST }"),
        fc("fc2", "n", extra="include { phase: TEST }"),
    ]
    assert reasons(plans.propose(build(*body))) == {("c", "n"): "'c' and 'n' are not in the same phases"}


def test_the_last_classifier():
    proposal, reborn = rebirth(net(C, conv("d", "c", 4), pool("p", "d")))
    assert reasons(proposal) == {("d", "p"): "'d' is the last classifier"}
    assert layers(reborn) == ["c", "d", "p"]


def test_no_kernel_fits():
    """A pool whose last window lies outside its input: a convolution would need more padding than kernel."""
    reason = "no kernel of stride 5 gives the 3 outputs needed"
    behind = [conv("c", "data", 8, 1), pool("p", "c", 1, 5)]
    in_front = [pool("p", "data", 1, 5), conv("c", "p", 8, 1)]
    for body, group in ((behind, ("c", "p")), (in_front, ("p", "c"))):
        proposal = plans.propose(build(*body, size=(1, 3, 7, 7)))
        assert reasons(proposal) == {group: reason}
        assert not proposal.plan.merges
    proposal, reborn = rebirth(build(*behind, lrn("n", "p"), size=(1, 3, 7, 7)))
    assert reasons(proposal) == {("c", "p"): reason}
    assert layers(reborn) == ["c/rebirth", "p", "fc"]  # the LRN goes all the same


# ---- ids and names ----------------------------------------------------------------------------------------


def test_ids_are_what_people_call_the_layers():
    body = [
        conv("block1/a", "data", 4, 3, "pad: 1"), lrn("n1", "block1/a"), pool("p1", "n1"),
        conv("block1/b", "p1", 4, 3), lrn("n2", "block1/b"), pool("p2", "n2"),
        conv("block1", "p2", 4, 1), lrn("n3", "block1"),
    ]  # fmt: skip
    proposal, reborn = rebirth(build(*body, size=(1, 3, 31, 31)))
    assert list(merges(proposal)) == ["block1", "block1/b", "block1:2"]
    wanted = {"block1+p1": "block1", "block1/b+p2": "block1/b"}
    assert {m.id: m.instead_of for m in offers(proposal).values()} == wanted
    assert "enable 'block1/b+p2'" in reasons(proposal)["block1/b", "p2"]
    assert layers(reborn) == ["block1/a/rebirth", "p1", "block1/b/rebirth", "p2", "block1/rebirth", "fc"]
    _, reborn = rebirth(build(*body, size=(1, 3, 31, 31)), only=["block1/b+p2"])
    assert layers(reborn) == ["block1/a", "n1", "p1", "block1/b/rebirth", "block1", "n3", "fc"]


def test_a_reborn_net_may_be_reborn_again():
    once = rebirth(with_weights(build(C, lrn("n", "c"), pool("p", "n"))), only=["c"])[1]
    assert layers(once) == ["c/rebirth", "fc"]
    again = net(*(x.text for x in once.layers[1:2]), lrn("n2", "p"), fc("fc", "n2"))
    _, twice = rebirth(with_weights(again))
    assert layers(twice) == ["c/rebirth2", "fc"]


@pytest.mark.parametrize("phase", [TEST, TRAIN])
def test_googlenets_train_val_keeps_every_shape_that_is_read(phase):
    original = Net.load(ZOO / "bvlc_googlenet" / "train_val.prototxt")
    _, reborn = rebirth(original)
    before = {v.name: s for v, s in infer(original.graph.view(phase)).items()}
    after = {v.name: s for v, s in infer(reborn.graph.view(phase)).items()}
    common = before.keys() & after.keys()
    assert {k: before[k] for k in common} == {k: after[k] for k in common}
    heads = [x for x in original.layers if x.name.startswith("loss")]
    assert [reborn.layer(x.name).text for x in heads] == [x.text for x in heads]


def test_concat_of_one():
    """A Concat of one bottom joins nothing: what stands behind it is its tail."""
    _, reborn = rebirth(build(C, concat("j", "c"), pool("p", "j")))
    assert layers(reborn) == ["c/rebirth", "fc"]
    assert shape(reborn, "c/rebirth") == "8 x 3x3/2 pad 1"
