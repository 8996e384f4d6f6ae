"""Reborn layers fitted to the original on images, in real Caffe."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from rebirth_caffe import fit as module
from rebirth_caffe import params
from rebirth_caffe import plan as plans
from rebirth_caffe.calibration import Calibration, Start
from rebirth_caffe.data import write_lmdb
from rebirth_caffe.derive import deploy
from rebirth_caffe.engines import get_engine
from rebirth_caffe.engines.caffe import CaffeEngine
from rebirth_caffe.engines.training import CaffeTrainer
from rebirth_caffe.errors import RebirthError
from rebirth_caffe.fit import fit
from rebirth_caffe.init import least_squares
from rebirth_caffe.init.fill import generator
from rebirth_caffe.init.rescale import MOST, scales
from rebirth_caffe.rebirth import rebirth
from rebirth_caffe.retrain import Options, retrain
from rebirth_caffe.transform import Transform
from tests import tiny
from tests.nets import concat, conv, fc, lrn, pool, relu, with_weights
from tests.nets import net as build
from tests.tiny import synthetic

ROOT = Path(__file__).resolve().parent.parent
GREY = (1, 1, 28, 28)
TRANSFORM = Transform(mean_values=(70.0,), scale=0.02)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A database of 60 grey images of 28 x 28."""
    path = tmp_path_factory.mktemp("fit") / "images.lmdb"
    write_lmdb(path, synthetic(60, 1))
    return path


@pytest.fixture(scope="module")
def by_caffe(caffe):
    return CaffeEngine(caffe)


def fitted(original, images, engine, kernel="keep", count=60, init="lsq"):
    """The net after all its merges, as inherited and as fitted, and what came of each layer."""
    plan = plans.propose(original, kernel).plan
    start = Start(init, 0, Calibration(str(images), count, TRANSFORM))
    inherited = plans.apply(original, plan)
    return inherited, *fit(original, inherited, plan, start, engine)


def output(net, engine, tmp_path, blob):
    """What a net makes of noise."""
    net.write(tmp_path / "net.prototxt")
    net.write_weights(tmp_path / "net.caffemodel")
    with engine.open(tmp_path / "net.prototxt", tmp_path / "net.caffemodel") as session:
        return session.forward(outputs=[blob])[blob]


def test_an_average_pool_is_found_exactly(images, by_caffe, tmp_path):
    """conv -> average pool is one larger convolution: nothing is left of the difference."""
    body = [conv("a", "data", 6, 3), pool("p", "a", 2, 2, "pool: AVE"), conv("b", "p", 4, 3), fc("fc", "b")]
    original = with_weights(build(*body, size=GREY))
    inherited, reborn, (one,) = fitted(original, images, by_caffe, "cover")
    assert (one.layer, one.note) == ("a/rebirth", "")
    assert one.after < 1e-3 < 0.3 < one.before
    wanted = output(original, by_caffe, tmp_path, "p")
    assert np.abs(output(reborn, by_caffe, tmp_path, "p") - wanted).max() < 5e-3 * np.abs(wanted).max()
    assert np.abs(output(inherited, by_caffe, tmp_path, "p") - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [((3, 28, 28), "again without make_lmdb.py's --gray"), ((1, 20, 20), "give the --crop it was trained")],
)
def test_images_of_another_shape_are_refused(images, shape, complaint):
    with pytest.raises(RebirthError, match=complaint):
        list(Calibration(str(images)).batches(shape, 8))


def test_what_reads_too_much_stays_as_inherited_and_says_so(images, by_caffe, monkeypatch):
    monkeypatch.setattr(module, "MOST_INPUTS", 8)
    original = with_weights(build(conv("a", "data", 6, 3), pool("p", "a"), fc("fc", "p"), size=GREY))
    inherited, reborn, (one,) = fitted(original, images, by_caffe)
    assert one.note == "reads 9 values, too many to fit: as inherited"
    assert reborn.layer("a/rebirth").blobs[0].array.tobytes() == (
        inherited.layer("a/rebirth").blobs[0].array.tobytes()
    )


