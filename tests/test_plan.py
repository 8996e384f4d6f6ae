"""The plan: proposed, written, read back, edited, applied."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.cost import cost
from rebirth_caffe.errors import PlanError
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.init.rescale import pooled
from rebirth_caffe.merge import Merge
from rebirth_caffe.net import Net
from rebirth_caffe.plan import Plan
from rebirth_caffe.rebirth import rebirth
from tests.nets import (
    blobs_of,
    concat,
    conv,
    dropout,
    fc,
    layers,
    lrn,
    norm,
    pool,
    relu,
    scale,
    shape,
    with_weights,
)
from tests.nets import net as build

ZOO = Path(__file__).resolve().parent.parent / "prototxts"
GOOGLENET = ZOO / "bvlc_googlenet/deploy.prototxt"
CAFFENET = ZOO / "bvlc_reference_caffenet/deploy.prototxt"

TEXT = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 16 dim: 16 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc" inner_product_param { num_output: 2 } }
"""
PLAN = """
version: 1
net: small
merges:
- id: conv
  kind: streamline
  stage: conv
  absorbs: [conv, pool]
  becomes:
  - {name: conv/rebirth, like: conv, bottom: ['@in'], top: ['@out'],
     num_output: 4, kernel: [3, 3], stride: [2, 2], pad: [1, 1], group: 1}
  - {name: relu, bottom: ['@out'], top: ['@out']}
"""


