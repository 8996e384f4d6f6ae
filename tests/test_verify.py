"""--exact is checked against the original in an engine, and refused where it is not exact."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe import verify as verification
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.errors import EngineError, RebirthError
from rebirth_caffe.plan import Plan
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.verify import Verified, verify
from tests.nets import conv, fc, layer, net, norm, relu, scale, with_weights

BODY = [conv("c", "data", 6, 3), norm("n", "c"), scale("s", "c"), relu("r", "c"), fc("fc", "c")]
SOFTMAX = layer("prob", "Softmax", "fc")


def exact(original):
    return plans.propose(original, exact=True).plan


def test_what_is_exact_is_found_so(caffe):
    original = with_weights(net(*BODY, SOFTMAX))
    done = verify(original, exact(original))
    assert done.engine.startswith("caffe ")
    assert done.difference is not None
    assert done.difference < 1e-5
    assert not done.reason
    assert str(done).startswith("verified in caffe")


def test_a_net_without_weights_is_verified_with_those_of_its_fillers(caffe):
    original = net(*BODY)
    done = verify(original, exact(original))
    assert done.difference is not None
    assert not any(x.blobs for x in original.layers)


@pytest.mark.parametrize("gone", ["r", "n"])
def test_what_is_not_is_refused(gone, caffe):
    """A merge that is not exact: by hand, a layer just goes. Softmax would hide most of it."""
    original = with_weights(net(*BODY, SOFTMAX))
    (merge,) = exact(original).merges
    plan = Plan("", (replace(merge, kind="streamline", absorbs=(gone,), becomes=()),))
    with pytest.raises(
        RebirthError, match=r"output '\w+' would differ by .* of its largest value \(over 0.0001"
    ):
        verify(original, plan)


def test_nothing_to_compare_is_nothing_verified():
    """As if no output of the original were left."""
    one, other = {"a": np.ones(3, np.float32)}, {"b": np.ones(3, np.float32)}
    with pytest.raises(RebirthError, match=r"none of its outputs would be left \(a\); please report it"):
        verification._difference(one, other)


def test_without_caffe_in_opencv(monkeypatch):
    monkeypatch.setattr(verification, "available_engines", lambda: ["opencv"])
    original = with_weights(net(*BODY))
    assert verify(original, exact(original)).engine.startswith("opencv ")


def test_what_no_engine_runs_is_written_and_said_not_to_be_verified(tmp_path):
    text = net(*BODY[:-1], layer("own", "OfAFork", "c"), fc("fc", "own")).text()
    (tmp_path / "in.prototxt").write_text(text)
    result = rebirth(tmp_path / "in.prototxt", exact=True)
    result.write(tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["verified"]["difference"] is None
    assert "OfAFork" in report["verified"]["reason"]


def test_a_train_val_without_a_known_image_is_written_and_said_not_to_be_verified(tmp_path):
    data = layer("data", "Data", "", "data label", 'data_param { source: "x" batch_size: 1 backend: LMDB }')
    text = net(data, *BODY, layer("loss", "SoftmaxWithLoss", "fc label"), size=()).text()
    (tmp_path / "in.prototxt").write_text(text)
    result = rebirth(tmp_path / "in.prototxt", exact=True)
    result.write(tmp_path / "out")
    assert result.merges
    assert result.verified is not None
    assert "its image size is not in the file" in result.verified.reason


def test_nothing_is_written_that_differs(tmp_path, monkeypatch, caffe):
    (tmp_path / "in.prototxt").write_text(net(*BODY).text())
    result = rebirth(tmp_path / "in.prototxt", exact=True)
    monkeypatch.setattr(verification, "LIMIT", -1.0)
    with pytest.raises(RebirthError, match="would differ by"):
        result.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.prototxt"]


def test_a_caffe_that_was_asked_for_must_be_there():
    with pytest.raises(EngineError, match="--caffe /nowhere: no such file"):
        verify(net(*BODY), Plan("", ()), "/nowhere")


def test_an_original_that_gives_no_numbers(caffe):
    original = with_weights(net(*BODY))
    fc_weights = [np.full(b.shape, np.float32(3e38)) for b in original.layer("fc").blobs]
    original.layer("fc").record = Record("fc", "InnerProduct", [Blob(a) for a in fc_weights])
    done = verify(original, exact(original))
    assert done == Verified(reason="an output of the original is not finite")
    assert str(done) == "not verified: an output of the original is not finite"
