"""Image sets, batches and augmentation: known answers, damaged files, no network."""

import ast
import colorsys
import gzip
import io
import os
import resource
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mini_resdecay import data, require
from mini_resdecay.data import Batches, ImageSet, flip, load, shapes, shift, to_float

LOCAL = os.environ.get("MINI_RESDECAY_DATA")
real = pytest.mark.skipif(not LOCAL, reason="MINI_RESDECAY_DATA names no folder with real images")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_RESDECAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """One cache for the tests of real sets, so that each is decoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def real_sets(module_cache, monkeypatch):
    monkeypatch.setenv("MINI_RESDECAY_CACHE", str(module_cache))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_parquet(path, images, labels, column="img"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array(rows, kind), "label": pa.array(labels, pa.int64())}
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def cifar(tmp_path):
    """A CIFAR-10 folder of 12 images in PNG, and their pixels [12, 32, 32, 3]."""
    pixels = noise(12, 32, 32, 3)
    file = tmp_path / "sets/cifar10/plain_text/test-00000-of-00001.parquet"
    write_parquet(file, [encoded(image) for image in pixels], [i % 10 for i in range(12)])
    return file, pixels


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def fashion(tmp_path):
    folder = tmp_path / "sets/fashion-mnist"
    folder.mkdir(parents=True)
    pixels, labels = noise(7, 28, 28), np.arange(7, dtype=np.uint8)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(idx(pixels))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return folder, pixels


def small_set(n=20, classes=4):
    images = torch.from_numpy(noise(n, 3, 8, 8))
    return ImageSet(images, torch.arange(n) % classes, tuple("abcd"[:classes]))


# ---- generated sets ----


def test_a_refusal_names_the_argument_what_it_must_be_and_what_it_was():
    require("n", 1, True, "be at least 1")
    with pytest.raises(ValueError, match=r"^n must be at least 1, got 0$"):
        require("n", 0, torch.tensor(False), "be at least 1")


def test_digits_are_scikit_learns_split_by_class():
    from sklearn.datasets import load_digits

    train, test = load("digits", "train"), load("digits", "test")
    assert train.images.shape == (1437, 1, 8, 8) and test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    both = torch.cat([train.images, test.images]).float().flatten(1) * 16 / 255
    theirs = load_digits().data
    assert Counter(map(bytes, both.round().byte().numpy())) == Counter(
        map(bytes, theirs.astype(np.uint8))
    )
    share = train.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert (share - 0.8).abs().max() < 0.01
    assert train.fingerprint == load("digits", "train").fingerprint


def test_shapes_splits_are_fixed_and_differ():
    test = load("shapes", "test")
    assert test.images.shape == (2000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [500] * 4
    assert torch.equal(test.images, load("shapes", "test").images)
    assert not torch.equal(test.images[:100], shapes(100, seed=0)[0].images)


def test_shapes_have_the_area_that_their_factors_say():
    images, factors = shapes(400, seed=3)
    colour = images.images.float().amax(1) / 255  # a saturated colour has one channel at 1
    back = factors["background"].view(-1, 1, 1)
    area = ((colour - back) / (1 - back)).sum((1, 2)) / factors["size"] ** 2
    exact = torch.tensor([torch.pi, 4, 2, 20 / 9])[factors["shape"]]  # in half-widths squared
    assert torch.equal(images.labels, factors["shape"])
    assert ((area - exact).abs() / exact).max() < 0.1


def test_shapes_have_the_colour_and_place_that_their_factors_say():
    images, factors = shapes(200, seed=4)
    for i in range(200):
        x, y, hue, back = (float(factors[k][i]) for k in ("x", "y", "hue", "background"))
        inside = images.images[i, :, int(y), int(x)].float() / 255
        assert inside.tolist() == pytest.approx(colorsys.hsv_to_rgb(hue, 1, 1), abs=0.01)
        assert images.images[i, :, 0, 0].tolist() == pytest.approx([255 * back] * 3, abs=0.51)


def test_seeds_above_32_bits_are_seeds_of_their_own():
    a, b = shapes(8, seed=1)[0], shapes(8, seed=1 + 2**32)[0]
    assert a.fingerprint != b.fingerprint  # torch alone would draw the same


@pytest.mark.parametrize("n", [0, -1])
def test_shapes_need_an_image(n):
    with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
        shapes(n)


# ---- ImageSet ----


def test_fingerprint_changes_with_one_pixel_one_label_and_the_shape():
    one = small_set()
    images, labels = one.images.clone(), one.labels.clone()
    images[7, 1, 2, 3] ^= 1
    labels[7] ^= 1
    others = [
        ImageSet(images, one.labels, one.classes),
        ImageSet(one.images, labels, one.classes),
        ImageSet(one.images.view(20, 3, 4, 16), one.labels, one.classes),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert small_set().fingerprint == one.fingerprint and len(one.fingerprint) == 16


def test_subset_is_seeded_nested_and_keeps_labels_with_images():
    whole = small_set()
    five, nine = whole.subset(5, seed=1), whole.subset(9, seed=1)
    assert torch.equal(nine.images[:5], five.images)
    assert not torch.equal(whole.subset(5, seed=2).images, five.images)
    for image, label in zip(nine.images, nine.labels, strict=True):
        (row,) = [i for i in range(20) if torch.equal(whole.images[i], image)]
        assert whole.labels[row] == label
    assert whole.subset(20, seed=1).labels.bincount().tolist() == [5] * 4


@pytest.mark.parametrize("n", [0, 21])
def test_subset_must_fit(n):
    with pytest.raises(ValueError, match=rf"n must be in 1…20, got {n}"):
        small_set().subset(n, seed=0)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), r"uint8 \[N, C, H, W\].*float32"),
        (torch.zeros(2, 8, 8).byte(), torch.zeros(2).long(), r"got torch.uint8 \[2, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(3).long(), r"int64 \[3\]"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2), r"int64 \[N\].*float32 \[2\]"),
        (torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0).long(), r"got torch.uint8 \[0, 3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.tensor([0, 2]), r"in 0…1, got 0…2"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.tensor([-1, 1]), r"in 0…1, got -1…1"),
    ],
)
def test_wrong_shapes_types_and_labels_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(images, labels, ("a", "b"))


# ---- real sets ----


@real
@pytest.mark.parametrize(("split", "each"), [("train", 6000), ("test", 1000)])
def test_real_fashion_mnist(split, each, real_sets):
    images = load("fashion-mnist", split)
    assert images.images.shape == (10 * each, 1, 28, 28)
    assert images.labels.bincount().tolist() == [each] * 10
    first = {"train": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], "test": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}
    assert images.labels[:10].tolist() == first[split]
    if split == "train":  # the mean and deviation that everybody normalises with
        pixels = images.images.double() / 255
        assert (pixels.mean(), pixels.std()) == pytest.approx((0.2860, 0.3530), abs=1e-4)


@real
@pytest.mark.parametrize(("split", "each"), [("train", 5000), ("test", 1000)])
def test_real_cifar10(split, each, real_sets):
    images = load("cifar10", split, LOCAL)
    assert images.images.shape == (10 * each, 3, 32, 32)
    assert images.labels.bincount().tolist() == [each] * 10
    (file,) = Path(LOCAL).glob(f"cifar10/plain_text/{split}-*.parquet")
    table = pq.read_table(file)
    names = [row["path"].split("-")[0] for row in table["img"].to_pylist()]
    assert [images.classes[label] for label in images.labels] == names
    mean = images.images.double().mean((0, 2, 3)) / 255  # known; ours are JPEG
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.005)


@real
def test_real_tiny_imagenet_test_split(real_sets):
    images = load("tiny-imagenet-100", "test", Path(LOCAL) / "tiny-imagenet-100")
    assert images.images.shape == (5000, 3, 64, 64) and len(images.classes) == 100
    assert images.classes[:2] == ("goldfish", "bullfrog")
    assert images.labels.bincount().tolist() == [50] * 100
    grey = (images.images[:, 0] == images.images[:, 1]).flatten(1).all(1)
    assert 0 < grey.sum() < 500  # some are grey, and came out with three channels


# ---- small files: decoding ----


def test_parquet_pixels_are_exact_and_channels_come_first(cifar, tmp_path):
    _, pixels = cifar
    for root in (tmp_path / "sets", tmp_path / "sets/cifar10"):
        images = load("cifar10", "test", root)
        assert np.array_equal(images.images.permute(0, 2, 3, 1), pixels)
        assert images.images.is_contiguous()
        assert images.labels.tolist() == [*range(10), 0, 1]
        assert images.classes[3] == "cat"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_pixels_are_those_that_pillow_opens(mode, tmp_path):
    smooth = np.add.outer(np.arange(32), np.arange(0, 96, 3))[..., None] + np.array([0, 60, 120])
    rows = []
    for quality in (75, 95):
        buffer = io.BytesIO()
        Image.fromarray(smooth.astype(np.uint8)).convert(mode).save(buffer, "JPEG", quality=quality)
        rows.append(buffer.getvalue())
    write_parquet(tmp_path / "test-0.parquet", rows, [1, 2])
    images = load("cifar10", "test", tmp_path).images.permute(0, 2, 3, 1)
    for row, image in zip(rows, images, strict=True):
        assert np.array_equal(image, Image.open(io.BytesIO(row)).convert("RGB"))


def test_the_variable_names_the_folder(cifar, tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_RESDECAY_DATA", str(tmp_path / "sets"))
    assert len(load("cifar10", "test")) == 12


def test_tiny_imagenet_shards_are_joined_in_order_and_grey_becomes_rgb(tmp_path):
    grey, colour = noise(64, 64), noise(64, 64, 3)
    for shard, image in enumerate((grey, colour)):
        file = tmp_path / f"data/train-0000{shard}-of-00002.parquet"
        write_parquet(file, [encoded(image)], [shard], "image")
    lines = "0\tn01443537\tgoldfish, Carassius auratus\n1\tn01641577\tbullfrog\n"
    (tmp_path / "classes.tsv").write_text(lines)
    images = load("tiny-imagenet-100", "train", tmp_path)
    assert images.classes == ("goldfish", "bullfrog") and images.labels.tolist() == [0, 1]
    assert np.array_equal(images.images[0], np.stack([grey] * 3))
    assert np.array_equal(images.images[1].permute(1, 2, 0), colour)
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    with pytest.warns(UserWarning, match="holds 1 of 2 train"):
        assert len(load("tiny-imagenet-100", "train", tmp_path)) == 1


def test_idx_pixels_are_exact(fashion, tmp_path):
    _, pixels = fashion
    images = load("fashion-mnist", "test", tmp_path / "sets")
    assert np.array_equal(images.images[:, 0], pixels)
    assert images.labels.tolist() == list(range(7)) and images.classes[6] == "shirt"


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_image_folder_scales_crops_the_centre_and_shares_classes(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = (0, 255, 0)  # the centre is green
    picture(tmp_path / "train/owl/a.png", wide)
    picture(tmp_path / "train/ant/b.JPG", np.full((300, 200), 100, np.uint8))
    picture(tmp_path / "train/.hidden/c.png", wide)
    picture(tmp_path / "val/owl/d.jpeg", wide)
    (tmp_path / "train/owl/notes.txt").write_text("not an image")
    train = load("imagefolder", "train", tmp_path, size=16)
    assert train.classes == ("ant", "owl") and train.labels.tolist() == [0, 1]
    assert train.images.shape == (2, 3, 16, 16)
    assert (train.images[0].int() - 100).abs().max() <= 1
    green = torch.tensor([0, 255, 0]).view(3, 1, 1)
    assert (train.images[1, :, :, 2:14].int() - green).abs().max() <= 1
    assert load("imagefolder", "val", tmp_path, size=16).labels.tolist() == [1]


# ---- the cache ----


def forbid_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(data, "_decode", refuse)


def cache_files(tmp_path):
    return list((tmp_path / "cache").iterdir())


def test_second_load_comes_from_the_cache_wherever_the_folder_is(cifar, tmp_path, monkeypatch):
    first = load("cifar10", "test", tmp_path / "sets")
    (tmp_path / "sets").rename(tmp_path / "moved")
    forbid_decoding(monkeypatch)
    second = load("cifar10", "test", tmp_path / "moved")
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    assert (first.classes, first.fingerprint) == (second.classes, second.fingerprint)
    assert [path.suffix for path in cache_files(tmp_path)] == [".safetensors"]  # no drafts left


def test_images_from_the_cache_may_be_changed_without_changing_it(cifar, tmp_path):
    load("cifar10", "test", tmp_path / "sets")
    load("cifar10", "test", tmp_path / "sets").images.zero_()
    assert load("cifar10", "test", tmp_path / "sets").images.any()


def test_a_changed_file_is_decoded_anew(cifar, tmp_path):
    file, pixels = cifar
    load("cifar10", "test", tmp_path / "sets")
    stat = file.stat()
    write_parquet(file, [encoded(image) for image in pixels[::-1]], [0] * 12)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    images = load("cifar10", "test", tmp_path / "sets")
    assert np.array_equal(images.images.permute(0, 2, 3, 1), pixels[::-1])


def test_a_changed_image_in_a_folder_is_decoded_anew(tmp_path):
    file = tmp_path / "train/a/a.png"
    picture(file, np.zeros((8, 8), np.uint8))
    assert load("imagefolder", "train", tmp_path, size=8).images.max() == 0
    picture(file, np.full((8, 8), 9, np.uint8))
    os.utime(file, ns=(1, 1))
    assert load("imagefolder", "train", tmp_path, size=8).images.min() == 9
    assert load("imagefolder", "train", tmp_path, size=4).images.shape == (1, 3, 4, 4)


def flip_a_pixel(raw):
    return raw[:-1] + bytes([raw[-1] ^ 1])


def rename_a_class(raw):
    assert raw.count(b"truck") == 1
    return raw.replace(b"truck", b"trunk")


@pytest.mark.parametrize(
    "damage",
    [flip_a_pixel, rename_a_class, lambda raw: raw[:-5], lambda _: b"", lambda raw: b"x" * 99],
)
def test_a_damaged_cache_is_rebuilt(cifar, tmp_path, damage, monkeypatch):
    first = load("cifar10", "test", tmp_path / "sets")
    (file,) = cache_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = load("cifar10", "test", tmp_path / "sets")
    assert again.fingerprint == first.fingerprint and again.classes == first.classes
    assert len(file.read_bytes()) == len(whole)
    forbid_decoding(monkeypatch)
    load("cifar10", "test", tmp_path / "sets")


def test_a_cache_folder_that_cannot_be_made_is_only_a_warning(cifar, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINI_RESDECAY_CACHE", str(tmp_path / "file/cache"))
    with pytest.warns(UserWarning, match="cifar10 is not kept in"):
        assert len(load("cifar10", "test", tmp_path / "sets")) == 12


def test_a_full_disk_is_only_a_warning_and_leaves_nothing(cifar, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow further
    try:
        with pytest.warns(UserWarning, match="cifar10 is not kept in"):
            images = load("cifar10", "test", tmp_path / "sets")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(images) == 12 and cache_files(tmp_path) == []


# ---- bad input ----


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match='one of digits, shapes, fashion-mnist, .*got "zzz"$'):
        load("zzz", "train")
    with pytest.raises(ValueError, match='got "cifar-10"; did you mean "cifar10"\\?$'):
        load("cifar-10", "train")


@pytest.mark.parametrize("name", ["digits", "shapes", "cifar10", "fashion-mnist"])
def test_an_unknown_split(name, tmp_path):
    with pytest.raises(ValueError, match='split must be one of train, test, got "validation"'):
        load(name, "validation", tmp_path)


def test_root_must_be_a_folder(tmp_path, monkeypatch):
    told = r"root \(or --data, or MINI_RESDECAY_DATA\).*cifar10/ with train-\*.parquet.*nowhere"
    with pytest.raises(FileNotFoundError, match=told):
        load("cifar10", "test", tmp_path / "nowhere")
    monkeypatch.delenv("MINI_RESDECAY_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="root .* holds split/class/image.jpg .*, got ''"):
        load("imagefolder", "train")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "cifar10",
            r"cifar10/ with train-\*.parquet and test-\*.parquet, got .*no test-\*.parquet",
        ),
        ("tiny-imagenet-100", r"with classes.tsv, .*valid-\*.parquet, got .*no valid-\*.parquet"),
        ("fashion-mnist", r"four original files \*-ubyte.gz, got .*t10k-images-idx3-ubyte.gz"),
        ("imagefolder", "split/class/image.jpg or .png, got .*no such image"),
    ],
)
def test_an_empty_folder_is_told_what_belongs_there(name, wanted, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"MINI_RESDECAY_DATA.* must be .*{wanted}") as told:
        load(name, "test", tmp_path)
    assert str(tmp_path) in str(told.value)


def test_another_set_in_the_folder_is_not_taken_for_it(cifar, tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-imagenet-100"):
        load("tiny-imagenet-100", "test", tmp_path / "sets")
    write_parquet(tmp_path / "other/test-0.parquet", [encoded(noise(32, 32, 3))], [0], "image")
    with pytest.raises(ValueError, match="test-0.parquet is damaged or of another set.*img"):
        load("cifar10", "test", tmp_path / "other")


def test_tiny_imagenet_without_its_classes(tmp_path):
    write_parquet(tmp_path / "valid-0.parquet", [encoded(noise(64, 64, 3))], [0], "image")
    with pytest.raises(FileNotFoundError, match="holds tiny-.*No such file.*classes.tsv"):
        load("tiny-imagenet-100", "test", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 500, -9])
def test_a_cut_parquet_file_is_named(cifar, tmp_path, keep):
    file, _ = cifar
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cifar10 in .*test-00000-of-00001.parquet is damaged"):
        load("cifar10", "test", tmp_path / "sets")


GOOD = encoded(noise(32, 32, 3))
JPEG = encoded(noise(32, 32, 3), "JPEG")


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (GOOD[:700], 0, "image test-0.parquet row 1 is damaged"),
        (JPEG[:-200], 0, "image test-0.parquet row 1 is damaged: .*truncated"),
        (JPEG[:2], 0, "row 1 is damaged: cannot identify"),
        (encoded(noise(16, 32, 3), "JPEG"), 0, r"it must be 32×32 pixels, got \(32, 16\)"),
        (encoded(noise(64, 64, 3), "JPEG"), 0, r"it must be 32×32 pixels, got \(64, 64\)"),
        (b"", 0, "row 1 is damaged: cannot identify"),
        (None, 0, "row 1 is damaged"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n",
            0,
            "row 1 is damaged: cannot iden",
        ),
        (encoded(noise(16, 32, 3)), 0, r"row 1 .*it must be 32×32 pixels, got \(32, 16\)"),
        (
            encoded(noise(32, 32).astype(np.uint16)),
            0,
            "mode must have at most 8 bits a channel, got I;16",
        ),
        (GOOD, 10, r"labels must lie in 0…9, got 0…10"),
        (GOOD, None, "test-0.parquet .*1 labels are missing"),
    ],
)
def test_a_bad_row_is_named(image, label, message, tmp_path):
    write_parquet(tmp_path / "test-0.parquet", [GOOD, image], [0, label])
    with pytest.raises(ValueError, match=message):
        load("cifar10", "test", tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:60], "images-idx3-ubyte.gz is damaged"),
        (lambda raw: b"", "images-idx3-ubyte.gz is damaged"),
        (lambda raw: raw[:40] + b"\x00\x00\x00\x00" + raw[44:], "images-idx3-ubyte.gz is damaged"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "images-idx3-ubyte.gz is damaged"),
        (
            lambda raw: gzip.compress(b"\0\0\x0d\x03" + bytes(40)),
            "it must be an IDX file of bytes .*, got 00000d",
        ),
        (lambda raw: gzip.compress(b"\0\0\x08"), "images-idx3-ubyte.gz is damaged"),
        (lambda raw: idx(noise(7, 28, 27)), r"must be \[N, 28, 28\], got \[7, 28, 27\]"),
        (lambda raw: idx(noise(6, 28, 28)), r"got torch.uint8 \[6, 1, 28, 28\] and .* \[7\]"),
    ],
)
def test_damaged_idx_files(fashion, tmp_path, damage, message):
    file = fashion[0] / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"fashion-mnist in .*{message}"):
        load("fashion-mnist", "test", tmp_path / "sets")


def test_image_folder_names_the_broken_image_and_the_splits(tmp_path):
    picture(tmp_path / "train/a/good.png", noise(8, 8, 3))
    (tmp_path / "train/a/z.jpg").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"image train/a/z.jpg is damaged"):
        load("imagefolder", "train", tmp_path)
    with pytest.raises(ValueError, match='split must be one of train, got "test"'):
        load("imagefolder", "test", tmp_path)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load("imagefolder", "train", tmp_path, size=0)


def test_nothing_is_unpickled_or_run():
    tree = ast.parse(Path(data.__file__).read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} | {getattr(node, "module", "")}
        if isinstance(node, ast.keyword):
            names.add(node.arg)
            assert node.arg != "allow_pickle"
    banned = {
        "pickle",
        "exec",
        "eval",
        "trust_remote_code",
        "subprocess",
        "importlib",
        "allow_pickle",
    }
    assert not names & banned
    assert "torch.load" not in ast.unparse(tree)
    assert not any(name and name.startswith("mini_resdecay") for name in names)


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch):
    """`datasets` with a hub that answers from memory; what it was asked is in .asked."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv("MINI_RESDECAY_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    asked = []

    def answer(column, images, labels, names):
        features = {column: datasets.Image(), "label": datasets.ClassLabel(names=names)}
        rows = {column: [{"bytes": image, "path": None} for image in images], "label": labels}
        rows = datasets.Dataset.from_dict(rows, features=datasets.Features(features))

        def load_dataset(name, split):
            asked.append((name, split))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


