"""What a run knows of itself, as plain values. A card is made from nothing else, so its JSON can make it again."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field


@dataclass
class RunFacts:
    """What a trainer cannot know by itself, set as `trainer.facts`. What is not given is left out of the card.

    Args:
        dataset_name: a Hub id, or a local dataset's own name, never its path; without it there is no model-index.
        splits: prefix of figures ("eval", "test") to the name of the split that they were measured on.
        data: name of a split to what [`describe_captions`] returns for it; a streamed split has none.
        data_license: licence of the images and captions.
        teacher_license: licence of the teacher, where its card was read and states one.
        towers: Hub ids of the pre-trained towers.
        origin: what of the student was cut from what, and under which licence: sentences.
        teacher: the parsed JSON of the dataset's constant column `teacher`.
        license, languages: those of the student.
        baseline: `all_results.json` of the same student trained without a teacher.
        metrics: as in `all_results.json`, once the run is over; until then a card has those of the last evaluation.
        samples: captions of each training image saved as `assets/sample_1.png`, ...
        beside_grids: of `text_to_image.png` and `image_to_text.png` the texts that their font cannot draw.
        usage: `{"captions": [...], "output": str | None}`: the captions that the code on the card compares with
            `assets/query.png`, and what it printed; None if it was not run.
        temperature: what the student's temperature was fitted to: `scale`, which cosines are multiplied by, and
            `candidates`, how many pairs of the validation split each was told from.
        repo_id, revision: where the weights were pushed to, and the commit that holds them.
    """

    dataset_name: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"eval": "validation", "test": "test"})
    data: dict[str, dict] = field(default_factory=dict)
    data_license: str | None = None
    teacher_license: str | None = None
    towers: list[str] = field(default_factory=list)
    origin: list[str] = field(default_factory=list)
    teacher: dict | None = None
    license: str | None = None
    languages: list[str] | None = None
    baseline: dict[str, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[list[str]] = field(default_factory=list)
    beside_grids: dict[str, list[str]] = field(default_factory=dict)
    usage: dict | None = None
    temperature: dict[str, float] | None = None
    repo_id: str | None = None
    revision: str | None = None


@dataclass
class RunRecord:
    """All that a card is made of.

    Args:
        name: id of the repository that the student is pushed to, or else the name of the run's folder.
        method: "distillation" or "contrastive".
        facts: see [`RunFacts`].
        metrics: figures with the prefixes of `all_results.json`.
        metrics_step: the optimiser step whose weights they were measured on.
        step, max_steps: optimiser steps taken when the record was made, and planned.
        in_training: True if training was still going on then.
        weights_step: the step that the weights come from; earlier than `step` if the best checkpoint was loaded.
        resumed_at: steps at which the run was resumed.
        seconds: duration of training; None before its end, and for a run that was resumed.
        weights: weights of the losses, as `[step, {name: weight}]` at the first and the last log.
        model: the student's `parameters` (a number), `dim`, and the types of its `towers`.
        changed: settings of training that differ from their defaults.
        settings: all settings of training.
        hardware, versions: what training ran on.
        emissions: in the form of the Hub's `co2_eq_emissions`; None unless codecarbon measured them.
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


def describe_captions(
    captions: Iterable[list[str]], has_image: Iterable[bool] | None = None
) -> dict[str, int | list[float]]:
    """Numbers of images and captions of a split, and `[mean, least, most]` of captions per image, words per caption.

    Args:
        captions: for each row the list of its captions.
        has_image: which rows have an image; None: all.
    """
    per_image, words = Counter(), Counter()  # number of captions -> images with so many; of words -> captions
    for own, has in zip(captions, itertools.repeat(True) if has_image is None else has_image):
        if has:
            per_image[len(own)] += 1
        words.update(len(caption.split()) for caption in own)

    def spread(counts: Counter[int]) -> list[float]:
        if not counts:
            return [0.0, 0, 0]
        return [sum(number * times for number, times in counts.items()) / counts.total(), min(counts), max(counts)]

    return {
        "images": per_image.total(),
        "captions": words.total(),
        "captions_per_image": spread(per_image),
        "words_per_caption": spread(words),
    }
