"""Two-way recall through the package `evaluate`."""

import doctest
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import trainers.metrics
from trainers import retrieval_metrics


PATH = str(Path(trainers.metrics.__file__).with_name("two_way_recall.py"))


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(PATH, cache_dir=tmp_path)


def make(count=30, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, dim)).astype("float32")
    captions = [
        image + rng.normal(size=(n, dim)).astype("float32") for image, n in zip(images, rng.integers(1, 6, count))
    ]
    return images, captions


def expected(images, captions, groups):
    text_groups = [group for group, texts in zip(groups, captions) for _ in texts]
    return retrieval_metrics(torch.tensor(images), torch.tensor(np.concatenate(captions)), groups, text_groups)


def test_a_case_by_hand(metric):
    # Image 0 = x, image 1 = y. Of image 0's captions one lies at x, one nearer to y; image 1's is halfway, a tie.
    metric.add_batch(predictions=[[2.0, 0.0], [0.0, 3.0]], references=[[[1.0, 0.0], [0.1, 1.0]], [[1.0, 1.0]]])
    result = metric.compute()
    assert result["image_to_text_r1"] == 50.0  # y finds image 0's second caption first
    assert result["text_to_image_r1"] == pytest.approx(100 / 3)
    assert result["text_to_image_r5"] == result["image_to_text_r5"] == 100.0
    assert result["rsum"] == pytest.approx(50 + 100 / 3 + 4 * 100)
    assert (result["image_to_text_median_rank"], result["text_to_image_median_rank"]) == (1.5, 2.0)


@pytest.mark.parametrize("kind", ["arrays", "lists", "tensors"])
def test_batches_are_one_set(metric, kind):
    images, captions = make()
    to = {"arrays": lambda x: x, "lists": lambda x: x.tolist(), "tensors": torch.tensor}[kind]
    for part in (slice(0, 1), slice(1, 20), slice(20, None)):
        metric.add_batch(predictions=to(images[part]), references=[to(texts) for texts in captions[part]])
    groups = [f"group {i // 2}" for i in range(30)]
    assert metric.compute(groups=groups) == expected(images, captions, groups)
    assert len(metric) == 0  # ready for the next set


def test_every_image_is_for_itself_without_groups(metric):
    images, captions = make(seed=1)
    assert metric.compute(predictions=images, references=captions) == expected(images, captions, range(30))
    shared = metric.compute(predictions=images, references=captions, groups=[i // 3 for i in range(30)])
    assert shared["rsum"] > expected(images, captions, range(30))["rsum"]


def test_equal_captions_are_right_for_each_image_that_has_one(metric):
    images, captions = make(seed=3)
    texts = [["a photo", "a cat", "a dog"][i % 3] for i in range(sum(map(len, captions)))]
    groups = [i for i, own in enumerate(captions) for _ in own]
    rows = torch.tensor(images), torch.tensor(np.concatenate(captions))
    found = metric.compute(predictions=images, references=captions, text_ids=texts)
    assert found == retrieval_metrics(*rows, range(30), groups, text_ids=texts)
    assert found["rsum"] > expected(images, captions, range(30))["rsum"]


def test_combined_with_another_metric(metric):
    images, captions = make(seed=2)
    result = evaluate.combine([metric]).compute(predictions=images, references=captions)
    assert result == expected(images, captions, range(30))


def test_bad_input_stops(metric):
    images, captions = make(4)
    with pytest.raises(ValueError, match="image row 1 of group 1 has none"):
        metric.compute(predictions=images, references=[captions[0], captions[1][:0], *captions[2:]])
    with pytest.raises(ValueError, match="image_groups must name a group for each of the 4"):
        metric.compute(predictions=images, references=captions, groups=["a"] * 3)
    with pytest.raises(ValueError, match="row 2 holds nan"):
        metric.compute(predictions=np.where(np.arange(4)[:, None] == 2, np.nan, images), references=captions)
    with pytest.raises(ValueError, match="6 wide and text_embeds 5"):
        metric.compute(predictions=images, references=[texts[:, :5] for texts in captions])


def test_it_is_documented_and_its_example_is_true(metric, monkeypatch):
    assert "Recall at 1, 5 and 10" in metric.description and "karpathy2015deep" in metric.citation
    monkeypatch.chdir(Path(PATH).parents[1])
    example = doctest.DocTestParser().get_doctest(
        metric.inputs_description, {"evaluate": evaluate}, "example", None, 0
    )
    assert example.examples
    runner = doctest.DocTestRunner()
    assert runner.run(example).failed == 0


def test_it_needs_only_the_two_files(metric):
    module = type(metric).__module__
    assert module.startswith("evaluate_modules.")
    copied = Path(__import__(module, fromlist=["x"]).__file__).with_name("metrics.py")
    assert copied.read_bytes() == Path(trainers.metrics.__file__).read_bytes()
