"""tools/install_caffe.sh, on the Caffe it has left in .caffe/ (the download itself is not repeated here)."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "install_caffe.sh"

NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip"
  inner_product_param { num_output: 2 weight_filler { type: "constant" value: 1 } } }
"""
LAYER = """
import os, subprocess, sys
import caffe

class Twice(caffe.Layer):
    def setup(self, bottom, top):
        host = subprocess.check_output([HOST, "-c", "import sys; print(sys.prefix)"]).decode().strip()
        print("host", host, os.environ.get("PYTHONHOME"), os.environ["PYTHONPATH"])
        print("own", subprocess.check_output([sys.executable, "-c", "import caffe; print('again')"]).decode())
        sys.stdout.flush()

    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].shape)

    def forward(self, bottom, top):
        top[0].data[...] = 2 * bottom[0].data

    def backward(self, top, propagate_down, bottom):
        pass
"""


def run(
    *command: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "GLOG_logtostderr": "1", **environment},  # and no log files in /tmp
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def caffe_dir() -> Path:
    """Where `make setup` has unpacked Caffe. Without it the test is skipped, and fails in CI."""
    if (ROOT / ".caffe" / "bin" / "caffe").exists():
        return ROOT / ".caffe"
    if os.environ.get("CI"):
        pytest.fail("no .caffe/: make setup")
    pytest.skip("no .caffe/: make setup")


def snapshot(directory: Path) -> set[tuple[str, int, int, int]]:
    """Every file's place, type, size and time."""
    return {
        (path, status.st_mode, status.st_size, status.st_mtime_ns)
        for path, status in ((str(p), p.lstat()) for p in directory.rglob("*"))
        if "__pycache__" not in path
    }