def inception(reducer=16):
    """conv -> pool -> LRN, then four branches with a pool behind them, as in GoogLeNet."""
    branches = [
        [conv("1x1", "n", 8), relu("1x1_relu", "1x1")],
        [conv("3x3_reduce", "n", reducer), relu("3x3_reduce_relu", "3x3_reduce")],
        [conv("3x3", "3x3_reduce", 12, 3, "pad: 1"), relu("3x3_relu", "3x3")],
        [conv("5x5_reduce", "n", 4), relu("5x5_reduce_relu", "5x5_reduce")],
        [conv("5x5", "5x5_reduce", 6, 5, "pad: 2"), relu("5x5_relu", "5x5")],
        [pool("pool", "n", 3, 1, "pad: 1"), conv("proj", "pool", 5), relu("proj_relu", "proj")],
    ]
    stem = [
        conv("a", "data", 10, 3),
        relu("r", "a"),
        pool("p", "a", 3, 2),
        lrn("n", "p", "alpha: 1e-4 beta: 0.75"),
    ]
    tail = [concat("join", "1x1 3x3 5x5 proj"), pool("q", "join", 3, 2), fc("fc", "q")]
    return with_weights(build(*stem, *(x for branch in branches for x in branch), *tail, size=GREY))


def test_every_layer_of_a_googlenet_is_fitted(images, by_caffe, tmp_path):
    original = inception()
    inherited, reborn, found = fitted(original, images, by_caffe)
    assert [one.layer for one in found] == [f"{n}/rebirth" for n in ("a", "3x3_reduce", "5x5", "3x3")]
    assert all(0 < one.least < 0.9 for one in found)
    # The fit is close; what it cannot tell is inherited, which in a net of noise is far off.
    own = [one for one in found if one.before is not None]
    assert all(one.least < one.after < one.before and one.least < 0.7 * one.before for one in own)
    wanted = output(original, by_caffe, tmp_path, "fc")
    errors = [np.abs(output(net, by_caffe, tmp_path, "fc") - wanted).mean() for net in (inherited, reborn)]
    assert errors[1] < 0.9 * errors[0]
    made = {one.layer for one in found}
    for before, after in zip(inherited.layers, reborn.layers, strict=True):  # the others are as they were
        assert after is before or after.name in made
        assert after.text == before.text


def test_a_reducer_takes_over_trained_channels(images, by_caffe):
    """Eight of 16 + 8 candidates: channels of the original's reducer or of the absorbed branch."""
    original = inception()
    _, reborn, found = fitted(original, images, by_caffe)
    reducer = next(one for one in found if one.layer == "3x3_reduce/rebirth")
    assert reducer.before is None  # no channel of it is to be what it was
    assert reborn.layer("3x3_reduce/rebirth").blobs[0].array.shape[:2] == (8, 10)


def test_what_is_inherited_is_scaled_and_nothing_else(images, by_caffe, tmp_path):
    """Channel by channel to where it is nearest to the original's; the channels left of a reducer stay."""
    original = inception()
    inherited, reborn, found = fitted(original, images, by_caffe, init="inherit")
    assert [one.layer for one in found] == [f"{n}/rebirth" for n in ("a", "5x5", "3x3")]
    assert all(one.after < one.before and one.ridge is None for one in found)
    assert all(one.note.startswith("scaled by ") for one in found)
    for one in found:
        (w0, b0), (w1, b1) = ([b.array for b in n.layer(one.layer).blobs] for n in (inherited, reborn))
        factor = np.einsum("ochw,ochw->o", w1, w0) / np.einsum("ochw,ochw->o", w0, w0)
        assert np.allclose(w1, factor[:, None, None, None] * w0, atol=1e-6)
        assert np.allclose(b1, factor * b0, atol=1e-6)
        assert factor.std() > 0.01
    for layer in ("3x3_reduce/rebirth", "5x5_reduce", "fc"):
        assert reborn.layer(layer) is inherited.layer(layer)
    wanted = output(original, by_caffe, tmp_path, "n")
    errors = [((output(net, by_caffe, tmp_path, "n") - wanted) ** 2).mean() for net in (inherited, reborn)]
    assert errors[1] < errors[0]


