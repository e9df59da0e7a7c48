"""Every program of `make bench` on tiny models, and what it measures against what it says it does."""

import functools
import json
import re
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from benchmarks import __main__ as all_programs
from benchmarks import (
    cached_teacher,
    captions_per_second,
    common,
    loader,
    retrieval_speed,
    scale,
    start_up,
    step_cost,
    teacher_features,
    training_views,
)
from benchmarks.gpu.common import make_trainer
from rows.checks import check_dataset
from trainers.metrics import ranks


def leading_number(text: str) -> float:
    return float(re.search(r"[\d.]+", text)[0])


def check(rows: list[common.Row], ratios: bool = True) -> None:
    for row in rows:
        assert str(row).count("|") == 6
        assert leading_number(row.measured) >= 0
        assert not ratios or leading_number(row.ratio) > 0


@pytest.fixture(scope="module")
def paper_trainer(tmp_path_factory):
    settings = {"bf16": False, "queue_size": 64, "per_device_train_batch_size": 4}
    return make_trainer(str(tmp_path_factory.mktemp("run")), 64, tiny=True, **settings)


def test_sides_take_turns_and_warm_up_rounds_are_dropped():
    calls = []

    def side(name):
        calls.append(name)
        return len(calls)

    times = common.interleaved(lambda: side("a"), lambda: side("b"), rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert times == [[3, 5], [4, 6]]
    assert common.ratio([3, 5, 8], [1, 5, 2]) == 3  # of 3, 1 and 4


def test_published_batch_is_the_same_pairs_one_image_each(paper_trainer):
    examples = common.first_examples(paper_trainer, 4)
    ours = common.collate(paper_trainer, examples)
    published = captions_per_second.published_batch(paper_trainer, examples)
    length = min(ours["input_ids"].shape[1], captions_per_second.PUBLISHED_LENGTH)
    assert published["input_ids"].shape == (20, captions_per_second.PUBLISHED_LENGTH)
    assert published["pixel_values"].shape == (20, 3, 32, 32)
    assert torch.equal(published["input_ids"][:, :length], ours["input_ids"][:, :length])
    assert published["attention_mask"][:, length:].sum() == 0
    assert published["text_buckets"] == [(20, captions_per_second.PUBLISHED_LENGTH)]
    for batch_of in ("pixel_values", "teacher_image", "image_groups"):
        assert torch.equal(
            published[batch_of][published["caption_to_image"]], ours[batch_of][ours["caption_to_image"]]
        )
    assert torch.equal(published["teacher_text"], ours["teacher_text"])
    assert captions_per_second.padding_share(ours) < 0.1 < captions_per_second.padding_share(published)


def test_padding_share_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert captions_per_second.padding_share({"attention_mask": mask, "text_buckets": [(2, 4), (2, 2)]}) == 0.25


def test_a_step_trains_and_without_optimizer_it_does_not(paper_trainer):
    batch = common.collate(paper_trainer, common.first_examples(paper_trainer, 4))
    before = {name: value.clone() for name, value in paper_trainer.model.state_dict().items()}
    assert common.training_step(paper_trainer, batch)() > 0
    assert all(torch.equal(value, before[name]) for name, value in paper_trainer.model.state_dict().items())
    assert common.training_step(paper_trainer, batch, paper_trainer.create_optimizer())() > 0
    assert not torch.equal(paper_trainer.model.visual_projection.weight, before["visual_projection.weight"])


def test_queues_are_filled(paper_trainer):
    common.fill_queues(paper_trainer)
    assert len(paper_trainer.image_queue) == len(paper_trainer.text_queue) == 64
    torch.testing.assert_close(paper_trainer.image_queue.features.norm(dim=1), torch.ones(64))


def test_captions_per_second():
    (row,) = captions_per_second.measure(images=3, rounds=1, tiny=True)
    check([row])
    assert "3 images with 15 captions" in row.claim
    assert float(re.search(r"FLOPs: ([\d.]+) x", row.ratio)[1]) > 1.5


def test_step_cost(rows):
    check(step_cost.paper_student(captions=7, rounds=1, tiny=True))
    check(step_cost.quickstart(rows, images=8, rounds=1))


def test_cached_teacher():
    cached, making = cached_teacher.measure(images=2, rounds=1, tiny=True)
    check([cached, making])
    assert leading_number(cached.ratio) > 0.5


def test_teacher_features():
    check(teacher_features.measure("tiny", rows=3, rounds=1, batch_size=2, num_workers=0))


def test_training_views(monkeypatch):
    monkeypatch.setattr(training_views, "IMAGES", (("PNG", (20, 16), 12), ("JPEG", (600, 450), 48)))
    monkeypatch.setattr(training_views, "BATCH", (2, 32))
    rows = training_views.measure(rounds=1)
    check(rows)
    words = ("PNG of 20 x 16", "JPEG of 600 x 450", "2 views of 32 pixels through the processor as bytes, 0.0 MB")
    assert all(word in row.claim for word, row in zip(words, rows, strict=True))
    once, twice = (way(training_views.stored("JPEG", (600, 450)), 1) for way in training_views.ways(48))
    assert once.shape == twice.shape == (3, 48, 48)
    assert 0 < np.abs(once - twice).mean() < 0.1  # the same part of the picture, by other roundings


def test_loader(tmp_path, rows, validation_rows, monkeypatch):
    monkeypatch.setattr("train.use_the_cores", lambda device, processes: None)  # or later tests would have them too
    splits = {"train": rows, "validation": validation_rows, "test": validation_rows}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "rows")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    settings = {
        "dataset_name": tmp_path / "rows",
        "vision_config": json.dumps({"model_type": "vit", "patch_size": 16, **sizes}),
        "text_config": json.dumps({"model_type": "bert", **sizes}),
        "image_size": 32,
        "vocab_size": 400,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "use_cpu": True,
    }
    arguments = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
    waits, epoch = loader.measure(arguments, steps=3, rounds=1)
    check([waits, epoch])
    assert "0 loader workers" in waits.claim
    assert 0 <= leading_number(waits.ratio) <= 100


