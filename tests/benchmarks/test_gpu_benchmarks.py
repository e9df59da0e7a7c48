"""The GPU programs on a CPU, with tiny towers."""

import numpy as np
import pytest
import torch
from transformers import set_seed

from benchmarks import teacher_features
from benchmarks.gpu import loader, training
from benchmarks.gpu.common import CAPTIONS, Clock, make_rows, make_trainer, print_table


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(str(tmp_path_factory.mktemp("run")), 48, tiny=True)


@pytest.fixture(scope="module")
def model(trainer):
    return training.prepare(trainer)


def test_rows_are_like_coco():
    rows = make_rows(400, dim=8)
    lengths = np.array([[len(caption.split()) for caption in captions] for captions in rows["captions"]])
    assert lengths.shape == (400, CAPTIONS)
    assert 11.5 < lengths.mean() < 12.5 and lengths.max() > 20
    assert rows[0]["image"].size == (256, 256) and rows[0]["image"].format == "JPEG"
    assert np.shape(rows[1]["teacher_text_embeds"]) == (CAPTIONS, 8)


def test_batches_are_of_different_rows(trainer):
    batches = training.make_batches(trainer, 8)
    groups = torch.cat([batch["image_groups"] for batch in batches])
    assert len(groups.unique()) == 8 * training.BATCHES
    assert all(len(batch["input_ids"]) == 8 * CAPTIONS for batch in batches)


def test_the_step_cut_in_parts_is_the_same_step(tmp_path):
    weights = []
    for cut in (False, True):
        trainer = make_trainer(str(tmp_path), 24, tiny=True)
        model = training.prepare(trainer)
        batches = training.make_batches(trainer, 8)
        before = trainer.model.text_projection.weight.clone()
        set_seed(1)
        if cut:
            seconds = training.parts(trainer, model, batches, steps=3)
            assert list(seconds) == list(training.PARTS) and min(seconds.values()) > 0
        else:
            for batch in batches:
                training.step(trainer, model, batch)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
        assert not torch.equal(before, trainer.model.text_projection.weight)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_flops_are_those_of_the_linear_layers_and_little_more(trainer, model):
    batch = training.make_batches(trainer, 8)[0]
    flops = training.student_flops(trainer, model, batch)
    linear = 4 * 32 * 32 + 2 * 32 * 64  # multiplications of a token in the one layer of a tower
    buckets = batch["text_buckets"]
    tokens = 8 * (2 * 2 + 1) + sum(rows * length for rows, length in buckets)
    expected = 6 * linear * tokens + 6 * 32 * 32 * (8 + 8 * CAPTIONS)
    patches = 8 * 4 * 3 * 16 * 16 * 32 * 4  # forward and the weights' gradient
    assert expected + patches <= flops < 1.3 * (expected + patches)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_double_until_the_memory_is_out(trainer, model, monkeypatch):
    def measure(trainer, model, images, steps):
        if images > 8:
            raise torch.cuda.OutOfMemoryError
        return training.Speed(images, 1.0, 0, 0)

    monkeypatch.setattr(training, "measure", measure)
    assert [speed.images for speed in training.double(trainer, model, 4, steps=1)] == [4, 8]
    assert [speed.images for speed in training.double(trainer, model, 1, steps=1)] == [1, 2, 4, 8]
    with pytest.raises(ValueError, match="--start 16"):
        training.double(trainer, model, 16, steps=1)


def test_training_prints_a_table(capsys):
    with torch._dynamo.config.patch(recompile_limit=1):  # one graph for each batch size; tracing takes seconds
        print_table(training.figures(tiny=True, start=16, steps=2))
    printed = capsys.readouterr().out
    rows = dict(line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| "))
    assert "No GPU here" in printed and "torch" in printed
    for mode in ("eager", "compiled"):
        assert float(rows[f"{mode}, captions/s"].replace(",", "")) > 0
        assert 0 < float(rows[f"{mode}, share of the step outside the student"].strip(" %")) < 100
    assert float(rows["student, forward and backward"].split()[0]) > 0
    assert not any("memory" in name or "utilisation" in name or "host" in name for name in rows)


def test_the_loader_is_timed_after_its_start(trainer):
    trainer.args.per_device_train_batch_size = 4
    assert loader.loader_rate(trainer, 1) > 0
    with pytest.raises(ValueError, match="take more rows"):
        loader.loader_rate(trainer, 8)


def test_the_clock_counts_from_mark_to_mark():
    clock = Clock()
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 2 and clock.seconds() == []


def test_teacher_features_of_a_tiny_teacher():
    figures = dict(teacher_features.figures("tiny", rows=4, rounds=1, batch_size=4, num_workers=0))
    assert [float(figure.split()[0].replace(",", "")) > 0 for figure in figures.values()] == [True, True]


def test_the_large_teacher_is_as_large_as_openais():
    with torch.device("meta"):
        model = teacher_features.CLIPModel(teacher_features.make_config("ViT-L/14"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 427_616_513  # openai/clip-vit-large-patch14
