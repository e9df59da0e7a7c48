"""The distillation trainer against invariances: accumulation, ranks, resume, epochs, groups of parameters."""

import json
import math

import pytest
import torch
from conftest import DIM, make_rows, make_student
from safetensors.torch import load_file
from tiny_trainer import first_gradients, largest_difference, make_trainer
from transformers import Trainer

from trainers import DSMDTrainer, DSMDTrainingArguments
from trainers.distillation_trainer import STATE_FILE


SMOOTH_LOSSES = ["contrastive", "feature", "similarity"]


@pytest.mark.parametrize("queue_size", [0, 24])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, rows, queue_size):
    settings = {"losses": SMOOTH_LOSSES, "balancer": "fixed", "contrastive_pairs": ["II", "TT", "IT", "TI"]}
    settings |= {"loss_weights": [1.0, 30.0, 3.0], "queue_size": queue_size}
    whole, _ = first_gradients(tmp_path / "a", rows, per_device_train_batch_size=32, **settings)
    parts, trainer = first_gradients(tmp_path / "b", rows, gradient_accumulation_steps=2, **settings)
    assert len({len(captions) for captions in rows["captions"]}) > 1  # ragged, or the test would not tell
    assert largest_difference(whole, parts) < 1e-5
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3


def test_logged_loss_is_that_of_the_whole_step(tmp_path, rows):
    settings = {"losses": SMOOTH_LOSSES, "balancer": "fixed"}
    logs = []
    for name, sizes in (("a", {"per_device_train_batch_size": 32}), ("b", {"gradient_accumulation_steps": 2})):
        trainer = make_trainer(tmp_path / name, rows, **settings, **sizes)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for key in ("loss", "loss_contrastive", "loss_feature", "loss_similarity"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-5)
    assert logs[0]["loss"] == pytest.approx(sum(logs[0][f"loss_{name}"] for name in SMOOTH_LOSSES), rel=1e-5)


def test_every_loss_weight_and_share_is_logged(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, max_steps=3)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        names = ("contrastive", "feature", "similarity", "hard_negative")
        assert sum(entry[f"share_{name}"] for name in names) == pytest.approx(1, abs=1e-5)
        total = sum(entry[f"loss_{name}"] * entry[f"weight_{name}"] for name in names)
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert all(math.isfinite(value) for value in entry.values())


