#!/usr/bin/env python3
"""Bring a Caffe file of any era into today's format: a net's or a solver's prototxt, or weights.

Does what Caffe's upgrade_net_proto_text, upgrade_net_proto_binary and upgrade_solver_proto_text do, and keeps
comments and what forks have added. Weights may be binary or HDF5, and become HDF5 where OUT ends in .h5."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="IN", type=Path, help="a prototxt, caffemodel or caffemodel.h5")
    p.add_argument("target", metavar="OUT", type=Path, help="where to write; nothing is ever replaced")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    from rebirth_caffe.upgrade import upgrade_file

    for note in upgrade_file(args.source, args.target):
        print(cli.printable(f"note: {note}"), file=sys.stderr)
    print(cli.printable(f"wrote {args.target}"))


if __name__ == "__main__":
    cli.run(main)
