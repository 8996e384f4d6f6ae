"""Image databases that Caffe's Data layer reads: made from folders, lists and idx files, and read back.

A database is one folder, written under another name and renamed when it is whole:

    data.mdb          Datums under the keys 00000000, 00000001, ...: channels first, colours as B, G, R
    about.json        count, size, mean values, how it was made
    labels.txt        line i names label i
    list.txt          the record's image and label, a line for each: a Caffe list file
    mean.binaryproto  the mean image, for transform_param's mean_file
    skipped.txt       the images that could not be read, and why; only where there are any
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import cv2
import lmdb
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from .errors import RebirthError, by_x
from .schema.caffe_pb2 import BlobProto, Datum

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # of damaged images we tell ourselves

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
T = TypeVar("T")

FILES = {"data.mdb", "about.json", "labels.txt", "list.txt", "mean.binaryproto", "skipped.txt"}
LOCK = "lock.mdb"  # what Caffe leaves in a database that it has read
MOST_LABELS = 1_000_000  # a larger label is no class but a mistake
BATCH_BYTES = 16 << 20  # in one transaction
SECONDS_SHOWN = 0.1  # between two steps of a bar
CHUNK = 8  # images a thread takes at a time
IDX_IMAGES, IDX_LABELS = 0x803, 0x801
UNLABELLED = -1  # in place of a label


# ------------------------------------------------------------------------------------------------ sources


@dataclass(frozen=True)
class Images:
    """Images that have not been read yet, and their labels: all or none of them have one."""

    names: Sequence[str]
    labels: Labels
    load: Callable[[int], bytes | Pixels]  # a file's bytes, or pixels: height x width (x 3)
    classes: tuple[str, ...]  # what each label is called
    notes: tuple[str, ...] = ()  # what a person should know about them


def find_images(source: str, root: str | Path | None = None) -> Images:
    """The images of a folder with one folder per class (or of a folder of images without labels), of a
    database, of a Caffe list file or of an ``IMAGES,LABELS`` pair of idx files. ``root`` is where a list's
    paths start (default: the list's folder)."""
    path = Path(source)
    if path.is_dir():
        return from_lmdb(path) if (path / "data.mdb").exists() else from_folders(path)
    if path.exists():
        return from_list(path, None if root is None else Path(root))
    pair = source.split(",")
    if len(pair) == 2 and all(pair):
        return from_idx(Path(pair[0]), Path(pair[1]))
    raise RebirthError(f"{source}: no such folder or list file, nor a pair IMAGES,LABELS of idx files")


def from_folders(folder: Path) -> Images:
    """A folder per class; labels count the folders in alphabetical order. Without folders: no labels."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in entries if path.is_dir()]
    if not entries:
        raise RebirthError(f"{folder}: is empty; give a folder with one folder of images per class")
    if not folders:
        none = np.full(len(entries), UNLABELLED)
        return Images([path.name for path in entries], none, lambda i: entries[i].read_bytes(), ())
    paths: list[Path] = []
    labels: list[int] = []
    for label, path in enumerate(folders):
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        deeper = next((file for file in files if file.is_dir()), None)
        if deeper is not None:
            raise RebirthError(
                f"{deeper}: a folder inside the class folder {path.name}; give the folder whose folders are "
                "the classes, or a list file"
            )
        if any(file.name == "data.mdb" for file in files):
            raise RebirthError(f"{path}: a database among the class folders; move it elsewhere")
        if not files:
            raise RebirthError(f"{path}: the class folder is empty; fill it or remove it")
        paths += files
        labels += [label] * len(files)
    classes = tuple(path.name for path in folders)
    notes = []
    if len(entries) > len(folders):
        first = next(path.name for path in entries if path not in folders)
        notes.append(f"{len(entries) - len(folders)} not in a class folder and so not used, like {first}")
    if all(name.isdecimal() for name in classes) and list(classes) != sorted(classes, key=int):
        notes.append("labels count the folders as text, 10 before 2; see labels.txt")
    names = [os.path.relpath(path, folder) for path in paths]
    return Images(names, np.array(labels, np.int64), lambda i: paths[i].read_bytes(), classes, tuple(notes))


def from_list(file: Path, root: Path | None = None) -> Images:
    """A Caffe list: on each line a path, relative to ``root`` or the list's folder, and a label."""
    names: list[str] = []
    labels: list[int] = []
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    if "\0" in text[:4096]:
        raise RebirthError(f"{file}: not a list file; its lines are: PATH LABEL")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(.*\S)\s+(-?\d{1,18})", line.strip())
        if not match:
            raise RebirthError(
                f"{file}:{number}: '{line.strip()[:80]}' is not PATH LABEL, label a whole number"
            )
        label = int(match[2])
        if not 0 <= label < MOST_LABELS:
            raise RebirthError(f"{file}:{number}: label {label} is not from 0 to {MOST_LABELS - 1}")
        names.append(match[1])
        labels.append(label)
    if not names:
        raise RebirthError(f"{file}: lists no image; its lines are: PATH LABEL")
    at = file.parent if root is None else root
    found = np.array(labels, np.int64)
    return Images(names, found, lambda i: (at / names[i]).read_bytes(), *_numbered(found))


def from_idx(images: Path, labels: Path) -> Images:
    """A pair of MNIST's files, compressed or not."""
    pixels = _read_idx(images, IDX_IMAGES, "images")
    numbers = _read_idx(labels, IDX_LABELS, "labels").astype(np.int64)
    if len(pixels) != len(numbers):
        raise RebirthError(f"{images}: {len(pixels)} images, but {len(numbers)} labels in {labels}")
    if not pixels.size:
        raise RebirthError(f"{images}: holds no images")
    names = [f"{images.name}[{i}]" for i in range(len(pixels))]
    return Images(names, numbers, lambda i: pixels[i], *_numbered(numbers))


def from_lmdb(path: Path) -> Images:
    """The images of a database; their classes are called what its labels.txt says, if it has one."""
    database = open_lmdb(path)
    labels = np.array([label for _, label in database], np.int64)
    names = [f"{path.name}[{i}]" for i in range(len(labels))]

    def load(i: int) -> Pixels:
        pixels = database[i][0]
        return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))

    if labels.min() < 0:
        return Images(names, np.full_like(labels, UNLABELLED), load, ())
    classes, notes = _numbered(labels)
    with suppress(OSError):
        given = (path / "labels.txt").read_text("utf-8", "surrogateescape").splitlines()
        if len(given) >= len(classes):
            classes = tuple(given)
    return Images(names, labels, load, classes, notes)