def test_dynamic_weights_are_right_from_the_first_step(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows)
    trainer.train()
    first = trainer.state.log_history[0]
    for name in ("contrastive", "feature", "similarity", "hard_negative"):
        assert first[f"share_{name}"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("balancer", ["dynamic", "dwa", "random"])
@pytest.mark.parametrize("stop", [3, 4])  # in the middle of an epoch (two steps long), and at its end
def test_resume_gives_the_same_run(tmp_path, rows, validation_rows, stop, balancer):
    settings = {
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "random_shift": 0.2,
        "random_zoom": 0.2,
        "captions_per_image": 2,
        "save_strategy": "steps",
        "save_steps": stop,
        "balancer": balancer,
        "max_grad_norm": 1.0,
    }
    unbroken = make_trainer(tmp_path / "unbroken", rows, **settings)
    unbroken.train()
    resumed = make_trainer(tmp_path / "resumed", rows, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{stop}"))
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0
    assert largest_difference(unbroken._distillation_state(), resumed._distillation_state()) == 0.0
    last = [[e for e in trainer.state.log_history if e.get("step") == 6][0] for trainer in (unbroken, resumed)]
    assert last[0]["loss"] == last[1]["loss"]


@pytest.mark.parametrize(("accumulated", "drop_last"), [(1, True), (5, True), (5, False)])
def test_dwa_counts_the_steps_of_an_epoch_as_the_trainer_does(tmp_path, rows, accumulated, drop_last):
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 5, "balancer": "dwa"}
    settings |= {"gradient_accumulation_steps": accumulated, "dataloader_drop_last": drop_last}
    trainer = make_trainer(tmp_path, rows, **settings)
    assert len(rows) % 5 and len(trainer.get_train_dataloader()) % 5  # or neither rounding would show
    trainer.train()
    assert trainer.balancer.steps_per_epoch == trainer.state.global_step > 1


def test_random_weights_are_others_for_another_seed(tmp_path, rows):
    first, again, other = (
        make_trainer(tmp_path / str(i), rows, balancer="random", seed=seed).balancer.weights()
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_resume_without_balancer_and_queue_is_refused(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=STATE_FILE):
        make_trainer(tmp_path, rows, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_trainers_own_resume_still_loses_vit_towers(tmp_path, rows):
    """Fails when upstream mends what `_load_from_checkpoint` and `_load_best_model` are overridden for."""
    trainer = make_trainer(tmp_path, rows)
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    Trainer._load_from_checkpoint(trainer, str(tmp_path / "saved"))
    vision = sum(parameter.abs().sum() for parameter in trainer.model.vision_model.layers.parameters())
    assert vision == 0
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert sum(parameter.abs().sum() for parameter in trainer.model.vision_model.layers.parameters()) > 0


def test_best_model_is_loaded_at_the_end(tmp_path, rows, validation_rows):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        tmp_path, rows, eval_dataset=validation_rows, load_best_model_at_end=True, learning_rate=3e-2, **settings
    )
    trainer.train()
    scores = {entry["step"]: entry["eval_rsum"] for entry in trainer.state.log_history if "eval_rsum" in entry}
    assert trainer.state.best_metric == max(scores.values())
    assert trainer.evaluate()["eval_rsum"] == pytest.approx(max(scores.values()))


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


def test_queue_holds_the_whole_step_before_its_first_micro_batch(tmp_path, rows):
    seen = []

    class Spy(DSMDTrainer):
        def losses(self, image_embeds, text_embeds, batch):
            seen.append((len(self.image_queue), self.num_images, self.num_captions))
            return super().losses(image_embeds, text_embeds, batch)

    trainer = make_trainer(tmp_path, rows, gradient_accumulation_steps=2, queue_size=64)
    trainer.__class__ = Spy
    trainer.train()
    assert all(length == 32 and images == 32 for length, images, _ in seen)
    assert len({captions for _, _, captions in seen}) == 1


def test_queue_larger_than_the_data_is_clamped_with_a_warning(tmp_path, rows, caplog):
    trainer = make_trainer(tmp_path, rows, queue_size=8192)
    assert "clamped" in caplog.text
    trainer.train()
    assert trainer.image_queue.features.shape == (16, DIM)


def test_ids_renamed_change_nothing(tmp_path, rows):
    def rename(row):
        return {"group_id": "other " + row["group_id"]}

    a, _ = first_gradients(tmp_path / "a", rows, balancer="fixed")
    b, _ = first_gradients(tmp_path / "b", rows.map(rename), balancer="fixed")
    assert largest_difference(a, b) == 0.0


def test_bf16_runs_and_is_finite(tmp_path, rows, validation_rows):
    trainer = make_trainer(tmp_path, rows, eval_dataset=validation_rows, bf16=True, max_steps=2)
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert 0 <= trainer.evaluate()["eval_rsum"] <= 600


def test_no_pickle_but_what_resuming_needs(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    pickles = {path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    arguments = json.loads((tmp_path / "training_args.json").read_text())
    assert arguments["queue_size"] == 24
    for path in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    assert set(load_file(tmp_path / "checkpoint-1" / STATE_FILE)) == set(trainer._distillation_state())


def test_teacher_features_of_another_width_are_refused(tmp_path):
    with pytest.raises(ValueError, match="width 8, expected 16"):
        make_trainer(tmp_path, make_rows(20, dim=8))


def test_captions_longer_than_the_tower_takes_are_refused(tmp_path, rows):
    text = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student, processor = make_student(text={**text, "intermediate_size": 64, "max_position_embeddings": 20})
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    with pytest.raises(ValueError, match="max_caption_length=20: the text tower takes 19 tokens"):
        arguments = DSMDTrainingArguments(**settings, max_caption_length=20)
        DSMDTrainer(model=student, args=arguments, train_dataset=rows, processing_class=processor)
    arguments = DSMDTrainingArguments(**settings, max_caption_length=19, max_steps=1)
    DSMDTrainer(model=student, args=arguments, train_dataset=rows, processing_class=processor).train()


def test_hub_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="HF_TOKEN"):
        DSMDTrainingArguments(output_dir=str(tmp_path), hub_token="secret")
