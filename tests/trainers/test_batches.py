"""Batches: who belongs to whom, and draws that depend on nothing but seed, epoch and image."""

import io
import itertools
import math
import random
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows, make_student
from PIL import Image, JpegImagePlugin
from tiny_trainer import make_trainer
from transformers import CLIPImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

from rows.columns import id_hash
from trainers.batches import (
    RetrievalCollator,
    RetrievalDataset,
    Views,
    most_buckets,
    random_view,
    size_of_all,
    text_buckets,
)


VIEWS = Views(captions_per_image=2, random_shift=0.2, random_zoom=0.2, seed=3)


def test_a_batch_keeps_captions_features_and_images_together():
    rows = make_rows(10)
    _, processor = make_student()
    examples = RetrievalDataset(rows, with_teacher=True).__getitems__([7, 2, 4])
    batch = RetrievalCollator(processor, 32)(examples)
    whose = [
        (tuple(processor.tokenizer(caption)["input_ids"]), n, tuple(np.float16(feature)))
        for n, i in enumerate((7, 2, 4))
        for caption, feature in zip(rows[i]["captions"], rows[i]["teacher_text_embeds"])
    ]
    found = [
        (tuple(ids[mask == 1].tolist()), owner, tuple(feature))
        for ids, mask, owner, feature in zip(
            batch["input_ids"],
            batch["attention_mask"],
            batch["caption_to_image"].tolist(),
            batch["teacher_text"].numpy(),
        )
    ]
    assert sorted(found) == sorted(whose)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == batch["input_ids"].shape[1]
    assert batch["text_buckets"] == text_buckets(np.array(lengths))
    assert batch["teacher_text"].dtype == torch.float16
    assert np.array_equal(
        batch["teacher_image"].numpy(), np.float16([rows[i]["teacher_image_embeds"] for i in (7, 2, 4)])
    )
    assert batch["image_groups"].tolist() == [id_hash(rows[i]["group_id"]) for i in (7, 2, 4)]


@pytest.mark.parametrize("seed", range(20))
def test_a_tenth_of_the_tokens_is_padding_at_most(seed):
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(2, rng.integers(3, 60), size=rng.integers(50, 200)))[::-1]
    buckets = text_buckets(lengths)
    assert sum(rows for rows, _ in buckets) == len(lengths)
    start = 0
    for rows, tokens in buckets:
        assert rows >= 2 and tokens == lengths[start]  # the longest: nothing is cut off
        start += rows
    assert sum(rows * tokens for rows, tokens in buckets) <= lengths.sum() / 0.9


@pytest.mark.parametrize("seed", range(10))
def test_no_other_cut_into_as_many_buckets_has_less_padding(seed):
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(2, 30, size=12))[::-1]
    buckets = text_buckets(lengths)
    least = min(
        sum((end - start) * lengths[start] for start, end in itertools.pairwise((0, *cuts, 12)))
        for cuts in itertools.combinations(range(2, 11), len(buckets) - 1)
        if all(end - start >= 2 for start, end in itertools.pairwise((0, *cuts, 12)))
    )
    assert sum(rows * tokens for rows, tokens in buckets) == least


@pytest.mark.parametrize(
    ("lengths", "buckets"),
    [([7], [(1, 7)]), ([9, 2], [(2, 9)]), ([5] * 30, [(30, 5)]), ([20] * 9 + [19] * 9, [(18, 20)])],
)
def test_few_or_like_captions_are_one_bucket(lengths, buckets):
    assert text_buckets(np.array(lengths)) == buckets


@pytest.mark.parametrize("seed", range(10))
def test_on_a_gpu_a_batch_is_cut_once_at_most_and_where_it_saves_most(seed):
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(2, 60, size=100))[::-1]
    assert most_buckets(torch.device("cuda", 1)) == 2 and most_buckets(torch.device("cpu")) == 32
    assert len(text_buckets(lengths)) > 2
    (first, longest), (second, shorter) = text_buckets(lengths, most=2)
    assert first + second == 100 and (longest, shorter) == (lengths[0], lengths[first])
    costs = {cut: cut * lengths[0] + (100 - cut) * lengths[cut] for cut in range(2, 99)}
    assert costs[first] == min(costs.values())
    assert text_buckets(np.array([20] * 9 + [19] * 9), most=2) == [(18, 20)]
    assert text_buckets(np.array([9, 2]), most=2) == [(2, 9)]


def test_the_collator_makes_as_many_buckets_as_it_is_told():
    _, processor = make_student()
    captions = [" ".join(["word"] * count) for count in range(1, 25)]
    examples = [{"image_id": "0", "group": 0, "captions": captions, "image": Image.new("RGB", (32, 32))}]
    batches = [RetrievalCollator(processor, 64, most)(examples) for most in (2, 32)]
    assert len(batches[0]["text_buckets"]) == 2 < len(batches[1]["text_buckets"])
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_draws_depend_on_seed_epoch_and_image_alone():
    rows = make_rows(12)

    def views(dataset, order, epoch):
        dataset.set_epoch(epoch)
        return {
            e["image_id"]: (np.asarray(e["image"]).tobytes(), tuple(e["captions"]))
            for e in dataset.__getitems__(order)
        }

    first = views(RetrievalDataset(rows, True, VIEWS), list(range(12)), 1)
    shuffled = views(RetrievalDataset(rows.shuffle(seed=1), True, VIEWS), list(range(11, -1, -1)), 1)
    assert first == shuffled
    assert first != views(RetrievalDataset(rows, True, VIEWS), list(range(12)), 2)
    assert first != views(RetrievalDataset(rows, True, replace(VIEWS, seed=4)), list(range(12)), 1)
    assert all(len(captions) <= 2 for _, captions in first.values())


