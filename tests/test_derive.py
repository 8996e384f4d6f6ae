"""A deploy net from a train_val, against real Caffe and the deploy nets of the zoo."""

from pathlib import Path

import pytest

from rebirth_caffe.derive import deploy, is_trainable
from rebirth_caffe.errors import NetError
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.net import TEST, Net
from rebirth_caffe.plan import without_dropout
from rebirth_caffe.shapes import all_param_shapes, infer
from tests.nets import compute, difference, with_weights

ZOO = Path(__file__).resolve().parent.parent / "prototxts"
NETS = ("bvlc_googlenet", "bvlc_reference_caffenet", "bvlc_alexnet", "resnet_50")

DATA = """
layer { name: "data" type: "Data" top: "data" top: "label"
  transform_param { crop_size: 12 mean_value: 1 mean_value: 2 mean_value: 3 }
  data_param { source: "x" batch_size: 8 backend: LMDB } }
"""
CONV = """
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"  # kept as it is
  convolution_param { num_output: 4 kernel_size: 3 } }
"""


def sizes(net):
    """Shape of every blob of one image, and of every weight, by name."""
    blobs = {value.name: shape for value, shape in infer(net.graph.view(TEST), batch=1).items()}
    weights = {layer.name: shapes for layer, shapes in all_param_shapes(net).items() if shapes}
    return blobs, weights


@pytest.mark.parametrize("name", NETS)
def test_a_zoo_train_val_gives_the_zoo_deploy(name):
    given = Net.load(ZOO / name / "train_val.prototxt")
    made, shipped = deploy(given), Net.load(ZOO / name / "deploy.prototxt")
    assert not is_trainable(made)
    assert sizes(made) == sizes(shipped)
    originals = {layer.text for layer in given.layers}
    new = [layer.type for layer in made.layers if layer.text not in originals]
    assert new == ["Input", "Softmax"]
    dropped = without_dropout(made)
    assert not [layer for layer in dropped.layers if layer.type == "Dropout"]


@pytest.mark.parametrize("name", NETS)
def test_caffe_builds_it(in_caffe, tmp_path, name):
    made = without_dropout(deploy(Net.load(ZOO / name / "train_val.prototxt")))
    made.write(tmp_path / "deploy.prototxt")
    blobs = in_caffe.net(tmp_path / "deploy.prototxt")["blobs"]
    assert tuple(dict(blobs)["prob"]) == (1, 1000)
    assert next(iter(dict(blobs)["data"])) == 1


def test_a_deploy_net_is_itself():
    net = Net.load(ZOO / "bvlc_googlenet/deploy.prototxt")
    assert deploy(net) is net


def test_a_sigmoid_loss_becomes_a_sigmoid():
    text = (
        DATA
        + CONV
        + 'layer { name: "l" type: "SigmoidCrossEntropyLoss" bottom: "conv" bottom: "label" top: "l" }'
    )
    made = deploy(Net.parse(text))
    assert [layer.type for layer in made.layers] == ["Input", "Convolution", "Sigmoid"]
    assert made.layers[1].text == Net.parse(DATA + CONV).layers[1].text


def test_the_loss_of_the_largest_weight_is_the_one_deployed():
    head = (
        'layer {{ name: "{0}" type: "InnerProduct" bottom: "conv" top: "{0}" '
        "inner_product_param {{ num_output: {1} }} }}\n"
        'layer {{ name: "loss_{0}" type: "SoftmaxWithLoss" bottom: "{0}" bottom: "label" top: "loss_{0}" '
        "loss_weight: {2} }}\n"
    )
    made = deploy(Net.parse(DATA + CONV + head.format("main", 7, 1) + head.format("aux", 5, 0.3)))
    assert [layer.name for layer in made.layers] == ["data", "conv", "main", "prob"]
    assert sizes(made)[0]["prob"] == (1, 7)


def test_stages_of_an_all_in_one_file():
    text = (
        DATA.replace('top: "label"', 'top: "label" include { stage: "train" }')
        + 'layer { name: "data" type: "Input" top: "data" include { stage: "deploy" }\n'
        + "  input_param { shape { dim: 1 dim: 3 dim: 12 dim: 12 } } }\n"
        + CONV
        + 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "conv" bottom: "label" top: "loss"\n'
        + '  include { stage: "train" } }\n'
    )
    made = deploy(Net.parse(text))
    assert "conv" in {layer.name for layer in made.layers}
    assert not [layer for layer in made.layers if layer.type in ("Data", "SoftmaxWithLoss")]


def test_images_of_unknown_size_are_refused():
    unknown = DATA.replace("crop_size: 12", "")
    text = (
        unknown + CONV + 'layer { name: "l" type: "SoftmaxWithLoss" bottom: "conv" bottom: "label" top: "l" }'
    )
    with pytest.raises(NetError, match="image size is not in the file"):
        deploy(Net.parse(text))
    net = Net.parse(text)
    net.image = (3, 20, 30)
    assert sizes(deploy(net))[0]["data"] == (1, 3, 20, 30)


