"""What every merge saves and loses by itself, measured in real Caffe."""

import json

import numpy as np

from rebirth_caffe import plan as plans
from rebirth_caffe import sensitivity as module
from rebirth_caffe.calibration import Calibration
from rebirth_caffe.data import Images, open_lmdb, write_lmdb
from rebirth_caffe.net import Net
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.report import show
from rebirth_caffe.sensitivity import Sensitivity, variants
from rebirth_caffe.solver import TrainData
from rebirth_caffe.stages import Training
from tests.test_fit import inception


def test_every_geometry_once():
    """A pool gives a merge up to three kernels, reducers several shares."""
    found = [(merge.id, kernel, reduce) for merge, _, kernel, reduce in variants(inception())]
    assert len(found) == len(set(found))
    assert {kernel for id_, kernel, _ in found if id_ == "a"} == {"keep", "cover", "auto"}
    assert {reduce for id_, _, reduce in found if id_ != "a"} == {1.0, 0.5}  # a quarter of 16 is 8 again
    for merge, plan, *_ in variants(inception()):
        assert [m for m in plan.active if not m.exact] == [merge]
        plans.apply(inception(), plan)


def test_merges_are_measured_alone_and_kept_as_data(trained, caffe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "RUNS", 2)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    data = TrainData(str(trained / "train.lmdb"), str(trained / "test.lmdb"))
    result = rebirth(
        trained / "train_val.prototxt",
        trained / "original.caffemodel",
        training=Training(data, iterations=6),
        sensitivity=True,
    )
    result.write(tmp_path / "out")
    rows = json.loads((tmp_path / "out/sensitivity.json").read_text())
    assert {row["merge"] for row in rows} == {"conv1", "conv2"}
    assert all(0 < row["error"] < 1 and row["after_ms"] > 0 and 0.1 < row["top1"] <= 1 for row in rows)
    assert Sensitivity(**rows[0]) == result.sensitivity[0]
    (whole,) = {one.before_top1 for one in result.sensitivity}
    assert whole is not None
    saving = [one for one in result.sensitivity if one.saved_ms > 0]
    prices = [max(0, whole - (one.top1 or 0)) / one.saved_ms for one in saving]
    assert prices == sorted(prices)  # the best bargain first
    assert not any(one.saved_ms > 0 for one in result.sensitivity[len(prices) :])
    show(result)
    said = capsys.readouterr().out
    assert "merged alone" in said
    assert f"% of {whole:.2%}" in said
    assert Net.load(tmp_path / "out/deploy.prototxt").layers


def test_measuring_changes_nothing_else_and_takes_no_labels(trained, caffe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RUNS", 2)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    with open_lmdb(trained / "test.lmdb") as labelled:
        found = [labelled[i][0][0] for i in range(60)]
    database = tmp_path / "unlabelled.lmdb"
    write_lmdb(database, Images(list(map(str, range(60))), np.full(60, -1), found.__getitem__, ()))
    data = TrainData(str(trained / "train.lmdb"), str(database))
    given = trained / "train_val.prototxt", trained / "original.caffemodel"
    training = Training(data, iterations=6)
    plain = rebirth(*given, training=training)
    images = Calibration(str(database), 40)
    result = rebirth(*given, training=training, calibration=images, sensitivity=True)
    assert {one.before_top1 for one in result.sensitivity} == {1.0}  # right is what the original says
    assert any(0 < (one.top1 or 0) < 1 for one in result.sensitivity)
    assert result.start == plain.start
    assert not result.fitted
    for mine, other in zip(result.net.layers, plain.net.layers, strict=True):
        for blob, same in zip(mine.blobs, other.blobs, strict=True):
            np.testing.assert_array_equal(blob.array, same.array)
