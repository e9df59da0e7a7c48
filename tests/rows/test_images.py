"""Images of every mode become RGB, and those that a dataset may not name stay unread."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import sys
import types
import zlib

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows
from image_files import encoded, picture
from PIL import Image, ImageFile

from datasets_scripts.arrow_files import rgb_file
from datasets_scripts.opening import open_dataset
from datasets_scripts.teacher_features import _chunks, _undecoded
from rows.images import load_rgb, to_rgb
from trainers.streaming import StreamedRetrievalDataset


def pixels(image):
    seen = to_rgb(image)
    assert seen.mode == "RGB"
    return np.asarray(seen).tolist()


def through_file(image, format, **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    return Image.open(file)


SIXTEEN = np.array([[0, 128, 129, 257, 300, 32768, 65407, 65535]], dtype=np.uint16)
EIGHT = [[[value] * 3 for value in (0, 0, 1, 1, 1, 128, 255, 255)]]  # divided by 257, rounded


@pytest.mark.parametrize("suffix", ["", "B"])
def test_sixteen_bits_are_scaled(suffix):
    array = SIXTEEN.astype(">u2") if suffix else SIXTEEN
    image = Image.frombytes(f"I;16{suffix}", (8, 1), array.tobytes())
    assert pixels(image) == EIGHT
    assert pixels(through_file(Image.fromarray(SIXTEEN), "TIFF")) == EIGHT
    assert pixels(through_file(Image.fromarray(SIXTEEN), "PNG")) == EIGHT


def test_sixteen_bits_of_a_pgm_file():
    file = io.BytesIO(b"P5 8 1 65535\n" + SIXTEEN.astype(">u2").tobytes())
    assert Image.open(file).mode == "I" and pixels(Image.open(file)) == EIGHT
    assert pixels(Image.fromarray(np.array([[-5, 70000]], dtype=np.int32))) == [[[0] * 3, [255] * 3]]


def test_transparent_parts_are_white():
    half = Image.fromarray(np.array([[[0, 100, 200, 0], [0, 100, 200, 255], [0, 100, 200, 51]]], dtype=np.uint8))
    assert pixels(half) == [[[255, 255, 255], [0, 100, 200], [204, 224, 244]]]  # 0.2 x + 0.8 * 255
    assert pixels(Image.fromarray(np.array([[[7, 0], [7, 255]]], dtype=np.uint8), "LA")) == [[[255] * 3, [7] * 3]]
    one_colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert pixels(through_file(one_colour, "PNG", transparency=(1, 2, 3))) == [[[255] * 3, [4, 5, 6]]]
    grey = Image.fromarray(np.array([[9, 8]], dtype=np.uint8))
    assert pixels(through_file(grey, "PNG", transparency=8)) == [[[9] * 3, [255] * 3]]


def test_palettes():
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(through_file(image, "PNG")) == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    for format in ("PNG", "GIF"):
        clear = through_file(image, format, transparency=1)
        assert clear.mode == "P" and pixels(clear) == [[[10, 20, 30], [255] * 3, [70, 80, 90]]]
    bytewise = through_file(image, "PNG", transparency=bytes([255, 0, 255]))
    assert pixels(bytewise) == [[[10, 20, 30], [255] * 3, [70, 80, 90]]]


def test_other_modes():
    assert pixels(Image.fromarray(np.array([[[0, 255, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8), "CMYK")) == [
        [[255, 0, 255], [0, 0, 0]]
    ]
    assert pixels(Image.fromarray(np.array([[True, False]]))) == [[[255] * 3, [0] * 3]]
    assert pixels(Image.fromarray(np.array([[3, 250]], dtype=np.uint8))) == [[[3] * 3, [250] * 3]]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    flat = to_rgb(through_file(noise.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(np.asarray(flat).astype(int) - np.asarray(noise).astype(int)).mean() < 30  # not a negative


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    stored = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1), 7: np.rot90(stored, 2).transpose(1, 0, 2), 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    file = through_file(image, "PNG", exif=exif)
    assert pixels(file) == upright.tolist()
    assert pixels(to_rgb(file)) == upright.tolist()  # once is enough
    assert np.asarray(file).tolist() == stored.tolist()  # the caller's image is left alone


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize(
    "at_least, side", [(None, 1), (9000, 1), (161, 1), (160, 2), (81, 2), (80, 4), (41, 4), (40, 8), (1, 8)]
)
def test_a_jpeg_may_be_decoded_smaller_but_not_too_small(at_least, side, orientation):
    image = picture(0, size=(640, 320))
    exif = Image.Exif()
    if orientation is not None:
        exif[Image.ExifTags.Base.Orientation] = orientation
    data = {"bytes": encoded(image, "JPEG", exif=exif, quality=95), "path": None}
    whole, small = load_rgb(data), load_rgb(data, at_least)
    assert small.size == tuple(-(-length // side) for length in whole.size)
    expected = np.asarray(whole.reduce(side)).astype(int)
    assert np.abs(np.asarray(small) - expected).mean() < 2
    if side == 1:
        assert np.array_equal(np.asarray(small), np.asarray(whole))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF"])
def test_other_files_are_decoded_whole(file_format):
    data = {"bytes": encoded(picture(0), file_format), "path": None}
    assert np.array_equal(np.asarray(load_rgb(data, 8)), np.asarray(load_rgb(data)))


@pytest.mark.parametrize("file_format", ["AVIF", "GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(file_format):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "lime")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    pixels = np.asarray(load_rgb({"bytes": data, "path": None})).astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() < 10


def test_avif_is_read_upright():
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    image = load_rgb({"bytes": encoded(picture(0), "AVIF", exif=exif), "path": None})
    expected = np.rot90(np.asarray(picture(0)).astype(int), -1)
    assert image.size == (64, 96) and np.abs(np.asarray(image) - expected).mean() < 6


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    """The box that an HEIF or AVIF file starts with, and some bytes after it."""
    brands = major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + b"\0\0\0\x08meta avif"


HEIC = [
    ftyp(b"heic", b"mif1", b"heic"),
    ftyp(b"heix"),
    ftyp(b"mif1", b"heic", b"miaf"),
    ftyp(b"mif1"),
    ftyp(b"msf1", b"hevc"),
    ftyp(b"heic"),
]


@pytest.mark.parametrize("data", HEIC)
def test_a_heic_file_says_what_to_install(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "pi_heif", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r'unreadable image: a HEIC file, .*: pip install -e "\.\[heic\]"$'):
        load_rgb({"bytes": data, "path": None})


@pytest.mark.parametrize("major", [b"avif", b"mif1", b"msf1"])
def test_an_avif_file_is_not_taken_for_heic(monkeypatch, major):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    data = encoded(picture(0), "AVIF")
    assert data[4:12] == b"ftypavif"  # and among the compatible brands, as the standard asks
    image = load_rgb({"bytes": data[:8] + major + data[12:], "path": None})
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture(0))).mean() < 6


@pytest.mark.parametrize("data", [b"", b"ftyp", b"\0\0\0\x18ftyp", ftyp(b"isom", b"heic"), ftyp(b"jxl ")])
def test_other_files_are_not_taken_for_heic(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(ValueError, match="unreadable image: of no format that Pillow knows"):
        load_rgb({"bytes": data, "path": None})


class HeifImageFile(ImageFile.ImageFile):
    """As that of pi_heif 1.4: lazy, upright already, its size known before it is decoded, when it may yet change."""

    format = "HEIF"
    size_before, decoded_to, loads = (6, 4), (6, 4), 0

    def _open(self):
        start = self.fp.read(12)
        if start[8:12] not in (b"heic", b"mif1") or b"broken" in self.fp.read():
            raise SyntaxError("Invalid input: No 'ftyp' box")
        self._size, self._mode = type(self).size_before, "RGB"
        self.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\1\0\0\0\0\0\0"
        self.tile = []

    def load(self):
        type(self).loads += 1
        self._size = type(self).decoded_to
        self.load_prepare()
        self.frombytes(bytes([255, 0, 0]) * (self.width * self.height), "raw", ("RGB", 0))
        return super().load()


@pytest.fixture
def pi_heif(monkeypatch):
    """Stands for the package of that name, which is not installed here."""
    module = types.ModuleType("pi_heif")
    module.HeifImageFile = type("HeifImageFile", (HeifImageFile,), {})
    monkeypatch.setitem(sys.modules, "pi_heif", module)
    return module.HeifImageFile


def test_a_heic_file_is_read_where_its_decoder_is_installed(pi_heif):
    image = load_rgb({"bytes": HEIC[0], "path": None})
    assert image.mode == "RGB" and np.asarray(image).tolist() == [[[255, 0, 0]] * 6] * 4
    with pytest.raises(ValueError, match="unreadable image: Invalid input"):
        load_rgb({"bytes": HEIC[0] + b"broken", "path": None})
    # Nothing else is to open them: the formats of Pillow are what they were.
    assert "HEIF" not in Image.OPEN
    file, _ = rgb_file(HEIC[0])
    assert Image.open(io.BytesIO(file)).format == "PNG"


@pytest.mark.parametrize(
    ("before", "after", "message", "loads"),
    [
        ((20_000, 20_000), (1, 1), "20000 x 20000 pixels", 0),
        ((1000, 1), (1000, 1), "expected sides of 1 : 200", 0),
        ((10, 10), (1000, 1), "expected sides of 1 : 200", 1),
    ],
)
def test_the_limits_hold_for_heic_before_it_is_decoded(pi_heif, before, after, message, loads):
    pi_heif.size_before, pi_heif.decoded_to = before, after
    with pytest.raises(ValueError, match=message):
        load_rgb({"bytes": HEIC[0], "path": None})
    assert pi_heif.loads == loads


def test_colour_profiles_of_junk_change_nothing():
    plain = encoded(picture(0), "PNG")
    junk = encoded(picture(0), "PNG", icc_profile=random.Random(0).randbytes(5000))
    images = [load_rgb({"bytes": data, "path": None}) for data in (plain, junk)]
    np.testing.assert_array_equal(*map(np.asarray, images))


@pytest.mark.parametrize("how", ["absolute", "up", "link", "linked folder", "other host", "archive"])
def test_a_dataset_names_no_picture_of_this_machine(tmp_path, how):
    """Its author would choose which are read, shown on the card and pushed with the features."""
    private = tmp_path / "private.png"
    picture(0).save(private)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(private)
    (folder / "linked").symlink_to(tmp_path)
    path = {
        "absolute": private,
        "up": folder / ".." / "private.png",
        "link": folder / "link.png",
        "linked folder": folder / "linked" / "private.png",
        "other host": "http://127.0.0.1:9/x.png",
        "archive": f"zip://x.png::{tmp_path}/private.zip",
    }[how]
    rows = make_rows(4).remove_columns("image").add_column("image", [{"bytes": None, "path": str(path)}] * 4)
    features = datasets.Features({**rows.features, "image": datasets.Image()})
    rows = rows.cast(features)
    table = rows.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, folder / "train.parquet")
    with pytest.raises(ValueError, match="holds no image but the path"):
        open_dataset(str(folder))
    stream = open_dataset(str(folder), streaming=True)["train"]
    with pytest.raises(ValueError, match="holds no image but the path"):
        next(iter(_chunks(_undecoded(stream, "train"), 2)))
    with pytest.raises(ValueError, match="holds no image but the path"):
        next(iter(StreamedRetrievalDataset(stream, 2, None)))


def test_images_in_the_datasets_own_folder_are_read(tmp_path):
    for i in range(3):
        (tmp_path / "train").mkdir(exist_ok=True)
        picture(i).save(tmp_path / "train" / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "captions": ["a"]} for i in range(3)]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(open_dataset(str(tmp_path))["train"]) == 3
    rows[0]["file_name"] = "/etc/hostname"
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises((ValueError, OSError)):
        open_dataset(str(tmp_path))


# 64 x 64, made by pillow-heif 1.8.1 with orientation 6 in its EXIF: blue above red before it is turned.
A_HEIC = (
    "c-mc&JxIe)5XbK|wnnK@{D4xVSW*0<L&3q#pmlJl;2`Lv@in0bP5VfLL?=7wsyI07<fhI}ItYTZn?vVLE=v8P-b<oLkG$Ny-"
    "~Hb`?j8UPTkftXn#h67Mk_008x0G9o!h2sKw#-"
    "&q2z=y2;?rb*({bSevzCG5nwW6_kkxHCnibbkBrfpLo8eVPG*N_V+JyS;ttQkKggtH$wObR33P1;l~70F2=ccmc!j)2XBU|w(XlT"
    "|y};LZvkB0vY|)8?&f=`qk^)646#1oYBDz7znFYq$GG`;T=xJkl>arY3##M<P<WJSNN#B`cch2>wPS*_ZO35knl1I1)V*7*!u`0~"
    "4VLe=Z0zH&KQB|r2UFcL?x(N~}?B8)SV9{Dc={TS`iH>Q7T;qi*_vb4+U$qN{e2DZUyIOzOPBvSw_VdwWX8to%-"
    "FwoyS6YV~7jJ7H6Lk{Bg6ZY+FikrZ80(h}QlVH-`v+}$Ujz"
)


def test_a_heic_file_is_read_by_its_decoder():
    """Turned once, and the colours where they belong; skipped where the extra is not installed."""
    pytest.importorskip("pi_heif")
    data = zlib.decompress(base64.b85decode(A_HEIC))
    image = load_rgb({"bytes": data, "path": None})
    assert image.size == (64, 64) and image.mode == "RGB"
    left, right = np.asarray(image)[32, 8].astype(int), np.asarray(image)[32, 56].astype(int)
    assert np.abs(left - (200, 30, 40)).max() < 25 and np.abs(right - (20, 60, 220)).max() < 25
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(rgb_file(data)[0]))), np.asarray(image))