# ---- what else a train_val may hold -----------------------------------------------------------------------

SOFTMAX = 'layer {{ name: "{0}" type: "SoftmaxWithLoss" bottom: "conv" bottom: "label" top: "{0}" {1} }}\n'
ACCURACY = 'layer { name: "acc" type: "Accuracy" bottom: "conv" bottom: "label" top: "acc" }\n'


def names(net):
    return [(layer.name, layer.type) for layer in net.layers]


def test_a_loss_of_training_only():
    made = deploy(Net.parse(DATA + CONV + SOFTMAX.format("loss", "include { phase: TRAIN }") + ACCURACY))
    assert names(made) == [("data", "Input"), ("conv", "Convolution"), ("prob", "Softmax")]


def test_a_net_that_is_only_tested():
    made = deploy(Net.parse(DATA + CONV + ACCURACY))
    assert names(made) == [("data", "Input"), ("conv", "Convolution")]


def test_a_name_that_is_taken():
    text = DATA + CONV.replace('"conv"', '"prob"') + SOFTMAX.format("loss", "").replace('"conv"', '"prob"')
    made = deploy(Net.parse(text))
    assert names(made) == [("data", "Input"), ("prob", "Convolution"), ("loss", "Softmax")]
    assert made.layers[-1].bottom == ("prob",)
    assert made.layers[-1].top == ("loss",)


def test_the_axis_of_the_softmax():
    made = deploy(Net.parse(DATA + CONV + SOFTMAX.format("loss", "softmax_param { axis: 2 }")))
    assert made.layers[-1].param.softmax_param.axis == 2
    made = deploy(Net.parse(DATA + CONV + SOFTMAX.format("loss", "")))
    assert "softmax_param" not in made.layers[-1].text


def test_another_loss_has_no_head():
    made = deploy(Net.parse(DATA + CONV + SOFTMAX.format("loss", "").replace("SoftmaxWith", "Hinge")))
    assert names(made) == [("data", "Input"), ("conv", "Convolution")]


def test_nothing_between_data_and_loss():
    text = DATA + SOFTMAX.format("loss", "").replace('"conv"', '"data"')
    with pytest.raises(NetError, match="has no layers between its data and its loss"):
        deploy(Net.parse(text))


def test_weights_go_with_their_layers():
    net = Net.load(ZOO / "bvlc_reference_caffenet/train_val.prototxt")
    fill_missing(net)
    made = deploy(net)
    for layer in made.layers:
        if layer.type not in ("Input", "Softmax"):
            assert layer.blobs == net.layer(layer.name).blobs


RULED = """layer {
  name: "conv"
  type: "Convolution"  # as it was
  bottom: "data" top: "conv" include { stage: "train" }
  include {
    stage: "val"
  }
  convolution_param { num_output: 4 kernel_size: 3 }
}
"""


@pytest.mark.parametrize("phase", [0, 1])
def test_rules_that_would_hide_a_layer_go_and_its_text_stays(in_caffe, tmp_path, phase):
    """As in the files of DIGITS: nothing is in a net without a stage, but a deploy net has none."""
    stages = 'include { stage: "train" } include { stage: "val" } '
    text = DATA.replace("  transform_param", f"  {stages}transform_param") + RULED
    text += SOFTMAX.format("loss", stages)
    made = deploy(Net.parse(text))
    assert names(made) == [("data", "Input"), ("conv", "Convolution"), ("prob", "Softmax")]
    wanted = RULED.replace(' include { stage: "train" }\n  include {\n    stage: "val"\n  }', "")
    assert made.layer("conv").text == wanted
    made.write(tmp_path / "deploy.prototxt")
    found = in_caffe.net(tmp_path / "deploy.prototxt", phase)
    assert found["blobs"] == {"data": [1, 3, 12, 12], "conv": [1, 4, 10, 10], "prob": [1, 4, 10, 10]}


def test_rules_that_a_deploy_net_meets_stay():
    text = DATA + CONV.replace("  convolution_param", '  exclude { stage: "x" } convolution_param')
    made = deploy(Net.parse(text + SOFTMAX.format("loss", "")))
    assert 'exclude { stage: "x" }' in made.layer("conv").text


@pytest.mark.parametrize("name", ["bvlc_googlenet", "resnet_50"])
def test_it_computes_what_the_train_val_computes(in_caffe, tmp_path, name):
    """In TEST, on the same image: the deployed net's scores are those the main loss reads."""
    net = with_weights(Net.load(ZOO / name / "train_val.prototxt"), seed=1)
    scores = deploy(net).layers[-1].bottom[0]
    shipped = Net.load(ZOO / name / "deploy.prototxt")
    for layer in shipped.layers:
        layer.record = next((x.record for x in net.layers if x.name == layer.name), None)
    made, wanted = compute(in_caffe, tmp_path, [without_dropout(deploy(net)), shipped])
    assert difference(wanted[scores][:1], made[scores]) < 1e-5  # the zoo takes ten at a time