def test_ranks_by_sorting_are_ours():
    image, text, image_groups, text_groups = retrieval_speed.make_embeds(20, 90, 16)
    image_ranks, text_ranks = ranks(image, text, image_groups, text_groups)
    texts_of = [np.flatnonzero(text_groups.numpy() == i) for i in range(20)]
    assert retrieval_speed.ranks_by_sorting(image.numpy(), text.numpy(), texts_of) == image_ranks.tolist()
    answers = [text_groups.numpy()[[i]] for i in range(90)]
    assert retrieval_speed.ranks_by_sorting(text.numpy(), image.numpy(), answers) == text_ranks.tolist()


def test_retrieval_speed():
    check(retrieval_speed.beside_the_loop(images=30, captions=160, dim=8, some=10, rounds=1), ratios=False)
    check(retrieval_speed.at_scale(side=200, dim=8), ratios=False)


def test_the_start_of_a_run_is_timed_on_rows_of_the_contract(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = scale.made_rows(tmp_path / "rows.arrow", 250, at_once=100)
    assert len(made) == len(set(made["image_id"])) == 250 and made[249]["image"].size == (8, 8)
    check_dataset(made, "train", scale.DIM)
    lines = scale.start_table(250).splitlines()
    one, eight, _, _ = ([float(x) for x in re.findall(r"([\d.]+) s", line)] for line in lines[2:6])
    assert one[0] >= eight[0] and one[0] >= one[1] >= 0
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["250", "250", "2,500", "2,500"]


def test_start_up_waits_for_the_sign_and_ends_the_program():
    forever = "import time; print('starts'); print({'loss': 1}); time.sleep(600)"
    assert start_up.seconds_until([sys.executable, "-c", forever], "'loss'") < 60
    with pytest.raises(RuntimeError, match="broken"):
        start_up.seconds_until([sys.executable, "-c", "raise ValueError('broken')"], "'loss'")


def test_programs_run_in_processes_of_their_own(monkeypatch):
    programs = SimpleNamespace(measure=functools.partial(sorted, "ba")), SimpleNamespace(measure=list)
    monkeypatch.setattr(all_programs, "PROGRAMS", programs)
    assert list(all_programs.rows()) == ["a", "b"]


def test_table(capsys):
    common.print_table([common.Row("claim", "1 s", "2 s", "2.0 x", "faster")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2] == "| claim | 1 s | 2 s | 2.0 x | faster |"
    assert f"torch {torch.__version__}" in lines[-1]