def test_hub_tiny_imagenet_keeps_every_second_class(hub):
    pixels = noise(4, 64, 64, 3)
    names = [f"n{i:08}" for i in range(200)]
    asked = hub("image", [encoded(image) for image in pixels], [0, 1, 198, 4], names)
    images = load("tiny-imagenet-100", "test")
    assert asked == [("zh-plus/tiny-imagenet", "valid")]
    assert images.labels.tolist() == [0, 99, 2]
    assert len(images.classes) == 100 and images.classes[99] == "n00000198"
    assert np.array_equal(images.images.permute(0, 2, 3, 1), pixels[[0, 2, 3]])
    load("tiny-imagenet-100", "test")
    assert len(asked) == 1  # the second load needs no network


@pytest.mark.parametrize(
    ("name", "column", "shape", "address"),
    [
        ("cifar10", "img", (3, 32, 32, 3), "uoft-cs/cifar10"),
        ("fashion-mnist", "image", (3, 28, 28), "zalando-datasets/fashion_mnist"),
    ],
)
def test_hub_sets_equal_local_ones(hub, name, column, shape, address):
    pixels = noise(*shape)
    asked = hub(column, [encoded(image) for image in pixels], [9, 0, 3], list("abcdefghij"))
    images = load(name, "train")
    assert asked == [(address, "train")] and images.labels.tolist() == [9, 0, 3]
    channels_first = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(images.images, channels_first)


