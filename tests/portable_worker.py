"""Run by test_portability: training, evaluation and feature making where loader workers are not forked and the system
does not say which cores are free, as on macOS and Windows. Not from pytest, whose modules a new process has not."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import datasets
import torch
from conftest import make_rows, make_student
from image_files import write_tar
from tiny_trainer import make_trainer

from datasets_scripts.feature_job import default_workers
from datasets_scripts.feature_shards import Encoding
from datasets_scripts.opening import open_dataset
from datasets_scripts.teacher_features import encode_dataset
from teachers import load_teacher
from trainers import ContrastiveTrainer, RetrievalTrainingArguments
from trainers.run.distributed import usable_cores


def write_tars(folder: Path, rows: datasets.Dataset) -> None:
    for split in ("train", "validation"):
        files = []
        for i, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
            of_row = {"captions": row["captions"], "image_id": row["image_id"]}
            files += [(f"{i:03}.png", row["image"]["bytes"]), (f"{i:03}.json", json.dumps(of_row).encode())]
        write_tar(folder / f"{split}.tar", files)


def trained(folder: Path, rows, trainer_class=None, **settings) -> dict[str, torch.Tensor]:
    validation = make_rows(8, seed=1)
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "max_grad_norm": 1.0, **settings}
    if trainer_class is None:
        trainer = make_trainer(folder, rows, eval_dataset=validation, **settings)
    else:
        model, processor = make_student()
        shared = {"learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        args = RetrievalTrainingArguments(output_dir=str(folder), **shared, **settings)
        trainer = trainer_class(model, args, rows, validation, processing_class=processor)
    trainer.train()
    trainer.evaluate()
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def features(folder: Path, rows: datasets.Dataset, workers: int) -> list[Path]:
    model, processor = make_student()
    if not (folder / "teacher").is_dir():
        model.save_pretrained(folder / "teacher")
        processor.save_pretrained(folder / "teacher")
    out = folder / f"features-{workers}"
    out.mkdir()
    plain = rows.select_columns(["image", "captions", "image_id"])
    teacher = load_teacher(str(folder / "teacher"))
    encode_dataset(datasets.DatasetDict(train=plain), [teacher], "{}", Encoding(batch_size=8), out, workers)
    return sorted(out.glob("*.parquet"))


def main(folder: Path, context: str) -> None:
    del os.sched_getaffinity
    multiprocessing.set_start_method(context)
    assert usable_cores() == os.cpu_count() and default_workers() >= 1
    rows = make_rows(16)
    write_tars(folder / "tars", rows)
    stream = open_dataset(str(folder / "tars"), streaming=True)["train"]
    outside = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": context}
    drawn = {"captions_per_image": 2, "random_shift": 0.2}
    for name, data, more in (
        ("mapped", rows, drawn),
        ("streamed", rows.to_iterable_dataset(), {**drawn, "shuffle_buffer_size": 5}),
        ("tars", stream, {"trainer_class": ContrastiveTrainer, "shuffle_buffer_size": 5}),
    ):
        inside, other = (trained(folder / name, data, **more, **settings) for settings in ({}, outside))
        assert all(torch.equal(tensor, other[key]) for key, tensor in inside.items()), name
        print("the same:", name, flush=True)
    with_none, with_one = ([datasets.Dataset.from_parquet(str(p), cache_dir=str(folder / "cache" / str(w))).to_list()
                            for p in features(folder, rows, w)] for w in (0, 1))  # fmt: skip
    assert with_none == with_one and len(with_none) == 1 and len(with_none[0]) == 16
    print("the same: features", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