def given(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return plans.load(path)


@pytest.mark.parametrize("name", ["bvlc_googlenet", "bvlc_reference_caffenet", "resnet_50"])
@pytest.mark.parametrize("kernel", ["keep", "auto"])
def test_written_and_read_back_it_is_the_same_plan(tmp_path, name, kernel):
    plan = plans.propose(Net.load(ZOO / name / "deploy.prototxt"), kernel).plan
    assert plan.merges
    assert given(tmp_path, plans.dump(plan)) == plan


def test_what_it_proposes_is_a_plan_a_person_could_have_written(tmp_path):
    net = Net.parse(TEXT)
    assert plans.propose(net).plan.merges == given(tmp_path, PLAN).merges


def test_applying_is_deterministic_and_the_seed_counts(tmp_path):
    net = Net.parse(TEXT)
    fill_missing(net)
    plan = plans.propose(net).plan
    files = {}
    for name, init, seed in (("a", "xavier", 0), ("b", "xavier", 0), ("c", "xavier", 1), ("d", "inherit", 0)):
        made = plans.apply(net, plan, init, seed)
        made.write_weights(tmp_path / name)
        files[name] = made.text(), (tmp_path / name).read_bytes()
    assert files["a"] == files["b"]
    assert len({text for text, _ in files.values()}) == 1
    assert len({weights for _, weights in files.values()}) == 3


def test_an_edited_geometry_is_obeyed(tmp_path):
    plan = given(tmp_path, PLAN.replace("kernel: [3, 3]", "kernel: [4, 4]"))
    net = plans.apply(Net.parse(TEXT), plan)
    assert list(net.layer("conv/rebirth").param.convolution_param.kernel_size) == [4]
    oblong = given(
        tmp_path, PLAN.replace("kernel: [3, 3]", "kernel: [5, 3]").replace("pad: [1, 1]", "pad: [2, 1]")
    )
    p = plans.apply(Net.parse(TEXT), oblong).layer("conv/rebirth").param.convolution_param
    assert (p.kernel_h, p.kernel_w, p.pad_h, p.pad_w) == (5, 3, 2, 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("stride: [2, 2]", "stride: [3, 3]", "blob 'pool' would become"),
        ("num_output: 4", "num_output: 5", "blob 'pool' would become"),
        ("absorbs: [conv, pool]", "absorbs: [conv, nopool]", "no layer 'nopool'"),
        ("absorbs: [conv, pool]", "absorbs: [pool]", "made after 'conv', no layer of this merge"),
        ("  - {name: relu, bottom: ['@out'], top: ['@out']}\n", "", "exactly one"),
        ("like: conv,", "like: fc,", "fc"),
        ("like: conv,", "like: nothing,", "nothing"),
        ("bottom: ['@in']", "bottom: [nowhere]", "nowhere"),
    ],
)
def test_what_does_not_fit_the_net_is_refused_by_name(tmp_path, old, new, said):
    assert old in PLAN
    with pytest.raises(PlanError) as refused:
        plans.apply(Net.parse(TEXT), given(tmp_path, PLAN.replace(old, new)))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version: 1", "version: 2", "version is 2"),
        ("  kind: streamline", "  kind: magic", "known are"),
        ("  stage: conv", "  steps: conv", "unknown key 'steps'"),
        ("like: conv,", "liek: conv,", "unknown key 'liek'"),
        ("  stage: conv", "  enabled: maybe", "true or false"),
        ("  stage: conv", "  instead_of: other", "'other', no merge"),
        ("absorbs: [conv, pool]", "absorbs: []", "absorbs no layer"),
        ("absorbs: [conv, pool]", "absorbs: conv", "no list"),
        ("absorbs: [conv, pool]", "absorbs: [[conv]]", "give a name"),
        ("kernel: [3, 3]", "kernel: [3, 3, 3]", "give [height, width]"),
        ("kernel: [3, 3]", "kernel: [0, 3]", "give [height, width]"),
        ("num_output: 4", "num_output: -4", "whole number from 1"),
        ("num_output: 4", "num_output: true", "whole number from 1"),
        (
            "merges:",
            "merges: !!python/object/apply:os.system ['true']\nx:",
            "the tag tag:yaml",
        ),
        (
            "version: 1",
            "version: !!timestamp 1",
            "timestamp has no place in a plan",
        ),
        ("absorbs: [conv, pool]", "absorbs: &a [*a]", "*a repeats a part of the file; write it out"),
        ("  kind: streamline", "  kind: drop\n  kind: streamline", ":7: 'kind' is given twice; keep one"),
        ("version: 1", "version: [", "not YAML"),
        ("bottom: ['@in']", "bottom: []", "needs a bottom"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_with_its_place(tmp_path, old, new, said):
    assert old in PLAN
    with pytest.raises(PlanError) as refused:
        plans.apply(Net.parse(TEXT), given(tmp_path, PLAN.replace(old, new, 1)))
    assert "plan.yaml" in str(refused.value)
    assert said in str(refused.value)


def test_two_merges_of_one_name_and_files_that_are_not_there(tmp_path):
    with pytest.raises(PlanError, match="two merges are called 'conv'"):
        given(tmp_path, PLAN + PLAN[PLAN.index("- id: conv") :])
    with pytest.raises(PlanError, match="no such file"):
        plans.load(tmp_path / "other.yaml")
    with pytest.raises(PlanError, match="is a directory"):
        plans.load(tmp_path)


def test_steps_make_every_merge_once_from_bottom_to_top():
    net = Net.load(GOOGLENET)
    plan = plans.propose(net).plan
    steps = plan.steps()
    assert [step.name for step in steps] == plan.stages
    made: list[Merge] = []
    for step in steps:
        made += step.merges
        part = plan.only(made)
        assert part.stages == plan.stages[: plan.stages.index(step.name) + 1]
        plans.apply(net, part)
    assert part.active == plan.active


def test_the_other_schedules():
    plan = plans.propose(Net.load(GOOGLENET)).plan
    steps = plan.steps()
    (joint,) = plan.steps("joint")
    assert (joint.name, list(joint.merges)) == ("joint", [m for step in steps for m in step.merges])
    assert joint.new == [name for step in steps for name in step.new]
    first, *again = plan.steps("joint-then-steps")
    assert first == joint
    assert [(s.name, s.merges, s.again, s.new) for s in again] == [
        (s.name, (), s.merges, s.new) for s in steps
    ]
    assert Plan("x", ()).steps("joint") == Plan("x", ()).steps("joint-then-steps") == []
    with pytest.raises(PlanError, match="schedule jiont: give one of steps, joint, joint-then-steps"):
        plan.steps("jiont")


def test_each_merge_stands_alone():
    """Any merge may be switched off without the others noticing."""
    net = Net.load(GOOGLENET)
    plan = plans.propose(net).plan
    for i, merge in enumerate(plan.merges):
        merges = list(plan.merges)
        merges[i] = replace(merge, enabled=False)
        made = plans.apply(net, Plan(plan.net, tuple(merges)))
        names = {layer.name for layer in made.layers}
        assert names.issuperset(merge.absorbs)
        only = plans.apply(net, Plan(plan.net, (merge,)))
        assert not {layer.name for layer in only.layers}.intersection(merge.absorbs)


def test_an_offer_takes_the_place_of_another():
    net = Net.load(CAFFENET)
    plan = plans.propose(net).plan
    offer = next(m for m in plan.merges if m.id == "conv1+pool1")
    assert not offer.enabled
    assert offer.instead_of == "conv1"
    merges = tuple(replace(m, enabled=True) if m is offer else m for m in plan.merges)
    active = Plan(plan.net, merges).active
    assert offer.id in {m.id for m in active}
    assert "conv1" not in {m.id for m in active}


def test_only_and_skip_know_steps_and_merges_and_say_what_there_is():
    net = Net.load(GOOGLENET)
    assert plans.propose(net, only=["4b-4d"]).plan.stages == ["4b-4d"]
    assert "4b-4d" not in plans.propose(net, skip=["4b-4d"]).plan.stages
    assert [m.id for m in plans.propose(net, only=["4c"]).plan.active] == ["4c"]
    with pytest.raises(PlanError, match=r"no merge is called 'x'; there are .*conv1"):
        plans.propose(net, only=["x"])
    for plan in (plans.propose(net, exact=True).plan, plans.propose(net).plan):
        with pytest.raises(PlanError, match=r"no exact merge is called '3a'; there are drop:pool5"):
            plans.select(net, plan, only=["3a"], exact=True)
    resnet = Net.load(ZOO / "resnet_50/deploy.prototxt")
    assert [m.id for m in plans.propose(resnet, only=["conv1"]).plan.active] == ["fold:conv1", "conv1"]


def test_an_offer_that_is_taken_is_not_refused_too():
    net = Net.load(CAFFENET)
    refused = [refusal.layers for refusal in plans.propose(net).refused]
    assert ("conv1", "pool1") in refused
    taken = plans.propose(net, only=["conv1+pool1"])
    assert ("conv1", "pool1") not in [refusal.layers for refusal in taken.refused]
    assert ("conv2", "pool2") in [refusal.layers for refusal in taken.refused]


# ---- what a person may write ------------------------------------------------------------------------------


def small(tmp_path, *edits, text=PLAN):
    """The small net after PLAN with these edits (old, new)."""
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return plans.apply(with_weights(Net.parse(TEXT)), given(tmp_path, text))


GEOMETRY = "num_output: 4, kernel: [3, 3], stride: [2, 2], pad: [1, 1], group: 1"


def test_what_is_not_given_stays_as_it_was(tmp_path):
    reborn = small(tmp_path, (GEOMETRY, "stride: [2, 2]"))
    assert shape(reborn, "conv/rebirth") == "4 x 3x3/2 pad 1"
    assert blobs_of(reborn, "conv/rebirth")[0].shape == (4, 3, 3, 3)
    with pytest.raises(PlanError, match="blob 'pool' would become"):
        small(tmp_path, (GEOMETRY, "kernel: [3, 3]"))


def test_one_number_stands_for_both_axes(tmp_path):
    reborn = small(tmp_path, (GEOMETRY, "kernel: 5, stride: 2, pad: 2"))
    assert shape(reborn, "conv/rebirth") == "4 x 5x5/2 pad 2"


def test_another_group_is_obeyed(tmp_path):
    net = with_weights(Net.parse(TEXT.replace("dim: 3", "dim: 4")))
    reborn = plans.apply(net, given(tmp_path, PLAN.replace("group: 1", "group: 2")))
    assert reborn.layer("conv/rebirth").param.convolution_param.group == 2
    assert blobs_of(reborn, "conv/rebirth")[0].shape == (4, 2, 3, 3)
    with pytest.raises(PlanError, match="no multiple of group 3"):
        plans.apply(net, given(tmp_path, PLAN.replace("group: 1", "group: 3")))


def test_a_smaller_kernel_is_cut_out_of_the_old_one(tmp_path):
    original = with_weights(Net.parse(TEXT))
    reborn = small(tmp_path, ("kernel: [3, 3]", "kernel: [1, 1]"), ("pad: [1, 1]", "pad: [0, 0]"))
    kernel = blobs_of(reborn, "conv/rebirth")[0]
    wanted = np.float32(pooled(4)) * blobs_of(original, "conv")[0]  # the pool is made up for
    assert (kernel[:, :, 0, 0] == wanted[:, :, 1, 1]).all()


def test_rows_may_be_placed_by_hand(tmp_path):
    edits = (("kernel: [3, 3]", "kernel: [5, 5]"), ("pad: [1, 1]", "pad: [2, 2]"))
    rows = ("group: 1}", "group: 1, rows: [{layer: conv, at: [2, 0]}]}")
    kernel = blobs_of(small(tmp_path, *edits, rows), "conv/rebirth")[0]
    wanted = np.float32(pooled(4)) * blobs_of(with_weights(Net.parse(TEXT)), "conv")[0]
    assert (kernel[:, :, 2:, :3] == wanted).all()
    assert not kernel[:, :, :2].any()
    assert not kernel[:, :, :, 3:].any()


def test_layers_taken_away_by_hand(tmp_path):
    """A merge that becomes nothing: who read what it gave reads what it read."""
    body = [
        conv("c", "data", 4),
        relu("r", "c", "r"),
        dropout("d", "r", "d"),
        conv("e", "d", 4),
        fc("fc", "e"),
    ]
    text = "version: 1\nnet: x\nmerges:\n- {id: gone, kind: streamline, absorbs: [r, d], becomes: []}\n"
    reborn = plans.apply(build(*body), given(tmp_path, text))
    assert layers(reborn) == ["c", "e", "fc"]
    assert reborn.layer("e").bottom == ("c",)


def test_a_merge_may_build_upon_another(tmp_path):
    text = PLAN + (
        "- id: again\n  kind: streamline\n  absorbs: [conv/rebirth]\n  becomes:\n"
        "  - {name: conv/last, like: conv/rebirth, bottom: ['@in'], top: ['@out'], kernel: 5, pad: 2}\n"
    )
    assert layers(small(tmp_path, text=text)) == ["conv/last", "relu", "fc"]
    net, plan = Net.parse(TEXT), given(tmp_path, text)
    assert [m.id for m in plans.select(net, plan, only=["again"]).active] == ["conv", "again"]
    with pytest.raises(PlanError, match="'again': the net has no layer 'conv/rebirth' at this point"):
        plans.apply(net, plans.select(net, plan, skip=["conv"]))


FOLD = """
version: 1
net: x
merges:
- id: f
  kind: fold
  absorbs: [c, n]
  becomes:
  - {name: c/folded, like: c, bottom: ['@in'], top: ['@out']}
"""
BODY = [conv("c", "data", 4, 3), norm("n", "c"), relu("r", "c"), pool("p", "c"), lrn("l", "p"), fc("fc", "l")]
NO_FOLD = "merge 'f': a fold makes a Convolution or InnerProduct of itself and the BatchNorms"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("absorbs: [c, n]", "absorbs: [c, n, r]", NO_FOLD),
        ("absorbs: [c, n]", "absorbs: [n]", NO_FOLD),
        ("  becomes:\n  - {name: c/folded, like: c, bottom: ['@in'], top: ['@out']}", "  becomes: []",
         NO_FOLD),
        ("kind: fold\n  absorbs: [c, n]", "kind: drop\n  absorbs: [c, n]",
         "merge 'f': a drop becomes nothing"),
        ("name: c/folded, ", "name: c/folded, num_output: 5, ",
         "layer 'c/folded' keeps its weights: no num_output can be given"),
        ("name: c/folded, like: c,", "name: c, kernel: 5,",
         "layer 'c' keeps its weights: no kernel can be given; give it another name"),
        ("like: c,", "like: p,", "layer 'c/folded' is made after 'p', no layer of this merge"),
        ("like: c,", "like: c, rows: [{layer: p}],",
         "layer 'c/folded' is made after 'p', no layer of this merge"),
        ("kind: fold\n  absorbs: [c, n]\n  becomes:\n  - {name: c/folded, like: c",
         "kind: streamline\n  absorbs: [p]\n  becomes:\n  - {name: q, like: p",
         "layer 'q' is made after 'p', a Pooling; only a Convolution or InnerProduct can be reborn"),
        ("kind: fold\n  absorbs: [c, n]\n  becomes:\n  - {name: c/folded, like: c",
         "kind: streamline\n  absorbs: [fc]\n  becomes:\n  - {name: q, stride: 2, like: fc",
         "layer 'q' is an InnerProduct: it has no stride"),
        ("kind: fold\n  absorbs: [c, n]", "kind: streamline\n  absorbs: [c, p]",
         "merge 'f' reads c, data; a merge reads exactly one blob from outside"),
        ("top: ['@out']", "top: [elsewhere]", "merge 'f': none of the layers it becomes gives @out"),
        ("bottom: ['@in']", "bottom: [l]",
         "layer 'c/folded' reads 'l', which is neither @in nor given above it"),
    ],
)  # fmt: skip
def test_what_a_merge_cannot_say(tmp_path, old, new, said):
    assert old in FOLD
    assert plans.apply(with_weights(build(*BODY)), given(tmp_path, FOLD)).layer("c/folded").blobs
    with pytest.raises(PlanError) as refused:
        plans.apply(with_weights(build(*BODY)), given(tmp_path, FOLD.replace(old, new)))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_blob_in_and_one_out(tmp_path):
    second = [*BODY[:4], fc("other", "p"), *BODY[4:]]
    text = FOLD.replace("kind: fold\n  absorbs: [c, n]", "kind: streamline\n  absorbs: [c, n, r, p, l]")
    with pytest.raises(PlanError, match="'f' gives l, p; other layers may read exactly one of its blobs"):
        plans.apply(build(*second), given(tmp_path, text))