class TestInstalled:
    def test_command_takes_host_paths_from_any_directory(self, caffe_dir, tmp_path):
        (tmp_path / "a net").mkdir()
        (tmp_path / "a net" / "net.prototxt").write_text(NET)
        here = tmp_path / "a net"
        done = run(caffe_dir / "bin/caffe", "time", "-model", "net.prototxt", "-iterations", "1", cwd=here)
        assert done.returncode == 0, done.stderr
        assert "Average Forward pass" in done.stderr
        done = run(caffe_dir / "bin/caffe", "time", "-model", "missing.prototxt", cwd=tmp_path)
        assert done.returncode != 0
        assert "missing.prototxt" in done.stderr

    def test_python_runs_a_script_with_its_arguments(self, caffe_dir, tmp_path):
        (tmp_path / "net.prototxt").write_text(NET)
        (tmp_path / "forward.py").write_text(
            "import sys, caffe\n"
            "net = caffe.Net(sys.argv[1], caffe.TEST)\n"
            "net.blobs['data'].data[...] = float(sys.argv[2])\n"
            "print(net.forward()['ip'].tolist(), sys.argv[3])\n"
        )
        done = run(caffe_dir / "bin/python", "forward.py", "net.prototxt", "2", "two words", cwd=tmp_path)
        assert done.stdout == "[[6.0, 6.0]] two words\n", done.stderr

    def test_the_hosts_python_settings_do_not_reach_it(self, caffe_dir, tmp_path):
        """A PYTHONPATH for the host's Python cannot shadow what pycaffe stands on."""
        (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
        (tmp_path / "sitecustomize.py").write_text("raise SystemExit('the wrong sitecustomize')")
        done = run(
            caffe_dir / "bin/python",
            "-c",
            "import caffe, numpy; print(numpy.__file__)",
            PYTHONPATH=str(tmp_path),
            PYTHONHOME=str(tmp_path),
            VIRTUAL_ENV=str(tmp_path),
            LD_LIBRARY_PATH=str(tmp_path),
        )
        assert done.stdout.startswith(str(caffe_dir.resolve() / "root")), done.stderr

    @pytest.mark.parametrize("how", ["the command", "pycaffe"])
    def test_python_layers_come_from_pythonpath_and_children_see_the_host(self, caffe_dir, tmp_path, how):
        """The layers' modules are found, and what they start gets the environment as it was."""
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "twice.py").write_text(f"HOST = {sys.executable!r}\n{LAYER}")
        (tmp_path / "net.prototxt").write_text(
            'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 } } }\n'
            'layer { name: "py" type: "Python" bottom: "data" top: "py"\n'
            '  python_param { module: "twice" layer: "Twice" } }\n'
        )
        if how == "pycaffe":
            start = ["bin/python", "-c", "import caffe; caffe.Net('net.prototxt', caffe.TEST).forward()"]
        else:
            start = ["bin/caffe", "time", "-model", "net.prototxt", "-iterations", "1"]
        (tmp_path / "venv/bin").mkdir(parents=True)  # as an activated virtual environment
        (tmp_path / "venv/pyvenv.cfg").write_text("include-system-site-packages = false\n")
        (tmp_path / "venv/bin/python3").symlink_to(sys.executable)
        path = f"{tmp_path / 'venv/bin'}:{os.environ['PATH']}"
        done = run(caffe_dir / start[0], *start[1:], cwd=tmp_path, PYTHONPATH="modules", PATH=path)
        assert done.returncode == 0, done.stderr
        assert f"host {sys.prefix} None modules" in done.stdout
        assert "own again" in done.stdout

    def test_nothing_leaks_into_the_environment(self, caffe_dir):
        """PYTHONHOME, LD_LIBRARY_PATH and the wrapper's own variable stay out of child processes."""
        code = "import json, os; print(json.dumps(sorted(os.environ)))"
        host = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
        the_shells_own = {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
        seen = []
        for python in (caffe_dir / "bin/python", sys.executable):
            done = subprocess.run(
                [str(python), "-c", code], env=host, capture_output=True, timeout=60, check=True
            )
            seen.append(set(json.loads(done.stdout)) - the_shells_own)
        assert seen[0] == seen[1]

    def test_it_can_be_moved(self, caffe_dir, tmp_path):
        """The wrappers find everything relative to themselves, also through a link to them."""
        moved = tmp_path / "moved here"
        (moved / "bin").mkdir(parents=True)
        for name in ("caffe", "python"):
            shutil.copy(caffe_dir / "bin" / name, moved / "bin" / name)
        (moved / "root").symlink_to((caffe_dir / "root").resolve())
        (tmp_path / "link").symlink_to(moved / "bin/caffe")
        assert "caffe version 1.0" in run(moved / "bin/caffe", "--version", cwd=tmp_path).stdout
        assert "caffe version 1.0" in run("./link", "--version", cwd=tmp_path).stdout
        done = run("python", "-c", "import caffe; print(1)", PATH=f"{moved / 'bin'}:{os.environ['PATH']}")
        assert done.stdout == "1\n", done.stderr

    def test_no_link_leads_out_of_it(self, caffe_dir):
        """An absolute link of the old system would silently read the host's files."""
        root = caffe_dir.resolve() / "root"
        out = [
            str(path)
            for path in root.rglob("*")
            if path.is_symlink()
            and not str(path.readlink()).startswith("/etc/localtime")
            and not path.resolve().is_relative_to(root)
        ]
        assert out == []

    def test_second_run_only_looks(self, caffe_dir):
        before = snapshot(caffe_dir)
        began = time.monotonic()
        done = run(SCRIPT, caffe_dir)
        took = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Caffe works: ")
        assert took < 5  # under half a second where nothing else runs
        assert snapshot(caffe_dir) == before
        assert sorted(ROOT.glob(".caffe*")) == [ROOT / ".caffe"]


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--nonsense"], "unknown option '--nonsense'"),
            (["one", "two"], "one directory at a time: 'one' and 'two'"),
            (["--mirror"], "--mirror needs a value"),
            (["--mirror", "not-an-address"], "--mirror 'not-an-address' is not a URL"),
            (["--keyring", "missing.gpg"], "--keyring 'missing.gpg' cannot be read"),
            (["a:b"], "which the loader cannot take"),
            ([""], "the directory's name is empty"),
            (["/"], "'/' is not a place for it"),
            (["file"], "is not a directory"),
            (["full"], "holds something else"),
        ],
    )
    def test_bad_usage_is_one_line_and_status_2(self, tmp_path, arguments, says):
        (tmp_path / "file").touch()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").touch()
        before = snapshot(tmp_path)
        done = run(SCRIPT, *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
        assert snapshot(tmp_path) == before

    def test_a_mirror_without_packages_leaves_nothing(self, tmp_path):
        """What went wrong, in the package manager's words, and what to do; nothing half-made stays."""
        done = run(SCRIPT, "--mirror", f"file://{tmp_path}/nonexistent", tmp_path / "caffe")
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "nonexistent" in done.stderr or "mmdebstrap" in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_help_names_every_option(self):
        done = run(SCRIPT, "--help")
        assert done.returncode == 0
        for option in ("--mirror", "--keyring", "--force", "--verbose", "DIR"):
            assert option in done.stdout
