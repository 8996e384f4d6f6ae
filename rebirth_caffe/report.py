"""What a person sees: what a rebirth merged, what it refused and why, and the cost before and after."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import params
from .calibration import transform_of
from .cli import printable
from .errors import NetError, by_x
from .merge import Merge, Spec
from .net import Layer
from .rules.match import ACTIVATION
from .transform import UNTOUCHED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .rebirth import Result

WIDTH_WITHOUT_TERMINAL = 120
NAMES_SHOWN = 6


def new_console() -> Console:
    """Standard output: as wide as the terminal, 120 columns where there is none; colours only in one."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    if "COLUMNS" not in os.environ and not any(map(os.isatty, (0, 1, 2))):
        console.width = WIDTH_WITHOUT_TERMINAL
    return console


def show(result: Result, console: Console | None = None) -> None:
    """Print what was merged into what, what was refused and why, and the cost before and after."""
    console = console or new_console()

    def section(*parts: str | Table) -> None:
        if parts:
            console.print()
        for part in parts:
            console.print(printable(part) if isinstance(part, str) else part)

    with console.capture() as captured:  # rich itself would exit with 1 where a pipe is closed
        console.print(printable(f"{result.original.name}: {_summary(result)}"), style="bold")
        section(*_merged(result))
        section(*_exact(result.merges), *_left_out(result))
        section(*_refused(result))
        section(*_fitted(result))
        section(*_errors(result))
        section(*_alone(result))
        section(_costs(result))
        section(*_notes(result))
    console.file.write(captured.get())


def _summary(result: Result) -> str:
    exact = sum(merge.exact for merge in result.merges)
    count, steps = len(result.merges) - exact, len(result.plan.stages)
    parts = []
    if count:
        how = f"in {steps} step{'s' * (steps > 1)}"
        if count > 1 and result.training is not None:
            from .stages import schedule_for

            joint = schedule_for(result.training.schedule, result.training.distil) == "joint"
            how = "all at once" if joint else how
        parts.append(f"{count} merge{'s' * (count > 1)} to retrain {how}")
    if exact:
        parts.append(f"{exact} exact" + ("" if count else ", nothing to retrain"))
    return ", ".join(parts) or "nothing merged, the net stays as it is"


# ---- what was merged --------------------------------------------------------------------------------------


def _merged(result: Result) -> list[Table]:
    """The merges to be retrained, a row each."""
    originals = _Originals(result)
    rows = []
    stage = ""
    for merge in result.merges:
        if merge.exact:
            continue
        reborn = [spec for spec in merge.becomes if not spec.kept]
        gone = [originals.name(name) for name in merge.absorbs if name not in {spec.like for spec in reborn}]
        gone = [name for name in gone if not originals.is_activation(name)]
        into = [(originals.name(spec.like), originals.change(spec)) for spec in reborn]
        folders = {name.rpartition("/")[0] for name, _ in into}
        folder = folders.pop() if len(folders) == 1 else ""
        rows.append(
            [
                merge.stage if merge.stage != stage else "",
                folder,
                ", ".join(_inside(folder, name) for name in gone),
                ", ".join(f"{_inside(folder, name)} ({change})" for name, change in into),
            ]
        )
        stage = merge.stage
    return [_table(["step", "in", "merged", "into (outputs, stride)"], rows)] if rows else []


def _inside(folder: str, name: str) -> str:
    return name.removeprefix(f"{folder}/") if folder else name


class _Originals:
    """The layers of the net as it was given, also by the names that exact merges gave them."""

    def __init__(self, result: Result) -> None:
        self.net = result.original
        made = (spec for merge in result.merges for spec in merge.becomes if not spec.kept)
        self.made = {spec.name: spec.like for spec in made}

    def name(self, name: str) -> str:
        """What a layer was called at first."""
        while name in self.made:
            name = self.made[name]
        return name

    def layer(self, name: str) -> Layer | None:
        try:
            return self.net.layer(self.name(name))
        except NetError:
            return None

    def is_activation(self, name: str) -> bool:
        layer = self.layer(name)
        return layer is not None and layer.type in ACTIVATION

    def change(self, spec: Spec) -> str:
        """What is new in a reborn layer: ``128->192, stride 1->2``."""
        layer = self.layer(spec.like)
        if layer is None:
            return "reborn"
        convolution = layer.type == "Convolution"
        weighted = layer.param.convolution_param if convolution else layer.param.inner_product_param
        pairs: list[tuple[str, object, object]] = [("", weighted.num_output, spec.num_output)]
        if convolution and spec.kernel and spec.stride and spec.pad:
            conv = params.conv(layer.param)
            pairs += [
                ("", by_x(conv.kernel), by_x(spec.kernel)),
                ("stride ", _short(conv.stride), _short(spec.stride)),
                ("pad ", _short(conv.pad), _short(spec.pad)),
            ]
        return ", ".join(f"{what}{old}->{new}" for what, old, new in pairs if old != new) or "same size"


