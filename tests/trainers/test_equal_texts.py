"""Captions that stand for several images: counted against Python's own sets, said, and no negatives in a run."""

from __future__ import annotations

from collections import defaultdict

import datasets
import numpy as np
import pytest
import torch
from conftest import DIM, NAMES, make_rows, make_student, with_names
from safetensors.torch import load_file, save_file
from tiny_trainer import first_gradients, largest_difference, make_trainer

from rows.columns import id_hash, rows_and_captions, text_id, text_ids
from rows.teacher_columns import teacher_rows
from trainers import ContrastiveTrainer, DSMDTrainer, equal_texts, retrieval_metrics
from trainers.batches import NO_TEXT, RetrievalCollator, RetrievalDataset, Views
from trainers.distillation_trainer import STATE_FILE
from trainers.equal_texts import find_shared_texts
from trainers.feature_queue import UNKNOWN_TEXT
from trainers.run import checkpoints
from trainers.streaming import StreamedRetrievalDataset


KINDS = ("image", "text")


@pytest.fixture(scope="module")
def named():
    return with_names(make_rows(64))


@pytest.mark.parametrize("at_once", [7, 5000])
@pytest.mark.parametrize("grouped", [True, False])
def test_shared_texts_against_sets(monkeypatch, caplog, named, grouped, at_once):
    monkeypatch.setattr(equal_texts, "ROWS_AT_ONCE", at_once)
    column = "group_id" if grouped else "image_id"
    rows = named if grouped else named.remove_columns("group_id")
    owners, number = defaultdict(set), 0
    for row in rows:
        for caption in row["captions"]:
            owners[caption].add(row[column])
            number += 1
    several = {caption for caption, of in owners.items() if len(of) > 1}
    found = find_shared_texts(rows, "train", "each is right")
    assert found.ids == {text_id(caption) for caption in several} and several <= set(NAMES) and several
    count = sum(caption in several for own in rows["captions"] for caption in own)
    assert found.share == pytest.approx(100 * count / number)
    most = max(len(of) for of in owners.values())
    (said,) = caplog.messages
    assert f"{100 * count / number:.3g} % of the captions of train stand for several images" in said
    assert any(f"({name!r} for {most}): each is right." in said for name in several)


@pytest.mark.parametrize(
    ("captions", "groups"),
    [
        ([["a"], ["b"], ["A"]], "123"),  # another letter is another text
        ([["a", "a"], ["b"]], "12"),  # twice for one image
        ([["a"], ["a", "b"]], "11"),  # for two images of one group
        ([["a"]], "1"),
    ],
)
def test_nothing_is_shared_and_nothing_said(caplog, captions, groups):
    rows = datasets.Dataset.from_dict(
        {"captions": captions, "group_id": list(groups), "image_id": list("xyz")[: len(groups)]}
    )
    assert find_shared_texts(rows, "train", "").ids == frozenset() and not caplog.messages


def test_a_caption_of_a_terminals_controls_is_said_without_them(caplog):
    rows = datasets.Dataset.from_dict({"captions": [["\x1b[2J" + "x" * 99]] * 2, "image_id": ["1", "2"]})
    assert find_shared_texts(rows, "train", "").share == 100
    assert "\x1b" not in caplog.text and "x..." in caplog.text


def test_ids_are_63_bits_of_the_text_as_it_is_written():
    assert text_id("a cat") == text_id("a " + "cat") != text_id("A cat")
    assert text_id("a cat") == id_hash("a cat") % 2**63  # stored in checkpoints: must never change
    assert text_id("a cat") == 2512202700328793447
    rows = make_rows(9)
    assert text_ids(rows).tolist() == [text_id(caption) for own in rows["captions"] for caption in own]