def _numbered(labels: Labels) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names and notes for labels that nobody named."""
    number = int(labels.max()) + 1
    missing = np.setdiff1d(np.arange(number), labels)
    notes = (f"no image has label {missing[0]} though labels go to {number - 1}",) if len(missing) else ()
    return tuple(map(str, range(number))), notes


def _read_idx(path: Path, magic: int, what: str) -> Pixels:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise RebirthError(f"{path}: damaged or cut short ({error}); fetch it again") from None
    found = int.from_bytes(data[:4], "big")
    if len(data) < 4 or found != magic:
        hint = "; give IMAGES,LABELS in this order" if found in (IDX_IMAGES, IDX_LABELS) else ""
        raise RebirthError(f"{path}: not an idx file of {what}: it starts with {data[:4].hex()}{hint}")
    start = 4 + 4 * (magic & 0xFF)
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) != start + np.prod(shape, dtype=object):
        raise RebirthError(
            f"{path}: {max(0, len(data) - start)} bytes of {what} cannot be {by_x(shape)}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# ------------------------------------------------------------------------------------------- what and when


def choose(
    labels: Labels, *, shuffle: bool = False, seed: int = 0, limit: int | None = None, hold_out: float = 0
) -> tuple[Labels, Labels]:
    """The images to write, in order, and those held out of them: this part of each class, drawn by seed."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels)) if shuffle else np.arange(len(labels))
    order = order[:limit]
    if not hold_out:
        return order, order[:0]
    drawn = order if shuffle else random.permutation(order)
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    _, counts = np.unique(labels[drawn], return_counts=True)
    classes = np.split(drawn, np.cumsum(counts)[:-1])
    held = np.isin(order, np.concatenate([one[: round(hold_out * len(one))] for one in classes]))
    if held.all() or not held.any():
        raise RebirthError(f"holding out {hold_out:g} of {len(order)} images leaves one side without any")
    return order[~held], order[held]


