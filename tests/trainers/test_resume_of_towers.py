"""A run that is stopped in mid-epoch and resumed is the unbroken one, whatever the towers."""

import json

import pytest
import torch
from conftest import make_student
from tiny_runs import arguments
from tiny_towers import make_processor, vit
from tiny_trainer import largest_difference, make_trainer
from transformers import CLIPTextConfig, CLIPTextModel, ViTModel

import train
from trainers.student import StudentArguments, build_student


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {  # with dropout; MobileViT's BatchNorm has running means
    "deit": {"model_type": "deit", "patch_size": 16, "hidden_dropout_prob": 0.1, **SMALL},
    "dinov2": {"model_type": "dinov2", "patch_size": 16, "mlp_ratio": 2, "drop_path_rate": 0.1, **SMALL},
    "swin": {
        "model_type": "swin", "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2,
        "drop_path_rate": 0.1,
    },
    "mobilevit": {
        "model_type": "mobilevit", "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 12, 16, 20],
        "num_attention_heads": 2, "hidden_dropout_prob": 0.1,
    },
}  # fmt: skip
TEXT = {
    "minilm": {"model_type": "bert", **SMALL, "hidden_size": 24, "num_attention_heads": 6},
    "roberta": {"model_type": "roberta", **SMALL},
    "modernbert": {"model_type": "modernbert", "mlp_dropout": 0.1, **SMALL},
}
PAIRS = [("deit", "minilm"), ("dinov2", "roberta"), ("swin", "modernbert"), ("mobilevit", "minilm")]
STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}  # of 16 images; an epoch has four


@pytest.mark.parametrize("vision, text", PAIRS)
def test_resume_gives_the_same_run(tmp_path, rows, vision, text):
    def trainer(folder, **settings):
        return make_trainer(tmp_path / folder, rows, model=make_student(VISION[vision], TEXT[text])[0], **settings)

    unbroken = trainer("unbroken", **STEPS)
    start = {name: tensor.clone() for name, tensor in unbroken.model.state_dict().items()}
    unbroken.train()
    assert unbroken.state.epoch == 1.0
    resumed = trainer("resumed", **STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    end = unbroken.model.state_dict()
    assert largest_difference(end, resumed.model.state_dict()) == 0.0
    assert largest_difference(unbroken.distillation_state(), resumed.distillation_state()) == 0.0
    moved = sum(not end[name].equal(start[name]) for name in start)
    assert moved > 0.7 * len(start)  # or the test would not tell


@pytest.mark.parametrize("vision, text", PAIRS[1:3])
def test_the_best_model_is_loaded_at_the_end(tmp_path, rows, validation_rows, vision, text):
    settings = {**STEPS, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(
        tmp_path, rows, make_student(VISION[vision], TEXT[text])[0], eval_dataset=validation_rows, **settings
    )
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert largest_difference(trainer.model.state_dict(), best.state_dict()) == 0.0
    assert trainer.evaluate()["eval_rsum"] == pytest.approx(trainer.state.best_metric)


def clip_text_tower(folder):
    """As OpenAI's CLIP: its config has other ids of special tokens than its tokenizer."""
    processor = make_processor()
    tokenizer = processor.tokenizer
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"  # 2 and 3
    config = CLIPTextConfig(vocab_size=60, max_position_embeddings=32, bos_token_id=0, eos_token_id=2, **SMALL)
    CLIPTextModel(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    ViTModel(vit()).save_pretrained(folder / "vision")
    processor.image_processor.save_pretrained(folder / "vision")
    return {f"{name}_model_name_or_path": folder / name for name in ("vision", "text")}


@pytest.mark.parametrize("again", [False, True])
def test_a_text_tower_whose_tokens_trainer_aligns_is_resumed_without_a_change(tmp_path, run_data, again):
    """From the two towers, and from the student that they became."""
    towers = clip_text_tower(tmp_path)
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 4, "text_pooling": "pooler"}
    start = {"vision_config": None, "text_config": None, **towers}

    def command(run, **more):
        whole = arguments(tmp_path / run, run_data, settings, **{**start, **more})
        pairs = zip(whole[::2], whole[1::2])
        return [part for name, value in pairs if value != "None" for part in (name, value)]

    if again:
        train.main(command("first"))
        start = {"vision_config": None, "text_config": None, "model_name_or_path": tmp_path / "first"}
    trainer, *_ = train.prepare(command("looked_at"))
    config = trainer.model.config.text_config
    assert (config.bos_token_id, config.eos_token_id) == (2, 3)
    before = trainer.identity()
    train.main(command("unbroken"))
    saved = json.loads((tmp_path / "unbroken" / "checkpoint-4" / "_run.json").read_text())
    assert saved == before
    resumed = ["--resume_from_checkpoint", str(tmp_path / "unbroken" / "checkpoint-4")]
    train.main([*command("resumed"), *resumed])
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("unbroken", "resumed")]
    assert files[0] == files[1]


def test_a_student_of_clips_text_tower_is_the_same_when_it_is_loaded_again(tmp_path):
    """The tokenizer's last token is not its largest id, where the tower would look by its old config."""
    towers = {name: str(folder) for name, folder in clip_text_tower(tmp_path).items()}
    model, processor = build_student(StudentArguments(**towers, text_pooling="pooler"), [], 8)
    model.eval().save_pretrained(tmp_path / "student")
    inputs = processor.tokenizer(["arrow left", "a big red square"], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    again = type(model).from_pretrained(tmp_path / "student").eval()
    with torch.no_grad():
        features, loaded = (of.get_text_features(**inputs).pooler_output for of in (model, again))
        hidden = model.text_model(**inputs).last_hidden_state
        by_hand = model.text_projection(
            hidden[torch.arange(2), [ids.index(3) for ids in inputs["input_ids"].tolist()]]
        )
    torch.testing.assert_close(features, by_hand)
    torch.testing.assert_close(features, loaded)
