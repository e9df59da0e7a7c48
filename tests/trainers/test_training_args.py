"""Settings that are refused."""

from __future__ import annotations

import pytest

from trainers import DSMDTrainingArguments, RetrievalTrainingArguments
from trainers.training_args import settings_that_differ


def test_hub_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="HF_TOKEN"):
        DSMDTrainingArguments(output_dir=str(tmp_path), hub_token="secret")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"losses": ["contrastive", "contrastive"]}, "losses=.*each once"),
        ({"contrastive_pairs": ["XY"]}, "contrastive_pairs=.*II, TT, IT, TI"),
        ({"hard_negative_pairs": []}, "hard_negative_pairs=.*one or more"),
        ({"loss_weights": [1.0]}, "loss_weights has 1 values for 4 losses"),
        ({"contrastive_temperature": 0.0}, "contrastive_temperature=0.0: expected more than 0"),
        ({"balancer_temperature": -1.0}, "balancer_temperature=-1.0: expected more than 0"),
        ({"balancer_smoothing": 1.0}, "balancer_smoothing=1.0: expected a number in"),
        ({"queue_size": -1}, "queue_size=-1"),
        ({"max_caption_length": 2}, "max_caption_length=2"),
        ({"random_zoom": 1.0}, "random_zoom=1.0: expected a number in"),
        ({"max_skipped_steps": 0}, "max_skipped_steps=0"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size=0"),
        ({"captions_per_image": 0}, "captions_per_image=0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay False"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        DSMDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **setting)


def test_without_a_teacher_there_are_no_settings_of_the_distillation(tmp_path):
    args = RetrievalTrainingArguments(output_dir=str(tmp_path), use_cpu=True, random_shift=0.1)
    assert not {"losses", "queue_size", "balancer"} & args.to_dict().keys()
    assert settings_that_differ(args)["random_shift"] == 0.1
    with pytest.raises(TypeError, match="queue_size"):
        RetrievalTrainingArguments(output_dir=str(tmp_path), queue_size=8)
