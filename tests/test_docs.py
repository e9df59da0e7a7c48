"""The pages: links and anchors lead somewhere, the settings are those of the program, no page is lost."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from docs.write_settings import PAGE, page


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards" / "example").glob("*.md")]
)


def anchors_of(path: Path) -> set[str]:
    """The anchors that a code host and the site give a page's headings."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(path: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    inner = [child for token in tokens for child in token.children or ()]
    found = [child.attrGet("href" if child.type == "link_open" else "src") for child in inner]
    return [target for target in found if target]


@pytest.mark.parametrize("name", [path.as_posix() for path in PAGES])
def test_links_lead_somewhere(name):
    for target in links_of(ROOT / name):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("https://", "mailto:")), target
            continue
        file, _, anchor = target.partition("#")
        aim = (ROOT / name).parent / file if file else ROOT / name
        assert aim.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors_of(aim), f"{name}: {target}"


def test_the_settings_page_is_what_the_program_reads():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m docs.write_settings writes it anew"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.relative_to("docs").with_suffix("").as_posix() for path in PAGES if path.parts[0] == "docs"}
    listed = set(re.findall(r"^([\w/]+)$", index, re.MULTILINE))
    linked = {link.removesuffix(".md") for link in re.findall(r"\]\(([\w/]+\.md)\)", index)}
    assert pages - {"index"} == listed == linked


def test_programs_and_tests_that_pages_name_exist():
    """One in backquotes is a promise that it is there; pages name tests by the end of their path."""
    known = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.*") if ".venv" not in path.parts}
    rooms = "tests|trainers|teachers|datasets_scripts|inference|rows|recipes|benchmarks|accelerate_configs"
    for name in PAGES:
        for path, test in re.findall(r"`([\w/]+\.(?:py|yaml))(?:::(test_\w+))?`", (ROOT / name).read_text("utf-8")):
            if test or re.match(f"({rooms})/", path) or path.startswith("test_"):
                files = [known[full] for full in known if f"/{full}".endswith(f"/{path}")]
                assert files, f"{name} names {path}"
                assert not test or any(f"def {test}(" in file.read_text("utf-8") for file in files), f"{name}: {test}"


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
