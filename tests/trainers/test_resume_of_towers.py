"""A run that is stopped in mid-epoch and resumed is the unbroken one, whatever the towers."""

import pytest
from conftest import make_student
from tiny_trainer import largest_difference, make_trainer


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