def test_what_a_merge_gives_is_compared_as_a_whole(images, by_caffe, tmp_path):
    """The blobs of both nets, over all images; and smaller reducers lose more."""
    original, calibration = inception(32), Calibration(str(images), 60, TRANSFORM)
    found = []
    for reduce in (0.25, 0.5):
        plan = plans.propose(original, "keep", reduce).plan
        start = Start("lsq", 0, calibration)
        reborn, _ = fit(original, plans.apply(original, plan), plan, start, by_caffe, mix=False)
        found.append(module.output_errors(original, reborn, plan, calibration, by_caffe))
    assert set(found[0]) == {"a", "join"}
    assert 1 > found[0]["join"] > 1.02 * found[1]["join"] > 0
    assert found[0]["a"] == found[1]["a"]
    (batch,) = (batch for batch, _ in calibration.batches(GREY[1:], 60))
    blobs = {"a": "n", "join": "join"}
    values = []
    for net in (original, reborn):
        net.write(tmp_path / "net.prototxt")
        net.write_weights(tmp_path / "net.caffemodel")
        with by_caffe.open(tmp_path / "net.prototxt", tmp_path / "net.caffemodel") as session:
            given = [session.forward({"data": image[None]}, list(blobs.values())) for image in batch]
        values.append({blob: np.concatenate([one[blob] for one in given]) for blob in blobs.values()})
    for merge, blob in blobs.items():
        y, p = (found[blob].astype(np.float64) for found in values)
        spread = np.square(y - y.mean(axis=(0, 2, 3), keepdims=True)).sum()
        assert found[1][merge] == pytest.approx(np.sqrt(np.square(p - y).sum() / spread), rel=1e-4)


def test_a_fit_that_is_worse_than_what_is_inherited_is_not_taken(images, by_caffe):
    """As of too few images: ten, of which two are held out, for 300 inputs."""
    body = [conv("a", "data", 12, 3), relu("r", "a"), conv("b", "a", 6, 5), relu("s", "b")]
    original = with_weights(build(*body, lrn("n", "b", "alpha: 1e-6"), fc("fc", "n"), size=GREY))
    inherited, reborn, (one,) = fitted(original, images, by_caffe, count=10)
    assert one.layer == "b/rebirth"
    assert one.after == one.before
    assert one.note.startswith("no fit is better than what is inherited")
    for mine, other in zip(reborn.layers, inherited.layers, strict=True):
        for blob, same in zip(mine.blobs, other.blobs, strict=True):
            np.testing.assert_allclose(blob.array, same.array, rtol=1e-6)


def test_opencv_does_as_well(images, by_caffe):
    original = inception()
    _, _, found = fitted(original, images, by_caffe)
    _, _, other = fitted(original, images, get_engine("opencv"))
    assert [round(one.after, 2) for one in found] == [round(one.after, 2) for one in other]


def test_rows_are_bounded_whatever_the_number_of_images(images, by_caffe, monkeypatch):
    seen = []
    real = module._fitted

    def watched(*arguments, **options):
        seen.append(arguments[3].shape)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "_fitted", watched)
    monkeypatch.setattr(module, "ROWS", 600)
    original = with_weights(build(conv("a", "data", 6, 3), pool("p", "a", 2, 2), fc("fc", "p"), size=GREY))
    for count in (20, 60):
        fitted(original, images, by_caffe, "cover", count)
    assert seen == [(600, 16)] * 2


def test_of_more_images_than_rows_some_are_taken(images, by_caffe, monkeypatch):
    taken = []
    for name in ("_fitted", "_rescaled"):
        real = getattr(module, name)

        def watched(*arguments, real=real, **options):
            taken.append((len(arguments[3]), arguments[5].sum()))
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, watched)
    monkeypatch.setattr(module, "ROWS", 25)
    original = with_weights(build(conv("a", "data", 6, 3), lrn("n", "a"), fc("fc", "n"), size=GREY))
    for init in ("lsq", "inherit"):
        fitted(original, images, by_caffe, init=init)
    assert taken == [(25, 5)] * 2
    whole, given = np.arange(60, dtype=np.float32).reshape(60, 1, 1, 1), np.zeros((60, 4), np.float32)
    batches = [
        module._some(original.layer("fc"), whole[at : at + 7], given[at : at + 7], at, 60, generator(0, "fc"))
        for at in range(0, 60, 7)
    ]
    rows, _, held = map(np.concatenate, zip(*batches, strict=True))
    assert len(rows) == 25
    assert held.sum() == 5
    assert (np.diff(rows[:, 0]) >= 2).all()  # spread evenly


def test_images_that_tell_nothing(tmp_path, by_caffe):
    """Pixels that never change are noted; images that are all the same are refused."""
    varied = synthetic(30, 1)

    def dark(i):
        image = np.array(varied.load(i))
        image[:8] = 0
        return image

    body = [conv("a", "data", 6, 28), relu("r", "a"), lrn("n", "a"), fc("fc", "n")]
    original = with_weights(build(*body, size=GREY))
    write_lmdb(tmp_path / "dark.lmdb", replace(varied, load=dark))
    _, _, (found,) = fitted(original, tmp_path / "dark.lmdb", by_caffe, count=30)
    assert found.note.startswith("224 of 784 inputs never change; ")
    write_lmdb(tmp_path / "same.lmdb", replace(varied, load=lambda i: varied.load(0)))
    for init in ("lsq", "inherit"):
        with pytest.raises(RebirthError, match=r"same.lmdb: its 30 images are one and the same; give others"):
            fitted(original, tmp_path / "same.lmdb", by_caffe, count=30, init=init)


