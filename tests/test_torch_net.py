"""The torch engine's nets against real Caffe, blob by blob, forward and backward."""

import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebirth_caffe.engines.caffe import CaffeEngine
from rebirth_caffe.engines.torch import TorchEngine
from rebirth_caffe.errors import EngineError
from rebirth_caffe.net import TEST, TRAIN, Net, State, View
from tests.conftest import torch_or_skip
from tests.nets import ZOO, conv, layer, lrn, net, norm, pool, relu, scale, with_weights
from tests.test_random_nets import At, Builder

torch = torch_or_skip()

from rebirth_caffe.engines.torch.net import TorchNet  # noqa: E402

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
    for x in View(one, State(phase)).layers:
        for top, shape in zip(x.top, x.param.input_param.shape, strict=False):
            size = tuple(shape.dim)
            values = random.integers(0, CLASSES, size) if "label" in top else random.standard_normal(size)
            made[top] = values.astype("f4")
    return made


def in_torch(
    one: Net, phase: int, inputs: dict[str, Any], tops: dict[str, Any], dtype: Any = torch.float32
) -> dict[str, Any]:
    """The same answers as ``_COMPUTE`` gives, but for gradients of blobs that are no inputs."""
    view = View(one, State(phase))
    module = TorchNet(view).to(dtype)
    given = {n: torch.tensor(v, dtype=dtype, requires_grad="label" not in n) for n, v in inputs.items()}
    names = list(dict.fromkeys(v.name for v in view.values))
    loss, values = module(given, names)
    for name, diff in tops.items():
        loss = loss + (values[name] * torch.tensor(diff, dtype=dtype)).sum()
    if loss.requires_grad:
        loss.backward()
    found = {f"={name}": value.detach().numpy() for name, value in values.items()}
    found |= {f"~{name}": x.grad.numpy() for name, x in given.items() if x.grad is not None}
    for x, blobs in module.owned:
        for i, blob in enumerate(blobs):
            found[f"#{x.name} {i}"] = blob.detach().numpy()
            if blob.grad is not None:
                found[f"@{x.name} {i}"] = blob.grad.numpy()
    return found


def assert_same(in_caffe: Any, folder: Path, one: Net, phase: int = TRAIN, **given: Any) -> dict[str, Any]:
    """Both compute the same from the same; what torch computed. A net without a loss is driven backward from
    noise at its outputs."""
    view = View(one, State(phase))
    backward = all(x.type != "Accuracy" for x in view.layers)  # Caffe refuses to go through one
    one.header.force_backward = backward
    one.edited([f"force_backward: {str(backward).lower()}\n", *one.items]).write(folder / "net.prototxt")
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
    gradients = [name for name in found if name[0] in "~@"] if backward else []
    assert gradients or not backward
    allowed = dict.fromkeys(blobs, 1e-4) | dict.fromkeys(gradients, 1e-3)
    off = {name: apart(wanted, found, name) for name in allowed}
    if any(off[name] > most for name, most in allowed.items()):
        # A deep net can multiply float32's rounding. Then both are as near to the truth as each other, about.
        exact = in_torch(one, phase, inputs, tops, torch.float64)
        for name, most in allowed.items():
            caffes, torchs = apart(exact, wanted, name), apart(exact, found, name)
            nearer, further = sorted((torchs, caffes))
            assert off[name] <= most or further <= max(most, 4 * nearer), (name, off[name], torchs, caffes)
        assert statistics.median(off.values()) < 0.05
    return found


def apart(wanted: dict[str, Any], found: dict[str, Any], name: str) -> float:
    """The size of the difference, relative to the size of what is wanted.

    A layer's gradients are measured by its largest: a bias in front of a BatchNorm has none but rounding.
    """
    scale = (
        [n for n in wanted if n.rpartition(" ")[0] == name.rpartition(" ")[0]] if name[0] == "@" else [name]
    )
    size = max(float(np.linalg.norm(wanted[n].astype("f8"))) for n in scale)
    return float(np.linalg.norm(wanted[name].reshape(found[name].shape) - found[name].astype("f8"))) / (
        size or 1
    )


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


WHOLE_ZOO = sorted(path.name for path in ZOO.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("name", "phase"),
    [*((name, TRAIN) for name in WHOLE_ZOO), ("fashion_googlenet", TEST), ("resnet_50", TEST)],
)
def test_the_zoo(in_caffe, tmp_path, name, phase):
    assert_same(in_caffe, tmp_path, small(name, "train_val"), phase)


