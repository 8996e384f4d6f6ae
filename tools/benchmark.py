#!/usr/bin/env python3
"""Times nets against each other in Caffe, OpenCV and PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rebirth_caffe import cli

if TYPE_CHECKING:
    from rich.table import Table

    from rebirth_caffe.measure import Report

TITLES = {"caffe": "Caffe", "opencv": "OpenCV", "torch": "PyTorch"}
WORTH_A_ROW = 0.01  # of the whole forward's time


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        description="Times deploy nets in turn (A B A B ...) and compares them to the first.",
        epilog="Without weights a net gets them from its layers' fillers, the same in every engine.",
    )
    parser.add_argument(
        "nets", metavar="NET.prototxt", type=Path, nargs="+", help="deploy nets, the base first"
    )
    parser.add_argument(
        "--weights",
        metavar="W.caffemodel",
        action="append",
        default=[],
        help="weights: once for each net, in the same order; - for none",
    )
    parser.add_argument(
        "--engine", default="caffe,opencv", help="one or more of caffe,opencv,torch (default: caffe,opencv)"
    )
    parser.add_argument(
        "--caffe", metavar="PATH", help="a Caffe's directory or command (default: looked for)"
    )
    parser.add_argument("--threads", type=cli.positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--batch", type=cli.positive, default=1, metavar="N", help="images in one forward (default: 1)"
    )
    parser.add_argument(
        "--runs", type=cli.positive, default=20, metavar="N", help="timed forwards (default: 20)"
    )
    parser.add_argument(
        "--layers", action="store_true", help="the layers that take 1 %% of the time or more, too"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    return parser.parse_args()


def main() -> None:
    args = parse()

    from rebirth_caffe.engines import get_engine
    from rebirth_caffe.measure import measure

    engines = [get_engine(name, args.caffe) for name in dict.fromkeys(args.engine.split(","))]
    report = measure(
        args.nets,
        engines,
        weights=[None if weights == "-" else Path(weights) for weights in args.weights],
        threads=args.threads,
        batch=args.batch,
        runs=args.runs,
        layers=args.layers,
    )
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
        return

    from rich.console import Console

    versions = ", ".join(f"{TITLES[name]} {version}" for name, version in report.engines)
    Console().print(
        f"{versions}; batch {report.batch}, {report.threads} thread{'s' * (report.threads > 1)}, "
        f"median of {report.runs} forwards in turn",
        times(report),
        memory(report),
        *(layers(report) if args.layers else ()),
        sep="\n",
    )


def times(report: Report) -> Table:
    """Median time, middle half and ratio of every net in every engine."""
    table = new_table("Forward time, ms", ["net", "engine"], ["GMAC", "median", "middle half", "ratio"])
    for engine, _ in report.engines:
        for net in report.nets:
            result = report.result(engine, net.name)
            low, high = (f"{1e3 * seconds:#.3g}".rstrip(".") for seconds in result.quartiles)
            ratio = "1" if net is report.nets[0] else f"{report.ratio(result):.2f}x"
            gmac = f"{net.cost.macs / 1e9:.3f}"
            table.add_row(net.name, TITLES[engine], gmac, ms(result.median), f"{low}-{high}", ratio)
        table.add_section()
    return table


def memory(report: Report) -> Table:
    """Memory of every net in every engine."""
    table = new_table(
        "Memory, MB (peak: by how much the process grew)",
        ["net", "engine"],
        ["weights", "activations", "peak"],
    )
    for engine, _ in report.engines:
        for net in report.nets:
            m = report.result(engine, net.name).memory
            sizes = (m.weights_bytes, m.activation_bytes, m.peak_rss_bytes)
            table.add_row(net.name, TITLES[engine], *(f"{size / 1e6:.1f}" for size in sizes))
        table.add_section()
    return table


def layers(report: Report) -> list[Table]:
    """For each engine, the layers that matter in some net, in order of first appearance."""
    tables = []
    for engine, _ in report.engines:
        table = new_table(
            f"{TITLES[engine]}: layers, ms", ["layer", "type"], [net.name for net in report.nets]
        )
        results = [report.result(engine, net.name) for net in report.nets]
        found = [{(x.name, x.type): x.seconds for x in result.layers or ()} for result in results]
        least = WORTH_A_ROW * sum(found[0].values())
        shown = {key for times in found for key, seconds in times.items() if seconds >= least}
        for key in dict.fromkeys(key for times in found for key in times if key in shown):
            table.add_row(*key, *(ms(times[key]) if key in times else "-" for times in found))
        rest = [sum(seconds for key, seconds in times.items() if key not in shown) for times in found]
        table.add_row("the others", "", *map(ms, rest), end_section=True)
        table.add_row("together", "", *(ms(sum(times.values())) for times in found))
        tables.append(table)
    return tables


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def new_table(title: str, columns: list[str], numbers: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


if __name__ == "__main__":
    cli.run(main)
