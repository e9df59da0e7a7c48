"""Long streams: resident memory and rows/s stay where they were after the first tenth. `make soak` runs them whole."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS

from benchmarks.process_memory import own_bytes, tree
from trainers.student import StudentArguments, build_student


FILE_ROWS = 5000
SHARD_ROWS = 500  # of a file of teacher features
BATCH = 50
LOGGING_STEPS = 10
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {"model_type": "vit", "patch_size": 8, **SIZES}
TEXT = {"model_type": "bert", "max_position_embeddings": 32, **SIZES}


@dataclass
class Sample:
    """What a process had done and held at a moment."""

    rows: int
    seconds: float
    cpu_seconds: float  # of the process and all that it has started
    bytes: int  # of the same, see [`own_bytes`]


def write_rows(folder: Path, counts: dict[str, int]) -> None:
    """Parquet files of rows without features: images of 16 by 16 random pixels, two captions each, all distinct."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    (folder / "data").mkdir(parents=True)
    for split, count in counts.items():
        for file, start in enumerate(range(0, count, FILE_ROWS)):
            numbers = range(start, min(count, start + FILE_ROWS))
            pixels = rng.integers(0, 256, (len(numbers), 768), dtype=np.uint8)
            words = rng.choice(WORDS, (len(numbers), 2, 4))
            table = pa.table(
                {
                    "image": [{"bytes": b"P6 16 16 255\n" + own.tobytes(), "path": None} for own in pixels],
                    "captions": [[f"{' '.join(own)} {i}" for own in two] for i, two in zip(numbers, words.tolist())],
                    "image_id": [f"{split}/{i}" for i in numbers],
                },
                schema=features.arrow_schema,
            )
            pq.write_table(table, folder / "data" / f"{split}-{file:05d}.parquet")


def watch(command: list, folder: Path, rows_done: Callable[[], int]) -> list[Sample]:
    """Runs a program of the project, its output in `folder/output.txt`, and looks at it five times a second."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # train.py takes two all the same
        "OMP_WAIT_POLICY": "passive",  # and where cores are taken, threads that spin stand in each other's way
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    samples = []
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            processes = tree(process.pid)
            cpu_seconds = 0.0
            for each in processes:
                try:
                    cpu_seconds += sum(each.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    pass
            held = sum(own_bytes(each.pid) for each in processes)
            samples.append(Sample(rows_done(), time.perf_counter(), cpu_seconds, held))
            time.sleep(0.2)
    assert process.returncode == 0, (folder / "output.txt").read_text()[-3000:]
    return samples


def check_flat(samples: list[Sample], total: int, what: str) -> None:
    """Prints, and asserts, that the last tenth of the rows took no more memory and time than those before."""
    at_work = [sample for sample in samples if 0 < sample.rows < total]
    first = [sample.bytes for sample in at_work if sample.rows <= total / 10]
    last = [sample.bytes for sample in at_work if sample.rows >= total * 9 / 10]
    growth = max(last) / statistics.median(first) - 1
    rows = [sample.rows for sample in at_work]
    marks = np.linspace(rows[0], rows[-1], 11)
    rates = {}
    for clock in ("seconds", "cpu_seconds"):
        moments = np.interp(marks, rows, [getattr(sample, clock) for sample in at_work])
        rates[clock] = (marks[1] - marks[0]) / np.diff(moments)
    kept = {clock: rate[-1] / np.median(rate) for clock, rate in rates.items()}
    held = f"{statistics.median(first) / 1e6:.0f} MB in the first tenth, at most {max(last) / 1e6:.0f} MB in the last"
    print(
        f"{what}: {total:,} rows, {np.median(rates['seconds']):.0f} rows/s, in the last tenth {kept['seconds']:.2f} "
        f"of that ({kept['cpu_seconds']:.2f} by CPU time); memory {held}: {100 * growth:+.1f} %"
    )
    assert growth < 0.1
    # Beside CI's other tests, CPU time may stand for the clock, neither being quiet; `make soak` is alone.
    if total >= 300_000:
        assert kept["seconds"] > 0.8
    else:
        assert max(kept.values()) > 0.5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A tiny dual encoder, as a folder."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    student = StudentArguments(vision_config=VISION, text_config=TEXT, image_size=16, vocab_size=300)
    for part in build_student(student, WORDS, 16):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=[20_000, pytest.param(300_000, marks=pytest.mark.soak)],
    ids=lambda total: f"{total // 1000}k rows",
)
def total(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def source(total, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "rows"
    write_rows(folder, {"train": total, "validation": 200, "test": 200})
    return folder


@pytest.fixture(scope="module")
def features(source, teacher, total, tmp_path_factory) -> tuple[Path, list[Sample]]:
    """The streamed rows with the teacher's features, and what making them took."""
    folder = tmp_path_factory.mktemp("streamed")
    return folder / "features", make_features(source, teacher, folder, "--streaming")


def make_features(source: Path, teacher: Path, folder: Path, *more: str) -> list[Sample]:
    output = folder / "features"
    command = [
        "-m",
        "datasets_scripts.add_teacher_features",
        "--dataset_name",
        source,
        "--teacher_model_name_or_path",
        teacher,
    ]
    command += ["--output_dir", output, "--shard_rows", SHARD_ROWS, "--num_workers", 1, *more]
    files = output.with_name("features.partial")
    return watch(command, folder, lambda: SHARD_ROWS * len(list(files.glob("train-*.parquet"))))


def test_features_of_a_stream(features, total):
    check_flat(features[1], total, "features of a stream")


def test_features_of_rows_on_disk(source, teacher, total, tmp_path):
    check_flat(make_features(source, teacher, tmp_path), total, "features of rows on disk")


def test_training_on_a_stream(features, total, tmp_path, request):
    settings = {
        "dataset_name": features[0],
        "streaming": True,
        "vision_config": json.dumps(VISION),
        "text_config": json.dumps(TEXT),
        "image_size": 16,
        "vocab_size": 300,
        "output_dir": tmp_path / "run",
        "max_steps": total // BATCH,
        "per_device_train_batch_size": BATCH,
        "max_caption_length": 32,
        "queue_size": 1024,
        "dataloader_num_workers": 1,
        "logging_steps": LOGGING_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    command = [request.config.rootpath / "train.py"]
    for name, value in settings.items():
        command += [f"--{name}", value]
    output = tmp_path / "output.txt"
    samples = watch(command, tmp_path, lambda: BATCH * LOGGING_STEPS * output.read_text().count("'loss':"))
    check_flat(samples, total, "training on a stream")
