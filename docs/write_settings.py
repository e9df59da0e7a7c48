"""Writes docs/reference/settings.md from the dataclasses that train.py reads: `python -m docs.write_settings`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path

from transformers import TrainingArguments

from datasets_scripts.data_loading import DataArguments
from trainers import DSMDTrainingArguments, RetrievalTrainingArguments
from trainers.student_arguments import StudentArguments


PAGE = Path(__file__).parent / "reference" / "settings.md"
HEAD = """# Settings of train.py

Written by `python -m docs.write_settings`, from the dataclasses that `train.py` reads. Each is a line of a recipe
(`vision_layers: 6`) and an option (`--vision_layers 6`), which goes before the recipe. `None` unsets it. Every setting
of [TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer) is one too.
"""


def table(settings: type, without: type | None = None) -> str:
    """The fields of a dataclass as a Markdown table: name, default and help.

    Args:
        settings: the dataclass.
        without: a class of which it is a child; fields that this one has with the same default are left out.
    """
    known = {} if without is None else {setting.name: _default(setting) for setting in fields(without)}
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for setting in fields(settings):
        default = _default(setting)
        if setting.name in known and known[setting.name] == default:
            continue
        help_text = setting.metadata.get("help", "").replace("|", "\\|")
        choices = setting.metadata.get("choices")
        one_of = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        lines.append(f"| `{setting.name}` | {default} | {help_text}{one_of} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD,
            "## Data\n",
            table(DataArguments),
            "\n## Student\n",
            table(StudentArguments),
            "\n## Method\n",
            "Without a teacher (`--method contrastive`) there are none of these.\n",
            table(DSMDTrainingArguments, without=RetrievalTrainingArguments),
            "\n## Training\n",
            "What every training of a dual encoder adds to `TrainingArguments`, and where its default is another.\n",
            table(RetrievalTrainingArguments, without=TrainingArguments),
            "",
        ]
    )


def _default(setting) -> str:
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    default = default.value if isinstance(default, Enum) else default
    if default is None or default is MISSING:
        return ""
    if isinstance(default, (list, tuple)):
        return f"`{' '.join(map(str, default))}`" if default else ""
    return f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
