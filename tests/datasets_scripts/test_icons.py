"""The icons dataset: its columns, its groups and the promise that no test row has a twin in training."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from importlib import util
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Image, List, Value, concatenate_datasets

from datasets_scripts import icons


@pytest.fixture(scope="session")
def built():
    return icons.build_icons()


@pytest.fixture(scope="session")
def rows(built):
    """One dict per row of all splits, with its split and its pixels' hash."""
    result = []
    for split, part in built.items():
        for row in part:
            pixels = np.asarray(row["image"])
            result.append({**row, "split": split, "pixels": pixels, "hash": hashlib.md5(pixels.tobytes()).hexdigest()})
    return result


def test_columns_and_counts(built):
    assert list(built) == ["train", "validation", "test"]
    for part in built.values():
        assert part.features == {
            "image": Image(),
            "captions": List(Value("string")),
            "image_id": Value("string"),
            "group_id": Value("string"),
            "font": Value("string"),
        }
    counts = {split: part.num_rows for split, part in built.items()}
    total = sum(counts.values())
    assert 15_500 < total < 16_400
    assert 0.78 < counts["train"] / total < 0.82
    assert 0.08 < counts["test"] / total < 0.12
    for part in built.values():
        assert set(part["font"]) == set(icons.FONTS)


def test_images_are_fitted_centred_and_distinct(rows):
    assert len({row["hash"] for row in rows}) == len(rows)
    for row in rows:
        assert row["image"].mode == "L" and row["image"].size == (64, 64), row["image_id"]
        assert row["pixels"].min() < 128, f"{row['image_id']} is blank"
        ys, xs = np.nonzero(row["pixels"] < 255)
        height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
        assert 54 <= max(height, width) <= 56, row["image_id"]
        # As much white on one side as on the other.
        assert abs(xs.min() + xs.max() - 63) <= 1 and abs(ys.min() + ys.max() - 63) <= 1, row["image_id"]


def test_ids_and_captions(rows):
    assert len({row["image_id"] for row in rows}) == len(rows)
    for row in rows:
        font, code_point = row["image_id"].split("/")
        assert font == row["font"] and int(code_point, 16) > 0
        assert row["captions"] and len(set(row["captions"])) == len(row["captions"])
        for caption in row["captions"]:
            assert caption and caption == " ".join(caption.split()) and "-" not in caption and "_" not in caption


def test_every_name_of_the_charmaps_is_a_caption(rows):
    folder = Path(util.find_spec("qtawesome").submodule_search_locations[0]) / "fonts"
    captions = {caption for row in rows for caption in row["captions"]}
    lost = []
    for pattern in ("materialdesignicons6", "phosphor", "remixicon", "fontawesome6-solid", "codicon", "elusive"):
        (path,) = folder.glob(f"{pattern}*charmap*.json")
        lost += [name for name in json.loads(path.read_text()) if name.replace("-", " ") not in captions]
    assert len(lost) <= 2


def test_known_icons(rows):
    by_id = {row["image_id"]: row for row in rows}
    by_caption = defaultdict(list)
    for row in rows:
        for caption in row["captions"]:
            by_caption[caption].append(row)
    (row,) = by_caption["account arrow left outline"]
    assert row["font"] == "material_design"
    # Codicons has one code point under several names.
    assert by_id["codicons/ea60"]["captions"][0] == "add" and len(by_id["codicons/ea60"]["captions"]) > 1
    # Different drawings called "play" are all right answers.
    assert {row["font"] for row in by_caption["play"]} >= {"material_design", "phosphor", "font_awesome", "codicons"}
    assert len({row["group_id"] for row in by_caption["play"]}) == 1
    # A left arrow has its head, so more ink, on the left.
    ink = 255 - next(row for row in by_caption["arrow left"] if row["font"] == "phosphor")["pixels"].astype(int)
    assert ink[:, :32].sum() > 1.2 * ink[:, 32:].sum()


def test_groups_are_the_components_of_shared_captions(rows):
    group_of = {row["image_id"]: row["group_id"] for row in rows}
    smallest = {row["image_id"]: row["image_id"] for row in rows}
    by_caption = defaultdict(list)
    for row in rows:
        for caption in row["captions"]:
            by_caption[caption].append(row["image_id"])
    assert all(len({group_of[image_id] for image_id in ids}) == 1 for ids in by_caption.values())
    # Independent of union-find: the smallest id spreads over shared captions until nothing changes.
    before = None
    while before != smallest:
        before = dict(smallest)
        for ids in by_caption.values():
            low = min(smallest[image_id] for image_id in ids)
            smallest.update(dict.fromkeys(ids, low))
    assert group_of == smallest
    assert 2 <= max(Counter(group_of.values()).values()) <= 40


