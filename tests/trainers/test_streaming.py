"""Streams: every row once a pass for any processes and workers, the same examples as from memory, exact resume."""

import io
import itertools
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import DIM, make_rows, make_student
from image_files import write_tar
from launching import launch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import trainers.batches
from rows.columns import id_hash
from trainers import (
    ContrastiveTrainer,
    DSMDTrainer,
    DSMDTrainingArguments,
    base_trainer,
    streaming,
)
from trainers.batches import RetrievalDataset, Views, make_examples
from trainers.streaming import StreamedRetrievalDataset, stream_head


VIEWS = Views(captions_per_image=2, random_shift=0.2, random_zoom=0.2, seed=3)


def parquet_stream(folder, rows, shards: int = 1) -> datasets.IterableDataset:
    """Rows as parquet files that are read as they would be from far."""
    folder.mkdir(exist_ok=True)
    names = [str(folder / f"{shards}-{index}.parquet") for index in range(shards)]
    for index, name in enumerate(names):
        rows.shard(shards, index).to_parquet(name, batch_size=4)
    return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)


def change(rows: datasets.Dataset, row: int, **values) -> datasets.Dataset:
    changed = [{**example, **(values if i == row else {})} for i, example in enumerate(rows)]
    return datasets.Dataset.from_list(changed, features=rows.features)


def make_trainer(folder, stream, trainer_class=DSMDTrainer, **settings):
    model, processor = make_student()
    fixed = {"learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = DSMDTrainingArguments(output_dir=str(folder), **{"queue_size": 24, **fixed, **settings})
    return trainer_class(model, args, stream, processing_class=processor)


def full_state(trainer: DSMDTrainer) -> dict[str, torch.Tensor]:
    """Weights, balancer and queues."""
    state = {**trainer.model.state_dict(), **trainer.distillation_state()}
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def with_pass(monkeypatch):
    """Lets examples tell which pass they are of, and shares of a pass span several tables."""

    def marked(table, epoch, views, **settings):
        for example in make_examples(table, epoch, views, **settings):
            yield {**example, "pass": epoch}

    monkeypatch.setattr(streaming, "make_examples", marked)
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 5)


def passes(stream, count: int, ranks: int, workers: int) -> list[list[str]]:
    """The image ids that all ranks' workers give in the first passes."""
    ids = [[] for _ in range(count)]
    for rank in range(ranks):
        dataset = StreamedRetrievalDataset(stream, 6, DIM, rank, ranks)
        current = [0] * max(workers, 1)
        loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=list)
        # Batches of one come from the workers in turn.
        for step, (example,) in enumerate(itertools.islice(loader, 400)):
            current[step % len(current)] = example["pass"]
            if min(current) >= count:
                break
            if example["pass"] < count:
                ids[example["pass"]].append(example["image_id"])
    return ids


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2), (3, 0)])
def test_every_row_comes_once_in_a_pass(tmp_path, with_pass, shards, ranks, workers):
    rows = make_rows(23)
    stream = parquet_stream(tmp_path, rows, shards)
    for ids in passes(stream, 2, ranks, workers):
        assert Counter(ids) == Counter(rows["image_id"])


def test_processes_that_share_a_shard_get_as_many_rows_each(tmp_path, with_pass):
    stream = parquet_stream(tmp_path, make_rows(23))
    shares = []
    for rank in range(3):
        examples = iter(StreamedRetrievalDataset(stream, 6, DIM, rank, 3))
        shares.append(len(list(itertools.takewhile(lambda example: example["pass"] == 0, examples))))
    assert sorted(shares) == [7, 8, 8]


def test_a_process_reads_no_more_shards_than_its_own(tmp_path):
    rows = make_rows(23)
    stream = parquet_stream(tmp_path, rows, 2)
    shares = []
    for rank in range(2):
        dataset = StreamedRetrievalDataset(stream, 6, DIM, rank, 2)
        shares.append({example["image_id"] for example in itertools.islice(dataset, 11)})
    shards = [set(rows.shard(2, index)["image_id"]) for index in range(2)]
    assert all(any(share <= shard for shard in shards) for share in shares) and not shares[0] & shares[1]


