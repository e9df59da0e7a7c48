"""What a distillation step costs beside a plain contrastive step of the same student on the same batch.

python -m benchmarks.step_cost

Quickstart student, queue 8,192 x 256, batch 128; forward, losses, backward and balancer. Medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import datasets
import torch
import yaml
from transformers import HfArgumentParser

from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments
from trainers.data_loading import DataArguments, load_data
from trainers.losses import PAIRS
from trainers.retrieval_data import RetrievalCollator, RetrievalDataset
from trainers.student import StudentArguments, build_student


def make_step(trainer_class, student_args, rows: datasets.Dataset, settings: dict, **changes):
    """A function that takes one step's loss and gradient on a fixed batch, the queues full."""
    captions = [caption for texts in rows["captions"] for caption in texts]
    model, processor = build_student(student_args, captions, 256)
    args = DSMDTrainingArguments(**{**settings, **changes})
    trainer = trainer_class(model=model, args=args, train_dataset=rows, processing_class=processor)
    data = RetrievalDataset(rows, with_teacher=trainer.needs_teacher)
    batch = RetrievalCollator(processor, args.max_caption_length)(data.__getitems__(list(range(128))))
    batch.pop("unreadable")
    trainer.begin_step([batch])
    if trainer.needs_teacher:
        generator = torch.Generator().manual_seed(0)
        for queue in (trainer.image_queue, trainer.text_queue):
            features = torch.randn(8192, 256, generator=generator)
            queue.push(torch.nn.functional.normalize(features, dim=-1), torch.arange(8192))
    model.train()

    def step() -> float:
        started = time.perf_counter()
        trainer.begin_step([dict(batch)])
        trainer.compute_loss(model, batch).backward()
        if trainer.needs_teacher:
            trainer.end_step()
        model.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    with open("recipes/icons.yaml") as file:
        recipe = yaml.safe_load(file)
    rows = load_data(DataArguments(dataset_name="icons"))["train"]
    folder = tempfile.mkdtemp()
    student = HfArgumentParser(StudentArguments).parse_dict(recipe, allow_extra_keys=True)[0]
    settings = {"output_dir": folder, "use_cpu": True, "report_to": "none", "max_caption_length": 32}
    settings |= {"per_device_train_batch_size": 128, "queue_size": 8192}
    steps = {
        "plain contrastive": make_step(ContrastiveTrainer, student, rows, settings),
        "distillation, pairs II, TT": make_step(
            DSMDTrainer,
            student,
            rows,
            settings,
            contrastive_pairs=["II", "TT"],
            hard_negative_pairs=["II", "TT"],
        ),
        "distillation, four pairs": make_step(
            DSMDTrainer,
            student,
            rows,
            settings,
            contrastive_pairs=list(PAIRS),
            hard_negative_pairs=list(PAIRS),
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(options.runs + 2):
        for name, step in steps.items():
            seconds = step()
            if run >= 2:  # two to warm up
                times[name].append(seconds)
    base = statistics.median(times["plain contrastive"])
    print(
        f"batch 128, queue 8,192 x 256, {torch.get_num_threads()} threads, median of {options.runs} interleaved runs"
    )
    for name, values in times.items():
        print(f"{name:28} {1000 * statistics.median(values):7.1f} ms {statistics.median(values) / base:5.2f} x")


if __name__ == "__main__":
    main()
