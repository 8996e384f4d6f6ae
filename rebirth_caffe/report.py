"""What a person sees: the table of a rebirth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .merge import Merge, Spec

if TYPE_CHECKING:
    from rich.console import Console

    from .rebirth import Result


def show(result: Result, console: Console) -> None:
    """Print what was merged into what, what was refused and why, and the cost before and after."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"{result.original.name}: {_summary(result)}", style="bold"))
    retrained = [m for m in result.merges if not m.exact]
    exact = [m for m in result.merges if m.exact]
    if retrained:
        table = Table("step", "absorbs", "becomes", title="merged, to be retrained", title_justify="left")
        stage = ""
        for merge in retrained:
            table.add_row(
                merge.stage if merge.stage != stage else "",
                Text(_short(merge.absorbs)),
                Text("\n".join(_becomes(spec) for spec in merge.becomes if not spec.kept)),
                end_section=True,
            )
            stage = merge.stage
        console.print(table)
    if exact:
        console.print(f"exact, nothing to retrain: {_exact(exact)}")
    offers = [m for m in result.plan.merges if m not in result.merges]
    offered = [m for m in offers if m.enabled is False and not m.note.startswith("left out")]
    reasons: dict[str, list[str]] = {}
    for refusal in result.refused:
        reasons.setdefault(refusal.reason, []).append(" + ".join(refusal.layers))
    if reasons:
        table = Table("layers", "why not", title="refused", title_justify="left")
        for reason, layers in reasons.items():
            table.add_row(Text("\n".join(layers)), Text(reason))
        console.print(table)
    if offered:
        console.print(f"offered in plan.yaml (enabled: false): {', '.join(m.id for m in offered)}")
    console.print(_costs(result))
    strangers = result.net.strangers
    if strangers:
        names = ", ".join(record.name for record in strangers[:4]) + (" ..." if len(strangers) > 4 else "")
        console.print(f"weights of layers this net does not have, not written: {names}", highlight=False)
    if result.without_weights:
        console.print(f"layers without weights: {', '.join(result.without_weights)}", highlight=False)


def _short(names: tuple[str, ...]) -> str:
    """Names in one line, what all begin with (up to a slash) written once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        prefix, _, rest = name.rpartition("/")
        groups.setdefault(prefix, []).append(rest)
    parts = []
    for prefix, rests in groups.items():
        inner = ", ".join(rests)
        parts.append(
            f"{prefix}/{{{inner}}}" if prefix and len(rests) > 1 else f"{prefix}/{inner}".lstrip("/")
        )
    return ", ".join(parts)


def _summary(result: Result) -> str:
    exact = sum(m.exact for m in result.merges)
    steps = len(result.plan.stages)
    parts = [f"{exact} exact merge{'s' * (exact != 1)}"]
    count = len(result.merges) - exact
    parts.append(f"{count} to retrain in {steps} step{'s' * (steps != 1)}" if count else "nothing to retrain")
    return ", ".join(parts)


def _exact(merges: list[Merge]) -> str:
    folds = [m for m in merges if m.kind == "fold"]
    drops = [m for m in merges if m.kind == "drop"]
    parts = []
    if folds:
        absorbed = sum(len(m.absorbs) - 1 for m in folds)
        parts.append(f"{absorbed} BatchNorm and Scale layers folded into {len(folds)} layers below them")
    if drops:
        parts.append(f"Dropout removed ({', '.join(m.absorbs[0] for m in drops)})")
    return "; ".join(parts)


def _becomes(spec: Spec) -> str:
    from .rules.merge_streamline import describe

    shape = f"{spec.num_output} x {describe(spec)}" if spec.kernel is not None else describe(spec)
    return f"{spec.name}  {shape}"


def _costs(result: Result) -> object:
    from rich.table import Table

    table = Table("", "before", "after", "ratio", title="cost of one image", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    b, a = result.before, result.after
    for name, before, after, unit, digits in (
        ("layers", b.layers, a.layers, 1, 0),
        ("million multiply-adds", b.macs, a.macs, 1e6, 1),
        ("million parameters", b.params, a.params, 1e6, 2),
        ("activations, MB", b.activation_bytes, a.activation_bytes, 1e6, 2),
        ("activations at peak, MB", b.peak_activation_bytes, a.peak_activation_bytes, 1e6, 2),
    ):
        ratio = f"{before / after:.2f}x" if after else ""
        table.add_row(name, f"{before / unit:,.{digits}f}", f"{after / unit:,.{digits}f}", ratio)
    return table
