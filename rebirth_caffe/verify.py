"""Whether two nets compute the same: both in an engine, on the same noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import plan as plans
from .derive import deploy
from .engines import Array, Engine, available_engines, get_engine, running
from .errors import EngineError, NetError, RebirthError
from .init.fill import fill_missing
from .net import TEST, Net
from .plan import Plan
from .shapes import all_param_shapes

LIMIT = 1e-4  # of the largest value of an output


@dataclass(frozen=True)
class Verified:
    """By how much a net differs from the original: the largest difference of an output, relative to its
    largest value; or why that could not be found out. ``fillers``: some weights were drawn, none given."""

    engine: str = ""
    difference: float | None = None
    reason: str = ""
    fillers: bool = False

    def __str__(self) -> str:
        if self.difference is None:
            return f"not verified: {self.reason}"
        weights = ", with weights from the fillers" * self.fillers
        differ = f"outputs differ by {self.difference:.1e} of their largest value"
        return f"verified in {self.engine}{weights}: {differ}"


def verify(original: Net, plan: Plan, caffe: str | None = None, seed: int = 0) -> Verified:
    """Compare ``original`` with what the plan makes of it, in TEST: in Caffe, where there is none in OpenCV.

    Layers without weights get them from their fillers. Raises RebirthError where the two differ by more than
    ``LIMIT`` or the engine takes the original only.
    """
    try:
        before = deploy(_filled(original, seed))
    except NetError as error:  # of a train_val that says too little, or a filler nobody knows
        return Verified(reason=str(error))
    shadowed = before.graph.shadowed()
    hidden = next((x for x, shapes in all_param_shapes(before).items() if shapes and x in shadowed), None)
    if hidden is not None:
        return Verified(reason=f"{hidden.where} has the name of one above it: no file has its weights")
    after = deploy(plans.apply(_filled(original, seed), plan))
    problems = []
    for name in ["caffe"] if caffe else available_engines():
        engine = get_engine(name, caffe)
        try:
            expected = _outputs(engine, before)
        except (EngineError, OSError) as error:  # OSError: no room for its files
            problems.append(str(error))
            continue
        if not all(np.isfinite(values).all() for values in expected.values()):
            return Verified(reason="an output of the original is not finite")
        drawn = any(s and not layer.blobs for layer, s in all_param_shapes(deploy(original)).items())
        difference = _difference(expected, _outputs(engine, after))
        return Verified(f"{engine.name} {engine.version}", difference, fillers=drawn)
    return Verified(reason=problems[0] if problems else "neither Caffe nor OpenCV was found")


def _filled(net: Net, seed: int) -> Net:
    """A copy of a net in which every layer has weights."""
    copy = net.without_weights()
    for layer, original in zip(copy.layers, net.layers, strict=True):
        layer.record = original.record
    fill_missing(copy, seed)
    return copy


def _outputs(engine: Engine, net: Net) -> dict[str, Array]:
    """What a net gives for noise: its outputs and, because they hide differences, what a Softmax reads."""
    outputs = net.graph.view(TEST).outputs
    makers = [value.producer for value in outputs if value.producer is not None]
    blobs = {value.name for value in outputs} | {x.bottom[0] for x in makers if x.type == "Softmax"}
    with running(engine, net) as session:
        return session.forward(outputs=sorted(blobs))


def _difference(expected: dict[str, Array], found: dict[str, Array]) -> float:
    """The largest relative difference. Raises RebirthError where it is too large, or of nothing."""
    shared = sorted(expected.keys() & found.keys())
    if not shared:
        raise RebirthError(f"none of its outputs would be left ({', '.join(expected)}); please report it")
    worst = 0.0
    for blob in shared:
        scale = float(np.abs(expected[blob]).max(initial=0)) or 1.0
        difference = float(np.abs(expected[blob] - found[blob]).max(initial=0)) / scale
        if not difference <= LIMIT:  # nor is a NaN
            raise RebirthError(
                f"output '{blob}' would differ by {difference:.1e} of its largest value (over {LIMIT:g}); "
                "--skip the merge that does it, and please report it"
            )
        worst = max(worst, difference)
    return worst
