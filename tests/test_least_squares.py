"""The arithmetic of the fit: what it finds and what it leaves alone."""

import numpy as np
import pytest

from rebirth_caffe.init import least_squares
from rebirth_caffe.init.least_squares import Moments, directions, error, fit

RANDOM = np.random.default_rng(0)
HELD = np.arange(6000) % 5 == 4


def rows(inputs, outputs, count=6000):
    """Inputs of very different variance that depend on each other, and a linear map of them."""
    x = (
        RANDOM.normal(1, 1, (count, inputs))
        @ RANDOM.normal(0, 1, (inputs, inputs))
        * np.linspace(0.2, 2, inputs)
    )
    return x.astype("f4"), RANDOM.normal(0, 1, (outputs, inputs)), RANDOM.normal(0, 1, outputs)


def test_a_linear_map_is_found():
    x, weight, bias = rows(12, 7)
    y = (x @ weight.T + bias).astype("f4")
    found = fit(x, y, HELD, False, np.zeros_like(weight))
    assert found.error < 2e-3
    assert np.abs(found.weights[0] - weight).max() < 2e-2
    assert found.ridge == min(least_squares.RIDGES)


def test_behind_a_relu_what_is_cut_is_not_held_against_it():
    x, weight, bias = rows(12, 7)
    p = (x @ weight.T + bias - 6).astype("f4")  # mostly negative
    y = np.maximum(p, 0)
    start = np.zeros_like(weight)
    turns = fit(x, y, HELD, True, start)
    plain = fit(x, y, HELD, False, start)
    assert 0.05 < (y > 0).mean() < 0.5
    assert turns.error < 0.5 * error(x[HELD], y[HELD], plain.weights, True)


def test_moments_of_pieces_are_those_of_the_whole():
    x, *_ = rows(9, 1, 2 * least_squares.CHUNK + 17)
    pieces = Moments(9)
    for part in np.array_split(x, 13):
        pieces.add(part)
    assert np.allclose(pieces.mean, x.mean(axis=0, dtype="f8"))
    assert np.allclose(pieces.covariance, np.cov(x.T.astype("f8"), bias=True))


@pytest.mark.parametrize("relu", [False, True])
def test_what_the_rows_leave_open_stays_as_it_was(relu):
    """Inputs that never vary keep their weights; rows that are all alike change nothing but the bias."""
    x, weight, bias = rows(12, 7)
    x[:, 3] = 2.5
    y = np.maximum(x @ weight.T + bias, 0 if relu else -np.inf).astype("f4")
    start = RANDOM.normal(0, 1, weight.shape)
    found = fit(x, y, HELD, relu, start)
    assert np.allclose(found.weights[0][:, 3], start[:, 3])
    assert not np.allclose(found.weights[0][:, 4], start[:, 4], atol=0.1)
    alike = fit(np.repeat(x[:1], 20, 0), np.repeat(y[:1], 20, 0), HELD[:20], relu, start)
    assert np.allclose(alike.weights[0], start)
    assert np.allclose(np.maximum(x[0] @ start.T + alike.weights[1], 0 if relu else -np.inf), y[0], atol=1e-3)


def test_fewer_rows_than_inputs():
    x, weight, bias = rows(40, 7, 20)
    y = (x @ weight.T + bias).astype("f4")
    found = fit(x, y, HELD[:20], False, weight)  # the start is the answer, and the rows do not say otherwise
    assert found.error < 1e-3
    blind = fit(x, y, HELD[:20], False, np.zeros_like(weight))
    assert np.isfinite(blind.weights[0]).all()
    assert blind.error > found.error


def test_channels_that_are_never_active_end_below_zero():
    x, weight, _ = rows(12, 7)
    nothing = np.zeros((6000, 7), "f4")
    found = fit(x, nothing, HELD, True, weight)
    assert error(x, nothing, found.weights, True) < 0.1 * error(
        x, nothing, (weight, 0 * found.weights[1]), True
    )


def test_the_largest_ridge_that_is_as_good():
    """Two inputs that are nearly one: a small ridge makes large weights of their difference, for nothing."""
    x, *_ = rows(1, 1)
    x = np.concatenate([x, x + 1e-2 * RANDOM.normal(0, 1, x.shape)], axis=1).astype("f4")
    y = (x[:, :1] + RANDOM.normal(0, 0.5, x[:, :1].shape)).astype("f4")
    found = fit(x, y, HELD, False, np.zeros((1, 2)))
    assert found.ridge > min(least_squares.RIDGES)
    assert found.error < least_squares.TOLERANCE * error(
        x[HELD], y[HELD], (np.array([[1.0, 0]]), np.zeros(1)), False
    )


def test_principal_directions_of_what_is_needed():
    """Of five channels two count; a linear reducer keeps their plane, whatever else varies more."""
    x = RANDOM.normal(0, [1, 2, 3, 1, 9], (6000, 5))
    need = np.diag([1.0, 0, 0, 1, 0])
    mix = directions(np.cov(x.T), need, 2, relu=False)
    assert mix.shape == (5, 2)
    assert np.abs(mix[[1, 2, 4]]).max() < 1e-6
    assert abs(np.linalg.det(mix[[0, 3]])) > 0.5


def test_behind_a_relu_channels_that_tell_most():
    """A copy adds nothing: the third channel is the first again, and the fourth is needed by no one."""
    x = RANDOM.normal(0, 1, (6000, 4)) * [3, 2, 0, 9]
    x[:, 2] = 1.01 * x[:, 0]
    mix = directions(np.cov(x.T), np.diag([1.0, 1, 1, 0]), 2, relu=True)
    assert mix.sum() == 2
    assert set(map(tuple, np.argwhere(mix))) in ({(0, 0), (1, 1)}, {(1, 0), (2, 1)})
    more = directions(np.cov(x.T), np.diag([1.0, 1, 1, 0]), 4, relu=True)  # all there are
    assert (more == np.eye(4)).all()
