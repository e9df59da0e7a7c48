"""The contrastive loss against CLIP's, and against loops where groups and captions are ragged."""

import math

import pytest
import torch
from conftest import make_student
from mixed_rows import without_partners
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from trainers import ContrastiveTrainer, DSMDTrainingArguments, RetrievalTrainingArguments, base_trainer, streaming
from trainers.contrastive_trainer import contrastive_loss


def embeddings(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=-1)


def test_one_caption_and_one_group_an_image_is_clips_loss():
    image, text = embeddings(6, 0), embeddings(6, 1)
    ours = contrastive_loss(image, text, torch.arange(6), torch.arange(6), torch.tensor(7.0))
    assert torch.allclose(ours, image_text_contrastive_loss(7.0 * text @ image.T), atol=1e-6)


def test_ragged_captions_and_groups_against_loops():
    image, text = embeddings(4, 0), embeddings(7, 1)
    owner, group = [0, 0, 1, 2, 2, 2, 3], [5, 6, 5, 7]
    total = 0.0
    for c in range(7):
        positive = math.exp(3 * float(text[c] @ image[owner[c]]))
        images = sum(math.exp(3 * float(text[c] @ image[j])) for j in range(4) if group[j] != group[owner[c]])
        texts = sum(
            math.exp(3 * float(text[k] @ image[owner[c]])) for k in range(7) if group[owner[k]] != group[owner[c]]
        )
        total -= 0.5 * (math.log(positive / (positive + images)) + math.log(positive / (positive + texts)))
    ours = contrastive_loss(image, text, torch.tensor(group), torch.tensor(owner), torch.tensor(3.0))
    assert abs(ours.item() - total / 7) < 1e-5


def test_without_negatives_the_loss_is_zero_with_finite_gradients():
    image, text = embeddings(2, 0).requires_grad_(), embeddings(2, 1)
    loss = contrastive_loss(image, text, torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.tensor(3.0))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(image.grad).all()


def contrastive_trainer(folder, train_dataset) -> ContrastiveTrainer:
    """Given its rows as the third argument, without their name."""
    model, processor = make_student()
    settings = {"per_device_train_batch_size": 8, "max_steps": 8, "save_strategy": "no", "report_to": "none"}
    args = RetrievalTrainingArguments(output_dir=str(folder), disable_tqdm=True, use_cpu=True, **settings)
    return ContrastiveTrainer(model, args, train_dataset, processing_class=processor)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("lonely", ["images", "texts"])
def test_rows_without_a_partner_are_refused_however_they_come(tmp_path, rows, lonely, streamed):
    picked = {"images": lambda i: False, "texts": lambda i: False, lonely: lambda i: i == 40}
    mixed = without_partners(rows, **picked)
    with pytest.raises(ValueError, match="1 of 64 rows of train have no partner"):
        contrastive_trainer(tmp_path, mixed.to_iterable_dataset() if streamed else mixed)


@pytest.mark.parametrize("lonely", ["images", "texts"])
def test_rows_of_a_stream_without_a_partner_are_refused_when_they_come(tmp_path, rows, lonely, monkeypatch):
    picked = {"images": lambda i: False, "texts": lambda i: False, lonely: lambda i: i == 40}
    stream = without_partners(rows, **picked).to_iterable_dataset()
    monkeypatch.setattr(base_trainer, "stream_head", lambda stream: streaming.stream_head(stream, 32))
    trainer = contrastive_trainer(tmp_path, stream)
    images, texts = ("1", "0") if lonely == "images" else ("0", r"\d")
    with pytest.raises(ValueError, match=f"A step has {images} images without captions and {texts} texts without"):
        trainer.train()
    assert trainer.state.global_step < 8


def test_a_row_without_a_partner_on_another_rank_stops_this_one(tmp_path, rows, monkeypatch):
    trainer = contrastive_trainer(tmp_path, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.begin_step([batch])
    of_others = {"an image": [8, 8, 8, 1, 0], "a text": [8, 9, 8, 0, 0]}
    for counts in of_others.values():
        monkeypatch.setattr(trainer, "gather_step", lambda own, counts=counts: torch.tensor([own, [counts]]))
        with pytest.raises(ValueError, match="which teach nothing by --method contrastive"):
            trainer.begin_step([batch])


def test_contrastive_training_lowers_its_loss(tmp_path, rows, validation_rows):
    model, processor = make_student()
    args = DSMDTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=16,
        logging_steps=4,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ContrastiveTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=validation_rows, processing_class=processor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert model.logit_scale.item() != 2.6592


@pytest.mark.parametrize("length", [1.0, 300.0])
def test_logits_may_be_as_large_as_rows_make_them(length):
    """Against cross-entropy in float64: each image has one caption and a group of its own."""
    torch.manual_seed(0)
    image, text = (
        length * torch.nn.functional.normalize(torch.rand(2, 6, 4), dim=-1) * torch.tensor([1.0, -1.0])[:, None, None]
    )
    owners = torch.arange(6)
    logits = 20.0 * text.double() @ image.double().T
    expected = torch.nn.functional.cross_entropy(logits, owners) + torch.nn.functional.cross_entropy(logits.T, owners)
    loss = contrastive_loss(image, text, owners, owners, torch.tensor(20.0))
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-5)
