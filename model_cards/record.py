"""What a run knows of itself, as plain values: a card is made of nothing else, and can be made again from the JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field


@dataclass
class RunFacts:
    """What a trainer cannot know by itself; `trainer.facts`. What is not given is left out of the card.

    Args:
        dataset_name: a Hub id, or a local dataset's own name, never its path; without it there is no model-index.
        splits: names of the splits that `eval_*` and `test_*` figures are of.
        data: of each split that is known whole, what [`describe_captions`] returns.
        data_license: of the images and captions.
        towers: Hub ids of what training started from.
        teacher: the constant column `teacher` of the dataset, parsed.
        license, languages: of the student.
        baseline: `all_results.json` of the same student trained without a teacher.
        metrics: as in `all_results.json`, once the run is reported; until then a card has the last evaluation's.
        samples: captions of the training images saved as `assets/sample_1.png`, ...
        usage: `{"captions": [...], "output": str | None}`: what the code on the card compares with
            `assets/query.png`, and what it printed.
        repo_id, revision: where the weights were pushed to, and the commit that holds them.
    """

    dataset_name: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"eval": "validation", "test": "test"})
    data: dict[str, dict] = field(default_factory=dict)
    data_license: str | None = None
    towers: list[str] = field(default_factory=list)
    teacher: dict | None = None
    license: str | None = None
    languages: list[str] | None = None
    baseline: dict[str, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[list[str]] = field(default_factory=list)
    usage: dict | None = None
    repo_id: str | None = None
    revision: str | None = None


@dataclass
class RunRecord:
    """All that a card is made of.

    Args:
        name: of the repository that the student goes to, else of the run's folder.
        method: "distillation" or "contrastive".
        facts: see [`RunFacts`].
        metrics: figures with the prefixes of `all_results.json`.
        metrics_step: step of the weights that they were measured on.
        step, max_steps: how far training had come, of how many optimiser steps.
        in_training: whether training was going on.
        weights_step: the step that the weights are of: an earlier one where the best checkpoint was taken.
        resumed_at: steps at which the run was taken up again.
        seconds: of training; None where it was not one sitting.
        weights: of the losses, as `[step, {name: weight}]` at the first and the last log.
        model: `parameters`, `dim`, and the types of its `towers`.
        changed: settings of training that differ from their defaults.
        settings: all of them.
        hardware, versions: what it ran on.
        emissions: as the Hub's `co2_eq_emissions`, where codecarbon measured them.
        assets: names of the files in `assets/`.
    """

    name: str
    method: str
    facts: RunFacts
    metrics: dict[str, float]
    metrics_step: int
    step: int
    max_steps: int
    in_training: bool
    weights_step: int
    resumed_at: list[int]
    seconds: float | None
    weights: list[tuple[int, dict[str, float]]]
    model: dict[str, object]
    changed: dict[str, object]
    settings: dict[str, object]
    hardware: str
    versions: dict[str, str]
    emissions: dict[str, object] | None
    assets: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        values = json.loads(text)
        return cls(**{**values, "facts": RunFacts(**values["facts"])})


def describe_captions(captions: Iterable[list[str]]) -> dict[str, int | list[float]]:
    """Counts of a split, and `[mean, least, most]` of captions per image and of words per caption.

    Args:
        captions: of each image.
    """
    per_image, words = Counter(), Counter()  # how many have that many
    for own in captions:
        per_image[len(own)] += 1
        words.update(len(caption.split()) for caption in own)

    def spread(counts: Counter[int]) -> list[float]:
        return [sum(number * times for number, times in counts.items()) / counts.total(), min(counts), max(counts)]

    return {
        "images": per_image.total(),
        "captions": words.total(),
        "captions_per_image": spread(per_image),
        "words_per_caption": spread(words),
    }
