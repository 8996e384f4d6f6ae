"""Which merges are worth it: each by itself, in every geometry, fitted, timed and tested.

A merge is worth what a clock says it saves and costs what the blob it gives loses. Each is made alone, in
every kernel mode and with several shares of its reducers left, fitted to the calibration images (``fit``),
and timed beside the original, in turn, in one engine. With labelled images its accuracy is measured, too.

What it found, sensitivity.json, tells ``retrain`` which merge to leave out first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import plan as plans
from .calibration import Start, Tell
from .derive import deploy
from .engines import Engine, running
from .errors import RebirthError
from .evaluate import evaluate_net, guesses, is_labelled
from .fit import fit, output_errors
from .measure import time_in_turn
from .merge import Merge
from .net import Net
from .plan import Plan
from .rules import KERNELS

RATIOS = (1.0, 0.5, 0.25)
RUNS, SECONDS = 20, 1.0  # forwards, and at least so long: what else the machine does comes in bursts


@dataclass(frozen=True)
class Alone:
    """One merge alone, fitted: the relative error of the blob it gives (None where the original has no such
    blob), milliseconds of one image before and after, and top-1."""

    merge: str
    stage: str
    error: float | None
    before_ms: float
    after_ms: float
    top1: float | None

    @property
    def saved_ms(self) -> float:
        return self.before_ms - self.after_ms


@dataclass(frozen=True)
class Sensitivity(Alone):
    """One merge alone in one geometry: the kernel mode and the share of the reducers that give it. And the
    original's top-1, where there is one."""

    kernel: str
    reduce: float
    before_top1: float | None = None


@dataclass(frozen=True)
class Price:
    """What a merge by itself costs: ``lost`` of top-1 (0..1) or, where accuracy is not known, its relative
    error; and the milliseconds it saves."""

    merge: str
    lost: float
    of: str  # "top1" or "error"
    saved_ms: float

    @property
    def harm(self) -> float:
        """What is lost for a millisecond; merges that save none are the worst."""
        return self.lost / self.saved_ms if self.saved_ms > 0 else float("inf")

    def __str__(self) -> str:
        lost = (
            f"{100 * self.lost:.2f} points of top-1" if self.of == "top1" else f"an error of {self.lost:.2f}"
        )
        return f"by itself it costs {lost} and saves {self.saved_ms:.3f} ms"


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
    tested_on: Path | str | None = None,
    tell: Tell = lambda done, total: None,
) -> list[Sensitivity]:
    """The merges of ``net``, each alone, those first that lose least for what they save.

    ``start`` has the images to fit to; ``tested_on`` is a database to measure accuracy on, its images
    transformed likewise. Where these have no labels, right is what ``net`` says.
    Raises RebirthError, EngineError.
    """
    assert start.calibration is not None
    transform = start.calibration.transform
    top1: Callable[[Net], float] | None = None
    if tested_on is not None:
        database = tested_on
        labels = None if is_labelled(database) else guesses(net, database, engine, transform)

        def top1(made: Net) -> float:
            return evaluate_net(made, database, engine, transform, labels=labels).top1

    whole = None if top1 is None else top1(net)
    every = list(variants(net))
    found = []
    for number, (merge, plan, kernel, reduce) in enumerate(every):
        tell(number, len(every))
        one = alone(net, merge, plan, start, engine, top1)
        found.append(Sensitivity(**vars(one), kernel=kernel, reduce=reduce, before_top1=whole))
    tell(len(every), len(every))
    return sorted(found, key=lambda one: _price(one, whole).harm)


def alone(
    net: Net, merge: Merge, plan: Plan, start: Start, engine: Engine, top1: Callable[[Net], float] | None
) -> Alone:
    """``merge`` alone, which ``plan`` makes (with those it builds upon); ``top1`` gives a net's accuracy."""
    assert start.calibration is not None
    made, _ = fit(net, plans.apply(net, plan, start.init, start.seed), plan, start, engine, mix=False)
    error = output_errors(net, made, plan, start.calibration, engine).get(merge.id)
    before, after = _milliseconds([net, made], engine)
    accuracy = None if top1 is None else top1(made)
    return Alone(merge.id, merge.stage, error, before, after, accuracy)


def read(path: Path) -> list[Sensitivity]:
    """What ``sensitivity`` found, from its file; nothing where there is none.

    Raises RebirthError where it is damaged.
    """
    try:
        return [Sensitivity(**row) for row in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise RebirthError(f"{path}: damaged; make it again with rebirth_net.py, or remove it") from None


def known(net: Net, merges: Iterable[Merge], rows: Sequence[Sensitivity]) -> dict[str, Alone]:
    """What ``rows`` say of these merges of ``net`` in the geometry they have, by id."""
    found: dict[str, Alone] = {}
    wanted = {merge.id: merge for merge in merges}
    for merge, _, kernel, reduce in variants(net):
        mine = wanted.get(merge.id)
        if mine is not None and (mine.absorbs, mine.becomes) == (merge.absorbs, merge.becomes):
            found |= {
                row.merge: row
                for row in rows
                if (row.merge, row.kernel, row.reduce) == (merge.id, kernel, reduce)
            }
    return found


def prices(found: Iterable[Alone], top1: float) -> list[Price]:
    """Of merges alone, the most harmful first. ``top1`` is the original's; where one's accuracy is not known,
    all are judged by their error."""
    rows = list(found)
    whole = top1 if all(row.top1 is not None for row in rows) else None
    return sorted((_price(row, whole) for row in rows), key=lambda price: (-price.harm, -price.lost))


def _price(one: Alone, top1: float | None) -> Price:
    """By accuracy, against the original's ``top1``, or by error."""
    if top1 is not None and one.top1 is not None:
        return Price(one.merge, max(0.0, top1 - one.top1), "top1", one.saved_ms)
    return Price(one.merge, 1.0 if one.error is None else one.error, "error", one.saved_ms)


def _milliseconds(nets: list[Net], engine: Engine) -> list[float]:
    """The median time of one image of each net, in turn."""
    with ExitStack() as stack:
        deployed = [plans.without_dropout(deploy(net)) for net in nets]
        sessions = [stack.enter_context(running(engine, net, batch=1)) for net in deployed]
        return [1000 * median(times) for times in time_in_turn(sessions, RUNS, seconds=SECONDS)]
