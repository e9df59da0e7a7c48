"""What every training of a dual encoder shares."""

from __future__ import annotations

import pytest
from conftest import make_student
from tiny_trainer import make_trainer

from trainers import DSMDTrainer, DSMDTrainingArguments


def test_towers_and_heads_have_their_own_rates_and_norms_do_not_decay(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, learning_rate=1e-4, head_learning_rate=1e-2, weight_decay=0.1)
    assert not trainer.model.logit_scale.requires_grad
    trainer.model.logit_scale.requires_grad_()  # as without a teacher
    trainer.create_optimizer()
    settings_of = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        rate, decay = settings_of.pop(id(parameter))
        assert rate == (
            1e-2 if name in ("visual_projection.weight", "text_projection.weight", "logit_scale") else 1e-4
        )
        is_plain = name.endswith("bias") or "norm" in name.lower() or name == "logit_scale"
        assert decay == (0.0 if is_plain else 0.1), name
    assert not settings_of


def test_captions_longer_than_the_tower_takes_are_refused(tmp_path, rows):
    text = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student, processor = make_student(text={**text, "intermediate_size": 64, "max_position_embeddings": 20})
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    with pytest.raises(ValueError, match="max_caption_length=20: the text tower takes 19 tokens"):
        arguments = DSMDTrainingArguments(**settings, max_caption_length=20)
        DSMDTrainer(model=student, args=arguments, train_dataset=rows, processing_class=processor)
    arguments = DSMDTrainingArguments(**settings, max_caption_length=19, max_steps=1)
    DSMDTrainer(model=student, args=arguments, train_dataset=rows, processing_class=processor).train()