def test_examples_are_those_of_a_map_style_dataset(tmp_path, with_pass):
    rows = make_rows(12)
    stored = RetrievalDataset(rows, with_teacher=True, views=VIEWS, shared_texts=None)
    position = {image_id: i for i, image_id in enumerate(rows["image_id"])}
    streamed = StreamedRetrievalDataset(parquet_stream(tmp_path, rows, 2), 5, DIM, views=VIEWS)
    for example in itertools.islice(streamed, 30):
        stored.set_epoch(example.pop("pass"))
        expected = stored[position[example["image_id"]]]
        assert example.keys() == expected.keys()
        for name, value in example.items():
            assert np.array_equal(np.asarray(value), np.asarray(expected[name])), name
        assert example["teacher_image"].dtype == example["teacher_text"].dtype == np.float16


def test_order_follows_seed_and_pass_and_the_buffer_shuffles(tmp_path):
    rows = make_rows(24)
    stream = parquet_stream(tmp_path, rows)

    def order(buffer: int, **settings) -> list[list[str]]:
        dataset = StreamedRetrievalDataset(stream, buffer, None, views=Views(**settings))
        ids = [example["image_id"] for example in itertools.islice(dataset, 48)]
        return [ids[:24], ids[24:]]

    first, second = order(12)
    assert order(12) == [first, second]
    assert first != second and order(12, seed=7)[0] != first
    assert order(1) == [rows["image_id"][:], rows["image_id"][:]]
    moved = [abs(place - rows["image_id"].index(image_id)) for place, image_id in enumerate(first)]
    assert np.mean(moved) > 3 and first != rows["image_id"][:]


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_skipped_batches_are_not_decoded_and_nothing_else_changes(tmp_path, monkeypatch, workers):
    decoded = torch.zeros((), dtype=torch.int64).share_memory_()
    load_rgb = trainers.batches.load_rgb

    def counted(image, *more):
        decoded.add_(1)
        return load_rgb(image, *more)

    def batches(skip: int) -> list[list]:
        dataset = StreamedRetrievalDataset(stream, 6, DIM, views=VIEWS)
        dataset.skip(skip, batch_size=4)
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=list)
        return list(itertools.islice(loader, 11))

    stream = parquet_stream(tmp_path, make_rows(21), 2)
    whole, resumed = batches(0), batches(7)
    assert resumed[:7] == [[None] * 4] * 7
    for batch, expected in zip(resumed[7:], whole[7:]):
        for example, other in zip(batch, expected):
            assert all(np.array_equal(np.asarray(example[name]), np.asarray(other[name])) for name in other)
    if workers == 0:
        monkeypatch.setattr(trainers.batches, "load_rgb", counted)
        batches(7)
        assert decoded == 4 * 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_image_embeds": [float("nan")] * DIM}, "image_id '0/3'.*NaN"),
        ({"teacher_text_embeds": [[1.0] * DIM] * 9}, "image_id '0/3'.*9 teacher_text_embeds for"),
    ],
)
def test_a_bad_row_in_mid_stream_is_named(tmp_path, values, message):
    dataset = StreamedRetrievalDataset(parquet_stream(tmp_path, change(make_rows(8), 3, **values)), 4, DIM)
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(dataset, 8))


def test_what_cannot_be_used_is_left_out_of_a_stream_and_listed(tmp_path, monkeypatch):
    """Neither caption nor image, an empty caption, a lost image and a cut file, all of them among the rows that are
    looked at beforehand; an image without captions and a text without an image are used."""
    rows = make_rows(24).cast_column("image", datasets.Image(decode=False))
    cut = {"bytes": rows[9]["image"]["bytes"][:60], "path": None}
    empty = ["", *rows[5]["captions"][1:]]
    no_texts, no_image = {"captions": [], "teacher_text_embeds": []}, {"image": None, "teacher_image_embeds": None}
    faults = {3: {**no_texts, **no_image}, 5: {"captions": empty}, 7: {"image": None}, 9: {"image": cut}}
    for row, values in {**faults, 11: no_texts, 13: no_image}.items():
        rows = change(rows, row, **values)
    stream = parquet_stream(tmp_path / "rows", rows, 2)
    head = stream_head(stream)
    assert set(head["image_id"]) == {f"0/{i}" for i in range(24)} - {"0/3", "0/5", "0/7", "0/9"}
    settings = {"max_steps": 8, "per_device_train_batch_size": 6, "shuffle_buffer_size": 4, "save_strategy": "no"}
    trainer = make_trainer(tmp_path / "run", stream, **settings)
    trainer.train()
    reasons = dict(line.split(": ", 1) for line in trainer.unreadable)
    assert set(reasons) == {"0/3", "0/5", "0/7", "0/9"}
    assert "neither an image nor a caption" in reasons["0/3"] and "empty caption" in reasons["0/5"]
    assert "teacher_image_embeds and no image" in reasons["0/7"] and reasons["0/9"].startswith("unreadable image")