def by_class(labels: Labels) -> bool:
    """Whether one class follows another, which stochastic gradient descent cannot learn from."""
    return len(labels) > 0 and bool(np.all(np.diff(labels) >= 0)) and int(labels[0]) != int(labels[-1])


@dataclass(frozen=True)
class Recipe:
    """What is done to every image."""

    resize: tuple[int, int] | None = None  # height, width; bilinear, as Caffe's convert_imageset does
    pad: int = 0  # pixels on each side, mirrored, for crops around the original
    gray: bool = False
    encoded: bool = False  # files' bytes as they are where Caffe sees the same pixels in them, else PNG

    def pixels(self, data: bytes | Pixels) -> Pixels:
        """The image without its padding: height x width (x 3). Raises ValueError where it is none."""
        kind = cv2.IMREAD_GRAYSCALE if self.gray else cv2.IMREAD_COLOR
        image = data if isinstance(data, np.ndarray) else _decode(data, kind)
        if self.gray and image.ndim == 3:
            image = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), np.uint8)
        if self.resize is not None and image.shape[:2] != self.resize:
            image = np.asarray(cv2.resize(image, self.resize[::-1]), np.uint8)
        return image

    def padded(self, image: Pixels) -> Pixels:
        """With its mirrored sides."""
        if not self.pad:
            return image
        n = self.pad
        return np.asarray(cv2.copyMakeBorder(image, n, n, n, n, cv2.BORDER_REFLECT_101), np.uint8)

    def keeps(self, data: bytes | Pixels, image: Pixels) -> bool:
        """Whether Caffe sees ``image`` in a file's own bytes: it neither turns nor converts them."""
        if not isinstance(data, bytes) or not data.startswith((b"\xff\xd8", b"\x89PNG")) or self.pad:
            return False
        return np.array_equal(_decode(data, cv2.IMREAD_UNCHANGED), image)


