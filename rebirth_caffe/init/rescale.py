"""Inherited channels, scaled to what the original puts out in their place.

Where a merge drops max pooling or LRN, or sees an absorbed branch through fewer channels, a copied kernel
puts out less (or more) than the original did, and less from layer to layer. A channel p is multiplied by the
s that brings it nearest to the original's y, by least squares through the origin:

    s = mean(y p) / mean(p^2)

which makes up for a lost pool as far as p still tells y. The ratio of the means would keep the mean but blow
up what in p has nothing to do with y, layer by layer.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from .least_squares import Doubles, Floats

MOST = 10.0  # times as much, or as little


@cache
def pooled(taps: int) -> float:
    """What to expect of s, without images, where a max pool over so many taps behind a ReLU is gone.

    It is that of normally distributed taps, p = max(x_1, 0) and y = max(x_1, ..., x_n, 0):

        s = 2 * integral over x > 0 of x phi(x) (x F(x) + integral over m > x of m dF(m)),  F = Phi^(n - 1)

    for independent ones, and hardly another where they are correlated as neighbours are (9 taps: 1.36; 1.42
    at a correlation of 0.5, 1.36 at 0.8), unlike the ratio of the means (3.7, 2.7, 2.0).
    """
    x = np.linspace(0, 8, 4001)
    density = np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
    below = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x]) ** (taps - 1)
    steps = np.diff(below) * (x[1:] + x[:-1]) / 2
    above = np.append(np.cumsum(steps[::-1])[::-1], 0)
    return float(2 * np.sum(x * density * (x * below + above)) * (x[1] - x[0]))


def scales(p: Floats, y: Floats) -> Doubles:
    """The factor of each channel from rows of what it gives (``p``) and should give (``y``), rows x channels.

    1 for a channel that never gives anything.
    """
    power = np.mean(np.square(p, dtype=np.float64), axis=0)
    told = np.mean(np.multiply(p, y, dtype=np.float64), axis=0)
    found: Doubles = np.clip(np.divide(told, power, out=np.ones_like(told), where=power > 0), 1 / MOST, MOST)
    return found
