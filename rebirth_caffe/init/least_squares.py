"""The closed-form fit of a reborn layer: rows of what it reads against what it should put out.

Rows x (im2col), targets y, p = Wx + b. Behind a ReLU a target of 0 only asks for something that is not
positive, so that what is minimised is

    mean over rows of (sum over y > 0 of (p - y)^2 + sum over y = 0 of max(p, 0)^2) + ridge v |W - W0|^2

with v the mean variance of the inputs. It is solved in turns: z = y where y > 0, else min(p, 0); then W is
the ridge regression of z, from one eigendecomposition of the covariance of x in float64. That never fails:
what the rows leave open (dead inputs, fewer rows than inputs) stays as in W0, which was inherited.

The ridge is not the one with the smallest error on held-out rows but the largest within ``TOLERANCE`` of it:
a smaller one buys that last per cent with weights many times as large in directions in which the input hardly
varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Weights = tuple[Doubles, Doubles]  # outputs x inputs, outputs

RIDGES = (10.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6)
TOLERANCE = 1.02
TURNS, FEWER = 15, 4  # of z and W: for the weights, and for comparing ridges
CHUNK = 4096  # rows


@dataclass(frozen=True)
class Solution:
    """A fitted layer: its ``weights`` from all rows and the ridge; ``tried``, the weights from all but the
    rows held out, and their ``error`` on those, in all and of each channel."""

    weights: Weights
    ridge: float
    tried: Weights
    error: float
    channels: Doubles


class Moments:
    """Mean and covariance of rows that come a few at a time, whatever their number."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum: Doubles = np.zeros(width)
        self._products: Doubles = np.zeros((width, width))

    def add(self, rows: NDArray[np.floating]) -> Moments:
        """Take in rows (rows x width)."""
        for some in _chunks(len(rows)):
            part = rows[some].astype(np.float64)
            self._sum += part.sum(axis=0)
            self._products += part.T @ part
        self.count += len(rows)
        return self

    @property
    def mean(self) -> Doubles:
        return self._sum / max(self.count, 1)

    @property
    def covariance(self) -> Doubles:
        return self._products / max(self.count, 1) - np.outer(self.mean, self.mean)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(at, at + CHUNK) for at in range(0, rows, CHUNK))


def outputs(x: Floats, weights: Weights, relu: bool) -> Floats:
    """What a layer makes of rows."""
    p = x @ weights[0].T.astype(np.float32) + weights[1].astype(np.float32)
    return np.maximum(p, 0) if relu else p


def error(x: Floats, y: Floats, weights: Weights, relu: bool) -> float:
    """The relative error of a layer: the root of squared error over the target's variance.

    0 is perfect, 1 no better than the mean of each channel; of targets that do not vary it is the error
    itself, and nan where there are no rows.
    """
    if not len(y):
        return math.nan
    wrong, spread = _squares(x, y, weights, relu)
    return math.sqrt(float(wrong.sum()) / (float(spread.sum()) or y.size))


def channel_errors(x: Floats, y: Floats, weights: Weights, relu: bool) -> Doubles:
    """The same of each channel; 0 of one whose target does not vary."""
    wrong, spread = _squares(x, y, weights, relu)
    return np.sqrt(np.divide(wrong, spread, out=np.zeros_like(wrong), where=spread > 0))


def _squares(x: Floats, y: Floats, weights: Weights, relu: bool) -> tuple[Doubles, Doubles]:
    """Of each channel the squared error, and that of its mean, summed over the rows."""
    wrong: Doubles = np.zeros(y.shape[1])
    for some in _chunks(len(x)):
        wrong += np.square(outputs(x[some], weights, relu) - y[some]).sum(axis=0, dtype=np.float64)
    return wrong, np.square(y - y.mean(axis=0)).sum(axis=0, dtype=np.float64)


