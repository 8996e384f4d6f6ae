"""Weights for the layers a merge makes: computed (exact), inherited, or drawn from a filler."""

from __future__ import annotations

import numpy as np

from ..caffemodel import Array
from ..errors import WeightsError
from ..merge import Merge
from ..net import Net

METHODS = ("xavier", "inherit", "lsq")


def weights_for(net: Net, merge: Merge, method: str, seed: int) -> dict[str, list[Array]]:
    """Blobs for every reborn layer of ``merge``, by name, from the weights in ``net`` (before the merge).

    ``method`` is ``xavier``, ``inherit``, or ``lsq``, which takes what is inherited for a start (see
    ``fit``); exact merges are so whatever the method. A layer made after one that has no weights gets none.
    Raises WeightsError where an exact merge lacks a blob, and where the weights are those of a training that
    diverged.
    """
    from .exact import exact
    from .reborn import reborn

    try:
        with np.errstate(all="ignore"):
            made = exact(net, merge) if merge.exact else reborn(net, merge, method, seed)
    except np.linalg.LinAlgError:
        made = None
    if made is None or not all(np.isfinite(blob).all() for blobs in made.values() for blob in blobs):
        raise WeightsError(
            f"merge '{merge.id}': the weights of {', '.join(merge.layers)} are not all finite numbers; "
            f"give others, or --skip {merge.id}"
        )
    return made
