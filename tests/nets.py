"""Nets for the tests in a line a layer, weights for them, and what real Caffe computes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rebirth_caffe import plan as plans
from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.merge import Merge
from rebirth_caffe.net import Layer, Net
from rebirth_caffe.params import conv as read_conv
from rebirth_caffe.plan import Plan, Proposal
from rebirth_caffe.rules.geometry import text as geometry_text
from rebirth_caffe.shapes import all_param_shapes

ZOO = Path(__file__).parent.parent / "prototxts"

# ---- writing nets -----------------------------------------------------------------------------------------


def layer(name: str, kind: str, bottoms: str, tops: str | None = None, more: str = "") -> str:
    """One layer; its top is called like it. Several bottoms or tops are separated by spaces."""
    wiring = [f'bottom: "{b}"' for b in bottoms.split()]
    wiring += [f'top: "{t}"' for t in (name if tops is None else tops).split()]
    return f'layer {{ name: "{name}" type: "{kind}" {" ".join(wiring)} {more} }}'


def conv(name: str, bottom: str, n: int, kernel: int = 1, more: str = "", *, extra: str = "") -> str:
    """A convolution; ``more`` goes into its convolution_param, ``extra`` into the layer."""
    size = f"kernel_size: {kernel}" if kernel else ""
    return layer(
        name, "Convolution", bottom, None, f"convolution_param {{ num_output: {n} {size} {more} }} {extra}"
    )


def pool(name: str, bottom: str, kernel: int = 3, stride: int = 2, more: str = "", *, extra: str = "") -> str:
    size = f"kernel_size: {kernel} stride: {stride}" if kernel else ""
    return layer(name, "Pooling", bottom, None, f"pooling_param {{ {size} {more} }} {extra}")


def relu(name: str, bottom: str, top: str | None = None, more: str = "", kind: str = "ReLU") -> str:
    """An activation, in place unless ``top`` is given."""
    return layer(name, kind, bottom, bottom if top is None else top, more)


def lrn(name: str, bottom: str, more: str = "") -> str:
    return layer(name, "LRN", bottom, None, f"lrn_param {{ local_size: 5 {more} }}")


def norm(name: str, bottom: str, top: str | None = None, more: str = "") -> str:
    """A BatchNorm, in place unless ``top`` is given."""
    return layer(name, "BatchNorm", bottom, bottom if top is None else top, more)


def scale(
    name: str, bottom: str, top: str | None = None, more: str = "scale_param { bias_term: true }"
) -> str:
    """A Scale with bias, in place unless ``top`` is given."""
    return layer(name, "Scale", bottom, bottom if top is None else top, more)


def dropout(name: str, bottom: str, top: str | None = None, extra: str = "") -> str:
    """A Dropout, in place unless ``top`` is given."""
    return layer(name, "Dropout", bottom, bottom if top is None else top, extra)


def concat(name: str, bottoms: str, more: str = "") -> str:
    return layer(name, "Concat", bottoms, None, more)


def fc(name: str, bottom: str, n: int = 5, more: str = "", *, extra: str = "") -> str:
    return layer(
        name, "InnerProduct", bottom, None, f"inner_product_param {{ num_output: {n} {more} }} {extra}"
    )


def net(*layers: str, size: Sequence[int] = (1, 3, 16, 16)) -> Net:
    """A net of these layers on an input ``data``; each layer is a line of its file."""
    dims = " ".join(f"dim: {d}" for d in size)
    head = (
        [f'layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ {dims} }} }} }}']
        if size
        else []
    )
    return Net.parse("\n".join(['name: "test"', *head, *layers]) + "\n", "test.prototxt")


# ---- weights ----------------------------------------------------------------------------------------------


def with_weights(bare: Net, seed: int = 0) -> Net:
    """The net with random weights under which values keep their scale from layer to layer."""
    random = np.random.default_rng(seed)
    loaded = Net.parse(bare.text(), bare.path)
    for one, shapes in all_param_shapes(loaded).items():
        if shapes:
            loaded.layer(one.name).record = Record(
                one.name, one.type, [Blob(b) for b in _blobs(one, shapes, random)]
            )
    return loaded


def _blobs(one: Layer, shapes: Sequence[tuple[int, ...]], random: np.random.Generator) -> list[Any]:
    if one.type == "BatchNorm":  # sums over a running average, as training leaves them
        factor = 999.98
        return [
            random.normal(0, 0.3, shapes[0]).astype("f4") * factor,
            random.uniform(0.5, 2, shapes[1]).astype("f4") * factor,
            np.full(1, factor, "f4"),
        ]
    if one.type == "Scale":
        return [random.uniform(0.2, 0.8, s).astype("f4") for s in shapes[:1]] + [
            random.normal(0, 0.2, s).astype("f4") for s in shapes[1:]
        ]
    if one.type == "PReLU":
        return [random.uniform(0, 0.5, shapes[0]).astype("f4")]
    weight = random.normal(0, np.sqrt(2 / np.prod(shapes[0][1:])), shapes[0]).astype("f4")
    return [weight] + [random.normal(0, 0.1, s).astype("f4") for s in shapes[1:]]


def blobs_of(one: Net, name: str) -> list[Any]:
    """The arrays of a layer's blobs."""
    return [blob.array for blob in one.layer(name).blobs]


