"""The YAML at the top of a student's card, which the Hub reads."""

from __future__ import annotations

import re

from huggingface_hub import EvalResult, ModelCardData

from . import tables
from .record import RunFacts, RunRecord


TAGS = {
    "contrastive": [
        "image-text-retrieval",
        "image-retrieval",
        "text-to-image-retrieval",
        "dual-encoder",
        "custom_code",
    ]
}
TAGS["distillation"] = [*TAGS["contrastive"], "distillation"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def front_matter(record: RunRecord, metrics: dict[str, float], captions: list[str] | None = None) -> str:
    """The fields of the Hub that the run knows.

    Of data that is on the Hub, `model-index` has every recall and rsum of each split, unrounded. Other data has none:
    the Hub refuses a result whose dataset has no id, and an id that is not there is nobody's.

    Args:
        metrics: those to show, with the prefixes of `all_results.json`.
        captions: what `assets/query.png` is compared with, where that picture is beside the card.
    """
    facts = record.facts
    name = facts.dataset_name if HUB_ID.fullmatch(facts.dataset_name or "") else None
    found = [(key, figure) for key in facts.splits for figure in tables.figures(metrics, key)] if name else []
    data = ModelCardData(
        **_license(facts),
        language=facts.languages,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=TAGS[record.method],
        datasets=[name] if name else None,
        base_model=facts.towers or None,
        base_model_relation="finetune" if facts.towers else None,
        widget=_widget(captions) if captions else None,
        metrics=["recall"] if found else None,
        co2_eq_emissions=record.emissions,
        model_name=record.name.split("/")[-1] if found else None,
        eval_results=[
            EvalResult(
                task_type="image-text-retrieval",
                dataset_type=name,
                dataset_name=name,
                dataset_split=facts.splits[key],
                metric_type=figure,
                metric_name=figure.replace("_", " "),
                metric_value=metrics[f"{key}_{figure}"],
            )
            for key, figure in found
        ]
        or None,
    )
    return data.to_yaml()


def licences(facts: RunFacts) -> str:
    """Of a student without a licence of its own those of its data and teacher; "" where it has one."""
    if facts.license is not None or facts.dataset_name is None:
        return ""
    data = tables.as_text(facts.data_license) if facts.data_license else "not stated"
    text = f"No licence was chosen for this student. That of its data is {data}"
    if facts.teacher:
        text += f", that of its teacher {tables.as_text(facts.teacher_license or 'not stated here')}"
    return f"{text}."


def _license(facts: RunFacts) -> dict[str, str | None]:
    if facts.license is None and facts.dataset_name is not None:
        return {"license": "other", "license_name": "of-data-and-teacher" if facts.teacher else "of-data"}
    return {"license": facts.license}


def _widget(captions: list[str]) -> list[dict[str, str]]:
    """The example that the Hub's page offers: the picture beside the card, and labels to tell it by."""
    labels = [" ".join(tables.one_line(caption).replace(",", " ").split()) for caption in captions]  # commas part them
    return [{"src": "assets/query.png", "candidate_labels": ", ".join(labels), "example_title": labels[0]}]
