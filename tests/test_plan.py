"""The plan: proposed, written, read back, edited, applied."""

from dataclasses import replace
from pathlib import Path

import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.errors import PlanError
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import Net
from rebirth_caffe.plan import Plan

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
    net = Net.load(CAFFENET)
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
        ("merges:", "merges: !!python/object/apply:os.system ['true']\nx:", "not YAML"),
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


def test_the_stages_are_prefixes():
    net = Net.load(GOOGLENET)
    plan = plans.propose(net).plan
    before = 0
    for stage in plan.stages:
        part = plan.until(stage)
        assert len(part.active) > before
        before = len(part.active)
        assert part.stages == plan.stages[: plan.stages.index(stage) + 1]
        plans.apply(net, part)
    assert part.active == plan.active
    with pytest.raises(PlanError, match="no training step is called 'x'"):
        plan.until("x")


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
    resnet = Net.load(ZOO / "resnet_50/deploy.prototxt")
    assert [m.id for m in plans.propose(resnet, only=["conv1"]).plan.active] == ["fold:conv1", "conv1"]


def test_an_offer_that_is_taken_is_not_refused_too():
    net = Net.load(CAFFENET)
    refused = [refusal.layers for refusal in plans.propose(net).refused]
    assert ("conv1", "pool1") in refused
    taken = plans.propose(net, only=["conv1+pool1"])
    assert ("conv1", "pool1") not in [refusal.layers for refusal in taken.refused]
    assert ("conv2", "pool2") in [refusal.layers for refusal in taken.refused]