IMAGE = (2, 6, 13, 11)
FUNCTIONS = (
    *("ReLU", "PReLU", "Sigmoid", "TanH", "AbsVal", "BNLL", "Exp"),
    "ReLU relu_param { negative_slope: 0.1 }",
    "PReLU prelu_param { channel_shared: true }",
    "ELU elu_param { alpha: 0.7 }",
    "Dropout dropout_param { dropout_ratio: 1e-9 }",
    "Power power_param { power: 2 scale: 0.5 shift: 1 }",
    "Power power_param { scale: -2 }",
    "Exp exp_param { base: 2 scale: 0.5 shift: 0.3 }",
    "Softmax softmax_param { axis: 2 }",
)
WINDOWS = (
    "kernel_size: 3 stride: 2",
    "kernel_size: 3 stride: 2 pad: 1",
    "kernel_size: 3 stride: 1 pad: 2",
    "kernel_size: 4 stride: 3 pad: 3",
    "kernel_h: 2 kernel_w: 5 stride_h: 2 stride_w: 3 pad_h: 1 pad_w: 0",
    "global_pooling: true",
)


def test_layers_that_move_windows(in_caffe, tmp_path):
    """Every way a window can lie over an edge."""
    turned = "convolution_param { num_output: 4 kernel_size: 3 stride: 2 pad: 1 }"
    lines = [
        conv("c1", "data", 4, 3, "pad: 1 dilation: 2 group: 2 bias_term: false"),
        conv("c2", "data", 4, 0, "kernel_h: 3 kernel_w: 1 stride_h: 2 stride_w: 1 pad_h: 1 pad_w: 0"),
        layer("d1", "Deconvolution", "data", more=turned),
    ]
    for i, how in enumerate(WINDOWS):
        for method in ("MAX", "AVE"):
            lines.append(pool(f"{method}{i}", "data", 0, 0, f"pool: {method} {how}"))
    assert_same(in_caffe, tmp_path, with_weights(net(*lines, size=IMAGE)))


def test_normalisations(in_caffe, tmp_path):
    lines = [
        lrn("l1", "data", "alpha: 0.5 beta: 0.75"),
        lrn("l2", "data", "alpha: 2 beta: 0.6 k: 2"),
        lrn("l3", "data", "norm_region: WITHIN_CHANNEL alpha: 0.3"),
        norm("n1", "data", "n1"),
        norm("n2", "data", "n2", "batch_norm_param { use_global_stats: true eps: 0.01 }"),
        norm("n3", "data", "n3", "batch_norm_param { moving_average_fraction: 0.5 }"),
        scale("s1", "data", "s1"),
        layer("s2", "Scale", "data", more="scale_param { axis: 2 num_axes: 1 }"),
        layer("s3", "Scale", "data s2", more="scale_param { axis: 0 }"),
        layer("b1", "Bias", "data", more="bias_param { axis: 1 num_axes: 2 }"),
    ]
    assert_same(in_caffe, tmp_path, with_weights(net(*lines, size=IMAGE)))


def test_functions_of_each_value(in_caffe, tmp_path):
    lines = [
        layer(f"f{i}", kind, "data", more=more)
        for i, (kind, _, more) in enumerate(how.partition(" ") for how in FUNCTIONS)
    ]
    lines.append(layer("positive", "AbsVal", "data"))
    lines.append(layer("log", "Log", "positive", more="log_param { base: 3 scale: 2 shift: 1 }"))
    assert_same(in_caffe, tmp_path, with_weights(net(*lines, size=IMAGE)))


def test_layers_that_join_and_cut(in_caffe, tmp_path):
    turned = "num_output: 4 transpose: true bias_term: false"
    lines = [
        layer("slice", "Slice", "data", "s1 s2 s3", "slice_param { slice_point: 1 slice_point: 3 }"),
        layer("halves", "Slice", "data", "h1 h2", "slice_param { axis: 1 }"),
        layer("cat", "Concat", "s1 h1 s3"),
        layer("cat2", "Concat", "h1 h2", more="concat_param { axis: 2 }"),
        layer("sum", "Eltwise", "h1 h2", more="eltwise_param { coeff: 1 coeff: -2 }"),
        layer("product", "Eltwise", "h1 h2 sum", more="eltwise_param { operation: PROD }"),
        relu("r1", "h1", "r1"), relu("r2", "h2", "r2"), relu("r3", "sum", "r3"),
        layer("max", "Eltwise", "r1 r2 r3", more="eltwise_param { operation: MAX }"),  # zeros are equal
        layer("flat", "Flatten", "cat", more="flatten_param { axis: 2 }"),
        layer("shape", "Reshape", "max", more="reshape_param { shape { dim: 0 dim: -1 dim: 11 } }"),
        layer("ip", "InnerProduct", "cat2", more="inner_product_param { num_output: 4 axis: 2 }"),
        layer("turned", "InnerProduct", "cat2", more=f"inner_product_param {{ {turned} }}"),
        layer("split", "Split", "s2", "p1 p2"),
        layer("silence", "Silence", "p1", ""),
    ]  # fmt: skip
    assert_same(in_caffe, tmp_path, with_weights(net(*lines, size=IMAGE)))


