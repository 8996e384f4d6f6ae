"""What a person sees of training: a live line, a table, a picture."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from time import monotonic
from typing import IO, Any

from .journal import Event, Journal
from .retrain import Outcome

SECONDS = 30  # between lines where the output is no terminal


class Screen:
    """Progress on a terminal as one live line, else as a line every ``seconds``; a line for every result."""

    def __init__(self, file: IO[str] | None = None, seconds: float = SECONDS) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = Console(file=file, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.completed}/{task.total}  {task.fields[news]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.task = self.progress.add_task("", total=1, visible=False, news="")
        self.seconds = seconds
        self.said = monotonic()  # when the last line was printed
        self.steps: list[tuple[str, int]] = []  # name, iterations
        self.stage = ""
        self.begun: tuple[float, int] | None = None  # when, and at which iteration, this step was first heard
        self.losses: list[float] = []
        self.accuracy = ""  # of the last step

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def tell(self, what: str, details: dict[str, Any]) -> None:
        """Show an event of ``retrain``."""
        if what == "run":
            self.steps = [(stage, n) for stage, n in details["steps"]]
            if details["done"]:
                self._print(f"done before: {', '.join(details['done'])}")
        elif what == "original":
            self._print(f"original: {_numbers(details)}")
            self.accuracy = f"top-1 {details['top1']:.2%} (original)"
        elif what == "step":
            self.begun, self.losses, self.stage = None, [], details["stage"]
            self.progress.reset(
                self.task, description=self._name(), total=details["iterations"], visible=True, news=""
            )
        elif what == "progress":
            self._progress(details)
        elif what == "testing":
            self._testing(details)
        elif what == "curve":
            self._print(f"{self._name()}: iteration {details['iteration']:,}, {_numbers(details)}")
            self.accuracy = f"top-1 {details['top1']:.2%} at {details['iteration']:,}"
        elif what == "note":
            self._print(details["text"])
        elif what == "result":
            self.progress.update(self.task, visible=False)
            if details["top1"] is not None:
                self._print(
                    f"{details['stage']}: {_numbers(details)}, {details['iterations']:,} iterations, "
                    f"{duration(details['seconds'])}{', ' * (not details['kept'])}{_verdict(details)}"
                )
                if details["kept"]:
                    self.accuracy = f"top-1 {details['top1']:.2%} after {details['stage']}"

    def _print(self, text: str) -> None:
        self.said = monotonic()
        self.console.print(text, markup=False)

    def _name(self) -> str:
        names = [stage for stage, _ in self.steps]
        if self.stage not in names:
            return self.stage
        return f"step {names.index(self.stage) + 1}/{len(names)}, {self.stage}"

    def _progress(self, details: dict[str, Any]) -> None:
        now, iteration = monotonic(), details["iteration"]
        if self.begun is None or iteration <= self.begun[1]:  # first, or again: longer, or more slowly
            self.begun, self.losses = (now, iteration), []
        self.losses = [*self.losses[-9:], details["loss"]]
        news = [f"loss {sum(self.losses) / len(self.losses):.4f}"]
        if self.accuracy:
            news.append(self.accuracy)
        done = iteration - self.begun[1]
        if done > 0:
            each = (now - self.begun[0]) / done
            left = details["of"] - iteration
            news.append(f"{duration(each * left)} left")
            after = self._iterations_after()
            if after:
                news.append(f"about {duration(each * (left + after))} for all steps")
        self._show(iteration, details["of"], ", ".join(news))

    def _iterations_after(self) -> int:
        """Iterations of the steps that come after this one."""
        names = [stage for stage, _ in self.steps]
        if self.stage not in names:
            return 0
        return sum(iterations for _, iterations in self.steps[names.index(self.stage) + 1 :])

    def _testing(self, details: dict[str, Any]) -> None:
        if self.live:
            news = f"images of the test data, testing {details['what']}"
            self.progress.update(
                self.task, completed=details["done"], total=details["of"], news=news, visible=True
            )
        elif monotonic() - self.said >= self.seconds:
            self._print(f"testing {details['what']}: {details['done']:,}/{details['of']:,} images")

    def _show(self, iteration: int, of: int, news: str) -> None:
        if self.live:
            self.progress.update(self.task, completed=iteration, total=of, news=news)
        elif monotonic() - self.said >= self.seconds:
            self._print(f"{self._name()}: iteration {iteration:,}/{of:,}, {news}")

    def summary(self, outcome: Outcome) -> None:
        """The table of a whole run."""
        from rich import box
        from rich.table import Table

        what = "accuracy" if outcome.labelled else "agreement with the original"
        table = Table(box=box.SIMPLE_HEAD, title=f"{what} on the test data", title_justify="left")
        for name in ("step", "top-1", "top-5", "loss", "iterations", "time", "MMAC", ""):
            table.add_column(name, justify="left" if name in ("step", "") else "right", overflow="fold")

        def row(
            name: str, e: dict[str, Any], macs: int, more: tuple[str, str] = ("", ""), end: str = ""
        ) -> None:
            known = e["top1"] is not None
            numbers = (f"{e['top1']:.2%}", f"{e['top5']:.2%}", f"{e['loss']:.4f}") if known else ("-",) * 3
            table.add_row(name, *numbers, *more, f"{macs / 1e6:,.1f}", end)

        o, f = outcome.original, outcome.final
        row("original", vars(o), outcome.macs[0])
        for step in outcome.steps:
            more = f"{step['iterations']:,}", duration(step["seconds"])
            row(step["stage"], step, step["macs"], more, _verdict(step))
        row("final", vars(f), outcome.macs[1])
        self.console.print(table)


def _verdict(step: dict[str, Any]) -> str:
    """What became of a step that was not kept."""
    if step["kept"]:
        return ""
    if "dropped" in step:
        return f"gave up {step['dropped']['merge']}"
    return "left out" if step["top1"] is None else "rolled back"


def _numbers(found: dict[str, Any]) -> str:
    return f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}, loss {found['loss']:.4f}"


def duration(seconds: float) -> str:
    """Seconds for a person: 0:07, 12:30, 3 h 05, 2 d 4 h."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