def test_no_network_says_what_to_set_without_retrying(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv("MINI_RESDECAY_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # refuses at once
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(a))
    with pytest.raises(ConnectionError, match="cifar10 cannot be fetched .*MINI_RESDECAY_DATA"):
        load("cifar10", "train")
    assert asked == []


def test_offline_mode_says_what_to_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.delenv("MINI_RESDECAY_DATA", raising=False)
    for settings_of in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(settings_of, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="uoft-cs/cifar10.*give root.*MINI_RESDECAY_DATA"):
        load("cifar10", "train")


# ---- batches ----


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 2**40), st.randoms())
def test_batches_are_a_function_of_seed_and_index(size, steps, seed, shuffle):
    def noisy(images, generator):
        return images ^ torch.randint(0, 256, images.shape, generator=generator).byte()

    one = Batches(small_set(), size, steps, seed, noisy)
    other = Batches(small_set(), size, steps, seed, noisy)
    assert len(one) == len(list(one)) == steps
    order = list(range(steps))
    shuffle.shuffle(order)
    shuffled = {i: other[i] for i in order}
    for i in range(steps):
        for a, b in zip(one[i], shuffled[i], strict=True):
            assert torch.equal(a, b)


def test_batches_resume_in_the_middle_of_an_epoch():
    def augment(images, generator):
        return flip(shift(images, 2, generator), generator)

    whole = list(Batches(small_set(), 6, steps=10, seed=5, augment=augment))
    resumed = Batches(small_set(), 6, steps=10, seed=5, augment=augment)
    for i in range(4, 10):
        assert torch.equal(whole[i][0], resumed[i][0]) and torch.equal(whole[i][1], resumed[i][1])