def _short(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else by_x(values)


def _exact(merges: list[Merge]) -> list[str]:
    """Exact merges, a line a kind."""
    folds = [merge for merge in merges if merge.kind == "fold"]
    lines = []
    if folds:
        absorbed, into = sum(len(merge.absorbs) - 1 for merge in folds), len(folds)
        where = "below" if all(m.absorbs[0] == m.becomes[0].like for m in folds) else "beside"
        what = f"{absorbed} BatchNorm, Scale and like layers"
        lines.append(f"{what} folded into the {into} layers {where} them")
    for kind, done in (
        ("unused", "removed, because they make no difference"),
        ("drop", "Dropout removed"),
        ("compose", "two linear layers made one"),
        ("reorder", "has changed places with what followed"),
        ("join", "convolutions on one blob made one"),
        ("stride", "stride of 1x1 convolutions pulled up from"),
    ):
        names = [name for merge in merges if _kind(merge) == kind for name in _about(merge)]
        if names:
            lines.append(f"{done} ({_some(names)})")
    return [f"exact: {line}" for line in lines]


def _kind(merge: Merge) -> str:
    """A merge's kind, and what kind of drop it is."""
    return "unused" if merge.id.startswith("unused:") else merge.kind


def _about(merge: Merge) -> tuple[str, ...]:
    """What to call an exact merge: the layers that are gone, else what its id says."""
    return merge.absorbs if merge.kind == "drop" else (merge.id.partition(":")[2],)


def _left_out(result: Result) -> list[str]:
    """Merges the plan knows, but was told not to make."""
    replaced = {merge.instead_of for merge in result.plan.active}
    left: dict[str, list[str]] = {}
    for merge in result.plan.merges:
        if merge.note.startswith("left out") and merge.id not in replaced:
            left.setdefault(merge.note, []).append(merge.id)
    return [f"{note}: {_some(ids)}" for note, ids in left.items()]


# ---- what was refused, and the cost -----------------------------------------------------------------------


def _refused(result: Result) -> list[Table]:
    """Refusals, those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for refusal in result.refused:
        reasons.setdefault(refusal.reason, []).append(" + ".join(refusal.layers))
    rows = [[_some(layers), reason] for reason, layers in reasons.items()]
    return [_table(["not merged", "why"], rows)] if rows else []


def _fitted(result: Result) -> list[Table]:
    """How well the layers that were fitted do what the original did."""
    rows = []
    for one in result.fitted:
        numbers = ["" if error is None else f"{error:.2f}" for error in (one.before, one.after, one.least)]
        ridge = "" if one.ridge is None else f"{one.ridge:g}"
        rows.append([one.merge, one.layer, *numbers, ridge, one.note])
    columns = ["merge", "fitted", "as inherited", "error now", "closest", "ridge", "note"]
    return [_table(columns, rows)] if rows else []


def _errors(result: Result) -> list[Table]:
    """How far off is what the merges give."""
    rows = [[merge, f"{error:.2f}"] for merge, error in result.errors.items()]
    return [_table(["merge", "error of what it gives, with all below it"], rows)] if rows else []


def _alone(result: Result) -> list[Table]:
    """What each merge saves and loses by itself, the best bargain first."""
    rows = []
    for one in result.sensitivity:
        error = "not known" if one.error is None else f"{one.error:.2f}"
        top1 = "" if one.top1 is None else f"{one.top1:.2%} of {one.before_top1:.2%}"
        saved = f"{one.saved_ms:+.2f} of {one.before_ms:.2f} ms"
        rows.append([one.merge, one.kernel, f"{one.reduce:g}", error, saved, top1])
    columns = ["merged alone, least lost per ms first", "kernel", "reducers", "error", "saves", "top-1"]
    return [_table(columns, rows)] if rows else []


def _costs(result: Result) -> Table:
    b, a = result.before, result.after
    rows = []
    for name, before, after, unit, digits, suffix in (
        ("layers", b.layers, a.layers, 1, 0, ""),
        ("multiply-adds", b.macs, a.macs, 1e6, 1, " M"),
        ("parameters", b.params, a.params, 1e6, 2, " M"),
        ("activations", b.activation_bytes, a.activation_bytes, 1e6, 2, " MB"),
        ("activations at peak", b.peak_activation_bytes, a.peak_activation_bytes, 1e6, 2, " MB"),
    ):
        numbers = [f"{value / unit:,.{digits}f}{suffix}" for value in (before, after)]
        rows.append([name, *numbers, f"{before / after:.2f}x" if after else ""])
    table = _table(["cost of one image", "before", "after", "ratio"], rows)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _notes(result: Result) -> list[str]:
    """What was verified; what is missing: the deploy net, costs, weights."""
    lines = [] if result.verified is None else [str(result.verified)]
    if result.no_deploy:
        lines.append(f"no deploy net could be derived: {result.no_deploy}")
    if result.before.unknown:
        lines.append(f"cost not known, so not counted: {_some(result.before.unknown)}")
    if result.net.strangers:
        names = _some([record.name for record in result.net.strangers])
        lines.append(f"weights of layers this net does not have, not written: {names}")
    if result.fork_weights:
        fields = [
            f"{layer} {field} ({by_x(shape)})"
            for layer, blobs in result.fork_weights.items()
            for field, shape in blobs.items()
        ]
        lines.append(f"weights in the fork's own fields, kept as they are: {_some(fields)}")
    if result.without_weights:
        lines.append(f"layers without weights, the file has none for them: {_some(result.without_weights)}")
    if result.training is not None or result.images is not None:
        given = transform_of(result.original) if result.images is None else result.images.transform
        if given.leaves_values:
            lines.append(UNTOUCHED)
    return lines


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    """A table without lines between its rows, and without columns that are empty."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0), pad_edge=False)
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for i in used:
        table.add_column(columns[i], overflow="fold")
    for row in rows:
        table.add_row(*(printable(row[i]) for i in used))
    return table


def _some(names: Iterable[str]) -> str:
    """Names in a line; of many the first few."""
    names = list(names)
    if len(names) <= NAMES_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: NAMES_SHOWN - 1])} and {len(names) - NAMES_SHOWN + 1} more"