# ---- the picture ------------------------------------------------------------------------------------------

LOSS, TOP1, GREY = "#3a6ea5", "#c8553d", "#666666"


def draw(home: Path) -> Path | None:
    """training.png: loss by iteration and accuracy after each step, over all steps so far.

    Returns None, and draws nothing, where nothing has been trained yet.
    """
    journal = Journal(home / "retrain" / "journal.jsonl", read_only=True)
    original = journal.find("original")
    steps = _drawn(journal)
    if original is None or not steps:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}
    with pyplot.rc_context(style):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
        end = steps[-1].start + steps[-1].length
        for i, step in enumerate(steps):
            for axes in (above, below):
                if i % 2:
                    axes.axvspan(step.start, step.start + step.length, color="0.955", linewidth=0, zorder=0)
            xs, ys = [step.start + x for x, _ in step.points], [y for _, y in step.points]
            above.plot(xs, ys, linewidth=0.7, color=LOSS, alpha=0.35)
            above.plot(xs, _smooth(ys), linewidth=1.6, color=LOSS)
        _name_steps(above, steps, end)
        above.set_ylabel("training loss, and its running median")
        above.set_ylim(bottom=0, top=_top([y for step in steps for _, y in step.points]))
        _accuracies(below, steps, original)
        below.set(xlabel="iterations, all steps", ylabel="top-1 on the test data, %", xlim=(0, 1.015 * end))
        below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        below.grid(axis="y", color="0.88", linewidth=0.8)
        below.set_axisbelow(True)
        path = home / "training.png"
        unfinished = path.with_name(".training.png")
        figure.savefig(unfinished, dpi=110, format="png")
        pyplot.close(figure)
    unfinished.replace(path)
    return path


