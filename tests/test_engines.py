"""Engines: the same numbers from all of them, errors in one line, and which Caffe is found."""

import ast
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rebirth_caffe.caffemodel import Blob, Record
from rebirth_caffe.engines import Engine, Session, available_engines, get_engine, known_engines
from rebirth_caffe.engines import caffe as finder
from rebirth_caffe.engines.caffe import Caffe, CaffeEngine, find_caffe
from rebirth_caffe.engines.child import WORKER, ChildSession, last_words, worker_command
from rebirth_caffe.errors import EngineError, RebirthError
from rebirth_caffe.net import Net
from rebirth_caffe.shapes import all_param_shapes

SMALL = """
name: "small"
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 24 dim: 24 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "norm1" type: "LRN" bottom: "conv1" top: "norm1" lrn_param { local_size: 5 alpha: 0.1 } }
layer { name: "pool1" type: "Pooling" bottom: "norm1" top: "pool1"
        pooling_param { pool: MAX kernel_size: 3 stride: 2 } }
layer { name: "a" type: "Convolution" bottom: "pool1" top: "a"
        convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "slice" type: "Slice" bottom: "pool1" top: "low" top: "high" }
layer { name: "cat" type: "Concat" bottom: "a" bottom: "low" bottom: "high" top: "cat" }
layer { name: "fc" type: "InnerProduct" bottom: "cat" top: "fc" inner_product_param { num_output: 10 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""
SHAPES = {
    "data": (2, 3, 24, 24),
    "conv1": (2, 8, 24, 24),
    "norm1": (2, 8, 24, 24),
    "pool1": (2, 8, 12, 12),
    "a": (2, 4, 12, 12),
    "low": (2, 4, 12, 12),
    "high": (2, 4, 12, 12),
    "cat": (2, 12, 12, 12),
    "fc": (2, 10),
    "prob": (2, 10),
}


def write_net(folder: Path, text: str = SMALL) -> tuple[Path, Path]:
    """A net and random weights for it: (prototxt, caffemodel)."""
    prototxt, weights = folder / "small.prototxt", folder / "small.caffemodel"
    prototxt.write_text(text)
    net = Net.load(prototxt)
    random = np.random.default_rng(1)
    for layer, shapes in all_param_shapes(net).items():
        blobs = [Blob(random.normal(0, 0.2, shape).astype("f4")) for shape in shapes or []]
        layer.record = Record(layer.name, layer.type, blobs)
    net.write_weights(weights)
    return prototxt, weights


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_net(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def opencv() -> Engine:
    return get_engine("opencv")


@pytest.fixture(scope="module")
def opencv_session(opencv: Engine, small: tuple[Path, Path]) -> Iterator[Session]:
    with opencv.open(*small) as session:
        yield session


@pytest.fixture(scope="module")
def caffe_session(caffe: Caffe, small: tuple[Path, Path]) -> Iterator[Session]:
    with CaffeEngine(caffe).open(*small) as session:
        yield session


@pytest.fixture(params=["caffe", "opencv"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "caffe":
        return CaffeEngine(request.getfixturevalue("caffe"))
    return get_engine("opencv")


@pytest.fixture(params=["caffe_session", "opencv_session"])
def session(request: pytest.FixtureRequest) -> Session:
    opened: Session = request.getfixturevalue(request.param)
    return opened


# ---- what a session answers -------------------------------------------------------------------------------


def test_every_blob_is_the_same_in_both_engines(caffe_session: Session, opencv_session: Session) -> None:
    ours, theirs = (s.forward(outputs=list(SHAPES)) for s in (caffe_session, opencv_session))
    assert list(ours) == list(theirs) == list(SHAPES)
    for name in SHAPES:
        assert np.abs(ours[name]).max() > 0, name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4 * np.abs(ours[name]).max())


def test_blobs_and_their_shapes(session: Session) -> None:
    assert session.blobs() == SHAPES
    assert list(session.blobs()) == list(SHAPES)


def test_inputs_given_are_used(session: Session) -> None:
    image = np.random.default_rng(3).normal(size=SHAPES["data"]).astype("f4")
    given = session.forward({"data": image}, ["data", "conv1"])
    np.testing.assert_array_equal(given["data"], image)
    assert (given["conv1"] != session.forward(outputs=["conv1"])["conv1"]).any()
    twice = [session.forward()["prob"] for _ in range(2)]
    np.testing.assert_array_equal(twice[0], twice[1])
    np.testing.assert_allclose(twice[0].sum(axis=1), 1, rtol=1e-5)


def test_the_net_outputs_are_what_nobody_reads(session: Session) -> None:
    assert list(session.forward()) == ["prob"]


def test_wrong_requests_leave_the_session_alive(session: Session) -> None:
    with pytest.raises(EngineError, match="no blob named bogus"):
        session.forward(outputs=["bogus"])
    with pytest.raises(EngineError, match=r"input data has shape \(1, 3\), the net takes \(2, 3, 24, 24\)"):
        session.forward({"data": np.zeros((1, 3), "f4")})
    with pytest.raises(EngineError, match="the net's inputs are data, given were image"):
        session.forward({"image": np.zeros((1, 3), "f4")})
    assert session.blobs() == SHAPES


def test_batch_replaces_the_first_dimension(engine: Engine, small: tuple[Path, Path]) -> None:
    with engine.open(*small, batch=5) as session:
        assert session.blobs() == {name: (5, *shape[1:]) for name, shape in SHAPES.items()}
        assert session.forward()["prob"].shape == (5, 10)


def test_layers_add_up_to_the_whole(session: Session) -> None:
    layers = session.time_layers()
    names = [name for name, kind, _ in layers if kind not in ("Input", "Split")]
    assert [n for n in names if n in ("conv1", "norm1", "fc")] == ["conv1", "norm1", "fc"]
    assert {name: kind for name, kind, _ in layers}["fc"] == "InnerProduct"
    # The least of several, because whatever else the machine does only adds.
    whole = min(session.time_forward() for _ in range(20))
    parts = min(sum(seconds for _, _, seconds in session.time_layers()) for _ in range(20))
    assert 0.4 * whole < parts < 2 * whole


def test_memory(session: Session) -> None:
    weights = 8 * 27 + 8 + 4 * 8 + 4 + 10 * 12 * 144 + 10
    memory = session.memory()
    assert memory["weights_bytes"] == 4 * weights
    assert memory["activation_bytes"] >= 4 * sum(np.prod(shape) for shape in SHAPES.values())
    assert 0 < memory["peak_rss_bytes"] < 100e6


def test_caffe_counts_memory_shared_between_blobs_once(caffe_session: Session) -> None:
    exact = 4 * sum(np.prod(shape) for shape in SHAPES.values())
    assert caffe_session.memory()["activation_bytes"] == exact


def test_caffe_draws_missing_weights_from_fillers(caffe: Caffe, tmp_path: Path) -> None:
    filled = SMALL.replace("num_output: 8", 'num_output: 8 bias_filler { type: "constant" value: 3 }')
    (tmp_path / "net.prototxt").write_text(filled)
    with CaffeEngine(caffe).open(tmp_path / "net.prototxt", None) as session:
        assert (session.forward(outputs=["conv1"])["conv1"] == 3).all()


def test_phase_decides_which_layers_there_are(caffe: Caffe, tmp_path: Path) -> None:
    loss = """
