#!/usr/bin/env python3
"""Time rebirth_net.py --init lsq on a net, and the memory that it and its engines take at their peak."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.errors import RebirthError

EVERY = 0.2  # seconds between two looks at the memory
EPILOG = """A net without weights gets them from its fillers. What is counted is the memory of the command and
all processes below it together, pages that several of them share once (Linux)."""


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, epilog=EPILOG)
    p.add_argument("net", metavar="NET.prototxt", type=Path, help="a deploy net")
    p.add_argument("--weights", metavar="W.caffemodel", help="its trained weights")
    p.add_argument("--calibration", metavar="IMAGES", required=True, help="as of rebirth_net.py")
    p.add_argument("--images", type=cli.positive, default=256, help="of them, to use (default: 256)")
    p.add_argument("--mean-value", default="104,117,123", help="default: 104,117,123")
    p.add_argument("--out", metavar="JSON", type=Path, help="what was measured, for programs")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    from rebirth_caffe.init.fill import fill_missing
    from rebirth_caffe.net import Net

    with tempfile.TemporaryDirectory(prefix="rebirth-") as home:
        weights = args.weights
        if weights is None:
            net = Net.load(args.net)
            fill_missing(net)
            weights = str(Path(home, "fillers.caffemodel"))
            net.write_weights(Path(weights))
        command = [
            sys.executable, str(Path(__file__).with_name("rebirth_net.py")), str(args.net),
            "--weights", weights, "--init", "lsq",
            "--calibration", args.calibration, "--images", str(args.images),
            f"--mean-value={args.mean_value}", "--out", str(Path(home, "out")),
        ]  # fmt: skip
        load = os.getloadavg()[0]
        seconds, peak = watched(command)
    found: dict[str, Any] = {
        "net": str(args.net), "images": args.images, "seconds": round(seconds, 1), "peak_bytes": peak,
        "cores": os.cpu_count(), "load_before": round(load, 2),
    }  # fmt: skip
    print(f"{args.net}, {args.images} images: {seconds / 60:.1f} minutes, {peak / 1e9:.2f} GB at the peak")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def watched(command: list[str]) -> tuple[float, int]:
    """Seconds that a command takes, and bytes that it and all below it take at their peak."""
    begun, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(_bytes, _below(process.pid))))
            time.sleep(EVERY)
    if process.returncode:
        raise RebirthError(f"{' '.join(command)}: exit status {process.returncode}")
    return time.perf_counter() - begun, peak


def _below(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found.extend(map(int, _read(task).split()))
    return found


def _bytes(pid: int) -> int:
    """The memory of a process, its share of what it shares with others; 0 where it has ended."""
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    cli.run(main)
