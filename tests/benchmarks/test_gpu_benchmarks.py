"""The GPU programs on a CPU, with tiny towers."""

import sys

import numpy as np
import pytest
import torch
from transformers import set_seed

from benchmarks import teacher_features
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import loader, training, whole_run
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


def test_a_part_prints_a_table(capsys):
    print_table(iter([("a", "1 s")]))
    printed = capsys.readouterr().out
    assert "No GPU here" in printed and "torch" in printed and "commit" in printed and "\n| a | 1 s |\n" in printed


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, str]:
    """All the programs, each in a process of its own, as `python -m benchmarks.gpu --device cpu` runs them."""
    path = tmp_path_factory.mktemp("gpu") / "new" / "gpu.md"
    assert gpu.main(["--device", "cpu", "--output", str(path)]) == 0
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    assert "say nothing" in path.read_text()
    return dict(line.strip("| ").split(" | ") for line in lines[1:])


def test_the_paper_s_student_is_timed_eager_and_compiled(table):
    for mode in ("eager", "compiled"):
        name = f"the paper's student, {mode}"
        assert number(table[f"{name}, captions/s in `trainer.train()`"]) > 0
        assert 0 <= number(table[f"{name}, of it the loader was waited for"]) < 100
        assert number(table[f"{name}, student's FLOP/s"]) > 0
        assert number(table[f"{mode}, captions/s"]) > 0
        assert 0 < number(table[f"{mode}, share of the step outside the student"]) < 100
    # The two modes may find another batch the fastest, whose captions are padded to another length.
    eager, compiled = (number(table[f"{mode}, forward and backward"]) for mode in ("eager", "compiled"))
    assert 0 < compiled == pytest.approx(eager, rel=0.2)
    assert number(table["the paper's student, compiled, compiled graphs"]) >= 1
    assert "the paper's student, eager, compiled graphs" not in table
    assert not any("utilisation" in name or "host" in name for name in table)


def test_the_other_parts_have_figures(table):
    name = "the quickstart's student"
    assert number(table[f"{name}, captions/s in `trainer.train()`"]) == pytest.approx(
        number(table[f"{name}, images/s"]), abs=1
    )  # a caption for each image
    assert number(table["FSDP 2, 2 processes of 4 images, captions/s"]) > 0
    assert table["resumed after 2 of 4 steps of 4 images, largest difference of a weight"] == "0 (bit for bit)"
    assert number(table["a checkpoint, written"]) > 0
    assert any(measure.startswith("bare forward, CLIP tiny") for measure in table)
    assert number(table["step, 8 images"]) > 0


def number(figure: str) -> float:
    return float(figure.split()[0].replace(",", ""))


def test_a_part_that_fails_leaves_the_rows_of_the_others(tmp_path, monkeypatch):
    parts = {
        "broken": "print('| a | 1 |', flush=True); raise ValueError('no | memory')",
        "slow": "print('| b | 2 |', flush=True); import time; time.sleep(600)",
        "well": "print('| c | 3 |')",
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "command_of", lambda name: [sys.executable, "-c", parts[name]])
    path = tmp_path / "gpu.md"
    assert gpu.main(["--device", "cpu", "--seconds", "3", "--output", str(path)]) == 1
    assert path.read_text().splitlines()[-5:] == [
        "| a | 1 |",
        "| broken | failed (1): ValueError: no / memory |",
        "| b | 2 |",
        "| slow | failed (longer than 3 s): no word |",
        "| c | 3 |",
    ]


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu"):
        gpu.main([])


def test_a_training_is_timed_from_step_to_step(tmp_path):
    settings = {"per_device_train_batch_size": 4, "disable_tqdm": True, "save_strategy": "no"}
    trainer = make_trainer(str(tmp_path), 64, tiny=True, max_steps=1 + 3 + whole_run.WATCHED, **settings)
    fetch = trainer.get_batch_samples
    timed = whole_run.time_training(trainer, warm_up=1, steps=3)
    assert (timed.steps, timed.images, timed.captions) == (3, 12, 60)
    assert 0 < timed.waited < timed.seconds and timed.memory > 2**20
    assert trainer.state.global_step == 9 and trainer.get_batch_samples == fetch
    with pytest.raises(ValueError, match="max_steps=9 is less than 15"):
        whole_run.time_training(trainer, warm_up=5, steps=5)


def test_padding_of_the_gpus_buckets_is_no_work(trainer):
    own = trainer.data_collator.most_buckets
    flops = []
    for most in (1, 32):
        trainer.data_collator.most_buckets = most
        flops.append(whole_run.flops_of_an_image(trainer))
        assert trainer.data_collator.most_buckets == most
    trainer.data_collator.most_buckets = own
    assert flops[0] == flops[1] > 0


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
