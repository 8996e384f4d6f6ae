#!/usr/bin/env python3
"""Run every prototxt below a folder through this tool and real Caffe: what to expect of a model collection.

Each file is read, written back unchanged, reborn by default and with --exact, and, where Caffe builds it,
built and computed before and after. Exit status 1 where something failed that must not."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.errors import EngineError, RebirthError

if TYPE_CHECKING:
    from rebirth_caffe.corpus import Checked


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", metavar="DIR", type=Path, help="*.prototxt in it and below are checked")
    p.add_argument("--caffe", metavar="PATH", help="the Caffe to build with (default: as everywhere)")
    p.add_argument("--no-caffe", action="store_true", help="only read, write and rebirth")
    p.add_argument("--jobs", metavar="N", type=cli.positive, default=os.cpu_count() or 1,
                   help="files at a time (default: one per processor)")  # fmt: skip
    p.add_argument("--seconds", metavar="S", type=cli.positive, default=5,
                   help="of a processor a file may take in this tool (default: 5)")  # fmt: skip
    p.add_argument("--caffe-seconds", metavar="S", type=cli.positive, default=60,
                   help="it may take in Caffe (default: 60)")  # fmt: skip
    p.add_argument("--memory", metavar="GB", type=cli.positive, default=4, help="it may take (default: 4)")
    p.add_argument("--json", action="store_true", help="print the results for programs")
    return p.parse_args()


def main() -> int:
    args = parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from rebirth_caffe.corpus import FAILED, Limits, check
    from rebirth_caffe.engines import get_engine

    if not args.folder.is_dir():
        raise RebirthError(f"{args.folder}: no such directory; give one with prototxts")
    paths = sorted(path for path in args.folder.rglob("*.prototxt") if path.is_file())
    if not paths:
        raise RebirthError(f"{args.folder}: holds no *.prototxt; give another directory")
    engine = None
    if not args.no_caffe:
        try:
            engine = get_engine("caffe", args.caffe)
        except EngineError as error:
            raise EngineError(f"{error}; or leave it out with --no-caffe") from None
    limits = Limits(args.seconds, args.caffe_seconds, args.memory * 2**30)
    results = []
    for checked in check(paths, engine, args.jobs, limits):
        results.append(checked)
        if not args.json:
            print(cli.printable(line(checked, args.folder)), flush=True)
    if args.json:
        print(json.dumps([asdict(checked) for checked in results], indent=2, default=str))
    else:
        print(totals(results))
    return any(checked.status == FAILED for checked in results)


def line(checked: Checked, folder: Path) -> str:
    """One file in one line."""
    parts = [f"{checked.status:8}{checked.seconds:5.2f} s  {checked.path.relative_to(folder)}"]
    if checked.layers:
        parts.append(f"{checked.layers} layers, {checked.merges} merges, {checked.exact} exact")
    if checked.note:
        parts.append(checked.note.removeprefix(f"{checked.path}:"))
    if checked.caffe:
        parts.append(f"Caffe: {checked.caffe}")
    if checked.difference is not None:
        parts[-1] += f" (exact to {checked.difference:.0e})"
    return "  ".join(parts)


def totals(results: list[Checked]) -> str:
    """What the collection says as a whole."""
    read = [checked for checked in results if checked.written or checked.layers]
    built = [checked for checked in results if checked.built]
    computed = [checked for checked in results if checked.difference is not None]
    refused = [checked for checked in results if checked.status == "refused"]
    failed = [checked for checked in results if checked.status == "FAILED"]
    slowest = max(results, key=lambda checked: checked.seconds)
    return "\n".join(
        [
            "",
            f"{len(results)} files: {len(results) - len(refused) - len(failed)} ok, {len(refused)} refused, "
            f"{len(failed)} failed",
            f"read {len(read)}, of these written back to the byte {sum(c.written for c in results)}",
            f"built by Caffe {len(built)}, after rebirth with the same shapes "
            f"{sum(c.status != 'FAILED' for c in built)}",
            f"computed after exact merges {len(computed)}, largest difference "
            f"{max((c.difference or 0 for c in computed), default=0):.1e}",
            f"slowest {slowest.seconds:.2f} s: {cli.printable(str(slowest.path))}",
        ]
    )


if __name__ == "__main__":
    cli.run(lambda: sys.exit(main()))