def test_features_of_another_width_in_mid_stream_are_refused(tmp_path):
    dataset = StreamedRetrievalDataset(parquet_stream(tmp_path, make_rows(8)), 4, DIM + 4)
    with pytest.raises(ValueError, match="width 16, expected 20"):
        next(iter(dataset))


def test_a_share_without_rows_is_an_error_and_not_a_loop(tmp_path):
    stream = parquet_stream(tmp_path, make_rows(1))
    assert next(iter(StreamedRetrievalDataset(stream, 4, DIM, 0, 2)))["image_id"] == "0/0"
    with pytest.raises(ValueError, match="no row for worker 0 of process 1"):
        next(iter(StreamedRetrievalDataset(stream, 4, DIM, 1, 2)))


def test_the_head_has_the_first_rows_and_all_columns(tmp_path):
    rows = make_rows(9).add_column("teacher", ["{}"] * 9)
    stream = parquet_stream(tmp_path, rows, 2)
    head = stream_head(stream, 7)
    assert head.column_names == rows.column_names and head.features == stream.features
    for name in ("image_id", "captions", "teacher_text_embeds"):
        assert head[name][:] == rows[name][:7]
    assert np.array_equal(np.asarray(head[6]["image"]), np.asarray(rows[6]["image"]))
    assert len(stream_head(stream)) == 9
    with pytest.raises(ValueError, match="features="):
        stream_head(stream.map(lambda row: row))


def npy(features: list) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.float16(features))
    return buffer.getvalue()


def test_webdataset_tars_mapped_to_the_contract(tmp_path):
    rows = make_rows(10)
    names = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    for shard, name in enumerate(names):
        files = []
        for i, row in enumerate(rows.cast_column("image", datasets.Image(decode=False)).shard(2, shard)):
            texts = {column: row[column] for column in ("captions", "image_id", "group_id")}
            files += [(f"{i}.png", row["image"]["bytes"]), (f"{i}.json", json.dumps(texts).encode())]
            files += [(f"{i}.image.npy", npy(row["teacher_image_embeds"]))]
            files += [(f"{i}.text.npy", npy(row["teacher_text_embeds"]))]
        write_tar(Path(name), files)

    def to_row(sample):
        features = {"teacher_image_embeds": sample["image.npy"], "teacher_text_embeds": sample["text.npy"]}
        return {"image": sample["png"], **sample["json"], **features}

    stream = datasets.load_dataset("webdataset", data_files=names, split="train", streaming=True)
    stream = stream.cast_column("png", datasets.Image(decode=False))
    stream = stream.map(to_row, remove_columns=stream.column_names, features=rows.features)
    expected = {e["image_id"]: e for e in RetrievalDataset(rows, True, shared_texts=None).__getitems__(range(10))}
    examples = list(itertools.islice(StreamedRetrievalDataset(stream, 4, DIM), 10))
    assert {example["image_id"] for example in examples} == set(expected)
    for example in examples:
        for name, value in expected[example["image_id"]].items():
            assert np.array_equal(np.asarray(example[name]), np.asarray(value)), name


