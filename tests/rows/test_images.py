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
from rows.images import load_rgb
from trainers.streaming import StreamedRetrievalDataset


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