def test_a_kept_layer_whose_weights_no_longer_fit(tmp_path):
    """By hand: the reducer shrinks, and what reads it keeps its name and its weights."""
    block = build(
        conv("t", "data", 16), conv("a", "t", 8), conv("r", "t", 16), conv("b", "r", 8, 3, "pad: 1"),
        concat("j", "a b"), fc("fc", "j"),
    )  # fmt: skip
    text = (
        "version: 1\nnet: x\nmerges:\n- id: m\n  kind: branches\n  absorbs: [r]\n  becomes:\n"
        "  - {name: r/rebirth, like: r, bottom: ['@in'], top: [r/rebirth], num_output: 8}\n"
        "  - {name: b, bottom: [r/rebirth], top: ['@out']}\n"
    )
    plan = given(tmp_path, text)
    plans.apply(block, plan)  # a net without weights may learn it
    with pytest.raises(PlanError, match="layer 'b' blob 0 is 8x16x3x3, the net needs 8x8x3x3"):
        plans.apply(with_weights(block), plan)


def test_a_plan_for_another_net():
    plan = plans.propose(Net.load(GOOGLENET)).plan
    with pytest.raises(PlanError, match="is the plan for this net"):
        plans.apply(Net.load(CAFFENET), plan)


def test_names_that_yaml_would_take_for_something_else(tmp_path):
    names = {"c": "010", "n": "yes", "p": "1e3", "r": "null", "l": "a: b #c"}
    text = build(*BODY).text()
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    plan = plans.propose(Net.parse(text)).plan
    assert plan.merges
    assert given(tmp_path, plans.dump(plan)) == plan


