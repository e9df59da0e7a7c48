"""What is found of a model on two images before it is trained: text poolings that see one token, unused parameters."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DIM, make_rows, make_student
from tiny_towers import (
    bert,
    convnext,
    deit,
    dinov2,
    distilbert,
    make,
    make_processor,
    minilm,
    mobilevit,
    modernbert,
    roberta,
    swin,
    vit,
)
from tiny_trainer import make_trainer
from transformers import CLIPConfig, CLIPModel, DebertaV2Config

from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments
from trainers.batches import RetrievalCollator
from trainers.dry_run import check_embeds, check_text_pooling, tiny_batch, unused_parameters


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3}
QWEN3 = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": None}
# The tokenizer that is trained ends a caption by [SEP], 3.
CLIP = {"model_type": "clip_text_model", **SIZES, "eos_token_id": 3, "bos_token_id": 2}
NO_EOS = {**CLIP, "eos_token_id": 49407}  # of the tokenizer no caption has one: CLIP then pools the first token


def batch_of(processor) -> dict:
    return tiny_batch(RetrievalCollator(processor, 32), torch.device("cpu"))


def embedding(model, processor, caption: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**processor.tokenizer(caption, return_tensors="pt")).text_embeds


@pytest.mark.parametrize(
    "text, pooling, right",
    [
        (CLIP, "cls", "'pooler' or 'mean'"),
        (NO_EOS, "cls", "'mean'"),
        (NO_EOS, "pooler", "'mean'"),
        (GPT2, "cls", "'mean'"),
        (QWEN3, "cls", "'mean'"),
        ({"model_type": "bert", **SIZES, "is_decoder": True}, "cls", "'mean'"),
        (CLIP, "pooler", None),
        (CLIP, "mean", None),
        (GPT2, "mean", None),
        (QWEN3, "mean", None),
        ({"model_type": "bert", **SIZES}, "cls", None),
        ({"model_type": "modernbert", **SIZES, "global_attn_every_n_layers": 2, "local_attention": 4}, "cls", None),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_a_pooling_that_sees_one_token_is_refused_and_the_right_one_named(tmp_path, rows, text, pooling, right):
    student, processor = make_student(text=text)
    student.config.text_pooling = pooling
    one, other = (embedding(student, processor, caption) for caption in ("red arrow left", "red house on the moon"))
    assert torch.equal(one, other) == (right is not None)
    if right is None:
        make_trainer(tmp_path, rows, model=student)
        return
    with pytest.raises(ValueError, match=f"text_pooling='{pooling}' gives every caption the same.*Use {right}\\.$"):
        make_trainer(tmp_path, rows, model=student)
    assert student.config.text_pooling == pooling
    make_trainer(tmp_path, None, model=student).evaluate(make_rows(6))  # what was trained so may still be looked at


@pytest.mark.parametrize("text", [bert, distilbert, minilm, roberta, modernbert])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_towers_whose_first_token_sees_all_are_taken(text, pooling):
    model = make(text=text, text_pooling=pooling)
    check_text_pooling(model, batch_of(make_processor()))


@pytest.mark.parametrize("vision", [vit, deit, dinov2, swin, convnext, mobilevit])
@pytest.mark.parametrize("text", [bert, distilbert, roberta, modernbert])
@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_of_the_usual_towers_nothing_is_unused(vision, text, pooling):
    pools = pooling if vision in (vit, deit, dinov2) else "mean" if pooling == "cls" else pooling
    has_pooler = text in (bert, roberta)
    model = make(vision, text, pools, pooling if pooling != "pooler" or has_pooler else "mean")
    assert unused_parameters(model, batch_of(make_processor())) == ["logit_scale"]  # a matter of the loss


class Spare(torch.nn.Module):
    """Parts of every kind: one that nothing needs, one that only training needs, one that only evaluation needs."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.never, self.in_training, self.in_evaluation = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3))
        self.norm = torch.nn.BatchNorm1d(DIM)

    def forward(self, **inputs):
        output = self.model(**inputs)
        used = self.in_training if self.training else self.in_evaluation
        rows = self.norm(torch.nn.functional.dropout(output.image_embeds, 0.5, self.training))
        return SimpleNamespace(image_embeds=rows * used.sum(), text_embeds=output.text_embeds)


def test_only_what_is_never_used_is_found_and_nothing_is_changed():
    student, processor = make_student()
    model = Spare(student).train()
    model.norm.eval()  # a part that is in another mode comes back in the model's
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert unused_parameters(model, batch_of(processor)) == ["model.logit_scale", "never"]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def clip_model() -> CLIPModel:
    text = {**SIZES, "vocab_size": 400, "max_position_embeddings": 77, "eos_token_id": 3, "bos_token_id": 2}
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM))


@pytest.mark.parametrize("trainer_class", [DSMDTrainer, ContrastiveTrainer])
def test_a_model_that_embeds_no_modality_by_itself_is_refused_before_training(tmp_path, rows, trainer_class):
    _, processor = make_student()
    args = DSMDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="CLIPModel gives no image_embeds for pixel_values alone.*give a DSMDModel"):
        trainer_class(clip_model(), args, train_dataset=rows, processing_class=processor)


def wrong(change):
    """The tiny student's class with another output."""
    student, processor = make_student()

    class Changed(type(student)):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            change(output)
            return output

    student.__class__ = Changed
    return student, processor


def lose(name):
    return lambda output: setattr(output, name, None)


def scale(output):
    output.text_embeds = None if output.text_embeds is None else output.text_embeds * 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lose("image_embeds"), "gives None as image_embeds of 2 rows for pixel_values alone"),
        (lose("text_embeds"), "gives None as text_embeds of 2 rows for input_ids and attention_mask alone"),
        (scale, "text_embeds of Changed are of length 3, not L2-normalised"),
    ],
)
def test_a_model_whose_output_lacks_something_is_refused(change, message):
    student, processor = wrong(change)
    with pytest.raises(ValueError, match=message):
        check_embeds(student, batch_of(processor))


def test_a_model_without_buckets_is_trained_and_evaluated_as_the_student_is(tmp_path, rows):
    """Any model with the interface: here the student behind a forward that does not know `text_buckets`."""

    def of(trained):
        trainer = make_trainer(tmp_path, rows, model=trained, max_steps=2, losses=["feature"])
        trainer.train()
        return trainer.evaluate(make_rows(8, seed=1))["eval_rsum"], trainer.model.state_dict()

    student, _ = make_student()

    class Plain(type(student)):
        def forward(self, input_ids=None, pixel_values=None, attention_mask=None):
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)

    plain, _ = make_student()
    plain.__class__ = Plain
    (expected, weights), (found, others) = of(student), of(plain)
    assert found == pytest.approx(expected, abs=5) and weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=2e-3)


def test_a_tower_that_fails_is_refused_in_a_sentence(tmp_path, rows):
    """DeBERTa without layers looks for the output of one."""
    config = DebertaV2Config(vocab_size=60, hidden_size=16, num_hidden_layers=0, num_attention_heads=2)
    _, processor = make_student()
    batch = tiny_batch(RetrievalCollator(processor, 32), torch.device("cpu"))
    with pytest.raises(ValueError, match="DSMDModel gives no text_embeds .*take another tower, or more of its layers"):
        check_embeds(make(text=lambda: config), {**batch, "input_ids": batch["input_ids"] % 60})


def test_rows_of_zeros_are_no_fault_of_the_models():
    """A tower at its start may make nothing of noise: what is normalised is then still zero."""
    model, processor = make_student()
    with torch.no_grad():
        model.visual_projection.weight.zero_()
    check_embeds(model, batch_of(processor))
