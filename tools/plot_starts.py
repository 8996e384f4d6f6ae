#!/usr/bin/env python3
"""Draw what compare_starts.py wrote, top-1 against iterations and seconds, and print how every run ended."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.errors import RebirthError

Run = dict[str, Any]  # a line of compare_starts.py


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__.splitlines()[0])
    p.add_argument("runs", metavar="JSONL", type=Path, help="compare_starts.py's --out")
    p.add_argument("picture", metavar="PNG", type=Path)
    p.add_argument(
        "--iterations", type=cli.positive, help="draw the runs of this length (default: the longest)"
    )
    return p.parse_args()


def main() -> None:
    args = parse_args()
    lines = args.runs.read_text("utf-8").splitlines()
    runs = [run for run in map(json.loads, lines) if not run["job"]["held_out"]]
    length = args.iterations or max((run["job"]["iterations"] for run in runs), default=0)
    starts = by_start(run for run in runs if run["job"]["iterations"] == length)
    if not starts:
        raise RebirthError(f"{args.runs}: no run of {length:,} iterations to draw")
    draw(starts, args.picture)
    print(table(runs))
    print(f"wrote {args.picture}")


def by_start(runs: Iterable[Run]) -> dict[tuple[str, float], list[Run]]:
    """The runs of each start (with what the scores weighed and what Adam's moments were, where they are not
    the default) and rate, by their seeds."""
    found: dict[tuple[str, float], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["job"]["seed"]):
        job = run["job"]
        usual = {"scores": 4, "momentum": 0.9, "momentum2": 0.999}  # as all had it once
        odd = [f", {name} {job[name]:g}" for name, value in usual.items() if job.get(name, value) != value]
        found["".join([job["start"], *odd]), job["rate"]].append(run)
    return found


def table(runs: list[Run]) -> str:
    """Top-1 at the end of every run, in %, a row (of Markdown) a start and rate: its seeds side by side."""
    lengths = sorted({run["job"]["iterations"] for run in runs})
    rows = [["start", "base_lr", *(f"{length:,}" for length in lengths)]]
    rows.append(["---"] * len(rows[0]))
    for (start, rate), some in by_start(runs).items():
        ends = [
            ", ".join(
                f"{100 * run['final']['top1']:.2f}" for run in some if run["job"]["iterations"] == length
            )
            for length in lengths
        ]
        rows.append([start, f"{rate:g}", *ends])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(starts: dict[tuple[str, float], list[Run]], picture: Path) -> None:
    """A line for each start and rate: the mean over its seeds, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    with pyplot.rc_context(style):
        figure, panes = pyplot.subplots(1, 2, figsize=(12, 6.5), sharey=True, layout="constrained")
        for (start, rate), runs in sorted(
            starts.items(), key=lambda item: -mean(r["final"]["top1"] for r in item[1])
        ):
            top1 = [run["final"]["top1"] for run in runs]
            few = len(runs) <= 3  # of more the table has each
            ends = ", ".join(f"{x:.2%}" for x in top1) if few else f"{mean(top1):.2%}, mean of {len(runs)}"
            iterations = [x for x, _ in curve(runs[0])]
            heights = list(zip(*([100 * y for _, y in curve(run)] for run in runs), strict=True))
            # Tests are not timed one by one: an iteration costs the same throughout a run.
            each = mean(run["seconds"] / run["job"]["iterations"] for run in runs)
            for axes, scale in zip(panes, (1.0, each), strict=True):
                xs = [scale * x for x in iterations]
                (line,) = axes.plot(
                    xs, [mean(h) for h in heights], ".-", label=f"{start} at {rate:g} ({ends})"
                )
                axes.fill_between(
                    xs,
                    [min(h) for h in heights],
                    [max(h) for h in heights],
                    color=line.get_color(),
                    alpha=0.15,
                    linewidth=0,
                )
        for axes, name in zip(panes, ("iterations", "seconds of training"), strict=True):
            axes.set(xlabel=name, xlim=(0, None))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.grid(axis="y", color="0.88", linewidth=0.8)
            originals = {run["original"]["top1"] for runs in starts.values() for run in runs}
            for top1 in originals:
                axes.axhline(100 * top1, color="#666666", linewidth=1, linestyle="--")
        # Where they begin says little, and would leave the rest no room.
        later = [y for runs in starts.values() for run in runs for _, y in curve(run)[1:]]
        panes[0].set_ylim(bottom=max(0, 100 * min(later) - 3))
        panes[0].set_ylabel("top-1 on the test data, %; dashed: the original")
        lines = panes[0].get_legend_handles_labels()
        figure.legend(*lines, fontsize=9, frameon=False, loc="outside lower center", ncols=2)
        figure.savefig(picture, dpi=110, format="png")
        pyplot.close(figure)


def curve(run: Run) -> list[tuple[int, float]]:
    """Iterations and top-1 of the attempt that counts, from the first test to the last."""
    last = run["curve"][-1]
    counts = [e for e in run["curve"] if (e["attempt"], e["rate"]) == (last["attempt"], last["rate"])]
    points = {e["iteration"]: e["top1"] for e in counts}
    points[run["job"]["iterations"]] = run["final"]["top1"]
    return sorted(points.items())


if __name__ == "__main__":
    cli.run(main)