class _Drawn:
    """One step in the picture."""

    def __init__(
        self, start: int, stage: str, segments: list[Event], curve: list[Event], end: Event | None
    ) -> None:
        self.start, self.stage, self.end = start, stage, end
        self.points: list[tuple[int, float]] = []
        self.top1: list[tuple[int, float]] = []  # on the way
        self.length = 0
        for attempt in dict.fromkeys(e["attempt"] for e in segments):
            mine = [e for e in segments if e["attempt"] == attempt]
            mine = [e for e in mine if e["rate"] == mine[-1]["rate"]]  # without what diverged
            self.points += [(self.length + x, y) for e in mine for x, y in e["losses"]]
            self.top1 += [
                (start + self.length + e["iteration"], 100 * e["top1"])
                for e in curve
                if (e["attempt"], e["rate"]) == (attempt, mine[-1]["rate"])
            ]
            self.length += int(mine[-1]["iteration"])


def _drawn(journal: Journal) -> list[_Drawn]:
    """Every step that has been trained, at least in part."""
    drawn: list[_Drawn] = []
    segments = journal.all("segment")
    for name in dict.fromkeys(e["step"] for e in segments):
        end = journal.find("step", step=name)
        start = drawn[-1].start + drawn[-1].length if drawn else 0
        stage = end["stage"] if end is not None else name.partition("-")[2]
        mine = [e for e in segments if e["step"] == name]
        drawn.append(_Drawn(start, stage, mine, journal.all("curve", step=name), end))
    return drawn


def _smooth(values: list[float]) -> list[float]:
    """A running median."""
    reach = max(1, len(values) // 25)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [median(window) for window in windows]


def _top(losses: list[float]) -> float | None:
    """Where the loss axis ends: one wild value at the start of a step must not flatten all others."""
    if not losses:
        return None
    ordered = sorted(losses)
    usual = ordered[math.ceil(0.98 * (len(ordered) - 1))]
    return 1.05 * (ordered[-1] if ordered[-1] < 2 * usual else 1.5 * usual)


def _name_steps(axes: Any, steps: list[_Drawn], end: int) -> None:
    """The steps' names above the curves, slanted where there are many."""
    crowded = len(steps) > 8 or any(len(s.stage) > 90 * s.length / max(1, end) for s in steps)
    for step in steps:
        text = step.stage
        if step.end is not None and not step.end["kept"]:
            text += " (rolled back)"
        elif step.end is None:
            text += " (running)"
        axes.annotate(
            text,
            (step.start + step.length / 2, 1.01),
            xycoords=("data", "axes fraction"),
            rotation=30 if crowded else 0,
            ha="left" if crowded else "center",
            va="bottom",
            fontsize=8 if crowded else 9,
            color=GREY,
        )


def _accuracies(axes: Any, steps: list[_Drawn], original: Event) -> None:
    """Top-1 where each step ended, and the original's as a line."""
    axes.axhline(100 * original["top1"], color=GREY, linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        f"original {original['top1']:.2%}",
        (0.004, 100 * original["top1"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=9,
        color=GREY,
    )
    for step in steps:
        axes.plot([x for x, _ in step.top1], [y for _, y in step.top1], ".-", color=TOP1, alpha=0.5)
    ended = [(s.start + s.length, s.end) for s in steps if s.end is not None and s.end["top1"] is not None]
    for kept, style, label in ((True, "o-", "kept"), (False, "x", "rolled back")):
        points = [(x, 100 * e["top1"]) for x, e in ended if e["kept"] is kept]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], style, color=TOP1, markersize=6, label=label
        )
        for x, y in points:
            axes.annotate(
                f"{y:.2f}", (x, y), xytext=(0, -16), textcoords="offset points", ha="center", fontsize=9,
                color=TOP1,
            )  # fmt: skip
    if any(not e["kept"] for _, e in ended):
        axes.legend(fontsize=9, frameon=False, ncols=2, loc="upper right")
    axes.margins(y=0.2)