def test_every_epoch_is_a_new_permutation_without_the_incomplete_batch():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    numbered = ImageSet(images, torch.arange(20) % 2, ("even", "odd"))
    batches = Batches(numbered, 6, steps=9, seed=0)
    seen = [x.flatten().tolist() for x, _ in batches]
    epochs = [sum(seen[start : start + 3], []) for start in (0, 3, 6)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(torch.equal(x.flatten() % 2, y.byte()) for x, y in batches)
    assert [x.flatten().tolist() for x, _ in Batches(numbered, 6, 9, seed=1)] != seen


def test_augmentation_differs_from_step_to_step():
    def draw(images, generator):
        return torch.rand(len(images), generator=generator)

    batches = Batches(small_set(), 20, steps=8, seed=0, augment=draw)
    assert len({tuple(x.tolist()) for x, _ in batches}) == 8


@pytest.mark.parametrize("i", [-1, 5, 99])
def test_batch_index_outside(i):
    with pytest.raises(IndexError, match=f"in 0…4, got {i}"):
        Batches(small_set(), 4, steps=5, seed=0)[i]


@pytest.mark.parametrize(
    ("size", "steps", "seed", "message"),
    [
        (21, 1, 0, r"size must be in 1…20 .*got 21"),
        (0, 1, 0, r"size must be in 1…20 .*got 0"),
        (4, -1, 0, "steps must be at least 0, got -1"),
        (4, 1, -2, "seed must be at least 0, got -2"),
    ],
)
def test_batches_refuse(size, steps, seed, message):
    with pytest.raises(ValueError, match=message):
        Batches(small_set(), size, steps, seed)


# ---- augmentation ----


def naive_shift(image, down, right):
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


def test_shift_moves_each_image_by_one_offset_and_zeros_move_in():
    images = torch.from_numpy(noise(300, 3, 5, 6)) | 1  # no zero of its own
    moved = shift(images, 1, generator())
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    counts = Counter()
    for image, result in zip(images, moved, strict=True):
        (offset,) = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if torch.equal(naive_shift(image, down, right), result)
        ]
        counts[offset] += 1
    assert len(counts) == 9 and min(counts.values()) > 300 / 9 / 2


