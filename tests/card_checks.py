"""What a card is read by, and a run that leaves one."""

import re
from pathlib import Path

import yaml
from test_train import RECIPE

import train


RECALLS = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
FINISHED = ["Results", "Queries and answers", "Use", "Method", "Data", "Training", "Limits", "Citation"]


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def sections(card: str) -> list[str]:
    outside = re.sub(r"^```.*?^```$", "", card.split("---\n", 2)[2], flags=re.S | re.M)
    return re.findall(r"^##+ (.*)$", outside, re.M)


def table(card: str, first: str) -> list[list[str]]:
    """Cells of the table whose first cell begins so."""
    start = card.index(f"| {first}")
    lines = card[start : card.index("\n\n", start)].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|-")]


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, re.S | re.M)


def assert_well_formed(card: str) -> None:
    assert card.count("\n```") % 2 == 0 and card.count("<details>") == card.count("</details>")
    assert "{{" not in card and "{%" not in card and "\n\n\n" not in card and card.endswith("\n")
    assert "None" not in card and "nan" not in card.lower().split() and "More information" not in card
    for rows in re.findall(r"(?:^\|.*\|\n)+", card, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows.splitlines()}) == 1, rows
    for heading in re.finditer(r"^#+ .*$", card, re.M):
        after = card[heading.end() :].lstrip("\n")
        assert after and not after.startswith("## "), heading[0]  # no section is empty


def indexed(card: str) -> dict[tuple[str, str], float]:
    """Figures of the model-index by (split, figure)."""
    (model,) = front_matter(card)["model-index"]
    return {
        (result["dataset"]["split"], metric["type"]): metric["value"]
        for result in model["results"]
        for metric in result["metrics"]
    }


def run(folder: Path, data: Path, *arguments: str, **settings) -> Path:
    recipe = {**RECIPE, "dataset_name": str(data), "output_dir": str(folder), "report_to": "none", **settings}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    train.main(["--config", str(path), *arguments])
    return folder