def test_sampled_captions_keep_their_own_features():
    rows = make_rows(12)
    for example in RetrievalDataset(rows, True, VIEWS).__getitems__(list(range(12))):
        row = rows[int(example["image_id"].split("/")[1])]
        for caption, feature in zip(example["captions"], example["teacher_text"]):
            expected = row["teacher_text_embeds"][row["captions"].index(caption)]
            assert np.array_equal(feature, np.float16(expected))


def test_an_unreadable_image_is_left_out_and_named():
    rows = make_rows(4).cast_column("image", datasets.Image(decode=False))
    examples = [dict(row) for row in rows]
    examples[1]["image"] = {"bytes": b"no image", "path": None}
    broken = datasets.Dataset.from_list(examples, features=rows.features).cast_column("image", datasets.Image())
    _, processor = make_student()
    batch = RetrievalCollator(processor, 32)(RetrievalDataset(broken, True).__getitems__([0, 1, 2]))
    assert len(batch["pixel_values"]) == 2 and len(batch["unreadable"]) == 1
    assert batch["unreadable"][0].startswith("0/1: unreadable image")
    assert len(batch["teacher_text"]) == len(batch["input_ids"]) == len(rows[0]["captions"]) + len(rows[2]["captions"])


def test_random_view_repeats_the_edge_and_keeps_the_size():
    image = Image.new("RGB", (40, 20), (10, 20, 30))
    view = random_view(image, random.Random(0), 0.4, 0.4)
    assert view.size == (40, 20) and set(view.get_flattened_data()) == {(10, 20, 30)}
    assert random_view(image, random.Random(0), 0.0, 0.0) is image


def picture_bytes(image: Image.Image, file_format: str, **settings) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def test_a_view_of_another_size_shows_the_same_part():
    """A ramp is one after any resampling: what a view shows can be read from its colours."""
    across, down = np.meshgrid(np.linspace(0, 255, 400), np.linspace(0, 255, 300))
    ramp = Image.fromarray(np.stack([across, down, np.zeros_like(across)], axis=-1).round().astype(np.uint8))
    for seed in range(5):
        own = random_view(ramp, random.Random(seed), 0.05, 0.2).resize((40, 30), Image.Resampling.BILINEAR)
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            once = random_view(ramp, random.Random(seed), 0.05, 0.2, (40, 30), resample)
            assert once.size == (40, 30)
            inner = (np.asarray(view)[2:-2, 2:-2].astype(int) for view in (once, own))
            assert np.abs(np.subtract(*inner)).max() <= 2


@pytest.mark.parametrize("processor, size", [
    (ViTImageProcessorPil(size={"height": 20, "width": 30}), (30, 20)),
    (ViTImageProcessorPil(size={"height": 20, "width": 30}, do_resize=False), None),
    (CLIPImageProcessorPil(), None),  # the shortest side, then a crop
    (ConvNextImageProcessorPil(), None),
    (object(), None),
])  # fmt: skip
def test_views_are_made_small_where_the_processor_squashes_all_images_to_one_size(processor, size):
    assert size_of_all(processor) == size


def test_the_processor_leaves_a_view_of_its_size_as_it_is(tmp_path):
    rows = make_rows(8).cast_column("image", datasets.Image(decode=False))
    png = picture_bytes(Image.effect_noise((60, 45), 80).convert("RGB"), "PNG")
    rows = rows.map(lambda row: {"image": png}).cast_column("image", datasets.Image())
    trainer = make_trainer(tmp_path, rows, random_shift=0.1, random_zoom=0.2)
    (example,) = trainer.train_dataset.__getitems__([3])
    processor = trainer.processing_class.image_processor
    size = (processor.size.width, processor.size.height)
    assert example["image"].size == size == trainer.train_dataset.views.size != rows[3]["image"].size
    pixels = trainer.data_collator([example])["pixel_values"][0].numpy()
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    expected = (np.asarray(example["image"]).transpose(2, 0, 1) / 255 - mean) / std
    assert np.abs(pixels - expected).max() < 1e-6


def test_without_augmentation_an_image_is_given_whole(tmp_path):
    """And so the student is trained on the pixels that it is evaluated on, bit for bit."""
    rows = make_rows(8)
    trainer = make_trainer(tmp_path, rows)
    assert trainer.train_dataset.views.least_side is None
    (example,) = trainer.train_dataset.__getitems__([3])
    assert np.array_equal(np.asarray(example["image"]), np.asarray(rows[3]["image"].convert("RGB")))


def test_only_training_decodes_a_jpeg_small(tmp_path, monkeypatch):
    rows = make_rows(4).cast_column("image", datasets.Image(decode=False))
    jpeg = picture_bytes(Image.new("RGB", (600, 400), "red"), "JPEG")
    rows = rows.map(lambda row: {"image": jpeg}).cast_column("image", datasets.Image())
    drafts, draft = [], JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "draft", lambda self, mode, size: [drafts.append(size), draft(self, mode, size)]
    )
    trainer = make_trainer(tmp_path, rows, eval_dataset=rows, random_zoom=0.2)
    trainer.evaluate()
    trainer.encode(rows)
    RetrievalDataset(rows, True).__getitems__([0])
    assert drafts == []
    trainer.train_dataset.__getitems__([0])
    side = math.ceil(trainer.train_dataset.views.size[0] / 0.8)
    assert drafts == [(side, side)]
