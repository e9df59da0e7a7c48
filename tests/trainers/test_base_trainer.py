"""What every training of a dual encoder shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_student
from tiny_trainer import make_trainer

from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments


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


@pytest.mark.parametrize("trainer_class", [DSMDTrainer, ContrastiveTrainer])
@pytest.mark.parametrize("of", [str, Path])
def test_a_saved_student_is_trained_by_its_name(tmp_path, rows, trainer_class, of):
    """As trl's trainers take one: with the processor that was saved with it."""
    student, processor = make_student()
    for part in (student, processor):
        part.save_pretrained(tmp_path / "student")
    settings = {"output_dir": str(tmp_path / "run"), "report_to": "none", "use_cpu": True, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 8, "save_strategy": "no", "disable_tqdm": True}
    runs = []
    for model, given in (
        (of(tmp_path / "student"), None),
        (student, processor),
        (of(tmp_path / "student"), processor),
    ):
        arguments = trainer_class.arguments_class(**settings)
        trainer = trainer_class(model, arguments, train_dataset=rows, processing_class=given)
        trainer.train()
        runs.append(trainer)
    for trainer in (runs[0], runs[2]):
        assert trainer.model is not student
        for name, value in runs[1].model.state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], value), name
    assert runs[2].processing_class is processor
    assert runs[0].processing_class.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_name_of_no_student_is_refused_in_one_sentence(tmp_path, rows, hub):
    arguments = DSMDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    (tmp_path / "empty").mkdir()
    make_student()[0].save_pretrained(tmp_path / "alone")  # without its processor
    for name in ("user/none", tmp_path / "empty", str(tmp_path / "alone"), str(tmp_path / "missing")):
        with pytest.raises(ValueError, match="is no student that can be read: expected the folder or Hub id") as error:
            DSMDTrainer(model=name, args=arguments, train_dataset=rows)
        assert str(name) in str(error.value) and "\n" not in str(error.value)


def test_captions_longer_than_the_tower_takes_are_refused(tmp_path, rows):
    text = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student, processor = make_student(text={**text, "intermediate_size": 64, "max_position_embeddings": 20})
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    with pytest.raises(ValueError, match="max_caption_length=20: the text tower takes 19 tokens"):
        arguments = DSMDTrainingArguments(**settings, max_caption_length=20)
        DSMDTrainer(model=student, args=arguments, train_dataset=rows, processing_class=processor)
    arguments = DSMDTrainingArguments(**settings, max_caption_length=19, max_steps=1)
    DSMDTrainer(model=student, args=arguments, train_dataset=rows, processing_class=processor).train()
