"""Fills the card's template from the record of a run; what was not measured or set is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from modeling_dsmd.configuration_dsmd import OLDEST_TRANSFORMERS
from rows.images import UPRIGHT_ON_WHITE

from . import tables
from .front_matter import front_matter, licences
from .record import RunRecord


GRIDS = {"text_to_image.png": "Captions and the images found", "image_to_text.png": "Images and the captions found"}


def render_card(record: RunRecord) -> str:
    """The whole `README.md` of a student."""
    facts, metrics = record.facts, record.metrics
    usage = facts.usage if facts.usage and "query.png" in record.assets else {}
    distilled = record.method == "distillation"
    if not distilled:  # the dataset may hold features of a teacher, which this student did not learn from
        metrics = {name: of for name, of in metrics.items() if "teacher" not in name and "agreement" not in name}
    key = next((key for key in ("test", "eval") if f"{key}_images" in metrics), None)
    split, teacher = key and facts.splits[key], facts.teacher or {}
    environment = Environment(trim_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"as_text": tables.as_text, "fenced": tables.fenced}
    text = environment.from_string(Path(__file__).with_name("template.md").read_text(encoding="utf-8")).render(
        record=record,
        distilled=distilled,
        front_matter=front_matter(record, metrics, usage.get("captions")),
        title=record.name.split("/")[-1],
        parameters=f"{record.model['parameters'] / 1e6:.2f}",
        how_trained=_how_trained(record),
        status=[_status(record), *map(tables.as_text, facts.origin), licences(facts)],
        split=split,
        reading=tables.how_to_read(metrics, key, record.settings.get("recall_by_index", False)),
        table=key and tables.results_table(metrics, key, facts.baseline, teacher.get("parameters"), split),
        across=key and tables.across_table(metrics, key),
        widths=tables.width_note(metrics, key),
        grids=[(file, title) for file, title in GRIDS.items() if file in record.assets],
        code=usage_code(record.name, usage.get("captions"), facts.revision),
        output="\n".join(map(tables.without_controls, (usage.get("output") or "").split("\n"))),
        losses=", ".join(name.replace("_", " ") for name in record.settings.get("losses", ())),
        weights=_weights(record),
        teacher=tables.bullets(teacher),
        data=tables.data_table(facts.data),
        samples=tables.samples_table(facts.samples) if "sample_1.png" in record.assets else "",
        environment=_environment(record),
        changed=tables.bullets(record.changed),
        settings=yaml.safe_dump(record.settings, width=1000).strip(),
        oldest_transformers=OLDEST_TRANSFORMERS,
        limits=key and _limits(metrics, key, split, facts.baseline),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def usage_code(repo: str, captions: list[str] | None = None, revision: str | None = None) -> str:
    """The example code on the card: cosines of `assets/query.png` with captions.

    Without captions, image and captions are placeholders that the reader replaces.
    """
    at = ", revision=revision" if revision else ""
    pinned = f"\nrevision = {json.dumps(revision)}" if revision else ""
    image = f'cached_file(repo, "assets/query.png"{at})' if captions else '"photo.jpg"'
    captions = [tables.one_line(caption) for caption in captions or ["a first caption", "a second caption"]]
    return f"""import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor
{"from transformers.utils import cached_file" + chr(10) if "cached" in image else ""}
repo = {json.dumps(repo)}{pinned}
model = AutoModel.from_pretrained(repo{at}, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(repo, backend="pil", trust_remote_code=True{at})
{UPRIGHT_ON_WHITE.format(file=image)}
captions = {json.dumps(captions, ensure_ascii=False)}
inputs = processor(text=captions, images=[image], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
for caption, cosine in zip(captions, output.text_embeds @ output.image_embeds[0]):
    print(f"{{cosine:.3f}}  {{caption}}")"""


def _how_trained(record: RunRecord) -> str:
    how = "trained on pairs of images and captions"
    if record.method == "distillation":
        how = f"distilled from {tables.as_text((record.facts.teacher or {}).get('id', 'the features of a teacher'))}"
    return f"{how}, on {tables.as_code(record.facts.dataset_name)}" if record.facts.dataset_name else how


def _status(record: RunRecord) -> str:
    if not record.step:
        return ""
    text = f"Training was at step {record.step} of {record.max_steps}."
    if not record.in_training:
        stopped = record.step < record.max_steps
        text = f"Training {'stopped' if stopped else 'ended'} at step {record.step} of {record.max_steps}."
    if record.weights_step != record.step:
        best = record.settings["metric_for_best_model"]
        text += f" The weights are those of step {record.weights_step}, the best by {best} in validation."
    if record.resumed_at:
        text += f" The run was resumed at step {' and '.join(str(step) for step in record.resumed_at)}."
    return text


def _weights(record: RunRecord) -> str:
    if not record.weights:
        return ""
    (first, start), (last, end) = record.weights[0], record.weights[-1]
    one, other = (" : ".join(f"{value:.3g}" for value in weights.values()) for weights in (start, end))
    course = f"were {one} at step {first}"
    if last != first:
        course = f"moved from {one} at step {first} to {other} at step {last}" if one != other else f"stayed at {one}"
    return f"The weights of {' : '.join(name.replace('_', ' ') for name in start)} {course}."


def _environment(record: RunRecord) -> str:
    text = f"Trained on {record.hardware}"
    if record.seconds is not None:
        text += f" in {record.seconds / 60:.1f} minutes, evaluations included"
    if record.emissions:
        text += f"; {record.emissions['emissions']:.3g} g of CO2, as codecarbon measured"
    return f"{text}. Versions: {', '.join(f'{name} {version}' for name, version in record.versions.items())}."


def _limits(metrics: dict[str, float], key: str, split: str, baseline: dict[str, float] | None) -> str:
    if f"{key}_rsum" not in metrics:
        return tables.NO_PAIRS.format(split=tables.as_text(split))
    missed = {way: 100 - metrics[f"{key}_{way}_r1"] for way in ("text_to_image", "image_to_text")}
    text = f"{missed['text_to_image']:.1f} % of the captions of the {tables.as_text(split)} split do not find a right "
    text += f"image first, {missed['image_to_text']:.1f} % of its images no right caption."
    teacher = {
        name: metrics[f"teacher_{key}_{name}"] for name in tables.RECALLS if metrics.get(f"teacher_{key}_{name}")
    }
    if teacher:
        name = min(teacher, key=lambda name: metrics[f"{key}_{name}"] / teacher[name])
        own, its, label = metrics[f"{key}_{name}"], teacher[name], name.replace("_", " ")
        if own < its:
            text += f" It keeps least of its teacher in {label}: {own:.1f} of {its:.1f}, {100 * own / its:.1f} %."
    if baseline and baseline.get(f"{key}_rsum", 0) > metrics[f"{key}_rsum"]:
        text += f" Trained without a teacher it does better: rsum {baseline[f'{key}_rsum']:.1f}."
    return text + " Other images and other kinds of captions were not measured."
