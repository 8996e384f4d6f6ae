"""Which merges are worth it: each by itself, in every geometry, fitted, timed and tested.

A merge is worth what a clock says it saves and costs what the blob it gives loses. Each is made alone, in
every kernel mode and with several shares of its reducers left, fitted to the calibration images (``fit``),
and timed beside the original, in turn, in one engine. With labelled images its accuracy is measured, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import plan as plans
from .calibration import Start, Tell
from .derive import deploy
from .engines import Engine
from .evaluate import evaluate_net
from .fit import fit
from .measure import time_in_turn
from .merge import Merge
from .net import Net
from .plan import Plan
from .rules import KERNELS

RATIOS = (1.0, 0.5, 0.25)
RUNS = 20


@dataclass(frozen=True)
class Sensitivity:
    """One merge alone: the kernel mode and the share of the reducers that give it, the largest relative error
    of its layers (None where none could be fitted), milliseconds of one image before and after, and top-1."""

    merge: str
    stage: str
    kernel: str
    reduce: float
    error: float | None
    before_ms: float
    after_ms: float
    top1: float | None = None

    @property
    def saved_ms(self) -> float:
        return self.before_ms - self.after_ms


def variants(net: Net) -> Iterator[tuple[Merge, Plan, str, float]]:
    """Every merge in every geometry that is another, with the plan that makes just it."""
    seen: list[Merge] = []
    for kernel in KERNELS:
        for reduce in RATIOS:
            plan = plans.propose(net, kernel, reduce).plan
            for merge in plan.active:
                if not merge.exact and merge not in seen:
                    seen.append(merge)
                    yield merge, plans.select(net, plan, only=[merge.id]), kernel, reduce


def sensitivity(
    net: Net,
    start: Start,
    engine: Engine,
    labelled: Path | str | None = None,
    tell: Tell = lambda done, total: None,
) -> list[Sensitivity]:
    """The merges of ``net``, each alone, those first that lose least for what they save.

    ``start`` has the images to fit to; ``labelled`` is a database to measure accuracy on, its images
    transformed likewise.
    Raises RebirthError, EngineError.
    """
    assert start.calibration is not None
    every = list(variants(net))
    found = []
    for number, (merge, plan, kernel, reduce) in enumerate(every):
        tell(number, len(every))
        alone, fitted = fit(net, plans.apply(net, plan, start.init, start.seed), plan, start, engine)
        before, after = _milliseconds([net, alone], engine)
        top1 = None
        if labelled is not None:
            top1 = evaluate_net(alone, labelled, engine, start.calibration.transform).top1
        errors = [one.after for one in fitted if one.after is not None]
        found.append(
            Sensitivity(merge.id, merge.stage, kernel, reduce, max(errors, default=None), before, after, top1)
        )
    tell(len(every), len(every))
    return sorted(found, key=_price)


def _price(one: Sensitivity) -> float:
    """What is lost for a millisecond; merges that save none come last."""
    lost = 1.0 if one.error is None else one.error
    return lost / one.saved_ms if one.saved_ms > 0 else float("inf")


def _milliseconds(nets: list[Net], engine: Engine) -> list[float]:
    """The median time of one image of each net, in turn."""
    with tempfile.TemporaryDirectory(prefix="rebirth-") as folder, ExitStack() as stack:
        sessions = []
        for number, net in enumerate(nets):
            files = Path(folder, f"{number}.prototxt"), Path(folder, f"{number}.caffemodel")
            deployed = plans.without_dropout(deploy(net))
            deployed.write(files[0])
            deployed.write_weights(files[1])
            sessions.append(stack.enter_context(engine.open(*files, batch=1)))
        return [1000 * median(times) for times in time_in_turn(sessions, RUNS)]
