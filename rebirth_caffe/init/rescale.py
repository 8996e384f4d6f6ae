"""Inherited channels, scaled to what the original puts out in their place.

Where a merge drops max pooling or LRN, or sees an absorbed branch through fewer channels, a copied kernel
puts out less (or more) than the original did, and less from layer to layer. A channel p is multiplied by the
s that brings it nearest to the original's y, by least squares through the origin:

    s = mean(y p) / mean(p^2)

which makes up for a lost pool as far as p still tells y. The ratio of the means would keep the mean but blow
up what p has nothing to do with y, layer by layer, and such a net learns worse than a plain copy.
"""

from __future__ import annotations

import numpy as np

from .least_squares import Doubles, Floats

MOST = 10.0  # times as much, or as little


def scales(p: Floats, y: Floats) -> Doubles:
    """The factor of each channel from rows of what it gives (``p``) and should give (``y``), rows x channels.

    1 for a channel that never gives anything.
    """
    power = np.mean(np.square(p, dtype=np.float64), axis=0)
    told = np.mean(np.multiply(p, y, dtype=np.float64), axis=0)
    found: Doubles = np.clip(np.divide(told, power, out=np.ones_like(told), where=power > 0), 1 / MOST, MOST)
    return found
