"""The whole job in one call: read, propose, apply, derive, report, write.

>>> from rebirth_caffe.rebirth import rebirth
>>> result = rebirth("deploy.prototxt", weights="net.caffemodel")
>>> result.write("net_rebirth")
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import plan as plans
from .cost import Cost, cost
from .derive import deploy, is_trainable
from .errors import PlanError, RebirthError
from .init import METHODS
from .merge import Merge, Refusal
from .net import Net
from .plan import Plan, Proposal

KERNELS = ("keep", "cover", "auto")
FILES = ("deploy.prototxt", "train_val.prototxt", "weights.caffemodel", "plan.yaml", "report.json")


@dataclass
class Result:
    """A reborn net and how it came about."""

    original: Net
    net: Net  # of the kind that was given: deploy or train_val
    deploy: Net
    plan: Plan
    refused: list[Refusal]
    before: Cost  # of the deploy nets, for one image
    after: Cost

    @property
    def merges(self) -> list[Merge]:
        """The merges that were applied."""
        return self.plan.active

    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "net": self.original.name,
            "source": Path(self.original.path).name,
            "before": _cost(self.before),
            "after": _cost(self.after),
            "merges": [
                {
                    "id": m.id,
                    "kind": m.kind,
                    "exact": m.exact,
                    "absorbs": list(m.absorbs),
                    "becomes": [spec.name for spec in m.becomes if not spec.kept],
                    "stage": m.stage or None,
                }
                for m in self.merges
            ],
            "refused": [{"layers": list(r.layers), "reason": r.reason} for r in self.refused],
            "without_weights": self.without_weights,
            "weights_not_in_net": [record.name for record in self.net.strangers],
        }

    @property
    def without_weights(self) -> list[str]:
        """Layers that should have weights and got none from the file."""
        if not any(layer.blobs for layer in self.net.layers):
            return []
        from .shapes import all_param_shapes

        return [layer.name for layer, s in all_param_shapes(self.net).items() if s and not layer.blobs]

    def write(self, out: Path | str, force: bool = False) -> list[Path]:
        """Write the files into the directory ``out`` and return their paths.

        They appear all at once: what goes wrong before leaves nothing behind. An existing directory is an
        error unless ``force``; then these files are replaced and anything else in it is left alone.
        """
        out = Path(out)
        if out.exists() and (not out.is_dir() or not force):
            raise RebirthError(f"{out}: exists already; give another --out, or --force to replace its files")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            self.deploy.write(work / "deploy.prototxt")
            if is_trainable(self.net):
                self.net.write(work / "train_val.prototxt")
            if any(layer.blobs for layer in self.net.layers):
                self.net.write_weights(work / "weights.caffemodel")
            (work / "plan.yaml").write_text(plans.dump(self.plan), "utf-8")
            (work / "report.json").write_text(json.dumps(self.report(), indent=2) + "\n", "utf-8")
            written = [name for name in FILES if (work / name).exists()]
            if out.exists():
                for name in FILES:
                    if name in written:
                        (work / name).replace(out / name)
                    else:  # of an earlier run: it does not go with these
                        (out / name).unlink(missing_ok=True)
            else:
                work.chmod(0o777 & ~_umask())
                work.rename(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return [out / name for name in written]


def rebirth(
    prototxt: Path | str,
    weights: Path | str | None = None,
    *,
    plan: Path | str | Plan | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    exact: bool = False,
    reduce: float = 0.5,
    kernel: str = "keep",
    init: str = "inherit",
    seed: int = 0,
    image: tuple[int, int, int] | None = None,
) -> Result:
    """Read a net, merge what can be merged, and return the reborn one; nothing is written.

    Args:
        prototxt: a deploy or train_val file.
        weights: its .caffemodel; without one only structure is rewritten.
        plan: a plan.yaml (or Plan) to apply instead of asking the rules.
        only, skip: ids of merges or training steps to make alone, or to leave out.
        exact: only merges that change nothing the net computes.
        reduce: what is left of the reducers that feed an absorbing branch, 0 < reduce <= 1.
        kernel: keep, cover or auto (see ``rules.geometry.choose``).
        init: weights of reborn layers, xavier or inherit.
        seed: of everything random.
        image: channels, height and width of the images a Data layer reads, where its prototxt does not say
            (a crop_size gives the size, mean values the channels).

    Raises RebirthError with the place, what is wrong and what to do.
    """
    if not 0 < reduce <= 1:
        raise RebirthError(f"--reduce {reduce:g}: give a ratio above 0 and at most 1")
    if kernel not in KERNELS or init not in METHODS:
        raise RebirthError(f"kernel is one of {', '.join(KERNELS)}, init one of {', '.join(METHODS)}")
    net = Net.load(prototxt, weights, image)
    if plan is None:
        proposal = plans.propose(net, kernel, reduce, exact, only, skip)
    else:
        given = plan if isinstance(plan, Plan) else plans.load(Path(plan))
        proposal = Proposal(_selected(given, only, skip, exact))
    reborn = plans.apply(net, proposal.plan, init, seed)
    after = deploy(reborn)
    if after is not reborn:  # a deploy net of its own: never trained again
        drops = [m for m in plans.propose(after, exact=True).plan.merges if m.kind == "drop"]
        after = plans.apply(after, Plan(after.name, tuple(drops)))
    return Result(net, reborn, after, proposal.plan, proposal.refused, cost(deploy(net)), cost(after))


def _selected(plan: Plan, only: Sequence[str], skip: Sequence[str], exact: bool) -> Plan:
    """A given plan under --only, --skip and --exact."""
    known = {name for m in plan.merges for name in (m.id, m.stage) if name}
    for name in (*only, *skip):
        if name not in known:
            raise PlanError(f"the plan has no merge '{name}'; it has {', '.join(sorted(known)) or 'none'}")
    merges = [
        replace(m, enabled=False)
        if {m.id, m.stage} & set(skip)
        or (exact and not m.exact)
        or (only and not {m.id, m.stage} & set(only))
        else m
        for m in plan.merges
    ]
    return Plan(plan.net, tuple(merges))


def _cost(c: Cost) -> dict[str, int]:
    return {
        "layers": c.layers,
        "macs": c.macs,
        "params": c.params,
        "activation_bytes": c.activation_bytes,
        "peak_activation_bytes": c.peak_activation_bytes,
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
