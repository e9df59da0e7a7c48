"""Cards made of hostile names, captions and licences: text stays text, the YAML stays whole."""

import dataclasses
import re

import datasets
import pytest
import yaml
from conftest import make_rows
from hostile.fuzzing import NASTY, TIMES, fuzz
from huggingface_hub import DatasetCard, ModelCard
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from datasets_scripts import building, feature_shards, teacher_dataset
from inference.export_tables import export_readme
from model_cards import RunRecord, render_card
from model_cards.example import EXAMPLE
from model_cards.tables import SHOWN, as_code, as_text, fenced


ATTACKS = st.sampled_from(
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![x](https://evil.example/track.png)",
        "![x][r]\n\n[r]: https://evil.example/track.png",
        "[x](javascript:alert(1))",
        "a\n---\nlicense: mit\n---\n<b>",
        "---\n<b>x</b>\n---",
        "```\n<script>x</script>\n```",
        "````\n<b>",
        "~~~\n<b>",
        "` <b>` `` <i>",
        "a | b | c",
        "a \\| <b>\\",
        "|---|---|",
        "&lt;script&gt;",
        "<!-- ",
        "</details>",
        "https://evil.example",
        "{{ record }} {% for x in y %}",
        "$\\href{javascript:alert(1)}{x}$",
        "# a heading",
        "\u202e<b>\u2028<i>\x85<u>",
        "\x1b[31m\a\0",
    ]
)
STRANGE = (ATTACKS | NASTY | st.text(max_size=30) | st.text("`|<>[]()!\\*_#-&~$\n {}%", max_size=30)).map(
    lambda text: text.encode("utf-8", "replace").decode()  # as arrow and file systems hold it
)
MARKDOWN = MarkdownIt("commonmark").enable("table")


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?\n)---\n", card, re.S)[1])


def inspect(card: str) -> list[str]:
    """Asserts that a card has no markup but the template's; returns its headings."""
    assert not re.search("[\0-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", card)
    headings, tables = [], []
    tokens = MARKDOWN.parse(card)
    for token, after in zip(tokens, [*tokens[1:], None]):
        if token.type == "heading_open":
            headings.append(after.content)
        if token.type == "html_block":
            assert re.fullmatch(r"</?details>\n?|<details>\n<summary>All settings</summary>\n?", token.content), token
        if token.type == "tr_open":
            tables.append(0)
        if token.type in ("td_open", "th_open"):
            tables[-1] += 1
        for child in token.children or ():
            assert child.type != "html_inline", child
            if child.type == "image":
                assert re.fullmatch(r"assets/\w+\.png", child.attrs["src"]), child
            if child.type == "link_open":
                assert child.attrs["href"].startswith(("https://arxiv.org/", "https://github.com/microsoft/")), child
    # In a row of too many cells the surplus is dropped by renderers: lines must not have them.
    for rows in re.findall(r"(?:^\|.*\|\n)+", card, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows.splitlines()}) == 1, rows
    return headings


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return RunRecord.from_json((EXAMPLE / "assets" / "card.json").read_text())


