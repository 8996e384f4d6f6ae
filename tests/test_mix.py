"""Many images made of few: which ones, of what, and that they are images like those."""

import re

import numpy as np
import pytest

from rebirth_caffe.data import UNLABELLED, Images, Pixels, Recipe, open_lmdb, write_lmdb
from rebirth_caffe.errors import RebirthError
from rebirth_caffe.mix import CONTRAST, LIGHT, TINT, blend, mixed, patch, warp


def flat(*values: int, shape: tuple[int, ...] = (9, 7, 3)) -> Images:
    """Images of one colour each, called by it."""
    return Images(
        list(map(str, values)),
        np.zeros(len(values), np.int64),
        lambda i: np.full(shape, values[i], np.uint8),
        ("flat",),
    )


class Still(np.random.Generator):
    """Draws the middle of every range."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def uniform(self, low=0.0, high=1.0, size=None):
        return (low + high) / 2


@pytest.mark.parametrize("shape", [(8, 11, 3), (8, 11), (7, 7)])
def test_what_is_neither_turned_nor_scaled_nor_lit_stays(shape):
    image: Pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.array_equal(warp(image, Still()), image)


def test_every_image_is_warped_in_its_own_way():
    image: Pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    found = [warp(image, np.random.default_rng(seed)) for seed in range(20)]
    assert {one.shape for one in found} == {image.shape}
    assert len({one.tobytes() for one in found}) == 20


def test_images_are_drawn_from_the_chosen_and_two_of_three_are_of_two():
    sources = flat(0, 60, 120, 250)
    made = mixed(sources, np.array([1, 2]), Recipe(), 3000)
    assert len(made.names) == 3000
    assert set(made.names) == {"60", "120", "60 + 60", "60 + 120", "120 + 60", "120 + 120"}
    assert set(made.labels) == {UNLABELLED}
    assert made.classes == ()
    blends = [i for i, name in enumerate(made.names) if "+" in name]
    assert len(blends) == pytest.approx(2000, abs=100)
    most = LIGHT * TINT * CONTRAST
    for i in range(50):
        image = np.asarray(made.load(i))
        assert image.min() >= 60 / most - 1
        assert image.max() <= 120 * most + 1
        named = [int(value) for value in made.names[i].split(" + ")]
        assert min(named) / most - 1 <= image.mean() <= max(named) * most + 1


def test_a_blend_has_some_of_both_everywhere():
    random = np.random.default_rng(0)
    black, white = np.zeros((9, 7, 3), np.uint8), np.full((9, 7, 3), 200, np.uint8)
    found = [blend(black, white, random) for _ in range(50)]
    assert {one.shape for one in found} == {black.shape}
    assert all(np.ptp(one) == 0 for one in found)
    assert np.ptp([one[0, 0, 0] for one in found]) > 150


@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7)])
def test_a_patch_is_a_rectangle_of_the_other(shape):
    random = np.random.default_rng(0)
    image, other = (random.integers(low, low + 128, shape, np.uint8) for low in (0, 128))
    parts = []
    for _ in range(200):
        made = patch(image, other, random)
        taken = made == other
        assert np.array_equal(made, np.where(taken, other, image))
        rows, columns = (np.flatnonzero(taken.reshape(9, 7, -1).any(axis=axes)) for axes in ((1, 2), (0, 2)))
        if len(rows):
            assert taken[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        parts.append(taken.mean())
    assert np.mean(parts) == pytest.approx(0.5, abs=0.1)
    assert np.ptp(parts) > 0.8
    assert image.max() < 128  # as it was


def test_the_same_seed_makes_the_same_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    sources = Images(["a", "b"], np.zeros(2, np.int64), lambda i: pixels[i], ())
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        written = write_lmdb(tmp_path / name, mixed(sources, np.arange(2), Recipe(), 30, seed), Recipe(pad=1))
        assert written.shape == (3, 6, 6)
        assert written.count == 30
    x, y, z = ((tmp_path / name / "data.mdb").read_bytes() for name in "xyz")
    assert x == y != z
    assert {label for _, label in open_lmdb(tmp_path / "x")} == {UNLABELLED}


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    good = flat(10, 20)
    broken = Images(["good", "bad"], good.labels, lambda i: b"nothing" if i else good.load(0), ())
    written = write_lmdb(tmp_path / "x", mixed(broken, np.arange(2), Recipe(), 60))
    assert 0 < written.count < 60
    assert all("bad" in name and why.startswith("bad: damaged") for name, why in written.skipped)
    assert not re.search("bad", (tmp_path / "x/list.txt").read_text())


def test_sources_of_two_sizes_are_refused_with_a_way_out(tmp_path):
    shapes = [(4, 5), (6, 7)]
    sources = Images(["a", "b"], np.zeros(2, np.int64), lambda i: np.zeros(shapes[i], np.uint8), ())
    made = mixed(sources, np.arange(2), Recipe(), 60)
    with pytest.raises(
        RebirthError, match=r"a is 4x5 and b is 6x7; images are mixed in one size, give --res"
    ):
        made.load(list(made.names).index("a + b"))
    with pytest.raises(RebirthError, match="--resize HxW"):
        write_lmdb(tmp_path / "x", made)
    written = write_lmdb(tmp_path / "x", mixed(sources, np.arange(2), Recipe(resize=(4, 4)), 60))
    assert written.shape == (1, 4, 4)
