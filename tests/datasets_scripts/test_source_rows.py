"""From a table's cells to rows: where paths lead, and what a cell of captions may hold."""

import unicodedata
from pathlib import Path

import pytest

from datasets_scripts.source_rows import (
    Columns,
    ImageFolder,
    Table,
    captions_of,
    find_columns,
    is_missing,
    readable_class,
    rows_by_split,
)


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("a cat", ["a cat"]),
        ("None", ["None"]),  # a word
        ("", []), (None, []), (float("nan"), []), ("nan", []), ([], []),
        (["a", "b"], ["a", "b"]),
        ([["a"], ["b", ["c"]]], ["a", "b", "c"]),
        ([{"raw": "a"}, {"raw": "b"}], ["a", "b"]),
        ({"caption": "a"}, ["a"]),
        ('["a", "b"]', ["a", "b"]),  # JSON
        ("['a', \"b's\"]", ["a", "b's"]),  # pandas
        ("['a' \"b's\"\n 'c']", ["a", "b's", "c"]),  # numpy
        ("['a', b'b']", ["['a', b'b']"]), ("['a', nan]", ["['a', nan]"]), ("['a' + 'b']", ["['a' + 'b']"]),
        ("[a cat", ["[a cat"]), ("[1, 2]", ["[1, 2]"]), ("['a', 2]", ["['a', 2]"]), ("[]", ["[]"]),
        ("[__import__('os').getcwd()]", ["[__import__('os').getcwd()]"]),
        (["a", None, ""], ["a"]),
    ],
)  # fmt: skip
def test_captions_of_a_cell(cell, captions):
    assert captions_of(cell, "caption") == captions
    assert is_missing(cell) == (captions == [] and cell != [])


@pytest.mark.parametrize("cell", [7, 1.5, {"de": "a", "en": "b"}, [3], {}, b"a"])
def test_other_cells_are_refused_with_what_they_hold(cell):
    with pytest.raises(ValueError, match="column caption holds .*--caption_column caption.raw"):
        captions_of(cell, "caption")


def test_a_very_long_list_stays_text():
    text = "[" * 5_000_000
    assert captions_of(text, "caption") == [text]
    deep = "[" * 100_000 + "]" * 100_000
    assert captions_of(deep, "caption") == [deep]


@pytest.mark.parametrize(
    ("names", "given", "captions"),
    [
        (["path", "caption"], None, ("caption",)),
        (["path", "Caption"], None, ("Caption",)),
        (["path", "caption_0", "caption_1", "n"], None, ("caption_0", "caption_1")),
        (["path", "caption", "caption_0"], None, ("caption",)),
        (["image_name", "comment_number", "comment"], None, ("comment",)),
        (["path", "en", "de"], ("en", "de"), ("en", "de")),
        (["path", "sentences"], ("sentences.raw",), ("sentences.raw",)),
    ],
)
def test_columns_of_captions_are_found(names, given, captions):
    assert find_columns(names, Columns(captions=given), "a.csv").captions == captions


def test_several_columns_and_what_lies_in_objects():
    cells = {
        "path": "0",
        "en": "a cat",
        "more": [{"raw": "b", "id": 1}, {"raw": "c", "id": 2}],
        "deep": {"x": {"y": "d"}},
    }
    columns = Columns("path", ("en", "more.raw", "deep.x.y", "deep.x.z"))
    (row,) = rows_by_split([Table("t", columns, [{**cells, "path": lambda: b"0"}])]).parts[None]
    assert row.captions == ["a cat", "b", "c", "d"]


def test_rows_without_an_image_are_left_out_by_their_number():
    rows = [{"path": path, "caption": "x"} for path in ("a.jpg", "", None, float("nan"), "b.jpg")]
    found = rows_by_split([Table("t.csv", Columns("path", ("caption",)), rows, images=ImageFolder(Path("/data")))])
    assert [row.image_id for row in found.parts[None]] == ["a.jpg", "b.jpg"]
    assert found.left_out == [f"t.csv, row {i}: there is no image" for i in (2, 3, 4)]


@pytest.mark.parametrize("split", ["Train", "val2017", "TESTING"])
def test_a_column_of_splits_follows_the_same_rule(split):
    rows = [{"path": "a.jpg", "caption": "x", "split": split}]
    table = Table("t", Columns("path", ("caption",)), rows, images=ImageFolder(Path("/data")))
    expected = {"Train": "train", "val2017": "validation", "TESTING": "test"}[split]
    assert list(rows_by_split([table]).parts) == [expected]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").touch()
    for name in ("a.jpg", "sub/b.jpg", "sub/c.jpg", "c.jpg", unicodedata.normalize("NFD", "café.jpg")):
        (root / name).touch()
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "inner.jpg").symlink_to(root / "a.jpg")
    (tmp_path / "linked").symlink_to(root)
    return root


