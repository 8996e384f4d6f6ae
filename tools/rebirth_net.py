#!/usr/bin/env python3
"""Rewrite a Caffe net into a faster one: deploy, train_val, weights, plan and report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.init import METHODS
from rebirth_caffe.rebirth import KERNELS, rebirth


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("prototxt", metavar="IN.prototxt", help="a deploy or train_val net")
    p.add_argument("--weights", metavar="W.caffemodel", help="its trained weights (current or V1 storage)")
    p.add_argument("--out", metavar="DIR", help="where to write (default: <name>_rebirth/)")
    p.add_argument("--force", action="store_true", help="replace our files in an existing --out")
    p.add_argument("--plan", metavar="PLAN.yaml", help="apply this plan instead of proposing one")
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--only", metavar="IDS", type=_ids, default=(), help="just these merges or steps: 3a,3b"
    )
    which.add_argument("--skip", metavar="IDS", type=_ids, default=(), help="all but these")
    p.add_argument("--exact", action="store_true", help="only what leaves the net's function as it is")
    p.add_argument("--reduce", metavar="R", type=float, default=0.5,
                   help="what is left of the reducers under merged branches (default 0.5)")  # fmt: skip
    p.add_argument("--kernel", choices=KERNELS, default="keep",
                   help="kernel of a convolution that takes in a pool: the original, the smallest "
                   "well-centred, or the whole receptive field (default keep)")  # fmt: skip
    p.add_argument("--init", choices=METHODS, default="inherit",
                   help="weights of reborn layers: noise as in the paper, or the absorbed kernels "
                   "(default inherit)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    p.add_argument("--dry-run", action="store_true", help="show what would be done, write nothing")
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    return p.parse_args()


def _ids(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def main() -> None:
    args = parse_args()
    result = rebirth(
        args.prototxt, args.weights, plan=args.plan, only=args.only, skip=args.skip, exact=args.exact,
        reduce=args.reduce, kernel=args.kernel, init=args.init, seed=args.seed,
    )  # fmt: skip
    out = args.out or f"{result.original.name.replace('/', '_')}_rebirth"
    written = [] if args.dry_run else result.write(out, args.force)
    if args.json:
        print(json.dumps(result.report(), indent=2))
        return
    from rich.console import Console

    from rebirth_caffe.report import show

    console = Console(highlight=False, soft_wrap=False)
    show(result, console)
    if written:
        print(f"wrote {out}/: {', '.join(path.name for path in written)}")


if __name__ == "__main__":
    cli.run(main)
