#!/usr/bin/env python3
"""Measure a net's top-1 and top-5 accuracy over a database, in Caffe, OpenCV or torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli

EPILOG = """Of a train_val what computes the scores is tested, on images transformed as its own TEST data
layer says, unless told otherwise here."""


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, epilog=EPILOG)
    p.add_argument("net", metavar="NET.prototxt", type=Path, help="a deploy or train_val net")
    p.add_argument("weights", metavar="WEIGHTS", type=Path, help="its caffemodel")
    p.add_argument("--data", metavar="LMDB", required=True, help="labelled images (tools/make_lmdb.py)")
    p.add_argument("--engine", choices=("caffe", "opencv", "torch"), default="caffe", help="default: caffe")
    p.add_argument("--caffe", metavar="PATH", help="a Caffe's directory or command (default: looked for)")
    p.add_argument("--threads", metavar="N", type=cli.positive, default=1, help="default: 1")
    mean = p.add_mutually_exclusive_group()
    mean.add_argument("--mean-file", metavar="BINARYPROTO", help="mean image to subtract")
    mean.add_argument(
        "--mean-value", metavar="V,V,V", type=cli.numbers, help="mean of each channel to subtract"
    )
    p.add_argument("--scale", metavar="S", type=float, help="factor after that")
    p.add_argument("--crop", metavar="N", type=cli.positive, help="the middle N x N of the images")
    p.add_argument("--json", action="store_true", help="one JSON document instead of a line")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    from rebirth_caffe.data import lmdb_info, show_progress
    from rebirth_caffe.engines import get_engine
    from rebirth_caffe.evaluate import evaluate_net
    from rebirth_caffe.net import Net
    from rebirth_caffe.solver import data_layer
    from rebirth_caffe.transform import UNTOUCHED, Transform

    info = lmdb_info(args.data)
    net = Net.load(args.net, args.weights, (info.channels, info.height, info.width))
    layer = data_layer(net)
    given: dict[str, Any] = {"scale": args.scale, "crop": args.crop}
    if args.mean_file or args.mean_value:
        given |= {"mean_file": args.mean_file, "mean_values": args.mean_value or ()}
    own = Transform.of(layer) if layer is not None else Transform()
    mean = ("mean_file", "mean_values")
    transform = dataclasses.replace(own, **{k: v for k, v in given.items() if v is not None or k in mean})
    if transform.crop:
        net.image = (info.channels, transform.crop, transform.crop)
    engine = get_engine(args.engine, args.caffe)
    with show_progress() as progress:
        found = evaluate_net(net, args.data, engine, transform, args.threads, progress)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    print(
        f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, loss {found.loss:.4f}, {found.images:,} images, "
        f"{args.engine}"
    )
    if layer is None and transform.leaves_values:  # a train_val says itself what it wants
        print(UNTOUCHED)


if __name__ == "__main__":
    cli.run(main)
