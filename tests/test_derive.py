"""A deploy net from a train_val, against real Caffe and the deploy nets of the zoo."""

from pathlib import Path

import pytest

from rebirth_caffe.derive import deploy, is_trainable
from rebirth_caffe.errors import NetError
from rebirth_caffe.net import TEST, Net
from rebirth_caffe.rebirth import without_dropout
from rebirth_caffe.shapes import all_param_shapes, infer

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
