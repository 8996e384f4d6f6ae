"""Every exact rule on random nets that it applies to: real Caffe computes the same before and after.

    EXACT_NETS=100 EXACT_RESULTS=docs/results/exact_rules.json python -m pytest tests/test_exact_rules.py

takes 100 nets a rule instead of a few and writes what was found.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from rebirth_caffe import plan as plans
from rebirth_caffe.derive import is_trainable
from rebirth_caffe.errors import NetError
from rebirth_caffe.net import Net
from rebirth_caffe.plan import Plan
from rebirth_caffe.rules import (
    Findings,
    compose,
    drop_dropout,
    drop_unused,
    fold_affine,
    join_siblings,
    pull_stride,
    reorder,
)
from rebirth_caffe.rules.match import Matcher
from tests.nets import compute, concat, conv, difference, dropout, fc, layer, net, pool, relu, with_weights

NETS = int(os.environ.get("EXACT_NETS", "5"))
LIMIT = 1e-5
Body = list[str]


def geometry(r: Random, kernels: tuple[int, ...] = (1, 2, 3), pad: bool = True, bias: bool = True) -> str:
    """Of a convolution, without num_output."""
    kernel = (r.choice(kernels), r.choice(kernels))
    words = [f"kernel_h: {kernel[0]} kernel_w: {kernel[1]} stride: {r.choice((1, 1, 2))}"]
    words += [f"pad_h: {r.randrange(kernel[0])} pad_w: {r.randrange(kernel[1])}"] if pad else []
    words += [f"dilation: {r.choice((1, 1, 2))}"]
    return " ".join(words + ["bias_term: false"] * (not bias))


def affine(r: Random, name: str, bottom: str, shifts: bool = True) -> str:
    """A factor and a shift a channel; without ``shifts`` only a factor."""
    top = r.choice((bottom, name)) if bottom != "data" else name
    kinds = ["Scale", "Power"] + ["BatchNorm", "Bias"] * shifts
    kind = r.choice(kinds)
    params = {
        "Scale": f"scale_param {{ bias_term: {r.choice(('true', 'false')) if shifts else 'false'} }}",
        "Power": f"power_param {{ scale: {r.uniform(0.5, 2):.3f} {'shift: 0.3' * shifts} }}",
    }
    return layer(name, kind, bottom, top, params.get(kind, ""))


def top(line: str) -> str:
    """The blob a layer gives."""
    return Net.parse(line).layers[0].top[0]


def fold(r: Random) -> Body:
    """Factors and shifts in front of and behind a convolution or an inner product."""
    pads = r.random() < 0.4
    body: Body = []
    at = "data"
    for i in range(r.choice((0, 1, 2))):
        body.append(affine(r, f"before{i}", at, shifts=not pads))
        at = top(body[-1])
    if r.random() < 0.3:
        body.append(fc("c", at, 6, r.choice(("", "transpose: true", "bias_term: false"))))
    else:
        body.append(conv("c", at, 6, 0, f"{geometry(r, pad=pads)} group: {r.choice((1, 1, 3))}"))
    for i in range(r.choice((1, 2))):
        body.append(affine(r, f"behind{i}", top(body[-1])))
    return body


def two_convolutions(r: Random) -> Body:
    """Two convolutions, the first of many outputs; or two inner products."""
    if r.random() < 0.15:
        return [fc("a", "data", 200, r.choice(("", "transpose: true"))), fc("c", "a", 6)]
    group = r.choice((1, 1, 1, 3))
    if r.random() < 0.3:  # the second may pad over a 1x1 without bias
        first = conv("a", "data", 60, 1, f"bias_term: false stride: {r.choice((1, 2))} group: {group}")
        return [first, conv("c", "a", 6, 0, f"{geometry(r)} group: {group}")]
    first = conv("a", "data", 60, 0, f"{geometry(r)} group: {group}")
    return [first, conv("c", "a", 6, 0, f"{geometry(r, pad=False)} group: {r.choice((1, group))}")]


def convolution_and_pool(r: Random) -> Body:
    """A convolution and an average, or a pool that picks pixels, in either order."""
    if r.random() < 0.7:
        bias = r.random() < 0.5
        average = pool("p", "c", r.choice((2, 2, 3)), 2, f"pool: AVE pad: {0 if bias else r.choice((0, 1))}")
        return [conv("c", "data", 6, 0, geometry(r, (2, 3), bias=bias)), average]
    picks = pool("p", "data", 1, 2, f"pool: {r.choice(('AVE', 'MAX'))}")
    return [picks, conv("c", "p", 6, 0, f"{geometry(r)} group: {r.choice((1, 3))}")]


def relu_and_pool(r: Random) -> Body:
    """A ReLU in front of a MAX pool."""
    c = conv("c", "data", 6, 0, geometry(r))
    slope = r.choice(("", "relu_param { negative_slope: 0.1 }"))
    act = relu("r", "c", r.choice(("c", "r")), slope)
    size = r.choice((2, 3))
    return [c, act, pool("p", top(act), size, 2, f"pad: {r.randrange(size)}")]


def average_and_convolution(r: Random) -> Body:
    """A 1x1 convolution and an average pool, in either order."""
    bias = r.random() < 0.5
    more = "" if bias else "bias_term: false"
    size, padding = r.choice((2, 3)), 0 if bias else r.choice((0, 1))
    if r.random() < 0.7:
        average = pool("p", "c", 0, 0, "pool: AVE global_pooling: true")
        if r.random() < 0.7:
            average = pool("p", "c", size, 2, f"pool: AVE pad: {padding}")
        return [conv("c", "data", 6, 1, f"{more} group: {r.choice((1, 3))}"), average]
    return [pool("p", "data", 3, 1, "pool: AVE pad: 1"), conv("c", "p", 2, 1, "bias_term: false")]


def siblings(r: Random) -> Body:
    """Convolutions of one geometry on one blob, with ReLUs or without, that meet again or do not."""
    how = geometry(r)
    count = r.choice((2, 3, 4))
    names = [f"b{i}" for i in range(count)]
    with_relu = r.random() < 0.6
    body = [conv("x", "data", 24, 3, "pad: 1"), relu("xr", "x", "xr", kind="TanH")]
    for name in names:
        body.append(conv(name, "xr", r.choice((2, 3, 5)), 0, how))
        body += [relu(f"{name}_relu", name)] if with_relu else []
    if r.random() < 0.5:  # neighbours, with another or without
        other = conv("other", "xr", 4, 0, how + " group: 2")
        body += [other, concat("j", " ".join(r.choice((names, [*names, "other"], ["other", *names]))))]
        return body
    for name in names:
        body += [conv(f"{name}_on", name, 4, 1)]
    return [*body, concat("j", " ".join(f"{name}_on" for name in names))]


def strided(r: Random) -> Body:
    """A residual block in front of 1x1 convolutions of a stride."""
    s = r.choice((2, 2, 3))
    body = [conv("x", "data", 6, 3, "pad: 1"), relu("xr", "x")]
    body += [
        conv("a", "x", 4, 1),
        relu("ar", "a"),
        conv("b", "a", 4, 3, f"pad: 1 dilation: {r.choice((1, 1))}"),
    ]
    at = "b"
    if r.random() < 0.7:
        body += [layer("br", r.choice(("ReLU", "TanH", "Sigmoid")), "b", r.choice(("b", "br")))]
        at = top(body[-1])
    if r.random() < 0.7:
        body += [conv("c", at, 6, 1, r.choice(("", "bias_term: false")))]
        at = "c"
    if r.random() < 0.7:
        joined = "Eltwise" if at == "c" and r.random() < 0.7 else "Concat"
        kind = (
            f"eltwise_param {{ operation: {r.choice(('SUM', 'MAX', 'PROD'))} }}"
            if joined == "Eltwise"
            else ""
        )
        body += [layer("sum", joined, " ".join(r.sample(["x", at], 2)), "sum", kind), relu("sumr", "sum")]
        at = "sum"
    body += [conv("d", at, 4, 1, f"stride: {s}")]
    body += [conv("e", at, 5, 1, f"stride: {s}")] if r.random() < 0.6 else []
    ends = [x.split('"')[1] for x in body if 'name: "d"' in x or 'name: "e"' in x]
    return [*body, concat("j", " ".join(ends))]


def unused(r: Random) -> Body:
    """A branch that ends in a Silence, and layers that pass their input on."""
    body = [conv("x", "data", 6, 3), conv("dead", "x", 4, 1), relu("deadr", "dead")]
    body += [layer("quiet", "Silence", "dead", ""), conv("y", "x", 5, 1)]
    for i in range(r.choice((1, 2))):
        at = top(body[-1])
        kind = r.choice(("Concat", "Slice", "Power"))
        body.append(layer(f"idle{i}", kind, at, f"idle{i}"))
    return body


def dropped(r: Random) -> Body:
    """A Dropout."""
    return [conv("c", "data", 6, 0, geometry(r)), dropout("d", "c", r.choice(("c", "d")))]


def joined(m: Matcher, found: Findings) -> None:
    join_siblings.neighbours(m, found)
    join_siblings.sliced(m, found)


def dead_and_idle(m: Matcher, found: Findings) -> None:
    drop_unused.propose(m, found)
    drop_unused.propose_dead(m, found)


RULES: dict[str, tuple[Callable[[Matcher, Findings], None], Callable[[Random], Body]]] = {
    "fold_affine": (fold_affine.propose, fold),
    "compose, two convolutions": (compose.propose, two_convolutions),
    "compose, convolution and pool": (compose.propose, convolution_and_pool),
    "reorder, ReLU and MAX pool": (reorder.relu_behind_pool, relu_and_pool),
    "reorder, 1x1 and AVE pool": (reorder.average_pools, average_and_convolution),
    "join_siblings": (joined, siblings),
    "pull_stride": (pull_stride.propose, strided),
    "drop_unused": (dead_and_idle, unused),
    "drop_dropout": (drop_dropout.propose, dropped),
}


def nets_for(rule: str) -> list[tuple[Net, Net, int]]:
    """Random nets that a rule applies to: before, after, and the number of merges."""
    propose, build = RULES[rule]
    found: list[tuple[Net, Net, int]] = []
    for seed in range(40 * NETS):
        r = Random(f"{rule} {seed}")
        size = (r.choice((1, 2)), r.choice((3, 6)), r.randrange(9, 17), r.randrange(9, 17))
        body = build(r)
        end = [layer("end", "AbsVal", top(body[-1])), fc("fc", "end")]
        try:
            before = with_weights(net(*body, *end, size=size), seed)
            findings = Findings()
            propose(Matcher(before), findings)
        except NetError:  # its windows do not fit: no net
            continue
        assert not is_trainable(before)
        if findings.merges:
            after = plans.apply(before, Plan("", tuple(findings.merges)))
            found.append((before, after, len(findings.merges)))
        if len(found) == NETS:
            return found
    raise AssertionError(f"{rule} applies to {len(found)} of {40 * NETS} nets")


@pytest.mark.parametrize("rule", RULES)
def test_real_caffe_computes_the_same(rule, in_caffe, tmp_path):
    nets = nets_for(rule)
    values = compute(in_caffe, tmp_path, [one for before, after, _ in nets for one in (before, after)])
    worst = [
        max(difference(old[blob], new[blob]) for blob in ("end", "fc"))
        for old, new in zip(values[::2], values[1::2], strict=True)
    ]
    assert min(float(abs(v["fc"]).max()) for v in values) > 1e-3  # there is something to compare
    path = os.environ.get("EXACT_RESULTS")
    if path:
        results = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        merges = sum(count for *_, count in nets)
        median = sorted(worst)[len(worst) // 2]
        results[rule] = {"nets": len(nets), "merges": merges, "largest": max(worst), "median": median}
        Path(path).write_text(json.dumps(results, indent=2) + "\n")
    assert max(worst) <= LIMIT