def test_nothing_of_one_split_stands_in_another(rows):
    keys = {
        "caption": lambda row: row["captions"],
        "stem": lambda row: [icons.stem_of(caption) for caption in row["captions"]],
        "pixels": lambda row: [row["hash"]],
        "group": lambda row: [row["group_id"]],
    }
    for kind, key in keys.items():
        seen = defaultdict(set)
        for row in rows:
            seen[row["split"]].update(key(row))
        for first, second in itertools.combinations(seen, 2):
            assert not seen[first] & seen[second], (kind, first, second)


def test_styles_of_one_phosphor_icon_stand_in_one_split(rows):
    # Without `stem_of`: Phosphor draws every icon in five styles and says so in the last word.
    splits = defaultdict(set)
    for row in rows:
        if row["font"] == "phosphor":
            for caption in row["captions"]:
                words = caption.split()
                splits[" ".join(words[:-1] if words[-1] in ("thin", "light", "bold", "fill") else words)].add(
                    row["split"]
                )
    assert len(splits) == 894
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    ("name", "caption", "stem"),
    [
        ("account-arrow-left-outline", "account arrow left outline", "account arrow left"),
        ("chat-2-line", "chat 2 line", "chat"),
        ("activity-thin", "activity thin", "activity"),
        ("symbol_class", "symbol class", "symbol class"),
        ("-x-", "x", "x"),
        ("solid", "solid", "solid"),
        ("outline-thin", "outline thin", "outline thin"),
        ("7", "7", "7"),
        ("24-hours-fill", "24 hours fill", "24 hours"),
    ],
)
def test_captions_and_stems(name, caption, stem):
    assert icons.caption_of(name) == caption
    assert icons.stem_of(caption) == stem


def test_fingerprint_sees_splits_ids_and_captions_but_not_order(built):
    small = datasets.DatasetDict({split: part.select(range(5)) for split, part in built.items()})
    value = icons.icons_fingerprint(small)
    turned = datasets.DatasetDict({split: small[split].select(range(4, -1, -1)) for split in reversed(list(small))})
    assert icons.icons_fingerprint(turned) == value
    for change in (
        {"train": small["validation"], "validation": small["train"], "test": small["test"]},
        {**small, "test": small["test"].select(range(4))},
        {**small, "test": small["test"].map(lambda row: {"captions": row["captions"] + ["x"]})},
    ):
        assert icons.icons_fingerprint(datasets.DatasetDict(change)) != value


def test_another_process_builds_the_same_in_the_cache(tmp_path, monkeypatch):
    # Two small fonts, for time. Another process has another hash seed, so an order that leans on sets would show.
    fonts = {font: icons.FONTS[font] for font in ("codicons", "elusive")}
    program = f"from datasets_scripts import icons; icons.FONTS = {fonts!r}; icons.load_icons()"
    root = Path(icons.__file__).parents[1]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    (folder,) = (tmp_path / "dsmd_icons").iterdir()
    again = datasets.load_from_disk(folder)
    monkeypatch.setattr(icons, "FONTS", fonts)
    for split, part in icons.build_icons().items():
        assert part.num_rows > 20
        assert part.data.table.equals(again[split].data.table), split


def test_cache_is_built_once_and_the_first_builder_wins(built, tmp_path, monkeypatch, capsys):
    small = datasets.DatasetDict({split: part.select(range(3)) for split, part in built.items()})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    builds = []

    def build_while_another_finishes():
        builds.append(1)
        if len(builds) == 1:
            icons.load_icons()
        return small

    monkeypatch.setattr(icons, "build_icons", build_while_another_finishes)
    loaded = icons.load_icons()
    assert len(builds) == 2
    icons.load_icons()
    assert len(builds) == 2
    assert icons.icons_fingerprint(loaded) == icons.icons_fingerprint(small)
    # No half-written folder stays beside the finished one.
    (folder,) = (tmp_path / "dsmd_icons").iterdir()
    assert icons.QTAWESOME_VERSION in folder.name and str(folder) in capsys.readouterr().out


