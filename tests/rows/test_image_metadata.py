"""Files lose what they say of who took them, and nothing of the picture; written and read back by Pillow."""

import io

import numpy as np
import pyarrow as pa
import pytest
from image_files import decoded, encoded, picture
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from rows.image_metadata import without_metadata, without_metadata_of


SECRET = b"SECRET"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def private(orientation: int = 1) -> dict:
    """Everything that Pillow writes into a file beside the picture."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "SECRET camera"
    exif[ExifTags.Base.Artist] = "SECRET person"
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSAreaInformation] = b"SECRET place"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "SECRET time"
    return {"exif": exif, "xmp": b"<x:xmpmeta>SECRET</x:xmpmeta>", "icc_profile": PROFILE}


def jpeg(orientation: int = 1, mode: str = "RGB", **settings) -> bytes:
    data = encoded(picture(1, mode), "JPEG", comment=b"SECRET", **private(orientation), **settings)
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0eSECRET caption"
    iptc = b"\xff\xed" + (len(iptc) + 2).to_bytes(2, "big") + iptc
    maker = b"\xff\xe5" + (2 + len(SECRET)).to_bytes(2, "big") + SECRET
    return data[:2] + iptc + maker + b"\xff" + data[2:] + b"a video behind it: SECRET"  # the 0xFF fills up


def png(orientation: int = 1, mode: str = "RGB") -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", "SECRET")
    texts.add_text("Comment", "SECRET" * 200, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", "SECRET")
    settings = private(orientation)
    del settings["xmp"]
    return encoded(picture(1, mode), "PNG", pnginfo=texts, **settings) + SECRET


def webp(orientation: int = 1, mode: str = "RGB", **settings) -> bytes:
    return encoded(picture(1, mode), "WEBP", **private(orientation), **settings) + SECRET


FILES = {
    "jpeg": jpeg,
    "progressive": lambda orientation=1: jpeg(orientation, progressive=True),
    "restarts": lambda orientation=1: jpeg(orientation, restart_marker_blocks=1),
    "grey": lambda orientation=1: jpeg(orientation, "L"),
    "cmyk": lambda orientation=1: jpeg(orientation, "CMYK"),
    "png": png,
    "transparent png": lambda orientation=1: png(orientation, "RGBA"),
    "palette png": lambda orientation=1: png(orientation, "P"),
    "webp": webp,
    "lossless webp": lambda orientation=1: webp(orientation, lossless=True),
    "transparent webp": lambda orientation=1: webp(orientation, "RGBA"),
}


def as_people_see_it(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(decoded(data)))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_said_but_which_side_is_up(name, orientation):
    data = FILES[name](orientation)
    before, result = decoded(data), without_metadata(data)
    assert SECRET in data and before.getexif()[ExifTags.Base.Make] == "SECRET camera"
    after = decoded(result)
    assert SECRET not in result and (after.format, after.mode) == (before.format, before.mode)
    assert dict(after.getexif()) == ({} if orientation == 1 else {ExifTags.Base.Orientation: orientation})
    assert not {"comment", "xmp", "photoshop", "Author", "XML:com.adobe.xmp"} & after.info.keys()
    assert after.info["icc_profile"] == PROFILE
    assert np.array_equal(np.asarray(after), np.asarray(before))  # not encoded again
    assert np.array_equal(as_people_see_it(result), as_people_see_it(data))
    assert without_metadata(result) == result


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_file_that_says_nothing_stays_as_it_is(file_format):
    data = encoded(picture(2), file_format)
    assert without_metadata(data) == data


def test_frames_of_an_animation_stay():
    for file_format in ("PNG", "WEBP"):
        more = {"save_all": True, "append_images": [picture(3), picture(4)], "exif": private()["exif"]}
        data = encoded(picture(2), file_format, **more)
        before, after = decoded(data), decoded(without_metadata(data))
        assert SECRET in data and SECRET not in without_metadata(data) and after.n_frames == 3
        for frame in range(3):
            before.seek(frame)
            after.seek(frame)
            assert np.array_equal(np.asarray(after), np.asarray(before))


@pytest.mark.parametrize("file_format", ["AVIF", "TIFF", "GIF"])
def test_other_formats_become_upright_pngs(file_format):
    settings = {"comment": SECRET} if file_format == "GIF" else {"exif": private(6)["exif"]}
    data = encoded(picture(5), file_format, **settings)
    result = without_metadata(data)
    assert SECRET in data and SECRET not in result
    image = decoded(result)
    assert image.format == "PNG" and not image.info and not image.getexif()
    assert np.array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(decoded(data)).convert("RGB")))


def test_a_second_picture_behind_the_first_goes_with_its_list():
    buffer = io.BytesIO()
    picture(6).save(buffer, "MPO", save_all=True, append_images=[picture(7)], exif=private()["exif"])
    result = without_metadata(buffer.getvalue())
    assert decoded(buffer.getvalue()).format == "MPO" and decoded(result).format == "JPEG"
    assert SECRET not in result and b"MPF" not in result
    assert np.array_equal(np.asarray(decoded(result)), np.asarray(decoded(buffer.getvalue())))


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_a_file_cut_anywhere_says_nothing_or_is_refused(name):
    """Pillow opens some of them; none may end in a loop, or be given back with what it said."""
    data = FILES[name](6)
    for length in range(0, len(data), 7):
        try:
            result = without_metadata(data[:length])
        except Exception:
            continue
        assert SECRET not in result


def test_a_column_of_images():
    images = [jpeg(), None, encoded(picture(1), "PNG")]
    column = pa.array([{"bytes": images[0], "path": "a.jpg"}, None, {"bytes": images[2], "path": None}])
    for given in (column, pa.chunked_array([column[:1], column[1:]])):
        first, second, third = without_metadata_of(given).to_pylist()
        assert first == {"bytes": without_metadata(images[0]), "path": "a.jpg"} and SECRET not in first["bytes"]
        assert second is None and third == {"bytes": images[2], "path": None}
    clean = column[1:]
    assert without_metadata_of(clean) is clean
    with pytest.raises(ValueError, match="the image of row 1 cannot be read"):
        without_metadata_of(pa.array([{"bytes": images[2]}, {"bytes": b"none"}]))
