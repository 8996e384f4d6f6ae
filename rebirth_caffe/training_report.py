"""What a person sees of training: a live line, a table, a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .journal import Journal
from .retrain import Outcome


class Screen:
    """Progress on the terminal; one line a step where the output is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = Console(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}  {task.fields[news]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task("", total=1, visible=False, news="")
        self.begun: tuple[float, int] | None = None
        self.losses: list[float] = []

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def tell(self, what: str, details: dict[str, Any]) -> None:
        """Show an event of ``retrain``."""
        if what == "step":
            self.begun, self.losses = None, []
            self.progress.reset(
                self.task, description=details["stage"], total=details["iterations"], visible=True, news=""
            )
        elif what == "progress":
            self._progress(details)
        elif what == "note":
            self.console.print(details["text"])
        elif what == "result":
            self.progress.update(self.task, visible=False)
            verdict = "" if details["kept"] else "  rolled back"
            self.console.print(
                f"{details['stage']}: top-1 {details['top1']:.2%}, top-5 {details['top5']:.2%}, "
                f"loss {details['loss']:.4f}, {details['iterations']} iterations, "
                f"{details['seconds']:.0f} s{verdict}"
            )

    def _progress(self, details: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.begun is None:
            self.begun = now, details["iteration"]
        self.losses = [*self.losses[-9:], details["loss"]]
        done = details["iteration"] - self.begun[1]
        left = ""
        if done > 0:
            seconds = (now - self.begun[0]) / done * (details["of"] - details["iteration"])
            left = f", {int(seconds) // 60}:{int(seconds) % 60:02d} left"
        news = f"loss {sum(self.losses) / len(self.losses):.4f}{left}"
        self.progress.update(self.task, completed=details["iteration"], news=news)

    def summary(self, outcome: Outcome) -> None:
        """The table of a whole run."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title="accuracy on the test data", title_justify="left")
        for name in ("step", "top-1", "top-5", "loss", "iterations", "minutes", ""):
            table.add_column(name, justify="left" if name in ("step", "") else "right")
        o, f = outcome.original, outcome.final
        table.add_row("original", f"{o.top1:.2%}", f"{o.top5:.2%}", f"{o.loss:.4f}", "", "", "")
        for step in outcome.steps:
            table.add_row(
                step["stage"],
                f"{step['top1']:.2%}",
                f"{step['top5']:.2%}",
                f"{step['loss']:.4f}",
                str(step["iterations"]),
                f"{step['seconds'] / 60:.1f}",
                "" if step["kept"] else "rolled back",
            )
        table.add_row("final", f"{f.top1:.2%}", f"{f.top5:.2%}", f"{f.loss:.4f}", "", "", "")
        self.console.print(table)


def draw(home: Path) -> Path:
    """training.png: loss by iteration and accuracy after each step, over all steps so far."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    journal = Journal(home / "retrain" / "journal.jsonl")
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    at, marks = 0, [(0, journal.find("original"))]
    for step in journal.all("step"):
        segments = journal.all("segment", stage=step["stage"])
        points = [(at + i, loss) for s in segments for i, loss in s["losses"]]
        above.plot([x for x, _ in points], [y for _, y in points], linewidth=1, label=step["stage"])
        at += max((s["iteration"] for s in segments), default=0)
        marks.append((at, step))
        below.axvline(at, color="0.9")
    below.plot([x for x, e in marks if e], [100 * e["top1"] for _, e in marks if e], "o-", label="top-1")
    above.set(ylabel="training loss")
    below.set(ylabel="test top-1, %", xlabel="iteration")
    if len(marks) > 1:
        above.legend(fontsize="small", ncols=4)
    below.legend(fontsize="small")
    path = home / "training.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
