"""The distillation trainer against invariances: accumulation, ranks, resume, epochs, groups of parameters."""

import math

import pytest
import torch
from conftest import DIM, make_rows
from tiny_trainer import first_gradients, largest_difference, make_trainer

from trainers import DSMDTrainer
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


def test_the_loss_of_each_pair_is_logged_and_they_add_up(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, max_steps=3, logging_steps=3, contrastive_pairs=["II", "TI"])
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    pairs = {
        "contrastive": ["II", "TI"],
        "feature": ["II", "TT"],
        "similarity": ["II", "TT"],
        "hard_negative": ["II", "TT", "IT", "TI"],
    }
    for name, own in pairs.items():
        assert {key for key in log if key.startswith(f"loss_{name}_")} == {f"loss_{name}_{pair}" for pair in own}
        assert sum(log[f"loss_{name}_{pair}"] for pair in own) == pytest.approx(log[f"loss_{name}"], rel=1e-5)


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
    assert largest_difference(unbroken.distillation_state(), resumed.distillation_state()) == 0.0
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


def test_the_balancer_is_asked_for_its_weights_once_a_step(tmp_path, rows, monkeypatch):
    trainer = make_trainer(tmp_path, rows, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=8)
    asked, weights = [], trainer.balancer.weights

    def counted():
        asked.append(weights())
        return asked[-1]

    monkeypatch.setattr(trainer.balancer, "weights", counted)
    trainer.train()
    assert len(asked) == 3
    logged = [log["weight_feature"] for log in trainer.state.log_history if "weight_feature" in log]
    assert logged == pytest.approx([of_step[1].item() for of_step in asked])


def test_resume_without_balancer_and_queue_is_refused(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=STATE_FILE):
        make_trainer(tmp_path, rows, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_queue_holds_the_whole_step_before_its_first_micro_batch(tmp_path, rows):
    seen = []

    class Spy(DSMDTrainer):
        def loss_terms(self, image_embeds, text_embeds, batch):
            seen.append((len(self.image_queue), self.num_images, self.num_captions))
            return super().loss_terms(image_embeds, text_embeds, batch)

    trainer = make_trainer(tmp_path, rows, gradient_accumulation_steps=2, queue_size=64)
    trainer.__class__ = Spy
    trainer.train()
    assert all(length == 32 and images == 32 for length, images, _ in seen)
    assert len({captions for _, _, captions in seen}) == 1


@pytest.mark.parametrize("queue_size", [0, 1, 15, 16, 17, 40, 64, 100, 8192])
def test_the_dictionary_is_the_step_and_up_to_the_queues_size_older_rows(tmp_path, rows, queue_size):
    """Against lists: of each modality the step's rows, and before them the newest that there is room for."""
    fed: dict[str, list[tuple]] = {"image": [], "text": []}
    found = []

    class Spy(DSMDTrainer):
        def begin_step(self, batches):
            super().begin_step(batches)
            dictionary = self.dictionary()
            for side, all_rows in fed.items():
                step = getattr(self.step_rows, side), getattr(self.step_rows, f"{side}_groups")
                step = list(zip(step[0].tolist(), step[1].tolist(), strict=True))
                older = all_rows[len(all_rows) - max(0, min(queue_size - len(step), len(all_rows))) :]
                all_rows += step
                whole = getattr(dictionary, side).tolist(), getattr(dictionary, f"{side}_groups").tolist()
                assert sorted(zip(*whole, strict=True)) == sorted(older + step)
                found.append(len(whole[0]) - len(step))

    trainer = make_trainer(tmp_path, rows, queue_size=queue_size, max_steps=4, losses=["contrastive"])
    trainer.__class__ = Spy
    trainer.train()
    assert len(found) == 8 and found[0] == found[1] == 0 and (max(found) > 0) == (queue_size > 16)


def test_a_queue_smaller_than_the_step_contrasts_with_no_less_than_none(tmp_path, rows):
    losses, weights = {}, {}
    for queue_size in (0, 1, 7, 16):
        settings = {"queue_size": queue_size, "losses": ["contrastive"], "balancer": "fixed", "captions_per_image": 3}
        trainer = make_trainer(tmp_path / str(queue_size), rows, max_steps=3, logging_steps=3, **settings)
        trainer.train()
        losses[queue_size] = trainer.state.log_history[0]["loss_contrastive"]
        weights[queue_size] = trainer.model.state_dict()
    assert losses[0] == losses[1] == losses[7] == pytest.approx(losses[16], rel=1e-6)
    assert largest_difference(weights[0], weights[1]) == largest_difference(weights[0], weights[7]) == 0.0


def test_a_run_with_a_queue_smaller_than_the_step_is_resumed(tmp_path, rows):
    settings = {"max_steps": 4, "queue_size": 20, "save_strategy": "steps", "save_steps": 2}
    unbroken = make_trainer(tmp_path / "unbroken", rows, **settings)
    unbroken.train()
    resumed = make_trainer(tmp_path / "resumed", rows, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0
    assert largest_difference(unbroken.distillation_state(), resumed.distillation_state()) == 0.0


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


def test_teacher_features_of_another_width_are_refused(tmp_path):
    with pytest.raises(ValueError, match="width 8, expected 16"):
        make_trainer(tmp_path, make_rows(20, dim=8))