def test_a_batch_names_its_texts(named):
    _, processor = make_student()
    shared = find_shared_texts(named, "train", "").ids
    one = Views(captions_per_image=1, seed=3)
    examples = RetrievalDataset(named, True, one, shared).__getitems__([0, 1, 2, 3])
    batch = RetrievalCollator(processor, 32)(examples)
    drawn = {text_id(caption) for example in examples for caption in example["captions"]}
    assert set(batch["text_ids"].tolist()) == drawn and batch["text_ids"].shape == (4,)
    tokens = {tuple(processor.tokenizer(text)["input_ids"]): text_id(text) for e in examples for text in e["captions"]}
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], batch["text_ids"].tolist()):
        assert tokens[tuple(ids[mask == 1].tolist())] == text
    for own, texts in zip(named["captions"][:4], batch["image_texts"].tolist()):
        expected = {text_id(caption) for caption in own} & shared  # drawn or not
        assert set(texts) - {NO_TEXT} == expected and texts.count(NO_TEXT) == len(texts) - len(expected)
    plain = RetrievalCollator(processor, 32)(RetrievalDataset(named, True, one).__getitems__([0, 1]))
    assert not {"text_ids", "image_texts"} & plain.keys()


def test_a_run_without_equal_captions_carries_no_texts(tmp_path, rows, caplog):
    trainer = make_trainer(tmp_path, rows)
    trainer.train()
    assert trainer.image_queue.texts is None and trainer.step_rows.text_ids is None
    assert not any("texts" in name for name in trainer.distillation_state())
    assert "stand for several images" not in caplog.text


def test_a_run_says_the_share_and_its_dictionary_knows_the_text_of_each_row(tmp_path, named, caplog):
    """Rows of the dictionary are known by their features, over steps that wrap the queues around."""
    shared = find_shared_texts(named, "train", "").ids
    caplog.clear()
    known: dict[tuple, set[int]] = {}
    for row in named.with_format("numpy"):
        ids = [text_id(caption) for caption in row["captions"]]
        known[key(row["teacher_image_embeds"])] = set(ids) & shared
        known.update({key(feature): {text} for feature, text in zip(row["teacher_text_embeds"], ids)})
    seen = 0

    class Spy(DSMDTrainer):
        def begin_step(self, batches):
            nonlocal seen
            super().begin_step(batches)
            rows = self.dictionary()
            of_texts = {"image": rows.image_texts.tolist(), "text": rows.text_ids[:, None].tolist()}
            for kind in KINDS:
                for feature, texts in zip(getattr(rows, kind), of_texts[kind], strict=True):
                    assert set(texts) - {NO_TEXT, UNKNOWN_TEXT} == known[key(feature)]
                    seen += len(known[key(feature)])

    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "queue_size": 24, "max_steps": 6}
    trainer = make_trainer(tmp_path, named, captions_per_image=2, **settings)
    assert any("of the captions of train stand for several images" in line for line in caplog.messages)
    trainer.__class__ = Spy
    trainer.train()
    assert seen > 200


def key(feature) -> tuple:
    """A row of features as something that finds it again, normalised or not."""
    feature = torch.as_tensor(np.asarray(feature)).float()
    return tuple((feature / feature.norm()).mul(1e4).round().int().tolist())


@pytest.mark.parametrize("trainer_class", [DSMDTrainer, ContrastiveTrainer])
def test_texts_that_no_other_image_has_need_not_be_known(tmp_path, named, trainer_class):
    """As in a stream, where all are named; and texts that are shared do count."""
    found = {}
    for which, texts in (("shared", find_shared_texts(named, "train", "").ids), ("all", None), ("none", frozenset())):
        trainer = make_trainer(tmp_path / which, named, trainer_class=trainer_class)
        assert trainer.train_dataset.shared_texts == find_shared_texts(named, "train", "").ids
        trainer.train_dataset.shared_texts = texts
        trainer.train()
        found[which] = trainer.model.state_dict()
    assert all(torch.equal(tensor, found["all"][name]) for name, tensor in found["shared"].items())
    assert largest_difference(found["shared"], found["none"]) > 1e-5


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, named):
    settings = {"losses": ["contrastive", "feature", "similarity"], "captions_per_image": 2}
    whole, _ = first_gradients(tmp_path / "whole", named, **settings)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    accumulated, _ = first_gradients(tmp_path / "parts", named, **settings, **parts)
    assert largest_difference(whole, accumulated) < 1e-5


