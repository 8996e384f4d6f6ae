"""The clock: whose turn it is, and what is made of the seconds."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rebirth_caffe.cost import Cost
from rebirth_caffe.engines import Session, get_engine
from rebirth_caffe.engines.caffe import Caffe, CaffeEngine
from rebirth_caffe.errors import EngineError, NetError, RebirthError
from rebirth_caffe.init.fill import fill_missing
from rebirth_caffe.measure import (
    LayerTime,
    Memory,
    Report,
    Result,
    Timed,
    labels,
    measure,
    time_in_turn,
    time_layers_in_turn,
)
from rebirth_caffe.net import Net

SMALL = """
name: "small"
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 24 dim: 24 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 8 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "norm1" type: "LRN" bottom: "conv1" top: "norm1" }
layer { name: "fc" type: "InnerProduct" bottom: "norm1" top: "fc" inner_product_param { num_output: 10 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""


def write_net(folder: Path) -> tuple[Path, Path]:
    """The net and weights for it: (prototxt, caffemodel)."""
    prototxt, weights = folder / "small.prototxt", folder / "small.caffemodel"
    prototxt.write_text(SMALL)
    net = Net.load(prototxt)
    fill_missing(net, seed=1)
    net.write_weights(weights)
    return prototxt, weights


class FakeSession:
    """Gives the seconds it is told and writes down when it was asked."""

    def __init__(self, name: str, seconds: list[float], calls: list[str]) -> None:
        self.name = name
        self.seconds: Iterator[float] = iter(seconds)
        self.calls = calls

    def time_forward(self) -> float:
        self.calls.append(self.name)
        return next(self.seconds)

    def time_layers(self) -> list[tuple[str, str, float]]:
        self.calls.append(self.name)
        first, second = next(self.seconds), next(self.seconds)
        return [("conv", "Convolution", first), ("pool", "Pooling", second)]


def fakes(*seconds: list[float]) -> tuple[list[Session], list[str]]:
    calls: list[str] = []
    sessions = [FakeSession(chr(ord("A") + i), s, calls) for i, s in enumerate(seconds)]
    return sessions, calls  # type: ignore[return-value]


def test_every_round_times_every_net_once() -> None:
    sessions, calls = fakes([9, 9, 1, 2, 3], [8, 8, 4, 5, 6])
    assert time_in_turn(sessions, runs=3, warmup=2) == [[1, 2, 3], [4, 5, 6]]
    assert "".join(calls) == "ABABABABAB"


def test_rounds_are_added_until_the_nets_have_taken_so_long() -> None:
    sessions, _ = fakes([9, 1, 2, 3], [8, 4, 5, 6])
    assert time_in_turn(sessions, runs=1, warmup=1, seconds=11) == [[1, 2], [4, 5]]


def test_layers_are_timed_in_turn_and_their_median_taken() -> None:
    sessions, calls = fakes([1, 10, 3, 30, 2, 80], [4, 4, 5, 5, 9, 9])
    assert time_layers_in_turn(sessions, runs=3) == [
        [LayerTime("conv", "Convolution", 2), LayerTime("pool", "Pooling", 30)],
        [LayerTime("conv", "Convolution", 5), LayerTime("pool", "Pooling", 5)],
    ]
    assert "".join(calls) == "ABABAB"


def test_medians_quartiles_and_ratios() -> None:
    cost = Cost(1, 2, 3, 4, 5)
    memory = Memory(10, 20, 30)
    report = Report(
        nets=(Timed("a", Path("a.prototxt"), None, cost), Timed("b", Path("b.prototxt"), Path("w"), cost)),
        engines=(("caffe", "1.0.0"), ("opencv", "4")),
        results=(
            Result("caffe", "a", (0.010, 0.020, 0.030, 0.040, 9.0), memory),
            Result("caffe", "b", (0.010, 0.010, 0.020, 0.030), memory),
            Result("opencv", "a", (0.008,), memory, (LayerTime("conv", "Convolution", 0.0075),)),
            Result("opencv", "b", (0.016,), memory),
        ),
        threads=1,
        batch=2,
        runs=5,
    )
    first, second = report.result("caffe", "a"), report.result("caffe", "b")
    assert (first.median, first.quartiles) == (0.030, (0.020, 0.040))
    assert second.median == pytest.approx(0.015)
    assert [report.ratio(r) for r in report.results] == pytest.approx([1, 2, 1, 0.5])
    assert report.result("opencv", "a").quartiles == (0.008, 0.008)
    document = json.loads(json.dumps(report.to_json()))
    assert document["results"][2] == {
        "engine": "opencv",
        "net": "a",
        "median_ms": 8.0,
        "quartiles_ms": [8.0, 8.0],
        "ratio": 1.0,
        "runs_ms": [8.0],
        "memory": {"weights_bytes": 10, "activation_bytes": 20, "peak_rss_bytes": 30},
        "layers": [{"name": "conv", "type": "Convolution", "median_ms": 7.5}],
    }
    assert document["nets"][1] == {
        "name": "b",
        "prototxt": "b.prototxt",
        "weights": "w",
        "macs": 2,
        "params": 3,
        "activation_bytes": 4,
        "peak_activation_bytes": 5,
    }
    assert document["engines"][0] == {"name": "caffe", "version": "1.0.0"}
    assert (document["threads"], document["batch"], document["runs"]) == (1, 2, 5)


def test_labels_are_short_and_unlike_each_other() -> None:
    def of(*paths: str) -> list[str]:
        return labels([Path(path) for path in paths])

    assert of("zoo/alex/deploy.prototxt", "zoo/alex_rebirth/deploy.prototxt") == ["alex", "alex_rebirth"]
    assert of("a/net.prototxt", "b/net.prototxt", "c.prototxt") == ["a/net.prototxt", "b/net.prototxt", "c"]
    assert of("a.prototxt", "a.prototxt") == ["a.prototxt (1)", "a.prototxt (2)"]


def test_two_nets_in_both_engines(caffe: Caffe, tmp_path: Path) -> None:
    prototxt, weights = write_net(tmp_path)
    wide = tmp_path / "wide.prototxt"
    wide.write_text(SMALL.replace("num_output: 8", "num_output: 64"))
    report = measure(
        [prototxt, wide],
        [CaffeEngine(caffe), get_engine("opencv")],
        weights=[weights, None],
        batch=2,
        runs=5,
        layers=True,
    )
    assert [(r.engine, r.net) for r in report.results] == [
        (engine, net) for net in ("small", "wide") for engine in ("caffe", "opencv")
    ]
    assert all(len(r.seconds) == 5 and min(r.seconds) > 0 for r in report.results)
    for engine in ("caffe", "opencv"):
        small, big = (report.result(engine, net) for net in ("small", "wide"))
        assert report.ratio(small) == 1
        assert report.ratio(big) < 0.7  # eight times the arithmetic
        assert big.memory.weights_bytes > 4 * small.memory.weights_bytes
        assert big.memory.activation_bytes > 4 * small.memory.activation_bytes
        assert big.layers is not None
        assert {"conv1", "norm1", "prob"} <= {layer.name for layer in big.layers}
        assert sum(layer.seconds for layer in big.layers) == pytest.approx(big.median, rel=0.7)
    assert report.result("caffe", "small").memory.activation_bytes == 2 * report.nets[0].cost.activation_bytes


def test_wrong_arguments(tmp_path: Path) -> None:
    prototxt, weights = write_net(tmp_path)
    engines = [get_engine("opencv")]
    with pytest.raises(RebirthError, match="0 runs measure nothing"):
        measure([prototxt], engines, runs=0)
    with pytest.raises(RebirthError, match="2 nets but 1 weights; give one for each net"):
        measure([prototxt, prototxt], engines, weights=[weights])


def test_a_train_val_net_is_refused(tmp_path: Path) -> None:
    net = tmp_path / "train_val.prototxt"
    net.write_text(SMALL.replace('type: "Input"', 'type: "Data"'))
    with pytest.raises(NetError, match=r"train_val.prototxt:3: layer 'in': a Data layer feeds this net"):
        measure([net], [get_engine("opencv")])


def test_what_is_open_is_closed_when_a_net_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _ = write_net(tmp_path)
    bad = tmp_path / "bad.prototxt"
    bad.write_text(SMALL + 'layer { name: "e" type: "Exotic" bottom: "prob" top: "e" }')
    opened = []

    class Spy:
        name = version = "spy"

        def open(self, prototxt: Path, weights: Path | None, **options: object) -> Session:
            opened.append(get_engine("opencv").open(prototxt, weights))
            return opened[-1]

    monkeypatch.setattr("rebirth_caffe.measure.fill_missing", lambda net, seed: None)
    _, weights = write_net(tmp_path)
    with pytest.raises(EngineError, match='Can\'t create layer "e"'):
        measure([good, bad], [Spy()], weights=[weights, weights])
    assert len(opened) == 1
    with pytest.raises(EngineError, match="the session is closed"):
        opened[0].forward()