def test_a_stream_needs_max_steps_and_rows(tmp_path):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_trainer(tmp_path, parquet_stream(tmp_path / "a", make_rows(20)), max_steps=-1)
    with pytest.raises(ValueError, match="train split is empty"):
        make_trainer(tmp_path, parquet_stream(tmp_path / "b", make_rows(2)).filter(lambda row: False))
    with pytest.raises(ValueError, match="no column image_id"):
        make_trainer(tmp_path, parquet_stream(tmp_path / "c", make_rows(20)).remove_columns(["image_id"]))
    with pytest.raises(ValueError, match="Row 0 .*empty caption"):  # every row
        rows = make_rows(1)
        make_trainer(
            tmp_path, parquet_stream(tmp_path / "d", change(rows, 0, captions=["", *rows[0]["captions"][1:]]))
        )
    with pytest.raises(ValueError, match="shuffle_buffer_size=0"):
        DSMDTrainingArguments(output_dir=str(tmp_path), shuffle_buffer_size=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_gives_the_same_run(tmp_path, workers):
    """From the middle of the second pass to the third, four losses, ragged captions, draws, accumulation."""
    stream = parquet_stream(tmp_path / "rows", make_rows(25), 2)
    settings = {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "shuffle_buffer_size": 9,
        "max_steps": 5,
        "random_shift": 0.2,
        "random_zoom": 0.2,
        "captions_per_image": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_grad_norm": 1.0,
        "dataloader_num_workers": workers,
    }
    unbroken = make_trainer(tmp_path / "unbroken", stream, **settings)
    unbroken.train()
    resumed = make_trainer(tmp_path / "resumed", stream, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    assert unbroken.train_dataset.batches_to_skip == 0 and resumed.train_dataset.batches_to_skip == 6
    assert_equal_states(full_state(unbroken), full_state(resumed))
    last = [[e for e in trainer.state.log_history if e.get("step") == 5][0] for trainer in (unbroken, resumed)]
    assert last[0]["loss"] == last[1]["loss"] and last[0]["epoch"] == last[1]["epoch"]


def test_a_finished_run_that_is_resumed_ends(tmp_path):
    """A stream has no last epoch at which Trainer would stop."""
    stream = make_rows(16).to_iterable_dataset()
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    finished = make_trainer(tmp_path, stream, **settings)
    finished.train()
    resumed = make_trainer(tmp_path, stream, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert_equal_states(full_state(finished), full_state(resumed))


def test_the_queue_of_a_stream_is_not_clamped_and_unreadable_images_are_listed(tmp_path, monkeypatch, caplog):
    broken = {"bytes": b"no image", "path": None}
    rows = make_rows(20).cast_column("image", datasets.Image(decode=False))
    rows = change(rows, 13, image=broken).cast_column("image", datasets.Image())
    monkeypatch.setattr(base_trainer, "stream_head", lambda stream: stream_head(stream, 8))
    settings = {"max_steps": 3, "per_device_train_batch_size": 10, "queue_size": 100}
    trainer = make_trainer(tmp_path, parquet_stream(tmp_path / "rows", rows), **settings)
    trainer.train()
    assert trainer.image_queue.size == trainer.text_queue.size == 100 and "clamped" not in caplog.text
    assert len(trainer.image_queue) in (28, 29)  # the broken row comes once a pass of 20
    assert [line.split(":")[0] for line in trainer.unreadable] == ["0/13"]


def test_the_contrastive_trainer_streams_without_a_teacher(tmp_path):
    rows = make_rows(20).remove_columns(["teacher_image_embeds", "teacher_text_embeds", "group_id"])
    trainer = make_trainer(tmp_path, parquet_stream(tmp_path / "rows", rows), ContrastiveTrainer, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_two_processes(tmp_path):
    """Other rows on each, captions and features with their images; equal states; exact resume."""
    rows = make_rows(22).remove_columns("group_id")
    parquet_stream(tmp_path / "rows", rows, 3)
    launch(2, Path(__file__).with_name("streaming_worker.py"), tmp_path)
    states = [load_file(tmp_path / f"{run}-{rank}.safetensors") for run in ("unbroken", "resumed") for rank in (0, 1)]
    for state in states[1:]:
        assert_equal_states(states[0], state)
    # What accelerate would do with the loader: the day this fails, `get_train_dataloader` may not be needed.
    assert (tmp_path / "upstream_loader").read_text() == "DataLoaderDispatcher"

    row_of = {id_hash(row["image_id"]): row for row in rows}
    seen = [[], []]
    for rank in (0, 1):
        batches = load_file(tmp_path / f"batches-{rank}.safetensors")
        for step in range(len(batches) // 4):
            groups, owner, image, text = (batches[f"{step}.{name}"] for name in ("groups", "owner", "image", "text"))
            assert len(groups) == 4
            for i, group in enumerate(groups.tolist()):
                row = row_of[group]
                seen[rank].append(row["image_id"])
                assert np.array_equal(image[i], np.float16(row["teacher_image_embeds"]))
                # A batch's captions stand in the order of their lengths.
                own = sorted(text[owner == i].tolist())
                assert own == sorted(np.float16(row["teacher_text_embeds"]).tolist())
    assert not set(seen[0][:4]) & set(seen[1][:4])  # the first pass of a rank has more rows than these
    assert set(seen[0]) | set(seen[1]) == set(rows["image_id"])