def _decode(data: bytes, flags: int) -> Pixels:
    """Raises ValueError where it is no image."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(" ".join(str(error).split())) from None
    if image is None:
        raise ValueError("damaged, cut short or not an image")
    return np.asarray(image)


def _planes(image: Pixels) -> Pixels:
    """channels x height x width"""
    return image[np.newaxis] if image.ndim == 2 else np.ascontiguousarray(image.transpose(2, 0, 1))


class _Ready(NamedTuple):
    datum: bytes
    pixels: Pixels  # as Caffe will see them
    sums: NDArray[np.float64]  # of each channel, without the padding
    area: int


def _prepare(images: Images, i: int, recipe: Recipe) -> _Ready | str:
    """An image as a Datum, or why it cannot be read. Runs in threads: OpenCV lets others go on."""
    try:
        data = images.load(i)
        image = recipe.pixels(data)
        pixels = _planes(recipe.padded(image))
        kept = recipe.encoded and recipe.keeps(data, image)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    if kept:
        assert isinstance(data, bytes)
        content = data
    elif recipe.encoded:
        content = cv2.imencode(".png", recipe.padded(image))[1].tobytes()
    else:
        content = pixels.tobytes()
    channels, height, width = pixels.shape
    label = int(images.labels[i])
    datum = Datum(channels=channels, height=height, width=width, data=content, label=label)
    if recipe.encoded:
        datum.encoded = True
    sums = np.array(cv2.sumElems(image)[:channels])
    return _Ready(datum.SerializeToString(), pixels, sums, image.shape[0] * image.shape[1])


# ------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Written:
    """A database that was made."""

    path: Path
    count: int
    shape: tuple[int, int, int]  # channels, height, width
    classes: tuple[str, ...]
    mean_values: tuple[float, ...]  # of each channel, without the padding
    skipped: tuple[tuple[str, str], ...]  # names of images that could not be read, and why

    def summary(self) -> str:
        """A line or two for a person."""
        known = f"{len(self.classes)} class{'es' * (len(self.classes) != 1)}" if self.classes else "no labels"
        lines = [f"{self.path}: {self.count:,} images of {by_x(self.shape)}, {known}"]
        if self.skipped:
            first = ", ".join(f"{name} ({why})" for name, why in self.skipped[:3])
            more = f", ...; all in {self.path / 'skipped.txt'}" if len(self.skipped) > 3 else ""
            lines.append(f"  left out {len(self.skipped):,} that cannot be read: {first}{more}")
        return "\n".join(lines)

    def transform(self) -> str:
        """What subtracts the mean, ready to be pasted into training and test layers alike."""
        values = " ".join(f"mean_value: {value:.4f}" for value in self.mean_values)
        mean_file = self.path / "mean.binaryproto"
        return f'transform_param {{ {values} }}  # or {{ mean_file: "{mean_file}" }}'


def write_lmdb(
    out: str | Path, images: Images, recipe: Recipe | None = None, order: Labels | None = None, **options: Any
) -> Written:
    """Write one database, of all images as they come or of those in ``order``; options as of write_lmdbs."""
    chosen = np.arange(len(images.names)) if order is None else order
    return write_lmdbs({Path(out): chosen}, images, recipe, **options)[0]


def write_lmdbs(
    parts: Mapping[Path, Labels],
    images: Images,
    recipe: Recipe | None = None,
    *,
    strict: bool = False,
    force: bool = False,
    made: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Write databases, each with the images that ``parts`` names, in that order; all of them or none.

    ``strict`` refuses where an image cannot be read; ``force`` replaces databases that are there; ``made`` is
    kept in about.json; ``progress`` hears how many images are done, of how many.
    """
    total = sum(len(order) for order in parts.values())
    written: list[Written] = []
    numbers = count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(numbers), total)

    with ExitStack() as stack:
        folders = {out: stack.enter_context(_replacing(out, force)) for out in parts}
        for out, order in parts.items():
            try:
                written.append(_write(folders[out], out, images, order, recipe or Recipe(), made or {}, tick))
            except (OSError, lmdb.Error) as error:
                raise RebirthError(f"{out}: {_why(error)}; nothing was written") from None
        skipped = [pair for one in written for pair in one.skipped]
        if strict and skipped:
            raise RebirthError(
                f"{skipped[0][0]}: {skipped[0][1]}; {len(skipped)} of {total} images cannot be read and "
                "nothing was written"
            )
    return written


def _write(
    folder: Path,
    out: Path,
    images: Images,
    order: Labels,
    recipe: Recipe,
    made: Mapping[str, Any],
    tick: Callable[[], None],
) -> Written:
    """Fill ``folder``, which will be ``out``."""
    listed: list[str] = []
    skipped: list[tuple[str, str]] = []
    sums: NDArray[np.float64] = np.zeros(())  # of the channels without their padding, and of all pixels
    area = 0
    mean: NDArray[np.float64] = np.zeros(())
    first = ""
    with _Records(folder) as records:
        prepared = _in_order(lambda i: _prepare(images, int(i), recipe), order)
        for i, ready in zip(order, prepared, strict=True):
            name = images.names[i]
            if isinstance(ready, str):
                skipped.append((name, ready))
            else:
                if not listed:
                    first = name
                    mean = np.zeros(ready.pixels.shape)
                elif ready.pixels.shape != mean.shape:
                    here, there = (by_x(shape) for shape in (mean.shape, ready.pixels.shape))
                    raise RebirthError(
                        f"{first} is {here} and {name} is {there}; Caffe needs one size, give --resize HxW"
                    )
                sums = sums + ready.sums
                area += ready.area
                mean += ready.pixels
                records.add(ready.datum)
                listed.append(f"{name} {images.labels[i]}\n")
            tick()
        if not listed:
            raise RebirthError(
                f"none of {len(order)} images can be read; the first, {skipped[0][0]}: {skipped[0][1]}"
                if skipped
                else "no images to write"
            )
    channels, height, width = mean.shape
    written = Written(
        out, len(listed), (channels, height, width), images.classes, tuple(sums / area), tuple(skipped)
    )
    _save(folder / "list.txt", "".join(listed))
    _describe(folder, written, mean / written.count, {**asdict(recipe), **made})
    return written


