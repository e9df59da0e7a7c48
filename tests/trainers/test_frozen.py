"""Parts of a student that stay as they are: a frozen tower, and parameters that nothing depends on."""

from pathlib import Path

import frozen_worker
import pytest
import torch
from conftest import make_rows, make_student
from frozen_worker import CASES, RESNET, SGD, SIZES, trained
from launching import launch
from safetensors.torch import load_file
from tiny_trainer import KeepGradients, largest_difference, make_trainer

from trainers import ContrastiveTrainer, DSMDTrainingArguments
from trainers.contrastive_trainer import contrastive_loss


DROPOUT = {"model_type": "bert", **SIZES, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    launch(2, frozen_worker.__file__, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(on_two, tmp_path, case):
    alone = trained(tmp_path, case, **SGD).model.state_dict()
    first, second = (load_file(on_two / f"{case}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert largest_difference(alone, first) < 1e-5
    start = make_student(CASES[case].get("vision"))[0].state_dict()
    assert not torch.equal(start["visual_projection.weight"], first["visual_projection.weight"])
    tower = f"{case.split(',')[0]}_model."
    stays = [name for name in start if torch.equal(start[name], first[name])]
    if not case.startswith("unused"):
        assert {name for name in start if name.startswith(tower)} <= set(stays)
        assert not any(name.endswith("weight") and not name.startswith(tower) for name in stays)


def by_hand(frozen: str, batch: dict, model) -> dict[str, torch.Tensor]:
    """Gradients of the baseline's loss where the tower's features are constants, made without dropout."""
    inputs = (
        {"pixel_values": batch["pixel_values"]},
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
        },
    )
    model.train()
    getattr(model, f"{frozen}_model").eval()
    rows = []
    for modality, given in zip(("vision", "text"), inputs, strict=True):
        with torch.set_grad_enabled(modality != frozen):
            hidden = getattr(model, f"{modality}_model")(**given).last_hidden_state
            if hidden.ndim == 4:
                pooled = hidden.flatten(2).mean(dim=2)
            else:
                weight = given.get("attention_mask", torch.ones(hidden.shape[:2]))[:, :, None].float()
                pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        head = model.visual_projection if modality == "vision" else model.text_projection
        rows.append(torch.nn.functional.normalize(pooled @ head.weight.T, dim=1))
    loss = contrastive_loss(*rows, batch["image_groups"], batch["caption_to_image"], model.logit_scale.exp())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", ["vision", "text"])
def test_a_frozen_tower_stays_and_the_rest_has_the_gradient_by_hand(tmp_path, rows, frozen):
    """The frozen tower has BatchNorm (vision) or dropout (text); the other is without either, so that it is exact."""
    vision, text = (RESNET, None) if frozen == "vision" else (None, DROPOUT)
    model, processor = make_student(vision, text)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 16, "freeze": frozen}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.0}
    keep = KeepGradients()
    args = DSMDTrainingArguments(**settings, learning_rate=1e-2, weight_decay=0.1)
    trainer = ContrastiveTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=[keep])
    batches = []
    begin_step = trainer.begin_step
    trainer.begin_step = lambda given: (batches.extend(given), begin_step(given))
    trainer.train()
    of_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(f"{frozen}_model.")
        assert (id(parameter) in of_optimizer) != is_frozen and (name in keep.gradients) != is_frozen
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(start[name], tensor)
        assert not (moved and name.startswith(f"{frozen}_model.")), name
    assert not torch.equal(start["visual_projection.weight"], model.visual_projection.weight)
    again = make_student(vision, text)[0]
    again.load_state_dict(start)
    images = dict(zip(rows["image_id"], rows["image"]))  # where the tower is frozen the batch has its outputs
    shown = processor.image_processor([images[i] for i in batches[0]["image_ids"]], return_tensors="pt")
    expected = by_hand(frozen, {**batches[0], **shown}, again)
    assert largest_difference(expected, keep.gradients) < 1e-5
    assert len(expected) == len(keep.gradients) > 10


def test_of_a_frozen_tower_nothing_is_kept_for_the_way_back(tmp_path, rows):
    model, processor = make_student(None, DROPOUT)
    trainer = make_trainer(tmp_path, rows, model=model, freeze="text", losses=["feature"])
    kept = []
    model.text_model.register_forward_hook(
        lambda module, args, output: kept.append((module.training, output.last_hidden_state.requires_grad))
    )
    trainer.train()
    assert set(kept) == {(False, False)}


@pytest.mark.parametrize("frozen", ["vision", "text"])
def test_a_run_with_a_frozen_tower_is_resumed_exactly(tmp_path, rows, validation_rows, frozen):
    vision, text = (RESNET, None) if frozen == "vision" else (None, DROPOUT)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "freeze": frozen, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "eval_dataset": validation_rows, "load_best_model_at_end": True}
    unbroken = make_trainer(tmp_path / "a", rows, model=make_student(vision, text)[0], **settings)
    unbroken.train()
    resumed = make_trainer(tmp_path / "b", rows, model=make_student(vision, text)[0], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    last = [load_file(tmp_path / run / "checkpoint-4" / "model.safetensors") for run in "ab"]
    assert largest_difference(*last) == 0.0
    assert largest_difference(unbroken.distillation_state(), resumed.distillation_state()) == 0.0
    for other in (None, "text" if frozen == "vision" else "vision"):
        trainer = make_trainer(
            tmp_path / "c", rows, model=make_student(vision, text)[0], **{**settings, "freeze": other}
        )
        with pytest.raises(ValueError, match=f'freeze: "{frozen}" in the checkpoint'):
            trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_a_checkpoint_from_before_unused_ones_were_found_is_gone_on_from(tmp_path):
    """The optimiser then had them, without a state: as it has them now."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    unbroken = trained(tmp_path / "a", "unused", **settings)
    assert len(unbroken.unused) == 5 and all(name.startswith("vision_model.head.") for name in unbroken.unused)
    groups = torch.load(tmp_path / "a/unused/run/checkpoint-2/optimizer.pt", weights_only=True)["param_groups"]
    parameters = list(unbroken.model.parameters())
    trainable = len(parameters) - 1  # the temperature is not
    assert sum(len(group["params"]) for group in groups) == trainable
    resumed = frozen_worker.make_trainer(
        tmp_path / "b", make_rows(32), **CASES["unused"], max_steps=4, learning_rate=1e-3, queue_size=60,
        balancer="dynamic", **settings,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/unused/run/checkpoint-2"))
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0


def test_a_tower_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="freeze='image': expected 'vision', 'text'"):
        DSMDTrainingArguments(output_dir=str(tmp_path), freeze="image")