class _Regression:
    """Ridge regressions of any targets on the same rows, which are taken about their mean."""

    def __init__(self, x: Floats) -> None:
        self.mean = x.mean(axis=0, dtype=np.float64)
        self.x: Floats = x - self.mean.astype(np.float32)
        self.covariance = Moments(x.shape[1]).add(self.x).covariance
        values, self.vectors = np.linalg.eigh(self.covariance)
        self.values = np.maximum(values, 0)
        self.unit = float(self.values.mean()) or 1.0  # rows that are all alike leave everything open

    def solve(self, target: Callable[[slice], Floats], ridge: float, start: Doubles) -> Weights:
        """W and b, of the centred rows, for the targets that ``target`` gives for a slice of them."""
        cross: Doubles = np.zeros((self.x.shape[1], len(start)))
        total: Doubles = np.zeros(len(start))
        for some in _chunks(len(self.x)):
            z = target(some)
            cross += self.x[some].T @ z
            total += z.sum(axis=0, dtype=np.float64)
        rest = cross / len(self.x) - self.covariance @ start.T
        inner = (self.vectors.T @ rest) / (self.values + ridge * self.unit)[:, None]
        return start + (self.vectors @ inner).T, total / len(self.x)

    def fit(self, y: Floats, relu: bool, ridge: float, start: Doubles, at: Weights | None) -> Weights:
        """Weights in turns from ``at``; where there is none, from the plain regression, in more turns."""
        if not relu:
            weight, shift = self.solve(lambda some: y[some], ridge, start)
            return weight, shift - weight @ self.mean
        if at is None:
            found = self.solve(lambda some: y[some], ridge, start)
        else:
            found = at[0], at[1] + at[0] @ self.mean
        for _ in range(FEWER if at else TURNS):
            before = found

            def z(some: slice, before: Weights = before) -> Floats:
                return np.where(y[some] > 0, y[some], np.minimum(outputs(self.x[some], before, False), 0))

            found = self.solve(z, ridge, start)
        return found[0], found[1] - found[0] @ self.mean


def fit(x: Floats, y: Floats, held: NDArray[np.bool_], relu: bool, start: Doubles) -> Solution:
    """Fit a layer to rows ``x`` (rows x inputs) and targets ``y`` (rows x outputs), near ``start`` (W0).

    ``held`` marks the rows that choose the ridge; with it, the fit is made on all rows.
    """
    regression, mine, test = _Regression(x[~held]), y[~held], y[held]
    tried: list[tuple[float, float, Weights]] = []
    at: Weights | None = None
    for ridge in RIDGES:
        at = regression.fit(mine, relu, ridge, start, at)
        tried.append((error(x[held], test, at, relu), ridge, at))
        if tried[-1][0] > TOLERANCE * min(wrong for wrong, *_ in tried):
            break  # with less of it the fit only follows what the held-out rows do not share
    good = TOLERANCE * min(wrong for wrong, *_ in tried)
    wrong, ridge, at = next(one for one in tried if one[0] <= good)
    channels = channel_errors(x[held], test, at, relu)
    return Solution(_Regression(x).fit(y, relu, ridge, start, at), ridge, at, wrong, channels)


def directions(covariance: Doubles, need: Doubles, count: int, relu: bool) -> Doubles:
    """What to keep of channels from which all, weighed by ``need``, are to be told: channels x count.

    These are principal directions: the largest share of the trace of need x covariance. A ReLU would cut them
    in half; what passes it are channels as they are, each the one that explains most of what those before it
    left (a pivoted Cholesky decomposition).
    """
    if not relu:
        values, vectors = np.linalg.eigh(need)
        root = vectors * np.sqrt(np.maximum(values, 0))
        found: Doubles = root @ np.linalg.eigh(root.T @ covariance @ root)[1][:, ::-1][:, :count]
        return found
    left = covariance.copy()
    floor = 1e-9 * max(float(np.diag(left).max()), 1e-30)  # of a variance: below, nothing is left
    chosen: list[int] = []
    for _ in range(count):
        variance = np.diag(left)
        gain = np.where(variance > floor, (left * (need @ left)).sum(axis=0) / np.maximum(variance, floor), 0)
        gain[chosen] = -1
        best = int(np.argmax(gain))
        chosen.append(best)
        if variance[best] > floor:
            left -= np.outer(left[best], left[best]) / variance[best]
    return np.eye(len(covariance))[:, np.sort(chosen)]