def _describe(folder: Path, written: Written, mean: NDArray[np.float64], made: Mapping[str, Any]) -> None:
    """Write what goes with the images."""
    channels, height, width = written.shape
    about = {
        "images": written.count,
        "channels": channels,
        "height": height,
        "width": width,
        "mean_value": [round(value, 4) for value in written.mean_values],
        "skipped": len(written.skipped),
        **made,
    }
    blob = BlobProto(num=1, channels=channels, height=height, width=width, data=mean.ravel().tolist())
    _save(folder / "about.json", json.dumps(about, indent=2) + "\n")
    _save(folder / "labels.txt", "".join(f"{name}\n" for name in written.classes))
    _save(folder / "mean.binaryproto", blob.SerializeToString())
    if written.skipped:
        _save(folder / "skipped.txt", "".join(f"{name}: {why}\n" for name, why in written.skipped))


@contextmanager
def show_progress(what: str = "images") -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, if there is one: hears how many of ``what`` are done, of how many."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        shown = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if done == total or monotonic() > shown + SECONDS_SHOWN:
                bar.update(task, completed=done, total=total)
                shown = monotonic()

        yield progress


class _Records:
    """The Datums of a new database; on disk, all of them, when the ``with`` block ends."""

    def __init__(self, folder: Path) -> None:
        # What is half written is removed whatever happens: only the end needs to reach the disk.
        self.env = lmdb.open(str(folder), map_size=4 * BATCH_BYTES, lock=False, sync=False)
        self.waiting: list[bytes] = []
        self.bytes = 0
        self.count = 0

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            if failed is None:
                self._flush()
                self.env.sync(True)
        finally:
            self.env.close()

    def add(self, datum: bytes) -> None:
        self.waiting.append(datum)
        self.bytes += len(datum)
        if self.bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        while True:
            try:
                with self.env.begin(write=True) as transaction:
                    for number, datum in enumerate(self.waiting, self.count):
                        transaction.put(b"%08d" % number, datum, append=True)
                break
            except lmdb.MapFullError:  # an address range, not bytes on disk: the file is as long as its data
                self.env.set_mapsize(2 * self.env.info()["map_size"])
        self.count += len(self.waiting)
        self.waiting, self.bytes = [], 0


