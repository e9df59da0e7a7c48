"""The clip art: captions, what looks the same, and splits, on SVG files made here."""

import datasets
import numpy as np
import pytest

from datasets_scripts import clipart
from datasets_scripts.clipart import Art
from datasets_scripts.svg_drawing import Drawing


pytest.importorskip("resvg_py")


def file_of(content, title="", description="", keywords=()):
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="100" height="100"><metadata>
        <rdf:RDF xmlns:rdf="r" xmlns:cc="c" xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work><dc:title>{title}</dc:title>
        <dc:description>{description}</dc:description><dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject></cc:Work>
        </rdf:RDF></metadata>{content}</svg>"""


def shape(number):
    """A drawing that looks like no other number's: a bar of its own in each of three directions."""
    generator = np.random.default_rng(number)
    bars = "".join(
        f'<rect x="{x}" y="{y}" width="{30 + a}" height="{8 + b}" fill="rgb({r},{g},{c})"/>'
        for x, y, a, b, r, g, c in generator.integers(0, [60, 80, 30, 30, 200, 200, 200], (4, 7)).tolist()
    )
    return bars


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "svg"
    files = {f"food/thing_{name}": file_of(shape(i), f"Thing {name}") for i, name in enumerate("abcdefghijklmnop")}
    files |= {
        "office/magnifier_01": file_of(shape(50), "Magnifier", "To see better", ["glass", "tool"]),
        "tools/magnifier_01": file_of(shape(50), "Magnifier"),  # in two folders
        # nearly the same
        "tools/lens": file_of(
            shape(50) + '<rect x="45" y="45" width="2" height="2" fill="#ffe"/>', "Lens"
        ),  # nearly the same
        "people/dancer_01": file_of(shape(60), "Dancer"),
        "people/dancer_02": file_of(shape(61), "Dancer"),  # of the same title
        "people/empty": file_of("", "Nobody"),
        "people/broken": "<svg",
    }
    files |= {f"shapes/stars/star_{i}pt05step": file_of(shape(100 + i), "gramastar") for i in range(30)}
    for name, content in files.items():
        path = root / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "link.svg").symlink_to("/etc/passwd")
    return root


def art(name, title="", description="", keywords=()):
    return Art(name, Drawing(b"", title, description, list(keywords)))


@pytest.mark.parametrize(
    ("name", "title", "expected"),
    [
        ("office/magnifying_glass_olivier_01", "Magnifying Glass", "Magnifying Glass"),
        ("fruit/apple", "Clipart by Nicu Buculei - pear", "apple fruit"),  # another file's title
        ("fruit/pear", "Clipart by Nicu Buculei - pear", "pear"),
        ("icons/actions/2uparrow", "Lemon SVG theme", "2uparrow actions"),
        ("symbols/aiga_right_arrow_", "AIGA_Symbol_Signs", "aiga right arrow symbols"),
        ("l_zard", "L&amp;eacute;zard", "l zard"),
        ("pump.kin", "", "pump.kin"),
    ],
)
def test_a_title_is_the_drawings_own_or_its_collections(name, title, expected):
    assert clipart.name_of(art(name, title)) == expected


def test_descriptions_and_keywords_of_a_collection_are_not_a_drawings():
    arts = [
        art(f"a/thing_{i}", f"Thing {i}", "From http://x.org" if i == 0 else "All things", ["a", "b"])
        for i in range(5)
    ]
    arts.append(art("a/pear", "Pear", " A  ripe\npear ", ["fruit", "hash(0x1)", "fruit", "HASH(0x1)"]))
    captions = clipart.captions_of(arts)
    assert captions[:5] == [[f"Thing {i}"] for i in range(5)]
    assert captions[5] == ["Pear", "A ripe pear", "fruit"]
    assert clipart.captions_of([art("a/pear", "Pear", "pear", ["PEAR"])]) == [["Pear"]]


@pytest.mark.parametrize("names", [("Dancer 01", "dancer"), ("Crawfish (B and W)", "crawfish"), ("head_2", "head 11")])
def test_names_that_are_kept_in_one_split(names):
    assert len({clipart.key_of_name(name) for name in names}) == 1


def test_a_name_of_digits_stays():
    assert clipart.key_of_name("42") == "42" != clipart.key_of_name("43")


def test_program(folder, tmp_path, capsys):
    clipart.main(["--folder", str(folder), "--output_dir", str(tmp_path / "clipart")])
    out = capsys.readouterr().out
    assert "53 files: 10 generated stars passed over, 2 cannot be drawn" in out
    assert "3 drawings look like another" in out
    rows = datasets.load_from_disk(tmp_path / "clipart")
    split_of = {row["image_id"]: (split, row) for split, part in rows.items() for row in part}
    assert len(split_of) == 21 + 20 and "link" not in split_of
    assert sum(name.startswith("shapes/stars/") for name in split_of) == clipart.STARS_KEPT
    same = [split_of[name] for name in ("office/magnifier_01", "tools/magnifier_01", "tools/lens")]
    assert len({split for split, _ in same}) == len({row["group_id"] for _, row in same}) == 1
    assert same[0][1]["captions"] == ["Magnifier", "To see better", "glass tool"]
    dancers = [split_of[f"people/dancer_0{i}"] for i in (1, 2)]
    assert dancers[0][0] == dancers[1][0] and dancers[0][1]["group_id"] != dancers[1][1]["group_id"]
    groups = [{row["group_id"] for row in part} for part in rows.values()]
    names = [{clipart.key_of_name(text) for row in part for text in row["captions"]} for part in rows.values()]
    for sets in (groups, names):
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert rows["train"][0]["image"].size == (clipart.SIDE, clipart.SIDE)
    left_out = (tmp_path / "clipart.broken.txt").read_text()
    assert "people/empty: it draws nothing" in left_out and "people/broken: ParseError" in left_out
    card = (tmp_path / "clipart" / "README.md").read_text()
    assert "public domain" in card and str(tmp_path) not in card


def test_the_same_drawings_come_out_again(folder, tmp_path):
    first, second = (clipart.read_folder(folder)[0] for _ in range(2))
    assert first == second


def test_a_folder_without_drawings_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no SVG files; run `apt-get install openclipart-svg`"):
        clipart.read_folder(tmp_path / "missing")
