"""The clock: forward time and memory of several nets, measured against each other in one run.

A machine's speed drifts by tens of per cent within minutes, so nets are timed in turn (A B A B ...) and only
numbers of the same run are compared.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .cost import Cost, cost
from .engines import Engine, Session
from .errors import NetError, RebirthError
from .init.fill import fill_missing
from .net import TEST, Net

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class LayerTime:
    """The median time of one layer, in seconds."""

    name: str
    type: str
    seconds: float


@dataclass(frozen=True)
class Memory:
    """Bytes: the weights' and the activations' blobs as the engine reports them, and by how much the
    process grew at most, loading included."""

    weights_bytes: int
    activation_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Result:
    """One net in one engine: the seconds of every timed forward, in order."""

    engine: str
    net: str
    seconds: tuple[float, ...]
    memory: Memory
    layers: tuple[LayerTime, ...] | None = None  # None where they were not asked for

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds: the middle half of the forwards lies between these."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Timed:
    """A net that was measured; its cost is that of one image."""

    name: str
    prototxt: Path
    weights: Path | None  # None: drawn from the fillers
    cost: Cost


@dataclass(frozen=True)
class Report:
    """Everything measured in one run. The first net is the one the others are compared to."""

    nets: tuple[Timed, ...]
    engines: tuple[tuple[str, str], ...]  # name, version
    results: tuple[Result, ...]
    threads: int
    batch: int
    runs: int

    def result(self, engine: str, net: str) -> Result:
        """What was measured of a net in an engine."""
        return next(r for r in self.results if (r.engine, r.net) == (engine, net))

    def ratio(self, result: Result) -> float:
        """How many times faster than the first net in the same engine: the ratio of the medians."""
        return self.result(result.engine, self.nets[0].name).median / result.median

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON's types; times in milliseconds, sizes in bytes."""
        return {
            "threads": self.threads,
            "batch": self.batch,
            "runs": self.runs,
            "engines": [{"name": name, "version": version} for name, version in self.engines],
            "nets": [
                {
                    "name": net.name,
                    "prototxt": str(net.prototxt),
                    "weights": None if net.weights is None else str(net.weights),
                    "macs": net.cost.macs,
                    "params": net.cost.params,
                    "activation_bytes": net.cost.activation_bytes,
                    "peak_activation_bytes": net.cost.peak_activation_bytes,
                }
                for net in self.nets
            ],
            "results": [self._result_json(result) for result in self.results],
        }

    def _result_json(self, result: Result) -> dict[str, Any]:
        low, high = result.quartiles
        document: dict[str, Any] = {
            "engine": result.engine,
            "net": result.net,
            "median_ms": _ms(result.median),
            "quartiles_ms": [_ms(low), _ms(high)],
            "ratio": round(self.ratio(result), 4),
            "runs_ms": [_ms(seconds) for seconds in result.seconds],
            "memory": asdict(result.memory),
        }
        if result.layers is not None:
            document["layers"] = [
                {"name": layer.name, "type": layer.type, "median_ms": _ms(layer.seconds)}
                for layer in result.layers
            ]
        return document


def measure(
    prototxts: Sequence[Path],
    engines: Sequence[Engine],
    *,
    weights: Sequence[Path | None] = (),
    threads: int = 1,
    batch: int = 1,
    runs: int = 20,
    layers: bool = False,
    seed: int = 0,
) -> Report:
    """Time every net in every engine, ``runs`` forwards each, in turn.

    ``weights`` holds a caffemodel or None for each net, or nothing at all; a net without gets weights drawn
    from its fillers, the same in every engine. ``layers`` asks for the times of single layers, too.
    Raises RebirthError where the arguments or a net are wrong, EngineError where an engine refuses a net.
    """
    if runs < 1:
        raise RebirthError(f"{runs} runs measure nothing; give at least 1")
    if weights and len(weights) != len(prototxts):
        raise RebirthError(
            f"{len(prototxts)} nets but {len(weights)} weights; give one for each net in order, '-' for none"
        )
    given = list(weights) or [None] * len(prototxts)
    names = labels(prototxts)
    with TemporaryDirectory(prefix="rebirth-") as folder, ExitStack() as stack:
        nets = []
        sessions: list[Session] = []
        for i, (name, prototxt) in enumerate(zip(names, prototxts, strict=True)):
            net = Net.load(prototxt, given[i])
            _check_deploy(net)
            nets.append(Timed(name, prototxt, given[i], cost(net)))
            files = prototxt, given[i]
            if given[i] is None or net.converted:
                files = Path(folder, "deploy.prototxt"), Path(folder, "weights.caffemodel")
                if given[i] is None:
                    fill_missing(net, seed)
                net.write(files[0])
                net.write_weights(files[1])
            for engine in engines:
                session = engine.open(*files, threads=threads, batch=batch)
                sessions.append(stack.enter_context(session))
        times = time_in_turn(sessions, runs)
        of_layers = time_layers_in_turn(sessions, runs) if layers else None
        results = [
            Result(
                engine=engines[i % len(engines)].name,
                net=names[i // len(engines)],
                seconds=tuple(times[i]),
                memory=Memory(**session.memory()),
                layers=None if of_layers is None else tuple(of_layers[i]),
            )
            for i, session in enumerate(sessions)
        ]
    versions = tuple((engine.name, engine.version) for engine in engines)
    return Report(tuple(nets), versions, tuple(results), threads, batch, runs)


def time_in_turn(
    sessions: Sequence[Session], runs: int, warmup: int = WARMUP_ROUNDS, seconds: float = 0.0
) -> list[list[float]]:
    """The seconds of ``runs`` forwards of every session: each round times each of them once.

    Rounds are added until the forwards have taken ``seconds``.
    """
    for _ in range(warmup):
        for session in sessions:
            session.time_forward()
    rounds: list[list[float]] = []
    taken = 0.0
    while len(rounds) < runs or taken < seconds:
        rounds.append([session.time_forward() for session in sessions])
        taken += sum(rounds[-1])
    return [list(times) for times in zip(*rounds, strict=True)]


def time_layers_in_turn(sessions: Sequence[Session], runs: int) -> list[list[LayerTime]]:
    """The median of every layer's time over ``runs`` forwards of every session, in turn."""
    rounds = [[session.time_layers() for session in sessions] for _ in range(runs)]
    result = []
    for passes in zip(*rounds, strict=True):  # one session's forwards
        result.append(
            [
                LayerTime(same[0][0], same[0][1], statistics.median(seconds for _, _, seconds in same))
                for same in zip(*passes, strict=True)
            ]
        )
    return result


def labels(prototxts: Sequence[Path]) -> list[str]:
    """A short name for each file, unlike all others: its stem, its folder where that is ``deploy``, else the
    path as given, with its place in the list where the same file is given twice."""
    names = [path.absolute().parent.name if path.stem == "deploy" else path.stem for path in prototxts]
    count = Counter(names)
    names = [name if count[name] == 1 else str(path) for name, path in zip(names, prototxts, strict=True)]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _check_deploy(net: Net) -> None:
    """Refuse a net that reads its images from a database: the clock gives it the input itself."""
    view = net.graph.view(TEST)
    if view.inputs or any(layer.type == "Input" for layer in view.layers):
        return
    source = next(layer for layer in view.layers if not layer.bottom)
    raise NetError(f"{source.where}: a {source.type} layer feeds this net; time the deploy net instead")


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)