# ---- what builds upon what --------------------------------------------------------------------------------


def test_only_brings_what_clears_the_way():
    """A Dropout between what merges is taken away first, and so are the BatchNorm and Scale."""
    body = [
        conv("c", "data", 4, 3), norm("n", "c"), scale("s", "c"), dropout("d", "c", "d"),
        dropout("e", "d", "e"), pool("p", "e"), conv("f", "p", 4), dropout("g", "f", "g"), fc("fc", "g"),
    ]  # fmt: skip
    net = with_weights(build(*body))
    proposal = plans.propose(net)
    assert [m.id for m in proposal.plan.active] == ["fold:c", "drop:d", "drop:e", "drop:g", "c"]
    only = plans.select(net, proposal.plan, only=["c"])
    assert [m.id for m in only.active] == ["fold:c", "drop:d", "drop:e", "c"]
    assert [m.note for m in only.merges if not m.enabled] == ["left out by --only"]
    assert layers(plans.apply(net, only)) == ["c/rebirth", "f", "g", "fc"]
    exact = plans.select(net, proposal.plan, exact=True)
    assert [m.id for m in exact.active] == ["fold:c", "drop:d", "drop:e", "drop:g"]
    skipped = plans.propose(net, skip=["fold:c"])
    assert layers(plans.apply(net, skipped.plan)) == ["c/rebirth", "f", "fc"]


def test_a_given_plan_is_chosen_from_in_the_same_way():
    path = ZOO / "resnet_50/deploy.prototxt"
    plan = plans.propose(Net.load(path)).plan
    assert [m.id for m in rebirth(path, plan=plan, only=["conv1"]).merges] == ["fold:conv1", "conv1"]
    assert {m.kind for m in rebirth(path, plan=plan, exact=True).merges} == {"fold", "stride"}
    plan = plans.propose(Net.load(CAFFENET)).plan
    assert [m.id for m in rebirth(CAFFENET, plan=plan, only=["conv1+pool1"]).merges] == ["conv1+pool1"]


def test_the_plan_kept_beside_its_net_fits_it():
    """What docs/RESULTS.md measured: all six groups merged, conv2's kernel smaller than the others'."""
    folder = ZOO / "cifar10_googlenet"
    plan = plans.load(folder / "plan.yaml")
    net = Net.load(folder / "deploy.prototxt")
    assert [m.id for m in plan.active] == ["conv1", "conv2", "3a", "3b", "4a", "4b"]
    assert cost(plans.apply(net, plan)).macs == 20_166_144 < cost(net).macs
