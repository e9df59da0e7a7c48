"""Image files as they are kept or written anew: upright RGB, what was transparent white, no place of a photo."""

import datasets
import numpy as np
import pytest
from image_files import decoded, encoded, picture
from PIL import ExifTags, Image

from datasets_scripts import arrow_files


def rgb_bytes(data: bytes) -> bytes:
    return arrow_files.rgb_file(data)[0]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_an_upright_rgb_file_keeps_its_bytes(file_format):
    data = encoded(picture(1), file_format)
    assert rgb_bytes(data) == data


@pytest.mark.parametrize("how", ["animation", "transparent", "turned"])
@pytest.mark.parametrize("file_format", ["WEBP", "AVIF", "GIF"])
def test_files_that_show_more_than_an_upright_picture_become_pngs(file_format, how):
    """What is written is what a browser shows first of the file."""
    image, settings = picture(3), {}
    if how == "animation":
        settings = {"save_all": True, "append_images": [picture(4), picture(5)]}
    elif how == "transparent":
        image = image.copy()
        image.putalpha(0)
    elif file_format != "GIF":
        settings = {"exif": Image.Exif()}
        settings["exif"][Image.ExifTags.Base.Orientation] = 6  # turned by a quarter to be upright
    result = decoded(rgb_bytes(encoded(image, file_format, **settings)))
    assert (result.format, result.mode, getattr(result, "n_frames", 1)) == ("PNG", "RGB", 1)
    pixels = np.asarray(result).astype(int)
    expected = np.asarray(picture(3)).astype(int)
    if how == "turned" and file_format != "GIF":
        expected = np.rot90(expected, -1)
    if how == "transparent":
        expected = np.full_like(expected, 255)
    assert pixels.shape == expected.shape and np.abs(pixels - expected).mean() < 6


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_modes_become_rgb_jpegs(mode):
    data = encoded(picture(1, mode), quality=95)
    result = decoded(rgb_bytes(data))
    assert (result.format, result.mode) == ("JPEG", "RGB")
    expected = np.asarray(decoded(data).convert("RGB")).astype(int)
    assert np.abs(np.asarray(result) - expected).mean() < 3
    assert expected.std() > 20


@pytest.mark.parametrize(
    ("mode", "file_format"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "GIF"), ("RGB", "BMP")]
)
def test_other_files_become_pngs_with_the_same_pixels(mode, file_format):
    data = encoded(picture(2, mode), file_format)
    result = decoded(rgb_bytes(data))
    assert (result.format, result.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(result), np.asarray(decoded(data).convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped():
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    result = np.asarray(decoded(rgb_bytes(encoded(Image.fromarray(grey), "PNG"))))
    assert np.array_equal(result, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = orientation
    image = picture(3)
    data = encoded(image, "PNG", exif=exif)
    # What a reader of the dataset would see of the original.
    expected = datasets.Image(mode="RGB").decode_example({"bytes": data, "path": None})
    written = rgb_bytes(data)
    assert np.array_equal(np.asarray(decoded(written)), np.asarray(expected))
    assert decoded(written).size == (image.size if orientation < 5 else image.size[::-1])
    assert (written == encoded(image, "PNG")) == (orientation == 1)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(picture(0))[:300], encoded(picture(0), "PNG")[:2000]])
def test_broken_files_raise(data):
    with pytest.raises((OSError, SyntaxError, ValueError)):
        rgb_bytes(data)


@pytest.mark.parametrize(("file_format", "orientation"), [("JPEG", 1), ("JPEG", 6), ("PNG", 1), ("WEBP", 1)])
def test_where_a_photo_was_taken_is_not_kept(file_format, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 12.0)
    data = encoded(picture(3), file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    assert ExifTags.Base.GPSInfo in decoded(data).getexif()
    stored, _ = arrow_files.rgb_file(data)
    assert ExifTags.Base.GPSInfo not in decoded(stored).getexif() and b"Exif" not in stored
    if orientation == 1:  # and the picture is as it was
        assert np.array_equal(np.asarray(decoded(stored).convert("RGB")), np.asarray(decoded(data).convert("RGB")))
        assert decoded(stored).format == file_format
    else:
        assert decoded(stored).size == picture(3).size[::-1]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_nor_is_a_comment_of_a_jpeg_kept(mode):
    """Pillow writes it into the file that is written anew."""
    data = encoded(picture(3, mode), "JPEG", comment=b"taken by SECRET", xmp=b"SECRET")
    assert b"SECRET" in data and b"SECRET" not in arrow_files.rgb_file(data)[0]
