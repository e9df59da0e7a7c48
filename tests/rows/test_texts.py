"""How long a text may be."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_towers import SMALL, bert, roberta
from transformers import AutoModel, CLIPTextConfig, T5Config, T5EncoderModel

from rows.texts import LONGEST_CAPTION, cut, text_positions


def test_a_text_is_cut():
    assert [cut("a" * 9000), cut("a" * 8192), cut("")] == ["a" * 8192, "a" * 8192, ""] and LONGEST_CAPTION == 8192


def test_positions_are_as_many_as_the_model_takes():
    for config, expected in ((bert(), 32), (roberta(), 32), (CLIPTextConfig(vocab_size=60, **SMALL), 77)):
        model = AutoModel.from_config(config).eval()
        assert text_positions(model) == expected
        ids = torch.full((1, expected + 1), 5)
        model(input_ids=ids[:, 1:])
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=ids)


def test_positions_behind_a_wrapper_are_found():
    wrapped = torch.nn.ModuleDict({"inner": AutoModel.from_config(roberta())})
    wrapped.config = roberta()
    assert text_positions(wrapped) == 32


def test_a_model_without_positions_has_no_limit():
    config = T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert text_positions(T5EncoderModel(config)) == math.inf
