"""Many images made of few, for learning from the original: it says of any image what the reborn layers shall
give, so that an image need not show one thing. Every one is turned, scaled and made lighter or darker, and
two of three are a blend of two (Zhang et al., 2017, but without labels).
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from .data import UNLABELLED, Images, Labels, Pixels, Recipe
from .errors import RebirthError

ALONE = 1 / 3  # of the images are no blend
DEGREES = 15.0  # turned by up to so much, either way
ZOOM = 1.25  # times larger or smaller, at most
LIGHT = 1.2  # times lighter or darker, at most


def mixed(images: Images, order: Labels, recipe: Recipe, number: int, seed: int = 0) -> Images:
    """``number`` images without labels, each made of one or two of those in ``order``, drawn by ``seed``.

    They are made of what ``recipe`` makes of their sources before padding, whose sides they mirror where
    they are turned or smaller. Loading raises ValueError where a source cannot be read, and RebirthError
    where two have not one size.
    """
    draws = np.random.default_rng(seed)
    pairs = order[draws.integers(len(order), size=(number, 2))]
    shares = np.where(draws.random(number) < ALONE, 1, draws.random(number))

    def warped(i: int, random: np.random.Generator) -> Pixels:
        try:
            image = recipe.pixels(images.load(i))
        except (OSError, ValueError) as error:
            raise ValueError(f"{images.names[i]}: {error}") from None
        return warp(image, random)

    def load(i: int) -> Pixels:
        random = np.random.default_rng((seed, i))
        (first, second), share = pairs[i], shares[i]
        image = warped(first, random)
        if share == 1:
            return image
        other = warped(second, random)
        if image.shape != other.shape:
            here, there = ("x".join(map(str, one.shape[:2])) for one in (image, other))
            raise RebirthError(
                f"{images.names[first]} is {here} and {images.names[second]} is {there}; images are mixed in "
                "one size, give --resize HxW"
            )
        return np.asarray(cv2.addWeighted(image, share, other, 1 - share, 0), np.uint8)

    names = [
        images.names[first] + (f" + {images.names[second]}" if share < 1 else "")
        for (first, second), share in zip(pairs, shares, strict=True)
    ]
    return replace(images, names=names, labels=np.full(number, UNLABELLED), load=load, classes=())


def warp(image: Pixels, random: np.random.Generator) -> Pixels:
    """The image (height x width, or height x width x 3) turned, scaled, lighter or darker, in its size."""
    height, width = image.shape[:2]
    angle = random.uniform(-DEGREES, DEGREES)
    zoom, light = (limit ** random.uniform(-1, 1) for limit in (ZOOM, LIGHT))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, zoom)
    turned = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(cv2.convertScaleAbs(turned, alpha=light), np.uint8)