def test_layers_the_original_does_not_show_stay_as_they_were(images, by_caffe):
    """A pool that stays hides what the convolution below it should give."""
    body = [conv("a", "data", 6, 3), relu("r", "a"), pool("p", "a", 3, 2), lrn("n", "p"), fc("fc", "n")]
    inherited, reborn, (one,) = fitted(with_weights(build(*body, size=(1, 1, 29, 29))), images, by_caffe)
    assert one.note == "what it should put out is hidden behind 'p': as inherited"
    assert str(one) == f"a/rebirth: {one.note}"
    assert all(a is b for a, b in zip(inherited.layers, reborn.layers, strict=True))


def test_the_factor_is_that_of_least_squares_through_the_origin():
    random = np.random.default_rng(0)
    p = np.maximum(random.normal(0, 1, (1000, 5)), 0).astype("f4")
    y = p * np.array([2, 0.5, 100, 0, 3], "f4")
    y[:, 4] = random.permutation(y[:, 4])  # as large, and nothing to do with p
    p[:, 3] = 0
    found = scales(p, y)
    assert np.allclose(found[:4], [2, 0.5, MOST, 1])
    assert found[4] == pytest.approx((y[:, 4] * p[:, 4]).mean() / (p[:, 4] ** 2).mean())
    assert found[4] < 0.5 * y[:, 4].mean() / p[:, 4].mean()


def test_what_the_fit_cannot_tell_is_inherited():
    """Channel by channel: the fit where x tells, the kernel there was, scaled, where it does not."""
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (6000, 8)).astype("f4")
    weight, inherited = random.normal(0, 1, (2, 3, 8))
    y = (x @ weight.T).astype("f4")
    y[:, 1] = random.normal(0, 1, 6000)
    y[:, 2] += random.normal(0, y[:, 2].std(), 6000)  # an error of 0.71
    held, none = np.arange(6000) % 5 == 4, np.zeros(3)
    best = least_squares.fit(x, y, held, False, inherited)
    scaled = module._scaled((inherited, none), scales(x[~held] @ inherited.T.astype("f4"), y[~held]))
    found, bias = module._mixed(best.weights, scaled, best.channels)
    told, noise, half = best.channels
    assert told < 0.3 < 0.6 < half < 0.9 < noise
    assert np.allclose(found[0], (1 - told) * best.weights[0][0] + told * scaled[0][0])
    assert np.allclose(found[1], scaled[0][1], atol=0.05)
    assert np.allclose(found[2], (1 - half) * best.weights[0][2] + half * scaled[0][2])
    assert np.abs(bias).max() < 0.05
    alone = least_squares.fit(x, y[:, :1], held, False, inherited[:1])  # nothing is left to inherit
    exact, _ = module._mixed(alone.weights, (inherited[:1], none[:1]), alone.channels)
    assert np.allclose(exact, weight[:1], atol=0.02)


def test_channels_of_a_trained_net_stay_as_unlike_each_other_as_they_were(trained, by_caffe, tmp_path):
    """Of the closest fit alone they are alike: their outputs lie in fewer directions than the original's."""
    original, crops = tiny.learned(trained), replace(TRANSFORM, crop=24)
    (images,) = (x for x, _ in Calibration(str(trained / "test.lmdb"), 100, crops).batches((1, 24, 24), 100))
    plan = plans.propose(original).plan
    inherited = plans.apply(original, plan)
    start = Start("lsq", 0, Calibration(str(trained / "train.lmdb"), 330, crops))
    nets = {
        "original": original,
        "mixed": fit(original, inherited, plan, start, by_caffe)[0],
        "closest": fit(original, inherited, plan, start, by_caffe, mix=False)[0],
    }

    def directions(net, blob):
        """How many there are, by the eigenvalues' participation ratio."""
        paths = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
        deploy(net).write(paths[0])
        net.write_weights(paths[1])
        with by_caffe.open(*paths) as session:
            given = [session.forward({"data": image[None]}, [blob])[blob][0] for image in images]
        eigenvalues = np.linalg.eigvalsh(np.cov(np.concatenate([x.reshape(len(x), -1) for x in given], 1)))
        return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()

    for blob in ("norm1", "pool2"):
        found = {name: directions(net, blob) for name, net in nets.items()}
        assert found["closest"] < 0.9 * found["original"]
        assert abs(found["original"] - found["mixed"]) < 0.8 * (found["original"] - found["closest"])


