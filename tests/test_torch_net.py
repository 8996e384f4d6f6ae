"""The torch engine's nets against real Caffe, blob by blob, forward and backward."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rebirth_caffe.net import TEST, TRAIN, Net
from tests.conftest import missing
from tests.nets import ZOO, layer, with_weights

try:
    import torch

    from rebirth_caffe.engines.torch.net import TorchNet, to_numpy
except ImportError:
    missing("torch is not installed: pip install -r requirements-torch.txt")

CLASSES = 5

# What Caffe computes: values "=blob", their gradients "~blob", weights "#layer i", theirs "@layer i".
_COMPUTE = """
net = caffe.Net(path, phase, weights=weights) if weights else caffe.Net(path, phase)
with np.load(inputs) as given:
    for name in net.inputs:
        net.blobs[name].data[...] = given[name]
    net.forward()
    found = {"=" + name: blob.data.copy() for name, blob in net.blobs.items()}
    tops = {name[1:].replace("|", "/"): given[name] for name in given.files if name.startswith("^")}
    if backward:
        net.backward(**tops)
found.update({"~" + name: blob.diff for name, blob in net.blobs.items()})
for name, layer in zip(net._layer_names, net.layers):
    for i, blob in enumerate(layer.blobs):
        found["@%s %d" % (name, i)] = blob.diff
        found["#%s %d" % (name, i)] = blob.data
np.savez(out, **{name.replace("/", "|"): value for name, value in found.items()})
result = None
"""


def noise(one: Net, phase: int) -> dict[str, Any]:
    """Values for every input of a net: classes for what is called label, else noise."""
    random = np.random.default_rng(0)
    made = {}
    for x in one.graph.view(phase).layers:
        for top, shape in zip(x.top, x.param.input_param.shape, strict=False):
            size = tuple(shape.dim)
            values = random.integers(0, CLASSES, size) if "label" in top else random.standard_normal(size)
            made[top] = values.astype("f4")
    return made


def in_torch(one: Net, phase: int, inputs: dict[str, Any], tops: dict[str, Any]) -> dict[str, Any]:
    """The same answers as ``_COMPUTE`` gives, but for gradients of blobs that are no inputs."""
    view = one.graph.view(phase)
    module = TorchNet(view)
    given = {name: torch.tensor(v, requires_grad="label" not in name) for name, v in inputs.items()}
    names = list(dict.fromkeys(v.name for v in view.values))
    loss, values = module(given, names)
    for name, diff in tops.items():
        loss = loss + (values[name] * torch.from_numpy(diff)).sum()
    if loss.requires_grad:
        loss.backward()
    found = {f"={name}": to_numpy(value) for name, value in values.items()}
    found |= {f"~{name}": to_numpy(x.grad) for name, x in given.items() if x.grad is not None}
    for x, blobs in module.owned:
        for i, blob in enumerate(blobs):
            found[f"#{x.name} {i}"] = to_numpy(blob)
            if blob.requires_grad and blob.grad is not None:
                found[f"@{x.name} {i}"] = to_numpy(blob.grad)
    return found


def assert_same(in_caffe: Any, folder: Path, one: Net, phase: int = TRAIN, **given: Any) -> dict[str, Any]:
    """Both compute the same from the same; what torch computed. A net without a loss is driven backward from
    noise at its outputs."""
    view = one.graph.view(phase)
    backward = all(x.type != "Accuracy" for x in view.layers)  # Caffe refuses to go through one
    one.edited(["force_backward: true\n" if backward else "", *one.items]).write(folder / "net.prototxt")
    weights = None
    if any(x.blobs for x in one.layers):
        weights = str(folder / "net.caffemodel")
        one.write_weights(Path(weights))
    inputs = noise(one, phase) | given
    tops: dict[str, Any] = {}
    if not any("Loss" in x.type or x.param.loss_weight for x in view.layers):
        random = np.random.default_rng(1)
        outputs = [v for v in view.outputs if v.producer and v.producer.type not in ("Input", "Accuracy")]
        shapes = TorchNet(view).shapes
        tops = {v.name: random.standard_normal(shapes[v.name]).astype("f4") for v in outputs}
    named = {f"^{name}".replace("/", "|"): value for name, value in tops.items()}
    np.savez(folder / "in.npz", **inputs, **named)
    paths = {"path": str(folder / "net.prototxt"), "inputs": str(folder / "in.npz")}
    in_caffe(_COMPUTE, weights=weights, phase=phase, out=str(folder / "out.npz"), backward=backward, **paths)
    with np.load(folder / "out.npz") as data:
        wanted = {name.replace("|", "/"): data[name] for name in data.files}
    found = in_torch(one, phase, inputs, tops)
    blobs = [name for name in wanted if name[0] in "=#" and not re.search(r"_split_\d+$", name)]
    assert {n for n in blobs if n[0] == "="} == {n for n in found if n[0] == "="}
    for name in blobs:
        assert found[name].shape == wanted[name].shape, name
        assert relative(wanted[name], found[name]) < 1e-4, name
    gradients = [name for name in found if name[0] in "~@"] if backward else []
    assert gradients or not backward
    for name in gradients:
        assert relative(wanted[name], found[name]) < 1e-3, name
    return found


def relative(wanted: Any, found: Any) -> float:
    """The size of the difference, relative to the size of what is wanted."""
    size = float(np.linalg.norm(wanted.astype("f8")))
    return float(np.linalg.norm(wanted.astype("f8") - found)) / (size or 1)


def small(name: str, kind: str, batch: int = 2) -> Net:
    """A net of the zoo on inputs in place of its databases; its Dropout lets (almost) everything through."""
    text = (ZOO / name / f"{kind}.prototxt").read_text()
    one = Net.parse(re.sub(r"dropout_ratio: [\d.]+", "dropout_ratio: 1e-9", text), f"{name}.prototxt")
    dims = Net.load(ZOO / name / "deploy.prototxt").layer("data").param.input_param.shape[0].dim
    head = [data("data", (batch, *list(dims)[1:])), data("label", (batch,))]
    rest = [x.text for x in one.layers if x.type not in ("Data", "Input")]
    return with_weights(Net.parse("\n".join([*head, *rest]), one.path))


def data(name: str, shape: tuple[int, ...]) -> str:
    """An Input layer."""
    dims = " ".join(f"dim: {d}" for d in shape)
    return layer(name, "Input", "", name, f"input_param {{ shape {{ {dims} }} }}")


@pytest.mark.parametrize("phase", [TRAIN, TEST], ids=["train", "test"])
@pytest.mark.parametrize("name", sorted(path.name for path in ZOO.iterdir() if path.is_dir()))
def test_the_zoo(in_caffe, tmp_path, name, phase):
    assert_same(in_caffe, tmp_path, small(name, "train_val"), phase)
