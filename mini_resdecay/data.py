"""Image sets as uint8 tensors, seeded batches, and augmentation of whole batches.

    train = load("cifar10", "train")                 # .images [50000, 3, 32, 32] uint8
    batches = Batches(train, size=128, steps=1000, seed=0, augment=flip)
    images, labels = batches[7]                      # depends on (seed, 7) and nothing else

`digits` and `shapes` need no files. The other sets are read from a local folder (argument `root`,
or the variable MINI_RESDECAY_DATA), else fetched with Hugging Face `datasets`. Only parquet, IDX,
JPEG and PNG are read: nothing in a data folder is executed or unpickled.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor

from . import known, require

Augment = Callable[[Tensor, Generator], Tensor]
_Shape = tuple[int, int, int]  # H, W, C


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images uint8 [N, C, H, W] with labels int64 [N], each an index into `classes`.

    Raises ValueError if a shape, a type or a label does not fit.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        x, y, last = self.images, self.labels, len(self.classes) - 1
        require(
            "images, labels",
            f"{x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}",
            (x.dtype, x.ndim, y.dtype, y.ndim) == (torch.uint8, 4, torch.int64, 1)
            and len(x) == len(y) > 0,
            "be uint8 [N, C, H, W], int64 [N]",
        )
        low, high = y.min(), y.max()
        require("labels", f"{low}…{high}", 0 <= low <= high <= last, f"lie in 0…{last}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, n: int, seed: int) -> "ImageSet":
        """The first `n` images of a permutation seeded by `seed`.

        Raises ValueError if n is not in 1…N.
        """
        require("n", n, 1 <= n <= len(self), f"be in 1…{len(self)}")
        kept = torch.randperm(len(self), generator=_generator(seed))[:n]
        return replace(self, images=self.images[kept], labels=self.labels[kept])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over shapes, pixels and labels: what a run was trained on."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(str(list(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


class _Source(NamedTuple):
    hub: str
    column: str  # of the images, in the parquet files
    shape: _Shape
    classes: str = ""
    test: str = "test"  # what the hub calls the split that we test on
    every: int = 1  # of the hub's classes, this one in so many


_FASHION = "T-shirt/top trouser pullover dress coat sandal shirt sneaker bag boot"
_CIFAR = "airplane automobile bird cat deer dog frog horse ship truck"
_SOURCES = {
    "fashion-mnist": _Source("zalando-datasets/fashion_mnist", "image", (28, 28, 1), _FASHION),
    "cifar10": _Source("uoft-cs/cifar10", "img", (32, 32, 3), _CIFAR),
    "tiny-imagenet-100": _Source(
        "zh-plus/tiny-imagenet", "image", (64, 64, 3), test="valid", every=2
    ),
}
_EXTRA = 'pip install "mini-resdecay[hub]"'
# What belongs into the folder of image sets; parquet files may lie one folder deeper.
_LAYOUT = {
    "fashion-mnist": "fashion-mnist/ with its four original files *-ubyte.gz",
    "cifar10": "cifar10/ with train-*.parquet and test-*.parquet",
    "tiny-imagenet-100": "tiny-imagenet-100/ with classes.tsv, train-*.parquet, valid-*.parquet",
    "imagefolder": "split/class/image.jpg or .png",
}
NAMES = ("digits", "shapes", *_LAYOUT)


def load(name: str, split: str, root: str | Path | None = None, *, size: int = 64) -> ImageSet:
    """One split ("train" or "test") of an image set, whole and in memory, in its stored order.

    `root` (default: the variable MINI_RESDECAY_DATA) is the folder that holds `name/`, or that
    folder itself; with neither, the set comes from the Hugging Face hub. `digits` and `shapes`
    ignore it. "imagefolder" is any root/split/class/*.jpg or *.png, scaled and centre-cropped to
    `size` pixels; its split is the folder's name. tiny-imagenet-100 is every second class of
    tiny-imagenet, tested on the validation images. Decoded images are kept under
    MINI_RESDECAY_CACHE (default ~/.cache/mini_resdecay).

    Raises ValueError for an unknown name or split and for damaged files, FileNotFoundError for a
    missing or empty folder, ConnectionError where the hub is needed and out of reach.
    """
    known("name", name, NAMES)
    if name != "imagefolder":
        known("split", split, ("train", "test"))
    if name == "digits":
        return _digits(split)
    if name == "shapes":
        return shapes(10_000, 0)[0] if split == "train" else shapes(2_000, 1)[0]
    root = root or os.environ.get("MINI_RESDECAY_DATA", "")
    if not root and name != "imagefolder":
        return _from_hub(name, split)
    folder = Path(root).expanduser()
    folder = folder / name if (folder / name).is_dir() else folder
    try:
        if not root or not folder.is_dir():
            raise FileNotFoundError("no such folder")
        if name == "imagefolder":
            return _image_folder(split, folder, size)
        return _idx(split, folder) if name == "fashion-mnist" else _parquet(name, split, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"root (or --data, or MINI_RESDECAY_DATA) must be a folder that holds {_LAYOUT[name]}, "
            f"got {str(root)!r}: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name} in {folder}: {error}") from error


# ---- sets that need no files ----


def _digits(split: str) -> ImageSet:
    """scikit-learn's 8×8 digits, 1437 to train and 360 to test, the same share of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    x, y = (torch.from_numpy(part) for part in (parts[::2] if split == "train" else parts[1::2]))
    images = (x * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    return ImageSet(images, y.long(), tuple("0123456789"))


SHAPES = ("circle", "square", "triangle", "cross")


def shapes(n: int, seed: int = 0) -> tuple[ImageSet, dict[str, Tensor]]:
    """`n` RGB images 32×32 of one coloured shape on grey, and the factors that drew each.

    Factors, each [n]: shape (index into SHAPES, equally often), x and y (centre, pixels, 10…22),
    size (half-width, pixels, 4…9), hue (0…1, full saturation), background (grey, 0…0.5).

    Raises ValueError if n < 1.
    """
    require("n", n, n >= 1, "be at least 1")
    generator = _generator(seed)
    x, y, size, hue, grey = torch.rand(5, n, generator=generator)
    kind, grey = torch.randperm(n, generator=generator) % len(SHAPES), grey / 2
    x, y, size = 10 + 12 * x, 10 + 12 * y, 4 + 5 * size
    inside = _coverage(kind, x, y, size)
    # Fully saturated colour: red, green and blue are ramps around the circle of hues.
    colour = (((6 * hue + torch.tensor([[0.0], [4.0], [2.0]])) % 6 - 3).abs() - 1).clamp(0, 1)
    colour, back = rearrange(colour, "c n -> n c 1 1"), rearrange(grey, "n -> n 1 1 1")
    images = (255 * (back + inside * (colour - back))).round().to(torch.uint8)
    factors = dict(shape=kind, x=x, y=y, size=size, hue=hue, background=grey)
    return ImageSet(images, kind, SHAPES), factors


def _coverage(kind: Tensor, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """How much of each pixel lies inside the shape, [n, 1, 32, 32] in [0, 1]."""
    grid, r = torch.arange(32) + 0.5, size.view(-1, 1, 1)
    dx, dy = grid - x.view(-1, 1, 1), grid[:, None] - y.view(-1, 1, 1)
    wide, high = dx.abs(), dy.abs()
    # Distance to the edge in pixels, positive inside; the two arms of a cross overlap.
    arms = torch.minimum(r - wide, r / 3 - high), torch.minimum(r / 3 - wide, r - high)
    circle, square = r - (dx**2 + dy**2).sqrt(), r - torch.maximum(wide, high)
    triangle, cross = torch.minimum(r - dy, (r + dy) / 2 - wide), torch.maximum(*arms)
    distance = torch.stack([circle, square, triangle, cross])[kind, torch.arange(len(kind))]
    return (distance + 0.5).clamp(0, 1)[:, None]


# ---- sets in files ----

_Row = tuple[str, bytes | Path, int]  # place to name if it is damaged, encoded image, label
_Rows = tuple[list[_Row], tuple[str, ...]]  # with the names of all classes
_DAMAGE = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, SyntaxError, zlib.error)


def _idx(split: str, folder: Path) -> ImageSet:
    """Fashion-MNIST from its authors' four files."""
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    require("images", list(images.shape), images.shape[1:] == (28, 28), "be [N, 28, 28]")
    return ImageSet(images[:, None], labels.long(), tuple(_FASHION.split()))


def _read_idx(path: Path) -> Tensor:
    """A gzipped IDX array of bytes: magic 00 00 08 ndim, then each size as 4 big-endian bytes."""
    packed = path.read_bytes()
    try:
        raw = bytearray(gzip.decompress(packed))
        require("it", raw[:3].hex(), raw[:3] == b"\0\0\x08", "be an IDX file of bytes (000008)")
        shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
    except _DAMAGE as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def _parquet(name: str, split: str, folder: Path) -> ImageSet:
    """A set stored as on the hub: <split>-0000i-of-0000n.parquet, in the folder or one below."""
    source = _SOURCES[name]
    pattern = f"{'train' if split == 'train' else source.test}-*.parquet"
    files = sorted([*folder.glob(pattern), *folder.glob(f"*/{pattern}")])
    if not files:
        raise FileNotFoundError(f"no {pattern} in {folder} or a folder inside it")
    whole = files[0].stem.rpartition("-of-")[2]
    if whole.isdigit() and int(whole) != len(files):  # a shard alone is useful, but say so
        warnings.warn(f"{folder} holds {len(files)} of {int(whole)} {pattern}", stacklevel=3)
    classes = tuple(source.classes.split())
    if not classes:  # lines of label, WordNet id, names: the first name
        lines = (folder / "classes.tsv").read_text(encoding="utf-8").splitlines()
        classes = tuple(line.split("\t")[-1].split(",")[0] for line in lines)

    def read() -> _Rows:
        return [row for path in files for row in _read_parquet(path, source.column)], classes

    contents = [sha256(path.read_bytes()) for path in files]
    return _kept(name, split, source.shape, [classes, contents], read)