def test_images_of_another_size_are_refused(images, by_caffe):
    body = [conv("a", "data", 6, 3), relu("r", "a"), lrn("n", "a"), fc("fc", "n")]
    original = with_weights(build(*body, size=(1, 1, 29, 29)))
    with pytest.raises(
        RebirthError, match="its images are 1x28x28 after the transformation, the net takes 1x29x29"
    ):
        fitted(original, images, by_caffe)


def test_groups_and_inner_products(images, by_caffe, monkeypatch):
    monkeypatch.setattr(module, "MOST_INPUTS", 4096)  # c reads 4,608; Caffe runs no LRN behind it
    grouped = [conv("a", "data", 8, 3), conv("b", "a", 8, 3, "group: 2"), relu("r", "b"), lrn("n", "b")]
    original = with_weights(
        build(*grouped, fc("c", "n", 6), relu("cr", "c"), lrn("m", "c"), fc("fc", "m"), size=GREY)
    )
    _, reborn, found = fitted(original, images, by_caffe)
    assert [one.layer for one in found][:1] == ["b/rebirth"]
    assert found[0].after < 0.5 * found[0].before
    assert reborn.layer("b/rebirth").blobs[0].array.shape == (8, 4, 3, 3)


def test_a_kernel_reads_as_caffe_does():
    """Stride, pad and dilation, against a loop."""
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (2, 3, 9, 8)).astype("f4")
    one = build(conv("c", "data", 4, 3, "stride: 2 pad: 2 dilation: 2"), size=(2, 3, 9, 8)).layer("c")
    geometry = params.conv(one.param)
    found = module.patches(x, geometry, (np.array([0, 1]), np.array([0, 3]), np.array([2, 1])))
    for row, (image, i, j) in zip(found, ((0, 0, 2), (1, 3, 1)), strict=True):
        padded = np.pad(x[image], ((0, 0), (2, 2), (2, 2)))
        assert np.array_equal(row.reshape(3, 3, 3), padded[:, 2 * i : 2 * i + 5 : 2, 2 * j : 2 * j + 5 : 2])


