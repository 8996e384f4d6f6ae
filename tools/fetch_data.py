#!/usr/bin/env python3
"""Makes the databases of images that the small nets of this project are trained and tested with."""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.errors import RebirthError

if TYPE_CHECKING:
    from rebirth_caffe.data import Images

PACKAGE = "dataset-fashion-mnist"  # in Debian and its relatives
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
IDX = {"train": "train", "test": "t10k"}
EPILOG = """DIR gets <set>_train.lmdb, shuffled, and <set>_test.lmdb; with --hold-out also <set>_fit.lmdb and
<set>_val.lmdb, which are the training images in two parts. Databases that are there and made in the same way
are left alone."""


def parse_args() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, epilog=EPILOG)
    p.add_argument("set", choices=("fashion-mnist", "cifar10"))
    p.add_argument("src", metavar="SRC", nargs="?", type=Path,
                   help="fashion-mnist: a folder with its four idx.gz files (default: those of Debian's "
                   f"package {PACKAGE}, installed or not); cifar10: a folder or tar archive with "
                   "train/<class>/ and test/<class>/")  # fmt: skip
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("data"), help="default: data/")
    p.add_argument(
        "--hold-out", metavar="FRACTION", type=cli.fraction, default=0.0, help="of the training images"
    )
    p.add_argument("--pad", metavar="N", type=cli.whole, default=0,
                   help="mirror N pixels out of each side, and add _padN to the names")  # fmt: skip
    p.add_argument("--seed", metavar="N", type=cli.whole, default=0, help="of what is random (default: 0)")
    args = p.parse_args()
    if args.set == "cifar10" and args.src is None:
        p.error("cifar10 needs SRC, a folder or tar archive with train/<class>/ and test/<class>/")
    return args


def main() -> None:
    args = parse_args()

    from rebirth_caffe.data import Recipe, choose, show_progress, write_lmdbs

    name = args.set.replace("-", "_")
    ending = f"_pad{args.pad}.lmdb" if args.pad else ".lmdb"
    groups: list[tuple[str, tuple[str, ...], float]] = [("train", ("train",), 0), ("test", ("test",), 0)]
    if args.hold_out:
        groups.append(("train", ("fit", "val"), args.hold_out))
    with TemporaryDirectory(prefix="rebirth-") as scratch:
        images: Callable[[str], Images] | None = None
        for part, names, fraction in groups:
            paths = [args.out / f"{name}_{one}{ending}" for one in names]
            made = {"source": args.set, "part": part, "seed": args.seed, "hold_out": fraction}
            if all(_is_there(path, {**made, "pad": args.pad}) for path in paths):
                print("\n".join(f"{path}: is there" for path in paths))
                continue
            if images is None:
                images = (_fashion_mnist if args.set == "fashion-mnist" else _folders)(
                    args.src, Path(scratch)
                )
            found = images(part)
            orders = choose(found.labels, shuffle=part == "train", seed=args.seed, hold_out=fraction)
            with show_progress() as progress:
                written = write_lmdbs(
                    dict(zip(paths, orders, strict=False)),
                    found,
                    Recipe(pad=args.pad),
                    strict=True,
                    force=True,
                    made=made,
                    progress=progress,
                )
            print("\n".join(one.summary() for one in written))
            if part == "train":
                print(f"  {written[0].transform()}")


def _is_there(path: Path, made: dict[str, Any]) -> bool:
    """Whether a whole database lies there that was made like this."""
    from rebirth_caffe.data import lmdb_info

    try:
        about = json.loads((path / "about.json").read_text())
        return made.items() <= about.items() and lmdb_info(path).images == int(about["images"])
    except (OSError, ValueError, RebirthError):
        return False


def _fashion_mnist(src: Path | None, scratch: Path) -> Callable[[str], Images]:
    from rebirth_caffe.data import from_idx

    folder = src or (INSTALLED if INSTALLED.is_dir() else _unpacked(scratch))

    def images(part: str) -> Images:
        kinds = ("images-idx3", "labels-idx1")
        return from_idx(*(folder / f"{IDX[part]}-{kind}-ubyte.gz" for kind in kinds))

    return images


def _unpacked(scratch: Path) -> Path:
    """Fetch the Debian package and unpack it, neither of which needs root."""
    print(f"Fetching the package {PACKAGE} (31 MB)", file=sys.stderr)
    own_lists = [f"-oDir::State::Lists={scratch}/lists", f"-oDir::Cache={scratch}/cache"]
    try:
        try:
            _run(["apt-get", "download", PACKAGE], scratch)
        except subprocess.CalledProcessError:  # the system's lists of packages are missing or old
            for folder in ("lists/partial", "cache/archives/partial"):
                (scratch / folder).mkdir(parents=True)
            _run(["apt-get", *own_lists, "-oAPT::Update::Error-Mode=any", "update"], scratch)
            _run(["apt-get", *own_lists, "download", PACKAGE], scratch)
        _run(["dpkg-deb", "-x", *map(str, scratch.glob("*.deb")), "unpacked"], scratch)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = (error.stderr.strip().splitlines() or [error]) if hasattr(error, "stderr") else [error]
        raise RebirthError(
            f"cannot fetch Debian's package {PACKAGE} ({said[-1]}); install it, or give the folder that "
            "holds Fashion-MNIST's four idx.gz files"
        ) from None
    return scratch / "unpacked" / INSTALLED.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _folders(src: Path, _: Path) -> Callable[[str], Images]:
    from rebirth_caffe.data import from_folders

    if src.is_dir():
        return lambda part: from_folders(src / part)
    return _Archive(src).images


class _Archive:
    """The images of a tar archive, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[tuple[str, str, str], bytes] = {}  # part, class, name
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    parts = PurePosixPath(member.name).parts[-3:]
                    file = tar.extractfile(member) if member.isfile() else None
                    if file is not None and len(parts) == 3 and parts[0] in IDX:
                        self.files[parts[0], parts[1], parts[2]] = file.read()
        except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
            raise RebirthError(f"{path}: neither a folder nor a whole tar archive ({error})") from None

    def images(self, part: str) -> Images:
        import numpy as np

        from rebirth_caffe.data import Images

        keys = sorted(key for key in self.files if key[0] == part)
        if not keys:
            raise RebirthError(f"{self.path}: holds no {part}/<class>/<image>")
        classes = sorted({key[1] for key in keys})
        labels = np.array([classes.index(key[1]) for key in keys], np.int64)
        names = ["/".join(key[1:]) for key in keys]
        return Images(names, labels, lambda i: self.files[keys[i]], tuple(classes))


if __name__ == "__main__":
    cli.run(main)