layer { name: "l" type: "Input" top: "label" include { phase: TRAIN } input_param { shape { dim: 2 } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss"
        include { phase: TRAIN } }
"""
    (tmp_path / "net.prototxt").write_text(SMALL + loss)
    with CaffeEngine(caffe).open(tmp_path / "net.prototxt", None, phase="TRAIN") as session:
        assert session.blobs()["label"] == (2,)
        assert session.forward()["loss"].shape == ()
    with CaffeEngine(caffe).open(tmp_path / "net.prototxt", None) as session:
        assert "label" not in session.blobs()


def test_threads_reach_the_runtime(caffe: Caffe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    assert caffe.environment(3)["OPENBLAS_NUM_THREADS"] == "3"
    assert caffe.environment()["OMP_NUM_THREADS"] == "1"


def test_closing_ends_the_child(opencv: Engine, small: tuple[Path, Path]) -> None:
    session = opencv.open(*small)
    assert isinstance(session, ChildSession)
    child = session._child.pid
    session.close()
    session.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(EngineError, match="the session is closed"):
        session.forward()


# ---- nets a runtime refuses -------------------------------------------------------------------------------


def refusal(engine: Engine, prototxt: Path, weights: Path | None) -> str:
    with pytest.raises(RebirthError) as caught, engine.open(prototxt, weights):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert str(prototxt) in message
    return message


def test_files_that_are_not_there(engine: Engine, small: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none.prototxt: no such file"):
        engine.open(tmp_path / "none.prototxt", small[1])
    with pytest.raises(EngineError, match=r"none.caffemodel: no such file"):
        engine.open(small[0], tmp_path / "none.caffemodel")


def test_weights_cut_short(engine: Engine, small: tuple[Path, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.caffemodel"
    cut.write_bytes(small[1].read_bytes()[:-100])
    assert f"Failed to parse NetParameter file: {cut}" in refusal(engine, small[0], cut)


def test_an_unknown_layer_is_named(engine: Engine, small: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(SMALL.replace('"LRN"', '"Fancy"'))
    message = refusal(engine, tmp_path / "net.prototxt", small[1])
    assert "layer 'norm1'" in message
    assert "Fancy" in message
    assert len(message) < 300  # Caffe lists all layers it knows


def test_a_failed_check_of_caffe_names_the_layer(caffe: Caffe, tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(SMALL.replace("kernel_size: 3 pad: 1", "kernel_size: 30"))
    message = refusal(CaffeEngine(caffe), tmp_path / "net.prototxt", None)
    assert message.endswith("Caffe refuses it: layer 'conv1': Check failed: shape[i] >= 0 (-5 vs. 0)")
    assert not list(tmp_path.glob("core*"))


def test_weights_that_do_not_fit(caffe: Caffe, small: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(SMALL.replace("num_output: 10", "num_output: 11"))
    message = refusal(CaffeEngine(caffe), tmp_path / "net.prototxt", small[1])
    assert "Cannot copy param 0 weights from layer 'fc'; shape mismatch" in message


def test_a_prototxt_caffe_cannot_read(caffe: Caffe, tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(SMALL.replace("num_output: 10", "number: 10"))
    message = refusal(CaffeEngine(caffe), tmp_path / "net.prototxt", None)
    assert 'has no field named "number"' in message


def test_a_database_that_is_not_there(caffe: Caffe, tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(
        'layer { name: "data" type: "Data" top: "data" '
        'data_param { source: "none" backend: LMDB batch_size: 1 } }'
    )
    assert "layer 'data': Check failed: mdb_status" in refusal(
        CaffeEngine(caffe), tmp_path / "net.prototxt", None
    )


def test_opencv_wants_a_deploy_net_with_weights(
    opencv: Engine, small: tuple[Path, Path], tmp_path: Path
) -> None:
    assert "give a caffemodel" in refusal(opencv, small[0], None)
    net = tmp_path / "net.prototxt"
    net.write_text(SMALL.replace('type: "Input"', 'type: "Data"'))
    assert f"{net}:3: layer 'in': OpenCV has no Data layer; give a deploy net" in refusal(
        opencv, net, small[1]
    )
    net.write_text(SMALL.replace('type: "Softmax"', 'type: "Softmax" include { phase: TRAIN }'))
    assert "give a deploy net" in refusal(opencv, net, small[1])


# ---- last words -------------------------------------------------------------------------------------------


def test_last_words() -> None:
    log = (
        "I1122 20:58:45.138614  7629 layer_factory.hpp:77] Creating layer conv1\n"
        "F1122 20:58:45.2  7629 blob.cpp:32] Check failed: a == b (1 vs. 2) over\n two lines\n"
        "*** Check failure stack trace: ***\n    @ 0x7f  google::LogMessage::Fail()\n"
    )
    assert last_words(log, -6) == "layer 'conv1': Check failed: a == b (1 vs. 2) over two lines"
    built = log.replace("F1122", "I1122 1 1 net.cpp:257] Network initialization done.\nF1122")
    assert last_words(built, -6) == "Check failed: a == b (1 vs. 2) over two lines"
    assert last_words("", -9) == "ended by SIGKILL (out of memory?)"
    assert (
        last_words("Traceback\nImportError: no cv2\n\n", 1) == "ended with exit status 1: ImportError: no cv2"
    )


# ---- the worker -------------------------------------------------------------------------------------------


def test_the_worker_keeps_to_old_pythons_and_to_itself() -> None:
    tree = ast.parse(WORKER.read_text(), feature_version=(3, 5))
    kinds = {type(node) for node in ast.walk(tree)}
    assert not kinds & {ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match}
    imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "caffe", "cv2"}


def test_what_a_runtime_prints_does_not_disturb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv2.py").write_text("print('hello')\nraise ImportError('no\\nlibrary')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    request = {"backend": "opencv", "prototxt": "x"}
    with pytest.raises(EngineError, match="x: OpenCV refuses it: ImportError: no library"):
        ChildSession("OpenCV", worker_command(sys.executable), os.environ, request)


def test_a_python_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be run: No such file"):
        ChildSession("Caffe", [str(tmp_path / "python")], os.environ, {"prototxt": "x"})


# ---- which engines, which Caffe ---------------------------------------------------------------------------


def test_engines_by_name(caffe: Caffe) -> None:
    assert known_engines() == ("caffe", "opencv", "torch")
    assert available_engines() == ["caffe", "opencv", *["torch"] * (find_spec("torch") is not None)]
    assert get_engine("caffe").version == caffe.version
    assert get_engine("opencv").version.startswith("4.")
    with pytest.raises(RebirthError, match="engine 'mxnet' is not known; known are caffe, opencv"):
        get_engine("mxnet")


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def fake_module(folder: Path, version: str) -> Path:
    (folder / "caffe").mkdir(parents=True)
    (folder / "caffe" / "__init__.py").write_text(f"Net = object\n__version__ = {version!r}\n")
    return folder


def fake_caffe(root: Path, version: str) -> Path:
    """A directory as tools/install_caffe.sh leaves it."""
    executable(root / "bin" / "caffe", f"echo caffe version {version}")
    modules = fake_module(root / "lib", version)
    executable(root / "bin" / "python", f'PYTHONPATH={modules} exec {sys.executable} "$@"')
    return root


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A machine without any Caffe; call it with the places that shall have one, named by their version."""
    home = tmp_path / "repository"
    monkeypatch.setattr(finder, "ROOT", home)
    path = tmp_path / "path"
    path.mkdir()
    for name in ("sh", "python3"):
        (path / name).symlink_to("/bin/sh" if name == "sh" else sys.executable)
    monkeypatch.setenv("PATH", str(path))
    for variable in ("REBIRTH_CAFFE", "PYTHONPATH"):
        monkeypatch.delenv(variable, raising=False)

    def forget() -> None:
        finder._module_version.cache_clear()
        finder._binary_version.cache_clear()

    def place(*where: str) -> None:
        forget()
        if "variable" in where:
            monkeypatch.setenv("REBIRTH_CAFFE", str(fake_caffe(tmp_path / "variable", "variable")))
        if "repository" in where:
            fake_caffe(home / ".caffe", "repository")
        if "path" in where:
            executable(path / "caffe", "echo caffe version path")
        if "import" in where:
            monkeypatch.setenv("PYTHONPATH", str(fake_module(tmp_path / "import", "import")))

    place()
    yield place
    forget()


def test_the_order_of_the_search(machine: Callable[..., None], tmp_path: Path) -> None:
    machine("import")
    found = find_caffe()
    assert (found.version, found.binary, found.python) == ("import", None, Path(sys.executable))
    machine("path")
    found = find_caffe()
    assert (found.binary, found.version) == (tmp_path / "path" / "caffe", "import")
    machine("repository")
    assert find_caffe().version == "repository"
    machine("variable")
    assert find_caffe().version == "variable"
    explicit = fake_caffe(tmp_path / "explicit", "explicit")
    assert find_caffe(str(explicit)) == Caffe(
        explicit / "bin" / "caffe", explicit / "bin" / "python", None, "explicit"
    )


def test_the_forms_of_a_given_caffe(machine: Callable[..., None], tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    binary = executable(tree / "build" / "tools" / "caffe.bin", "echo caffe")
    modules = fake_module(tree / "python", "tree")
    for given in (tree, binary):
        found = find_caffe(str(given))
        assert found == Caffe(binary, Path(sys.executable), modules, "tree")
        assert found.environment()["PYTHONPATH"] == str(modules)
    installed = fake_caffe(tmp_path / "installed", "1.0")
    assert find_caffe(str(installed / "bin" / "caffe")).python == installed / "bin" / "python"
    alone = executable(tmp_path / "alone" / "bin" / "caffe", "echo caffe version 1.0.0-rc5")
    found = find_caffe(str(alone))
    assert found == Caffe(alone, None, None, "1.0.0-rc5")
    with pytest.raises(EngineError, match=r"has no pycaffe beside it.*tools/install_caffe.sh$"):
        CaffeEngine(found)


def test_a_given_caffe_that_does_not_work_is_not_passed_over(
    machine: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("import", "repository")
    broken = fake_caffe(tmp_path / "broken", "1.0")
    executable(broken / "bin" / "caffe", "echo 'libopenblas.so.0: cannot open' >&2; exit 127")
    empty = tmp_path / "empty"
    empty.mkdir()
    placeholder = tmp_path / "placeholder"
    (placeholder / "python" / "caffe").mkdir(parents=True)
    (placeholder / "python" / "caffe" / "__init__.py").touch()
    reasons = {
        tmp_path / "nowhere": "no such file or directory",
        broken: "does not run: libopenblas.so.0: cannot open",
        empty: "holds no Caffe",
        placeholder: "cannot import caffe: ImportError: .* has no Net",
        executable(tmp_path / "bin" / "other", "echo something else"): "is not Caffe's command",
    }
    for given, reason in reasons.items():
        with pytest.raises(EngineError, match=f"--caffe {given}: .*{reason}"):
            find_caffe(str(given))
        monkeypatch.setenv("REBIRTH_CAFFE", str(given))
        with pytest.raises(EngineError, match=f"REBIRTH_CAFFE {given}: .*{reason}"):
            find_caffe()


def test_no_caffe_at_all(machine: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^no Caffe was found; give one .* run tools/install_caffe.sh$"):
        find_caffe()
    assert set(available_engines()) - {"torch"} == {"opencv"}
    # A Python without NumPy is no Caffe gone wrong.
    (tmp_path / "path" / "python3").unlink()
    executable(tmp_path / "path" / "python3", "echo \"No module named 'numpy'\" >&2; exit 1")
    with pytest.raises(EngineError, match=r"^no Caffe was found; give one"):
        find_caffe()
    executable(tmp_path / "path" / "caffe", "echo broken >&2; exit 1")
    with pytest.raises(EngineError, match=r"no Caffe was found \(.*caffe does not run: broken\)"):
        find_caffe()


def test_looking_for_opencv_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    get_engine("opencv")
    assert "cv2" not in sys.modules
