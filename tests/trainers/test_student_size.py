"""The table before training against counts made another way; the hint where there are few images."""

import re

import pytest
import torch
from conftest import make_student
from tiny_towers import make
from transformers import CanineConfig

from trainers.student_arguments import StudentArguments
from trainers.student_size import FEW, few_pairs_hint, parameters_by_part, size_table


VIT, BERT = {"model_type": "vit"}, {"model_type": "bert"}


def test_the_parts_are_those_of_the_student():
    model, processor = make_student()
    parts = parameters_by_part(model)
    width, words = 32, len(processor.tokenizer)
    layer = 4 * (width * width + width) + 2 * width * 64 + 64 + width + 4 * width  # attention, feed-forward, two norms
    assert parts["word embeddings"] == words * width
    assert parts["text tower"] == 2 * layer + (512 + 2) * width + 2 * width  # positions, kinds of token, a norm
    patches = 3 * 16 * 16 * width + width + (4 + 1) * width + width
    assert parts["vision tower"] == 2 * layer + patches + 2 * width
    assert parts["heads"] == 2 * 16 * width + 1
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_a_tower_without_a_table_of_words_has_none():
    words = CanineConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = make(text=lambda: words)
    parts = parameters_by_part(model)
    assert parts["word embeddings"] == 0
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_the_table_has_sizes_and_speeds_and_changes_nothing():
    model, processor = make_student()
    model.train()
    before, weights = torch.get_rng_state(), [parameter.clone() for parameter in model.parameters()]
    table = size_table(model, processor, 32, {"id": "a teacher", "parameters": 2_500_000})
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert re.search(rf"^\| parameters +\| {whole / 1e6:.2f} M +\| 2.50 M +\|$", table, re.MULTILINE), table
    assert re.search(rf"^\| MB +\| {whole * 4 / 1e6:.1f} +\| 10.0 +\|$", table, re.MULTILINE), table
    for of in ("image", "caption"):
        assert float(re.search(rf"ms per {of}, batch 1 +\| +([\d.]+)", table)[1]) > 0
    alone = size_table(model, processor, 32)
    assert "teacher" not in alone and "heads" in alone


@pytest.mark.parametrize(
    "rows, settings, hinted",
    [
        (range(FEW - 1), {"vision_config": VIT, "text_config": BERT}, True),
        (range(FEW), {"vision_config": VIT, "text_config": BERT}, False),
        (range(5), {"vision_model_name_or_path": "a", "text_model_name_or_path": "b"}, False),
        (range(5), {"model_name_or_path": "a", "vision_config": VIT}, False),
        (iter(range(5)), {"vision_config": VIT, "text_config": BERT}, False),  # a stream
    ],
)
def test_few_images_and_towers_from_nothing_are_pointed_elsewhere(rows, settings, hinted):
    hint = few_pairs_hint(rows, StudentArguments(**settings))
    assert (hint is not None) == hinted
    if hinted:
        assert hint.startswith("There are 1,999 rows") and "recipes/few_pairs.yaml" in hint
