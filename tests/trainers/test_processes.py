"""Two and four processes against one: gradients, states, evaluation, streams."""

import json
from collections import Counter

import processes_worker
import pytest
import torch
from conftest import make_rows
from launching import launch
from processes_worker import (
    ACCUMULATED,
    BASELINE,
    CASES,
    DYNAMIC,
    NAMED,
    NAMED_BASELINE,
    NO_QUEUE,
    SHARDS,
    SPLITS,
    evaluations,
    make_trainer,
    trained,
    uneven_batches,
)
from safetensors.torch import load_file
from tiny_trainer import largest_difference

from modeling_dsmd import DSMDModel
from rows.columns import id_hash


UNEVEN = sorted({name.split("/")[0] for name in uneven_batches()})
STREAM = make_rows(24).remove_columns("group_id")


@pytest.fixture(scope="module", params=[2, 4])
def launched(request, tmp_path_factory):
    """What all cases leave on so many processes, for each of them: one start for all."""
    world, folder = request.param, tmp_path_factory.mktemp("processes")
    for shards in SHARDS:
        for index in range(shards):
            STREAM.shard(shards, index).to_parquet(folder / f"stream-{shards}-{index}.parquet")
    launch(world, processes_worker.__file__, folder)
    found = []
    for rank in range(world):
        of_rank = {path.name.split("-")[0]: load_file(path) for path in folder.glob(f"*-{rank}.safetensors")}
        metrics = json.loads((folder / f"metrics-{rank}.json").read_text())
        found.append({**of_rank, "metrics": metrics, "student": folder / "batch_norm"})
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same on one process, the whole batch at once."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    embeds, metrics = evaluations(folder)
    gradients, logged = trained(folder)
    return {
        "gradients": gradients,
        "logged": logged,
        "uneven": uneven_batches(),
        "embeds": embeds,
        "metrics": metrics,
    }


def of_case(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{case}/")}


@pytest.mark.parametrize("case", [*CASES, *NAMED, *NAMED_BASELINE, *NO_QUEUE, *ACCUMULATED, *DYNAMIC, *BASELINE])
def test_gradients_are_those_of_the_whole_batch(launched, alone, case):
    expected = of_case(alone["gradients"], case)
    for found in launched:
        assert largest_difference(expected, of_case(found["gradients"], case)) < 1e-6
        torch.testing.assert_close(found["logged"][case], alone["logged"][case], rtol=1e-5, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_batches_add_up(launched, alone, case):
    expected = of_case(alone["uneven"], case)
    for found in launched:
        assert largest_difference(expected, of_case(found["uneven"], case)) < 1e-6
    assert expected[f"{case}/value"] > 1e-4


def test_all_processes_hold_the_same_after_20_steps(launched):
    first, *others = (found["after_20_steps"] for found in launched)
    assert any(name.startswith("state.image_queue") for name in first)
    for other in others:
        assert other.keys() == first.keys() and all(torch.equal(other[name], first[name]) for name in first)
    # Or the test would not tell: both were trained, apart from each other.
    one, other = ({"": first[f"{name}.text_projection.weight"]} for name in ("distilled", "baseline"))
    assert largest_difference(one, other) > 1e-3


@pytest.mark.parametrize("count", SPLITS)
def test_evaluation_gives_each_row_once(launched, alone, count):
    expected, metrics = of_case(alone["embeds"], str(count)), alone["metrics"][str(count)]
    assert len(expected[f"{count}/text"]) == sum(map(len, make_rows(count, seed=1)["captions"]))
    for found in launched:
        assert largest_difference(expected, of_case(found["embeds"], str(count))) < 1e-6
        for name, value in metrics.items():
            if name not in ("eval_runtime", "eval_samples_per_second"):
                assert found["metrics"][str(count)][name] == pytest.approx(value, abs=1e-6), name


def test_evaluation_is_of_the_running_means_that_are_saved(launched, tmp_path):
    trainer = make_trainer(tmp_path, None)
    trainer.model = DSMDModel.from_pretrained(launched[0]["student"])
    expected = dict(zip(("image", "text"), trainer.encode(make_rows(10, seed=1))))
    for found in launched:
        assert largest_difference(expected, found["batch_norm"]) < 1e-5


@pytest.mark.parametrize("shards", SHARDS)
def test_a_pass_over_a_stream_has_each_row_once(launched, shards):
    steps = [found["streamed"][str(shards)] for found in launched]
    passes = [torch.cat(halves).flatten().tolist() for halves in zip(*(ids.chunk(2) for ids in steps))]
    assert passes[0] != passes[1]
    for ids in passes:
        assert Counter(ids) == Counter(map(id_hash, STREAM["image_id"]))


def test_a_process_that_sees_several_gpus_is_refused_with_the_line_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(processes_worker.DSMDTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"accelerate launch --num_processes 2 train\.py .*CUDA_VISIBLE_DEVICES=0"):
        make_trainer(tmp_path, None)