def _in_order(do: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """What ``do`` makes of each item, in threads but in order and only a little ahead."""
    threads = os.cpu_count() or 1
    items = iter(items)
    pending: deque[Future[list[T]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        while chunk := list(islice(items, CHUNK)):
            pending.append(pool.submit(lambda some: [do(item) for item in some], chunk))
            if len(pending) > 2 * threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _replacing(out: Path, force: bool) -> Iterator[Path]:
    """An empty folder that becomes ``out`` when the block ends well and else vanishes.

    It lies beside ``out`` and is locked while its writer lives, so that what a killed run left is known as
    such and removed by the next.
    """
    final = out.resolve()
    if not final.name:
        raise RebirthError(f"{out}: not a name for a database")
    part, old = (final.with_name(final.name + ending) for ending in (".part", ".old"))
    if not final.exists() and old.exists():
        old.rename(final)  # a run was killed between its two renames
    if final.exists():
        if not force:
            raise RebirthError(f"{out}: exists already; choose another name, or --force to replace it")
        _check_ours(final)
    part.mkdir(parents=True, exist_ok=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock), part.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError:
            mine = True  # a file system without locks
        if not mine:
            raise RebirthError(f"{out}: another process is writing it; wait for its end")
        _check_ours(part)
        try:
            for left in part.iterdir():
                left.unlink()
            yield part
            if final.exists():
                _remove(old)
                final.rename(old)
            part.rename(final)
            _remove(old)
            _sync(final.parent)
        except BaseException:
            _remove(part)
            raise
    finally:
        os.close(lock)


def _check_ours(folder: Path) -> None:
    """Refuse to touch what is no database of ours or Caffe's."""
    if not folder.is_dir():
        raise RebirthError(f"{folder}: is a file, not a database; move it away")
    names = {path.name for path in folder.iterdir()}
    if other := names - FILES - {LOCK}:
        raise RebirthError(f"{folder}: holds {min(other)}, so it is not just a database; move it away")


def _remove(folder: Path) -> None:
    if folder.exists():
        _check_ours(folder)
        shutil.rmtree(folder)


def _save(path: Path, content: str | bytes) -> None:
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Let a rename reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: OSError | lmdb.Error) -> str:
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error).rpartition(": ")[2]
    full = {os.strerror(code) for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
    return f"{text}, is the disk full?" if text in full else text  # LMDB calls a cut write an EIO


# ------------------------------------------------------------------------------------------- reading back


class Info(NamedTuple):
    """What a database holds: its first record's size."""

    images: int
    channels: int
    height: int
    width: int


_environments: WeakValueDictionary[tuple[int, int], lmdb.Environment] = WeakValueDictionary()


def _open(path: Path) -> lmdb.Environment:
    """LMDB lets a process open a database only once: its readers share it."""
    status = (path / "data.mdb").stat()
    if not status.st_size:
        raise RebirthError(f"{path}: data.mdb is empty; make the database again")
    key = status.st_dev, status.st_ino
    environment = _environments.get(key)
    if environment is None:
        try:  # nobody writes a finished database: no locks, so that its folder may be read-only
            environment = lmdb.open(str(path), readonly=True, lock=False)
        except lmdb.Error as error:
            raise RebirthError(
                f"{path}: cannot be opened as an LMDB ({str(error).rpartition(': ')[2]})"
            ) from None
        _environments[key] = environment
    return environment


class Lmdb(Sequence[tuple[Pixels, int]]):
    """A database of Datums, in the order in which Caffe reads it: ``image, label = database[i]``, the image
    channels x height x width as Caffe decodes it. A context manager; reads any Caffe's databases."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            made = "tools/make_lmdb.py makes one, tools/fetch_data.py those of prototxts/"
            raise RebirthError(f"{path}: no such database; {made}")
        if not (self.path / "data.mdb").is_file():
            raise RebirthError(
                f"{path}: holds no data.mdb, so it is not an LMDB; tools/make_lmdb.py makes one"
            )
        self._env = _open(self.path)
        info, stat = self._env.info(), self._env.stat()
        if (self.path / "data.mdb").stat().st_size < (info["last_pgno"] + 1) * stat["psize"]:
            raise RebirthError(f"{path}: data.mdb is cut short; copy or make it again")
        self._count = stat["entries"]
        if not self._count:
            raise RebirthError(f"{path}: the database is empty")
        self._keys: list[bytes] = []
        first, _ = next(iter(self))
        self.info = Info(self._count, *first.shape)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Pixels, int]]:
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            for key, value in cursor:
                yield self._read(key, value)

    def __getitem__(self, i: Any) -> Any:
        if not self._keys:
            with self._env.begin() as transaction, transaction.cursor() as cursor:
                self._keys = list(cursor.iternext(keys=True, values=False))
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        key = self._keys[i]
        with self._env.begin() as transaction:
            return self._read(key, transaction.get(key) or b"")

    def _read(self, key: bytes, value: bytes) -> tuple[Pixels, int]:
        where = f"{self.path}: record {key.decode('utf-8', 'replace')}"
        try:
            datum = Datum.FromString(value)
            if datum.encoded:
                return _planes(_decode(datum.data, cv2.IMREAD_UNCHANGED)), datum.label
        except (DecodeError, ValueError) as error:
            raise RebirthError(f"{where}: not an image's Datum ({error})") from None
        shape = datum.channels, datum.height, datum.width
        if datum.float_data:
            raise RebirthError(f"{where}: holds numbers (float_data), not an image of bytes")
        if not datum.data or len(datum.data) != np.prod(shape, dtype=object):
            raise RebirthError(f"{where}: {len(datum.data)} bytes are not an image of {by_x(shape)}")
        return np.frombuffer(datum.data, np.uint8).reshape(shape), datum.label

    def __enter__(self) -> Lmdb:
        return self

    def __exit__(self, *_: object) -> None:
        del self._env


def open_lmdb(path: str | Path) -> Lmdb:
    """Open a database for reading; RebirthError where it is missing, empty, damaged or none."""
    return Lmdb(path)


def lmdb_info(path: str | Path) -> Info:
    """How many images a database holds, and their size."""
    with open_lmdb(path) as database:
        return database.info