@pytest.mark.parametrize(
    ("weight", "how"),
    [
        (1, ""),
        (0.3, "ignore_label: 2"),
        (1, "ignore_label: 2 normalization: FULL"),
        (2, "normalization: BATCH_SIZE"),
        (1, "ignore_label: 1 normalization: NONE"),
        (1, "normalize: false"),
    ],
)
def test_losses(in_caffe, tmp_path, weight, how):
    more = f"loss_weight: {weight} loss_param {{ {how} }}"
    lines = [
        data("data", (4, CLASSES, 3, 2)),
        data("label", (4, 3, 2)),
        data("target", (4, CLASSES, 3, 2)),
        layer("mix", "Power", "data", more="power_param { scale: 3 }"),
        layer("loss", "SoftmaxWithLoss", "mix label", more=more),
        layer("euclid", "EuclideanLoss", "mix target", more="loss_weight: 0.7"),
        layer("also", "Sigmoid", "mix", more="loss_weight: 0.1"),
        layer("sigmoid", "SigmoidCrossEntropyLoss", "mix target2", more="loss_weight: 0.5"),
        layer("cut", "EuclideanLoss", "mix also", more="propagate_down: true propagate_down: false"),
    ]
    lines.insert(3, data("target2", (4, CLASSES, 3, 2)))
    one = Net.parse("\n".join(lines), "test.prototxt")
    target = np.random.default_rng(2).integers(0, 2, (4, CLASSES, 3, 2)).astype("f4")
    assert_same(in_caffe, tmp_path, one, target2=target)


def test_accuracy(in_caffe, tmp_path):
    lines = [
        data("data", (8, CLASSES)), data("label", (8,)),
        layer("top1", "Accuracy", "data label", "top1 each"),
        layer("top3", "Accuracy", "data label", more="accuracy_param { top_k: 3 ignore_label: 1 }"),
    ]  # fmt: skip
    assert_same(in_caffe, tmp_path, Net.parse("\n".join(lines), "test.prototxt"), TEST)


def test_shared_weights_learn_from_both_places():
    share = "param { name: 'w' } param { name: 'b' }"
    lines = [conv("c1", "data", 6, 3, "pad: 1", extra=share), conv("c2", "c1", 6, 3, "pad: 1", extra=share)]
    one = with_weights(net(*lines, size=IMAGE))
    module = TorchNet(one.graph.view(TRAIN))
    assert len(module.params) == 2
    assert module.owned[0][1][0] is module.owned[1][1][0]


@given(st.data())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_random_nets(in_caffe, tmp_path, data):
    builder = Builder(data.draw)
    at = At("data", 4, (14, 14))
    for _ in range(data.draw(st.integers(1, 5))):
        at = builder.free(at, 1)
    text = [line.replace('type: "Dropout"', 'type: "AbsVal"') for line in builder.lines]
    one = net(*text, size=(2, 4, 14, 14))
    if any(value.producer and value.producer.type != "Input" for value in one.graph.view(TRAIN).values):
        assert_same(in_caffe, tmp_path, with_weights(one), data.draw(st.sampled_from([TRAIN, TEST])))


def test_what_has_no_gradient_costs_none():
    """lr_mult 0 below, nothing above it that needs the way through."""
    frozen = "param { lr_mult: 0 } param { lr_mult: 0 }"
    lines = [
        conv("still", "data", 4, 3, extra=frozen),
        conv("learns", "still", 4, 3),
        layer("loss", "EuclideanLoss", "learns data2"),
        data("data2", (2, 4, 9, 7)),
    ]
    one = with_weights(net(lines[3], *lines[:3], size=IMAGE))
    module = TorchNet(one.graph.view(TRAIN))
    inputs = {"data": torch.ones(IMAGE), "data2": torch.ones(2, 4, 9, 7)}
    _, values = module(inputs, ["still", "learns"])
    assert values["learns"].requires_grad
    assert not values["still"].requires_grad
    assert [p.tensor.requires_grad for p in module.params] == [False, False, True, True]


def test_an_unknown_layer_is_named():
    one = net(layer("odd", "MVN", "data"))
    with pytest.raises(EngineError, match=r"layer 'odd': the torch engine has no MVN layer; known are Ab"):
        TorchNet(one.graph.view(TEST))


def test_a_session_gives_what_caffe_gives_in_less_memory(caffe, tmp_path):
    """The engine behind evaluate.py, benchmark.py and --distil."""
    one = small("fashion_googlenet", "deploy")
    one.write(tmp_path / "net.prototxt")
    one.write_weights(tmp_path / "net.caffemodel")
    found = []
    for engine in (CaffeEngine(caffe), TorchEngine()):
        with engine.open(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", batch=8) as session:
            values = session.forward(outputs=["conv2/3x3", "prob"])
            assert session.blobs()["prob"] == (8, 10)
            assert {name for name, _, _ in session.time_layers()} >= {"conv1/5x5", "prob"}
            assert session.time_forward() > 0
            with pytest.raises(EngineError, match="no blob named gone"):
                session.forward(outputs=["gone"])
            found.append((values, session.memory()))
    (wanted, before), (values, after) = found
    for name, value in wanted.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())
    assert after["weights_bytes"] == before["weights_bytes"]
    assert after["activation_bytes"] < before["activation_bytes"]