def _read_parquet(path: Path, column: str) -> list[_Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"parquet files need pyarrow: {_EXTRA}") from error

    try:
        return _rows(parquet.ParquetFile(path).read(["label", column]), column, path.name)
    except (*_DAMAGE, ArrowException) as error:
        raise ValueError(f"{path.name} is damaged or of another set: {error}") from error


def _rows(table: Any, column: str, place: str) -> list[_Row]:
    """The rows of an Arrow table whose image column is a struct {bytes, path}."""
    if table["label"].null_count:
        raise ValueError(f"{table['label'].null_count} labels are missing")
    pairs = zip(table[column].to_pylist(), table["label"].to_pylist(), strict=True)
    return [(f"{place} row {i}", image["bytes"], y) for i, (image, y) in enumerate(pairs)]


def _image_folder(split: str, folder: Path, size: int) -> ImageSet:
    """root/split/class/image; other files are passed over; all splits share one list of classes."""
    require("size", size, size >= 1, "be at least 1")
    found = sorted(folder.glob("[!.]*/[!.]*/[!.]*"))
    files = [path for path in found if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise FileNotFoundError(f"no such image in {folder}")
    splits, classes = (tuple(sorted({path.parts[i] for path in files})) for i in (-3, -2))
    known("split", split, splits)
    files = [path for path in files if path.parts[-3] == split]
    rows: list[_Row] = [(str(p.relative_to(folder)), p, classes.index(p.parts[-2])) for p in files]
    key = [classes, [(path, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]]
    return _kept("imagefolder", split, (size, size, 3), key, lambda: (rows, classes))


def _from_hub(name: str, split: str) -> ImageSet:
    """A set from the Hugging Face hub; once decoded and kept, it needs no network again."""
    source = _SOURCES[name]

    def read() -> _Rows:
        found = _hub_rows(name, source.hub, "train" if split == "train" else source.test)
        rows = _rows(found.with_format("arrow")[:], source.column, source.hub)
        chosen = [(at, x, y // source.every) for at, x, y in rows if y % source.every == 0]
        classes = source.classes.split() or found.features["label"].names
        return chosen, tuple(classes[:: source.every])

    return _kept(name, split, source.shape, [source.hub], read)


def _hub_rows(name: str, hub: str, split: str) -> Any:
    """The rows of a hub set, or a ConnectionError within seconds where the hub is out of reach."""
    try:
        import datasets

        # Alone, `datasets` retries for half a minute; when told it is offline, it does not try.
        if not datasets.config.HF_HUB_OFFLINE:
            with contextlib.suppress(HTTPError):  # a refusal is an answer too
                urlopen(datasets.config.HF_ENDPOINT, timeout=5).close()
        return datasets.load_dataset(hub, split=split)
    except Exception as error:  # whatever the hub's client raises, the remedy is the same
        extra = f"{_EXTRA}, or " if isinstance(error, ImportError) else ""
        raise ConnectionError(
            f"{name} cannot be fetched from the Hugging Face hub ({hub}: {error}); {extra}"
            f"give root, or set MINI_RESDECAY_DATA, to a folder that holds {_LAYOUT[name]}"
        ) from error


# ---- decoding, once ----


def _kept(name: str, split: str, shape: _Shape, key: Any, read: Callable[[], _Rows]) -> ImageSet:
    """What `read` finds, decoded to `shape` [H, W, C]; kept in a file named by `key`."""
    digest = sha256(repr((shape, key)).encode())[:16]
    path = cache_folder() / f"{name}-{split}-{digest}.safetensors"
    with contextlib.suppress(*_DAMAGE, SafetensorError):  # missing, cut or altered
        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
        kept = ImageSet(images, labels, tuple(json.loads(notes["classes"])))
        if notes["seal"] == _seal(kept):
            return kept
    rows, classes = read()
    labels = torch.tensor([label for *_, label in rows])
    kept = ImageSet(_decode(rows, shape), labels, classes)
    notes = {"classes": json.dumps(classes), "seal": _seal(kept)}
    try:
        write_whole(path, save({"images": kept.images, "labels": labels}, notes))
    except OSError as error:  # a full or read-only disk costs the cache, not the data
        warnings.warn(f"{name} is not kept in {path.parent}: {error}", stacklevel=4)
    return kept


def _seal(kept: ImageSet) -> str:
    return sha256(f"{kept.fingerprint} {kept.classes}".encode())


def _decode(rows: list[_Row], shape: _Shape) -> Tensor:
    """JPEG or PNG images, from memory or from files, as uint8 [N, C, H, W]."""
    height, width, channels = shape
    sheet = Image.new("RGB" if channels == 3 else "L", (width, height))  # made once, for speed
    pixels = np.empty((len(rows), *shape), np.uint8)
    for i, (place, source, _) in enumerate(rows):
        try:
            image = _open(source, sheet)
            pixels[i] = np.frombuffer(image.tobytes(), np.uint8).reshape(shape)
        except (*_DAMAGE, Image.DecompressionBombError) as error:
            raise ValueError(f"image {place} is damaged: {error}") from error
    return rearrange(torch.from_numpy(pixels), "n h w c -> n c h w").contiguous()


def _open(source: bytes | Path, sheet: Image.Image) -> Image.Image:
    """One image in the mode and size of `sheet`, drawn on it or new; only files are scaled."""
    mode, size = sheet.mode, sheet.size
    if isinstance(source, bytes) and source[:2] == b"\xff\xd8":
        # Straight to the JPEG decoder: opening a small image costs more than decoding it. What
        # does not decode to this very size is left to the careful path and its messages.
        with contextlib.suppress(ValueError):
            sheet.frombytes(source, "jpeg", (mode, ""))
            return sheet
    stream = source if isinstance(source, Path) else io.BytesIO(source)
    # Only these two formats: for some others Pillow starts outside programs.
    with Image.open(stream, formats=("JPEG", "PNG")) as image:
        require("mode", image.mode, image.mode[0] not in "IF", "have at most 8 bits a channel")
        if isinstance(source, Path):
            image.draft(mode, (2 * size[0], 2 * size[1]))  # a JPEG shrinks while it is decoded
            return ImageOps.fit(image.convert(mode), size)
        require("it", image.size, image.size == size, f"be {size[0]}×{size[1]} pixels")
        return image.convert(mode)


# ---- batches ----


class Batches(Sequence[tuple[Tensor, Tensor]]):
    """`steps` batches of (images uint8 [B, C, H, W], labels [B]), each a function of (seed, i).

    Every epoch is a new permutation without its incomplete last batch. As batch i needs no
    earlier one, a run resumes by starting at i. `augment(images, generator)` gets a generator
    seeded by (seed, i).

    Raises ValueError for size not in 1…N, steps < 0 or seed < 0; IndexError outside 0…steps − 1.
    """

    def __init__(
        self, dataset: ImageSet, size: int, steps: int, seed: int, augment: Augment | None = None
    ) -> None:
        n = len(dataset)
        require("size", size, 1 <= size <= n, f"be in 1…{n} (the set's length)")
        require("steps", steps, steps >= 0, "be at least 0")
        self.dataset, self.size, self.steps = dataset, size, steps
        self.seed, self.augment = seed, augment
        _generator(seed)  # refuses a seed below 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # no slices
        if not 0 <= i < self.steps:
            raise IndexError(f"batch index must be in 0…{self.steps - 1}, got {i}")
        epoch, place = divmod(i, len(self.dataset) // self.size)
        order = _permutation(len(self.dataset), self.seed, epoch)
        chosen = order[place * self.size : (place + 1) * self.size]
        images, labels = self.dataset.images[chosen], self.dataset.labels[chosen]
        if self.augment is not None:
            images = self.augment(images, _generator(self.seed, 1, i))
        return images, labels


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=_generator(seed, 0, epoch))


def _generator(*seeds: int) -> Generator:
    """A generator of its own for every tuple of seeds."""
    require("seed", min(seeds), min(seeds) >= 0, "be at least 0")
    # torch seeds its CPU generator with 32 bits only, so the numbers are mixed, not packed.
    return Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


# ---- augmentation of whole batches ----


def shift(images: Tensor, pixels: int, generator: Generator | None = None) -> Tensor:
    """Each image of [B, C, H, W] moved by −pixels…pixels along both axes, zeros moving in.

    Raises ValueError if pixels is not in 0…min(H, W) − 1.
    """
    batch, _, height, width = images.shape
    require("pixels", pixels, 0 <= pixels < min(height, width), f"be in 0…{min(height, width) - 1}")
    drawn = torch.randint(0, 2 * pixels + 1, (2, batch), generator=generator)
    top, left = _beside(images, drawn)
    # All (2·pixels + 1)² shifted views of every image, as strides and not as copies.
    views = F.pad(images, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return views[torch.arange(batch, device=images.device), :, top, left]


def crop(images: Tensor, smallest: float = 0.2, generator: Generator | None = None) -> Tensor:
    """A random part of each image of uint8 [B, C, H, W], enlarged to the whole by bicubic steps.

    It has `smallest` to all of the area and sides of ratio 3/4 to 4/3, cut at the border.
    Raises ValueError for images that are not uint8, and unless 0 < smallest <= 1.
    Source: the training of arXiv 2111.06377.
    """
    require("images", images.dtype, images.dtype == torch.uint8, "be uint8")
    require("smallest", smallest, 0 < smallest <= 1, "lie in (0, 1]")
    area, shape, x, y = _beside(images, torch.rand(4, len(images), generator=generator))
    area, ratio = smallest + (1 - smallest) * area, (4 / 3) ** (2 * shape - 1)
    width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    zero = torch.zeros_like(x)
    row_x = torch.stack([width, zero, (2 * x - 1) * (1 - width)], dim=1)
    row_y = torch.stack([zero, height, (2 * y - 1) * (1 - height)], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), False)
    part = F.grid_sample(images.float(), grid, "bicubic", "border", align_corners=False)
    return part.round().clamp(0, 255).to(images.dtype)


def flip(images: Tensor, generator: Generator | None = None) -> Tensor:
    """Each image of [B, C, H, W] mirrored left to right with probability 1/2."""
    chosen = _beside(images, torch.rand(len(images), generator=generator)) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def _beside(images: Tensor, drawn: Tensor) -> Tensor:
    """What was drawn on the CPU, where the images are; CUDA alone is safe not to be waited for."""
    return drawn.to(images.device, non_blocking=images.is_cuda)


def to_float(images: Tensor) -> Tensor:
    """uint8 0…255 as float32 in [-1, 1]; float images that are in [-1, 1] already pass.

    Raises ValueError for another type, for NaN or infinity, and for floats outside [-1, 1].
    """
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point() or not (images.abs() <= 1).all():  # NaN compares as False
        raise ValueError(
            "images must be uint8, or floats in [-1, 1] without NaN, got "
            f"{images.dtype} {images.min():.3g}…{images.max():.3g}"
        )
    return images.float()


# ---- files: small tools that the files below share ----


def sha256(data: bytes) -> str:
    """The SHA-256 of some bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: it is on the disk before it takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where decoded images and fetched results are kept: MINI_RESDECAY_CACHE or the default."""
    return Path(os.environ.get("MINI_RESDECAY_CACHE") or "~/.cache/mini_resdecay").expanduser()