def test_resume_gives_the_same_run_and_goes_on_from_a_queue_without_texts(tmp_path, named):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "queue_size": 64}
    trainer = make_trainer(tmp_path / "run", named, **settings)
    trainer.train()
    expected = {**trainer.model.state_dict(), **trainer.distillation_state()}
    assert "image_queue.texts" in expected and "text_queue.texts" in expected
    checkpoint = tmp_path / "run" / "checkpoint-2"
    trainer = make_trainer(tmp_path / "run", named, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    resumed = {**trainer.model.state_dict(), **trainer.distillation_state()}
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())

    state = {name: tensor for name, tensor in load_file(checkpoint / STATE_FILE).items() if "texts" not in name}
    save_file(state, checkpoint / STATE_FILE)  # as an earlier release left it
    checkpoints.reseal(checkpoint, STATE_FILE)
    trainer = make_trainer(tmp_path / "run", named, **{**settings, "max_steps": 3}, allow_changes=True)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    texts = trainer.image_queue.texts
    assert (texts == UNKNOWN_TEXT).all(dim=1).sum() == 32 and (texts[32:48] != UNKNOWN_TEXT).all()


def test_a_stream_names_the_texts_of_every_caption(tmp_path, named):
    named.to_parquet(tmp_path / "rows.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True)
    example = next(iter(StreamedRetrievalDataset(stream, 1, DIM, views=Views(captions_per_image=1))))
    (row,) = (row for row in named if row["image_id"] == example["image_id"])
    assert example["image_texts"] == [text_id(caption) for caption in row["captions"]]
    assert example["text_ids"] == [text_id(caption) for caption in example["captions"]]


def test_an_evaluation_counts_equal_captions_and_says_what_the_other_rule_gives(tmp_path, named, caplog):
    split = with_names(make_rows(30, seed=1), every=1)
    groups, owner = rows_and_captions(split)
    names = [caption for own in split["captions"] for caption in own]
    found = {}
    for by_index in (False, True):
        caplog.clear()
        trainer = make_trainer(tmp_path / str(by_index), None, eval_dataset=split, recall_by_index=by_index)
        image, text = trainer.encode(split)
        figures = found[by_index] = trainer.evaluate()
        trainer.evaluate()
        share = find_shared_texts(split, "eval", "").share
        assert figures["eval_shared_captions"] == share > 10
        told = retrieval_metrics(image, text, groups, groups[owner], text_ids=None if by_index else names)
        assert {name: figures[f"eval_{name}"] for name in told} == told
        (said,) = {line for line in caplog.messages if "stand for several images" in line and "right" in line}
        assert ("only its own image is" in said) == by_index and "of the captions of eval" in said
        teacher = retrieval_metrics(*teacher_rows(split), groups, groups[owner], text_ids=None if by_index else names)[
            "rsum"
        ]
        assert figures["teacher_eval_rsum"] == teacher
    assert found[False]["eval_rsum"] == found[True]["eval_rsum_by_text"] > found[True]["eval_rsum"]
    assert found[True]["eval_rsum"] == found[False]["eval_rsum_by_index"]


def test_an_evaluation_without_equal_captions_says_nothing_of_them(tmp_path, validation_rows, caplog):
    figures = [
        make_trainer(tmp_path / str(by_index), None, eval_dataset=validation_rows, recall_by_index=by_index).evaluate()
        for by_index in (False, True)
    ]
    assert not any("shared" in name or "rsum_by" in name for name in figures[0])
    assert "stand for several images" not in caplog.text
    assert all(figures[0][name] == figures[1][name] for name in figures[0] if "rsum" in name or "_r1" in name)