def test_failed_build_leaves_no_folder(built, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(icons, "build_icons", lambda: built)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", full)
    with pytest.raises(OSError, match="No space"):
        icons.load_icons()
    assert not list((tmp_path / "dsmd_icons").glob("*"))


def test_missing_and_broken_files(tmp_path, monkeypatch):
    monkeypatch.setattr(icons, "_fonts_folder", lambda: tmp_path)
    charmap = tmp_path / "materialdesignicons6-webfont-charmap-6.9.96.json"
    with pytest.raises(FileNotFoundError, match=charmap.name):
        icons.build_icons()
    charmap.write_text('{"abacus": "0xf16e0"}')
    with pytest.raises(FileNotFoundError, match="materialdesignicons6-webfont-6.9.96.ttf"):
        icons.build_icons()
    charmap.write_text('{"abacus": null}')
    with pytest.raises(ValueError, match="abacus.*None"):
        icons.build_icons()
    charmap.write_text("{}")
    with pytest.raises(ValueError, match="no icons"):
        icons.build_icons()


def test_program(built, tmp_path, monkeypatch, capsys):
    small = datasets.DatasetDict({split: part.select(range(50)) for split, part in built.items()})
    monkeypatch.setattr(icons, "build_icons", lambda: small)
    output = tmp_path / "icons"
    icons.main(["--output_dir", str(output)])
    printed = capsys.readouterr().out
    assert "| all | 50 / " in printed
    loaded = datasets.load_from_disk(output)
    assert icons.icons_fingerprint(loaded) == icons.icons_fingerprint(small)
    card = (output / "README.md").read_text()
    for word in ("Apache-2.0", "CC BY 4.0", "OFL", "MIT", "license: other", icons.icons_fingerprint(small)):
        assert word in card
    assert str(tmp_path) not in card
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(SystemExit):
        icons.main(["--output_dir", str(output)])
    assert "not empty" in capsys.readouterr().err


def test_push_keeps_the_files_of_the_splits_in_the_card(built, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", lambda self, repo: pushed.update(repo=repo))
    hub = icons.DatasetCard("---\nconfigs:\n- config_name: default\n---\n")
    monkeypatch.setattr(icons.DatasetCard, "load", lambda repo, **_: hub)
    monkeypatch.setattr(icons.DatasetCard, "push_to_hub", lambda self, repo, **_: pushed.update(card=str(self)))
    small = datasets.DatasetDict(train=built["test"].select(range(9)))
    monkeypatch.setattr(icons, "build_icons", lambda: small)
    icons.main(["--output_dir", str(tmp_path / "icons"), "--push_to_hub", "someone/icons"])
    assert pushed["repo"] == "someone/icons"
    data = icons.DatasetCard(pushed["card"]).data.to_dict()
    assert data["configs"] == [{"config_name": "default"}] and data["license"] == "other"
    assert "Phosphor" in pushed["card"]


def test_summary_adds_up(built):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in icons.icons_table(built).splitlines()]
    table = {
        cells[0]: [[int(n.replace(",", "")) for n in cell.split("/")] for cell in cells[1:]] for cells in lines[2:]
    }
    whole = table.pop("all")
    for column, (split, part) in enumerate(built.items()):
        for kind in (0, 1):
            assert sum(cells[column][kind] for cells in table.values()) == whole[column][kind]
        assert whole[column][0] == built[split].num_rows
        assert whole[column][2] == len(set(part["group_id"]))
    everything = concatenate_datasets(list(built.values()))
    assert sum(cell[1] for cell in whole) == sum(map(len, everything["captions"]))


def test_brands_are_known_by_their_names():
    from datasets_scripts.icon_licences import FONT_NOTICES, is_brand
    from datasets_scripts.icons import FONTS

    brands = [
        "github logo bold",
        "stack overflow fill",
        "home assistant",
        "file word",
        "battery 10 bluetooth",
        "xbox line",
    ]
    assert all(is_brand(["cat", name]) for name in brands)
    assert not any(
        is_brand([name]) for name in ("arrow left line", "home", "keyboard", "stack", "password", "airplane")
    )
    assert FONT_NOTICES.keys() == FONTS.keys()
    assert all(version in FONT_NOTICES[font] for font, (_, version) in FONTS.items() if version != "2.0")