# ---- merging ----------------------------------------------------------------------------------------------


def rebirth(original: Net, init: str = "inherit", seed: int = 0, **options: Any) -> tuple[Proposal, Net]:
    """What the rules propose for a net, and the net after it."""
    proposal = plans.propose(original, **options)
    reborn = plans.apply(original, proposal.plan, init, seed)
    assert_rest_is_untouched(original, reborn, proposal.plan)
    return proposal, reborn


def assert_rest_is_untouched(before: Net, after: Net, plan: Plan) -> None:
    """Layers of no merge are byte for byte the same, their blobs too, unless they read what has vanished."""
    merged = {name for merge in plan.active for name in merge.layers}
    vanished = {top for m in plan.active if not m.becomes for n in m.absorbs for top in before.layer(n).top}
    made = {spec.name for merge in plan.active for spec in merge.becomes}
    rest = [x for x in after.layers if x.name not in made]
    for old, new in zip((x for x in before.layers if x.name not in merged), rest, strict=True):
        assert new.blobs == old.blobs
        assert new.text == old.text or vanished & set(old.bottom)


def merges(proposal: Proposal) -> dict[str, Merge]:
    """The active merges by id."""
    return {merge.id: merge for merge in proposal.plan.active}


def offers(proposal: Proposal) -> dict[str, Merge]:
    """The merges that are only offered."""
    return {merge.id: merge for merge in proposal.plan.merges if not merge.enabled}


def reasons(proposal: Proposal) -> dict[tuple[str, ...], str]:
    """The refusals: layers -> reason."""
    return {refusal.layers: refusal.reason for refusal in proposal.refused}


def layers(one: Net) -> list[str]:
    """The layers' names but for the inputs, in order."""
    return [x.name for x in one.layers if x.type != "Input"]


def shape(one: Net, name: str) -> str:
    """``8 x 3x3/2 pad 1`` for a convolution."""
    c = read_conv(one.layer(name).param)
    return f"{c.num_output} x {geometry_text(c.kernel, c.stride, c.pad)}"


# ---- real Caffe -------------------------------------------------------------------------------------------

_COMPUTE = """
result = []
for path, weights, out in jobs:
    net = caffe.Net(path, 1, weights=weights) if weights else caffe.Net(path, 1)
    random = np.random.RandomState(0)
    for name in net.inputs:
        values = random.standard_normal(net.blobs[name].data.shape)
        net.blobs[name].data[...] = np.abs(values) if positive else values
    net.forward()
    np.savez(out, **{name.replace("/", "|"): blob.data for name, blob in net.blobs.items()})
    result.append({name: list(blob.shape) for name, blob in net.blobs.items()})
"""


def compute(in_caffe: Any, folder: Path, nets: Iterable[Net], positive: bool = False) -> list[dict[str, Any]]:
    """Every blob of each net in real Caffe on the same noise (or its absolute values), in one child."""
    jobs = []
    for i, one in enumerate(nets):
        path, weights, out = (str(folder / f"{i}{end}") for end in (".prototxt", ".caffemodel", ".npz"))
        one.write(Path(path))
        has = any(x.blobs for x in one.layers)
        if has:
            one.write_weights(Path(weights))
        jobs.append([path, weights if has else None, out])
    in_caffe(_COMPUTE, jobs=jobs, positive=positive)
    found = []
    for _, _, values in jobs:
        with np.load(str(values)) as data:
            found.append({name.replace("|", "/"): data[name] for name in data.files})
    return found


def difference(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(a).max())
