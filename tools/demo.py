#!/usr/bin/env python3
"""The tour: rebirth GoogLeNet and CaffeNet and time them against their originals.

It only runs the commands a person would type, and shows them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Net, and the flags of each reborn version of it. --kernel auto also merges the pools that only another
# kernel can take in: in GoogLeNet that changes two kernels, in CaffeNet it adds three pools.
TOUR = (
    ("bvlc_googlenet", {"reborn": [], "reborn_auto": ["--kernel", "auto"]}),
    ("bvlc_reference_caffenet", {"reborn": [], "reborn_auto": ["--kernel", "auto"]}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="where to write (default: demo/ in the repository)"
    )
    parser.add_argument("--runs", type=int, default=20, help="timed forwards of each net (default: 20)")
    parser.add_argument("--engine", default="caffe,opencv", help="as in tools/benchmark.py")
    args = parser.parse_args()
    if args.out != parser.get_default("out"):
        args.out = args.out.resolve()
    for name, versions in TOUR:
        original = f"prototxts/{name}/deploy.prototxt"
        nets = [original]
        for version, flags in versions.items():
            out = args.out / name / version
            quiet = ["--json"] if flags else []  # the second table would say nearly the same
            command = ["tools/rebirth_net.py", original, "--out", str(out), "--force", *flags, *quiet]
            if (status := show(command, hide=bool(quiet))) != 0:
                return status
            nets.append(str(out / "deploy.prototxt"))
        command = ["tools/benchmark.py", *nets, "--engine", args.engine, "--runs", str(args.runs)]
        if (status := show(command)) != 0:
            return status
    return 0


def show(command: list[str], hide: bool = False) -> int:
    """Run one of our commands in the repository, after printing it; its exit status."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL if hide else None, check=False
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