def test_shift_is_seeded_and_zero_pixels_change_nothing():
    images = torch.from_numpy(noise(16, 3, 8, 8))
    assert torch.equal(shift(images, 3, generator(1)), shift(images, 3, generator(1)))
    assert not torch.equal(shift(images, 3, generator(1)), shift(images, 3, generator(2)))
    assert torch.equal(shift(images, 0, generator()), images)
    assert shift(to_float(images), 2, generator()).dtype == torch.float32


@pytest.mark.parametrize("pixels", [-1, 8])
def test_shift_refuses(pixels):
    with pytest.raises(ValueError, match=f"pixels must be in 0…7, got {pixels}"):
        shift(torch.zeros(2, 3, 8, 9), pixels, generator())


def test_crop_enlarges_a_part_of_each_image():
    columns = torch.arange(0, 256, 8, dtype=torch.uint8)  # a ramp of slope 8 from left to right
    images = torch.stack([columns.expand(32, 32), columns.expand(32, 32).T]).expand(200, 2, 32, 32)
    found = data.crop(images, generator=generator())
    assert found.dtype == torch.uint8 and found.shape == images.shape
    across, down = found[:, 0].float(), found[:, 1].float()
    assert (across.std(1) < 1).all() and (down.std(2) < 1).all()  # nothing is turned or sheared
    width, height = (x.mean(d).diff()[:, 8:-8].mean(1) / 8 for x, d in ((across, 1), (down, 2)))
    assert (width < 1.02).all() and (height < 1.02).all()
    area = width * height
    assert 0.18 < area.min() < 0.3 and area.max() > 0.9
    ratio = width / height
    assert ratio.min() > 0.72 and ratio.max() < 1.38
    assert across[:, :, 0].min() < 20 and across[:, :, -1].max() > 230  # parts reach both borders