class TestImages:
    def test_a_folder_a_list_and_a_database_are_the_same_images(self, images, tmp_path):
        pixels = synthetic(60, 1)
        names = []
        for i in range(60):
            name = f"{'even' if i % 2 == 0 else 'odd'}/{i:02d}.png"
            (tmp_path / name).parent.mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / name), np.asarray(pixels.load(i)))
            names.append(name)
        (tmp_path / "with.txt").write_text("".join(f"{name} 3\n" for name in names))
        (tmp_path / "without.txt").write_text("\n".join(names))

        def read(source):
            return np.concatenate(
                [b for b, _ in Calibration(str(source), 30, TRANSFORM).batches((1, 28, 28), 7)]
            )

        database = read(images)
        assert len(database) == 30
        assert np.array_equal(read(tmp_path / "with.txt"), database)
        assert np.array_equal(read(tmp_path / "without.txt"), database)
        folder = read(tmp_path)
        assert len({image.tobytes() for image in folder} | {image.tobytes() for image in database}) < 60

    def test_a_damaged_image_is_told_of_once(self, tmp_path, capfd):
        png = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))[1].tobytes()
        for i in range(10):
            (tmp_path / f"{i}.png").write_bytes(png[: len(png) // 2] if i == 5 else png)
        with pytest.raises(RebirthError, match=r"5\.png: damaged, cut short or not an image; remove it"):
            list(Calibration(str(tmp_path)).batches((1, 28, 28), 8))
        assert capfd.readouterr() == ("", "")

    def test_one_image_is_no_list(self, tmp_path):
        cv2.imwrite(str(tmp_path / "a.png"), np.zeros((28, 28), np.uint8))
        with pytest.raises(RebirthError, match=r"a\.png: is one image; give an LMDB, a folder or a list"):
            list(Calibration(str(tmp_path / "a.png")).batches((1, 28, 28), 8))

    @pytest.mark.parametrize(
        ("make", "complaint"),
        [
            (lambda p: None, "no such database, folder or list of images"),
            (lambda p: p.mkdir(), "holds no images; give an LMDB, a folder or a list of images"),
            (lambda p: write_lmdb(p, synthetic(9, 1)), "9 images; to calibrate takes 10 or more"),
            (lambda p: p.write_text("a.png 1\n" * 10), r"a\.png, of the images of .*x: No such file"),
        ],
    )
    def test_what_is_none_is_refused(self, tmp_path, make, complaint):
        make(tmp_path / "x")
        with pytest.raises((RebirthError, OSError), match=complaint):
            list(Calibration(str(tmp_path / "x")).batches((1, 28, 28), 8))

    def test_too_few_of_many_are_refused(self, tmp_path):
        write_lmdb(tmp_path / "x", synthetic(20, 1))
        with pytest.raises(RebirthError, match=r"^--images 5; to calibrate takes 10 or more"):
            list(Calibration(str(tmp_path / "x"), 5).batches((1, 28, 28), 8))


def test_without_complete_weights_there_is_nothing_to_learn_from(images, by_caffe):
    original = inception()
    original.layer("fc").record = None
    with pytest.raises(RebirthError, match="layer 'fc': has no weights to learn from"):
        fitted(original, images, by_caffe)


def test_every_training_step_starts_from_a_fit_to_the_net_before_it(trained, caffe, tmp_path):
    home = tiny.reborn(trained, tmp_path / "home", iterations=2, init="lsq")
    settings = json.loads((home / "original/settings.json").read_text())
    assert (settings["calibration"], settings["images"]) == (str(trained / "train.lmdb"), 1024)
    assert "lr_mult: 4" in (home / "stages/01-conv1/train_val.prototxt").read_text()
    notes: list[str] = []

    def tell(what, details):
        if what == "note":
            notes.append(details["text"])

    outcome = retrain(home, Options(iterations=2), CaffeTrainer(caffe), tell)
    assert outcome is not None
    assert "lr_mult: 4" in (home / "retrain/01-conv1/train_val.prototxt").read_text()
    assert [note.partition(" 0.")[0] for note in notes] == [
        f"conv{i}: conv{i}/rebirth: relative error" for i in (1, 2)
    ]


def test_the_command(images, tmp_path):
    original = inception()
    original.write(tmp_path / "net.prototxt")
    original.write_weights(tmp_path / "net.caffemodel")
    command = [
        *(sys.executable, ROOT / "tools/rebirth_net.py", tmp_path / "net.prototxt"),
        *("--weights", tmp_path / "net.caffemodel", "--init", "lsq", "--out", tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        done.stderr == "error: --init lsq takes images; give --calibration, or --train-data and --test-data; "
        "see rebirth_net.py --help\n"
    )
    assert done.returncode == 2
    command += ["--calibration", images, "--images", "40", "--mean-value", "70", "--scale", "0.02"]
    scaled = [*command, "--init", "inherit", "--dry-run"]
    assert "scaled by" in subprocess.run(scaled, capture_output=True, text=True, check=True).stdout
    noise = subprocess.run([*command, "--init", "xavier"], capture_output=True, text=True, check=False)
    assert noise.stderr.startswith(
        "error: --calibration is for --init lsq and inherit, and for --sensitivity"
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"merge +fitted +as inherited +error now +closest +ridge", done.stdout)
    assert re.search(r"merge +error of what it gives, with all below it *\n", done.stdout)
    assert "0 to 255" not in done.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["fitted"][0]["layer"] == "a/rebirth"
    assert all(0 < one["least"] < 1 for one in report["fitted"])
    assert {one["id"]: 0 < one["error"] < 2 for one in report["merges"]} == {"a": True, "join": True}
    # As they are is seldom how a net was trained.
    raw = [*command[:-4], "--dry-run", "--json", "--sensitivity", "--only", "a"]
    done = subprocess.run([*command[:-4], "--dry-run"], capture_output=True, text=True, check=True)
    assert "images go in as they are, 0 to 255; else give the net's --mean-value and --scale" in done.stdout
    measured = json.loads(subprocess.run(raw, capture_output=True, text=True, check=True).stdout)
    assert {one["merge"] for one in measured["sensitivity"]} >= {"a", "join"}


def test_what_the_data_layer_says_is_not_overruled(trained):
    images = Calibration(str(trained / "test.lmdb"), 40, Transform(mean_values=(3.0,)))
    given = trained / "train_val.prototxt", trained / "original.caffemodel"
    with pytest.raises(RebirthError, match="its Data layer says what is done to an image; leave out --mean-"):
        rebirth(*given, init="lsq", calibration=images)
