#!/usr/bin/env python3
"""Makes a database of images that Caffe's Data layer reads."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli

EPILOG = """SRC is a folder with one folder of images per class (labels count them in alphabetical order), a
folder of images without labels (for retrain.py --distil images), a database, a
Caffe list file with a line PATH LABEL for each image, or the two files of MNIST: IMAGES,LABELS (idx or .gz).
OUT is a folder: the database, the names of the classes (labels.txt), what became which record (list.txt) and
the mean image (mean.binaryproto). The mean values are printed at the end and kept in about.json."""


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, epilog=EPILOG)
    p.add_argument("src", metavar="SRC", help="a folder per class, a database, a list file, or IMAGES,LABELS")
    p.add_argument("out", metavar="OUT.lmdb", type=Path, help="the database to make")
    p.add_argument("--root", metavar="DIR", help="where a list file's paths start (default: its folder)")
    p.add_argument("--resize", metavar="HxW", type=_size, help="bilinear, as Caffe's convert_imageset does")
    p.add_argument("--pad", metavar="N", type=cli.positive, default=0,
                   help="mirror N pixels out of each side, for random crops of the old size")  # fmt: skip
    p.add_argument("--gray", action="store_true", help="one channel (default: three, an idx file's one)")
    p.add_argument(
        "--encoded", action="store_true", help="keep JPEG and PNG files as they are: smaller, slower"
    )
    p.add_argument("--shuffle", action="store_true", help="in random order: training needs it")
    p.add_argument("--seed", metavar="N", type=cli.whole, default=0,
                   help="of --shuffle, --hold-out and --mix (default: 0)")  # fmt: skip
    p.add_argument("--limit", metavar="N", type=cli.positive, help="only the first N images, after shuffling")
    p.add_argument("--mix", metavar="N", type=cli.positive,
                   help="N images without labels made of these: turned, scaled, lit, mixed of two; for "
                   "retrain.py --distil images where there are only some hundred or thousand")  # fmt: skip
    p.add_argument("--hold-out", metavar=("FRACTION", "OUT2.lmdb"), nargs=2,
                   help="write this part of each class into OUT2 instead, for validation")  # fmt: skip
    p.add_argument("--strict", action="store_true", help="fail where an image cannot be read")
    p.add_argument("--force", action="store_true", help="replace OUT (and OUT2) where they exist")
    return p.parse_args()


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, like 256x256")
    return int(match[1]), int(match[2])


def main() -> None:
    args = parse_args()
    try:
        fraction = cli.fraction(args.hold_out[0]) if args.hold_out else 0.0
    except argparse.ArgumentTypeError as error:
        cli.fail(f"--hold-out: {error}")
    if args.mix and args.hold_out:
        cli.fail("--mix: makes one database, of all images; hold out some first, then mix the database left")

    import numpy as np

    from rebirth_caffe.data import (
        UNLABELLED,
        Recipe,
        by_class,
        choose,
        find_images,
        show_progress,
        write_lmdbs,
    )

    images = find_images(args.src, args.root)
    order, held = choose(
        images.labels, shuffle=args.shuffle, seed=args.seed, limit=args.limit, hold_out=fraction
    )
    recipe = Recipe(args.resize, args.pad, args.gray, args.encoded)
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.mix:
        from rebirth_caffe.mix import mixed

        images = mixed(images, order, recipe, args.mix, args.seed)
        order = np.arange(args.mix)
    classes = [len(set(labels.tolist())) for labels in (images.labels[order], images.labels)]
    if classes[0] < classes[1]:
        print(f"note: only {classes[0]} of {classes[1]} classes are among these images", file=sys.stderr)
    unlabelled = int(images.labels[0]) == UNLABELLED
    if by_class(images.labels[order]) or (unlabelled and not args.shuffle and not args.mix):
        how = f"in the order of {args.src}" if unlabelled else "class by class"
        print(f"note: the images come {how}; training needs --shuffle, testing does not", file=sys.stderr)
    parts = {args.out: order}
    if args.hold_out:
        parts[Path(args.hold_out[1])] = held
        if len({out.resolve() for out in parts}) < 2:
            cli.fail(f"{args.out}: given for both parts; --hold-out wants a second name")
    made = {
        "source": args.src,
        "shuffle": args.shuffle,
        "seed": args.seed,
        "limit": args.limit,
        "hold_out": fraction,
        "mix": args.mix,
    }
    with show_progress() as progress:
        written = write_lmdbs(
            parts, images, recipe, strict=args.strict, force=args.force, made=made, progress=progress
        )
    for one in written:
        print(one.summary())
    if not args.mix:  # whose mean is of no use: a net that teaches keeps the one it was trained with
        print(written[0].transform())


if __name__ == "__main__":
    cli.run(main)