def test_crop_is_seeded_and_leaves_a_flat_image_as_it_is():
    images = torch.from_numpy(noise(16, 3, 8, 8))
    assert torch.equal(data.crop(images, 0.5, generator(1)), data.crop(images, 0.5, generator(1)))
    flat = torch.full((4, 1, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(data.crop(flat, generator=generator()), flat)


def test_crop_refuses():
    for smallest in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"smallest must lie in \(0, 1\], got {smallest}"):
            data.crop(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), smallest)
    with pytest.raises(ValueError, match="images must be uint8, got torch.float32"):
        data.crop(torch.zeros(2, 3, 8, 8))


@given(st.integers(0, 2**31), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_flip_is_an_involution_of_whole_images(seed, batch):
    images = torch.from_numpy(noise(batch, 3, 4, 5, seed=seed))
    flipped = flip(images, generator(seed))
    assert torch.equal(flip(flipped, generator(seed)), images)
    for image, result in zip(images, flipped, strict=True):
        assert torch.equal(result, image) or torch.equal(result, image[:, :, [4, 3, 2, 1, 0]])


def test_augmentation_runs_where_the_images_are_and_reads_no_value():
    """Images without values, as if on a GPU: to read one, or to mix devices, would fail."""
    images, drawn = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta"), generator()
    found = (data.crop(images, generator=drawn), flip(images, drawn), shift(images, 2, drawn))
    for out in found:
        assert (out.device.type, out.dtype, out.shape) == ("meta", torch.uint8, images.shape)
    with pytest.raises(RuntimeError):
        images.max().item()
    with pytest.raises(RuntimeError):
        images + torch.ones(4, 3, 8, 8)


def test_flip_mirrors_half_of_the_images():
    images = torch.from_numpy(noise(1000, 1, 2, 4))
    same = (flip(images, generator()) == images).flatten(1).all(1).float().mean()
    assert 0.45 < same < 0.55


def test_to_float_covers_minus_one_to_one():
    values = to_float(torch.tensor([0, 51, 204, 255], dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([-1, -0.6, 0.6, 1], abs=1e-7)
    assert torch.equal(to_float(values), values)
    assert to_float(values.double()).dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.tensor([0.5, float("nan")]), r"without NaN, got torch.float32 nan…nan"),
        (torch.tensor([0.5, float("inf")]), r"in \[-1, 1\].*float32 0.5…inf"),
        (torch.tensor([0.0, 255.0]), r"in \[-1, 1\].*float32 0…255"),
        (torch.tensor([0, 255]), "uint8, or floats .*got torch.int64"),
    ],
)
def test_to_float_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        to_float(images)


@pytest.mark.parametrize("missing", ["datasets", "pyarrow"])
def test_without_an_extra_the_error_says_what_to_install(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("MINI_RESDECAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINI_RESDECAY_DATA", raising=False)
    root = None
    if missing == "pyarrow":
        root = tmp_path / "cifar10"
        root.mkdir()
        (root / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises((ImportError, ConnectionError), match=r'pip install "mini-resdecay\[hub\]"'):
        load("cifar10", "train", root)