def test_paths_in_the_forms_that_tables_have(folder, tmp_path):
    for root in (folder, tmp_path / "linked"):  # the root itself may be a link
        images = ImageFolder(root, by_name=True)
        for name, place in (
            ("a.jpg", "a.jpg"),
            ("sub\\b.jpg", "sub/b.jpg"),
            ("./sub/b.jpg", "sub/b.jpg"),
            (str(folder / "sub" / "b.jpg"), "sub/b.jpg"),
            (str(tmp_path / "linked" / "a.jpg") if root.is_symlink() else str(folder / "a.jpg"), "a.jpg"),
            (unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg")),
            ("b.jpg", "sub/b.jpg"),  # by its name alone
            ("train2017/b.jpg", "sub/b.jpg"),
            ("inner.jpg", "inner.jpg"),
        ):
            found = images.find(name)
            assert found.relative_to(root).as_posix() == place and found.exists()
        assert not images.find("none.jpg").exists()
        assert images.find("c.jpg") == root / "c.jpg"  # there twice, but named whole


def test_paths_are_relative_to_the_table(folder):
    assert ImageFolder(folder).find("b.jpg", Path("sub")) == folder / "sub" / "b.jpg"
    assert not ImageFolder(folder).find("b.jpg").exists()  # names are not looked for unless told


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "link.jpg", "sub/../../secret.jpg", "..\\secret.jpg", "a\0.jpg", 3.5, ""]
)
def test_no_path_leaves_the_folder(folder, name):
    for by_name in (False, True):
        with pytest.raises(ValueError, match="does not stay in the folder"):
            ImageFolder(folder, by_name).find(name)
    with pytest.raises(ValueError, match="does not stay in the folder"):  # a link that is found by its name
        ImageFolder(folder, by_name=True).find("elsewhere/link.jpg")


@pytest.mark.parametrize("name", ["https://a.b/c.jpg", "http://a.b", "s3://a/b.jpg"])
def test_a_url_is_to_be_downloaded_first(folder, name):
    with pytest.raises(ValueError, match="is a URL: download the images first, with img2dataset"):
        ImageFolder(folder, by_name=True).find(name)


def test_names_of_classes_are_made_readable():
    assert readable_class("golden_retriever") == readable_class("golden-retriever ") == "golden retriever"


def test_images_by_their_name_alone(tmp_path):
    """What tables of COCO, Flickr and others hold: names without folders, without endings, or of another machine."""
    for name in ("a/1.jpg", "b/2.PNG", "b/twice.jpg", "a/twice.jpg", ".cache/4.jpg", "5.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named, bare, own = (
        ImageFolder(tmp_path, by_name=True),
        ImageFolder(tmp_path, bare_names=True),
        ImageFolder(tmp_path),
    )
    found = {"1.jpg": "a/1.jpg", "1": "a/1.jpg", 1: "a/1.jpg", "2": "b/2.PNG", " 1.jpg ": "a/1.jpg", "4.jpg": None}
    found |= {"twice.jpg": None, "5": None}  # which of two? a text is no image
    for name, expected in found.items():
        for folder in (named, bare):
            path = folder.find(name)
            assert path == (tmp_path / (expected or str(name))) and path.exists() == (expected is not None)
        assert not own.find(name).exists()
    for name in ("../pics/1.jpg", "/home/me/pics/1.jpg", "pics/1", "C:\\pics\\1.jpg"):
        assert named.find(name) == tmp_path / "a" / "1.jpg"
        for folder in (bare, own):
            if name[0] in "./":
                with pytest.raises(ValueError, match="does not stay in .*; --images DIR names the folder"):
                    folder.find(name)
            else:
                assert not folder.find(name).exists()
    assert own.find("a/1") == tmp_path / "a" / "1.jpg"


def test_names_of_columns_that_are_taken_only_alone():
    def found(*names):
        columns = find_columns(list(names), Columns(), "t")
        return columns.image, *columns.captions

    assert found("file", "description", "price") == ("file", "description")
    assert found("file", "image", "raw", "caption") == ("image", "caption")
    assert found("image", "caption", "caption_2", "caption_3") == ("image", "caption", "caption_2", "caption_3")
    with pytest.raises(ValueError, match="several columns that may hold captions"):
        found("image", "description", "prompt")
    with pytest.raises(ValueError, match="t has addresses of images, in the column URL: .*img2dataset"):
        found("URL", "TEXT")
    assert found("url", "image", "text") == ("image", "text")