@pytest.mark.parametrize("times", TIMES)
def test_the_students_card(times, record):
    expected = inspect(render_card(record).split("---\n", 2)[2])

    @fuzz(40 * times, strings=st.lists(STRANGE, min_size=12, max_size=12))
    def check(strings):
        name, data, licence, teacher, revision, key, caption, split, student_licence, tower, setting, output = strings
        facts = dataclasses.replace(
            record.facts,
            dataset_name=data or "x",
            data={split: next(iter(record.facts.data.values()))} if record.facts.data else {},
            splits={"eval": "validation", "test": split or "test"},
            data_license=licence,
            license=student_licence or None,
            towers=[tower],
            teacher={"id": teacher, "revision": revision, key or "x": {key: caption}, "parameters": 1},
            samples=[[caption, licence], [name]],
            usage={"captions": [caption[:SHOWN], name], "output": " ".join(f"0.1  {output}".split())},
        )
        settings = {**record.settings, "run_name": setting}
        changed = {**record.changed, "run_name": setting}
        strange = dataclasses.replace(
            record, name=f"user/{name}", facts=facts, settings=settings, changed=changed, hardware="a CPU"
        )
        card = render_card(strange)
        front = front_matter(card)
        labels = [" ".join(of.replace(",", " ").split()) for of in front["widget"][0]["candidate_labels"].split(", ")]
        assert len(labels) == 2
        of_hub = dataclasses.replace(strange, facts=dataclasses.replace(facts, dataset_name="user/data"))
        (model,) = front_matter(render_card(of_hub))["model-index"]
        assert model["name"].split() == f"user/{name}".split("/")[-1].split()
        for held, given in (
            (front["license"], student_licence or "other"),
            (front["base_model"][0], tower),
            (ModelCard(card).data.to_dict()["base_model"][0], tower),
        ):
            assert held.split() == given.split()  # YAML has an ASCII newline only
        headings = inspect(card.split("\n---\n", 1)[1])
        assert headings[1:] == expected[1:] and len(headings) == len(expected)
        (code,) = re.findall(r"^```python\n(.*?)\n```$", card, re.S | re.M)
        compile(code, "card", "exec")
        (block,) = re.findall(r"^(`{3,})yaml\n(.*?)\n\1$", card, re.S | re.M)
        assert yaml.safe_load(block[1])["run_name"].split() == setting.split()


@pytest.mark.parametrize("times", TIMES)
def test_the_datasets_cards(times, tmp_path):
    rows = datasets.DatasetDict(train=make_rows(4), test=make_rows(4))
    for split, part in rows.items():
        part.to_parquet(feature_shards.shard_file(tmp_path, split, 0))

    @fuzz(50 * times, title=STRANGE, source=STRANGE, licence=STRANGE, teacher=STRANGE)
    def check(title, source, licence, teacher):
        card = str(building.dataset_card(rows, title, f"Made from {as_code(source)}.", licence))
        assert DatasetCard(card).data.pretty_name.split() == title.split()
        assert len(inspect(card.split("\n---\n", 1)[1])) == 2
        described = {"id": teacher, "preprocessing": {teacher: [source]}, "dim": 4}
        files = dict.fromkeys(rows, [0])
        figures = {"test": {"images": 4, "rsum": 1.0}}
        teacher_dataset.write_features_card(
            tmp_path, tmp_path, files, described, figures, source, licence or None, False
        )
        card = (tmp_path / "README.md").read_text()
        assert len(inspect(card.split("\n---\n", 1)[1])) == 2
        assert DatasetCard(card).data.tags
        card = export_readme(title, source or None, "")
        assert len(inspect(card.split("\n---\n", 1)[1])) == 1
        assert (front_matter(card).get("base_model") or "").split() == source.split()


@pytest.mark.parametrize("times", TIMES)
def test_text_and_code_and_blocks(times):
    """Each is read back by a Markdown reader as what went in, on one line."""

    @fuzz(100 * times, text=STRANGE)
    def check(text):
        (token,) = [token for token in MARKDOWN.parse(f"- {as_text(text)} x") if token.type == "inline"]
        assert {child.type for child in token.children} <= {"text"}
        plain = "".join(child.content for child in token.children).removesuffix("x")
        cleaned = re.sub(r"[^\w<>&`*|]", "", " ".join(text.split()))
        assert re.sub(r"[^\w<>&`*|]", "", plain) == re.sub(r"[^\w<>&`*|]", "", cleaned)
        (token,) = [token for token in MARKDOWN.parse(f"a {as_code(text)} b") if token.type == "inline"]
        assert [child.type for child in token.children] == ["text", "code_inline", "text"]
        kinds = [token.type for token in MARKDOWN.parse(fenced(text, "text") + "\n\nb")]
        assert kinds == ["fence", "paragraph_open", "inline", "paragraph_close"]
