"""Many images made of few, for learning from the original: it says of any image what the reborn layers shall
give, so that an image need not show one thing. Every one is turned, scaled and lit in its own way; a third
are a blend of two (mixup: Zhang et al., 2017), a third have a rectangle of another in them (CutMix: Yun et
al., 2019), all of them without labels. Mirroring is left to transform_param, which knows whether it is right.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from .data import UNLABELLED, Images, Labels, Pixels, Recipe
from .errors import RebirthError, by_x

DEGREES = 15.0  # turned by up to so much, either way
ZOOM = 1.3  # times larger or smaller, at most
LIGHT = 1.2  # times lighter or darker, at most
TINT = 1.1  # and each channel so much more or less
CONTRAST = 1.2  # times more or less, at most


def mixed(images: Images, order: Labels, recipe: Recipe, number: int, seed: int = 0) -> Images:
    """``number`` images without labels, each made of one or two of those in ``order``, drawn by ``seed``.

    They are made of what ``recipe`` makes of their sources before padding, whose sides they mirror where
    they are turned or smaller. Loading raises ValueError where a source cannot be read, and RebirthError
    where two have not one size.
    """
    draws = np.random.default_rng(seed)
    pairs = order[draws.integers(len(order), size=(number, 2))]
    ways = draws.integers(3, size=number)  # alone, blended, patched

    def warped(i: int, random: np.random.Generator) -> Pixels:
        try:
            image = recipe.pixels(images.load(i))
        except (OSError, ValueError) as error:
            raise ValueError(f"{images.names[i]}: {error}") from None
        return warp(image, random)

    def load(i: int) -> Pixels:
        random = np.random.default_rng((seed, i))
        first, second = pairs[i]
        image = warped(first, random)
        if not ways[i]:
            return image
        other = warped(second, random)
        if image.shape != other.shape:
            here, there = (by_x(one.shape[:2]) for one in (image, other))
            raise RebirthError(
                f"{images.names[first]} is {here} and {images.names[second]} is {there}; images are mixed in "
                "one size, give --resize HxW"
            )
        return (blend if ways[i] == 1 else patch)(image, other, random)

    names = [
        images.names[first] + (f" + {images.names[second]}" if way else "")
        for (first, second), way in zip(pairs, ways, strict=True)
    ]
    return replace(images, names=names, labels=np.full(number, UNLABELLED), load=load, classes=())


def warp(image: Pixels, random: np.random.Generator) -> Pixels:
    """The image (height x width, or height x width x 3) turned, scaled and lit otherwise, in its size."""
    height, width = image.shape[:2]
    angle = random.uniform(-DEGREES, DEGREES)
    zoom, light, contrast = (limit ** random.uniform(-1, 1) for limit in (ZOOM, LIGHT, CONTRAST))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, zoom)
    turned = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    lit = turned * np.asarray(light * TINT ** random.uniform(-1, 1, image.shape[2:]), np.float32)
    mean = lit.mean()
    return np.asarray(np.clip(np.rint(mean + contrast * (lit - mean)), 0, 255), np.uint8)


def blend(image: Pixels, other: Pixels, random: np.random.Generator) -> Pixels:
    """Some of both, everywhere."""
    share = random.random()
    return np.asarray(cv2.addWeighted(image, share, other, 1 - share, 0), np.uint8)


def patch(image: Pixels, other: Pixels, random: np.random.Generator) -> Pixels:
    """The image with a rectangle of the other, of any part of the area, where it was in the other."""
    share = np.sqrt(random.random())
    height, width = (round(side * share) for side in image.shape[:2])
    top = random.integers(image.shape[0] - height + 1)
    left = random.integers(image.shape[1] - width + 1)
    made = image.copy()
    made[top : top + height, left : left + width] = other[top : top + height, left : left + width]
    return made
