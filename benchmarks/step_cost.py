"""What distillation adds to the cost of a training step.

python -m benchmarks.step_cost

Three comparisons. The paper's student on 32 captions: a whole distillation step (four losses, all pairs, balancer,
queues of 8,192 x 768) beside the student's forward and backward and the optimiser. The quickstart's student with
batches of 128 and queues of 8,192 x 256: forward, losses, backward and balancer beside those of a plain contrastive
step. Its losses alone, forward and backward from given embeddings, beside the matrix products that they need at least.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import datasets
import torch
import yaml
from transformers import HfArgumentParser

from datasets_scripts.data_loading import DataArguments, load_data
from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments
from trainers.distillation_trainer import summed
from trainers.losses import PAIRS
from trainers.student import StudentArguments, build_student
from trainers.timing import seconds_of

from .captions_per_second import four_pair_trainer
from .common import Row, collate, fill_queues, first_examples, interleaved, print_table, ratio, training_step


BATCH = 128  # the quickstart's


def bare_step(trainer: DSMDTrainer, batch: dict, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """A function that takes a step without losses and returns its seconds: forward, backward, optimiser.

    The gradient at the embeddings, which the losses would give, is all ones.
    """

    def step() -> None:
        embeds = trainer.embed(trainer.model, batch)
        torch.autograd.backward(embeds, [torch.ones_like(rows) for rows in embeds])
        optimizer.step()
        trainer.model.zero_grad()

    return partial(seconds_of, step)


def paper_student(captions: int = 32, rounds: int = 3, tiny: bool = False) -> list[Row]:
    """The table's row of the paper's student; every image has five captions, but the last what is left over."""
    images = -(-captions // 5)
    with tempfile.TemporaryDirectory() as folder:
        trainer = four_pair_trainer(folder, images, tiny)
        examples = first_examples(trainer, images)
        left = captions - 5 * (images - 1)
        examples[-1] |= {name: examples[-1][name][:left] for name in ("captions", "teacher_text")}
        batch = collate(trainer, examples)
        optimizer = trainer.create_optimizer()
        steps = training_step(trainer, batch, optimizer), bare_step(trainer, batch, optimizer)
        times = interleaved(*steps, rounds=rounds)
    whole, bare = (f"{statistics.median(column):.2f} s" for column in times)
    return [
        Row(
            f"a distillation step, ViT-B/16 and BERT-base, {captions} captions",
            whole,
            f"the student's forward, backward and optimiser: {bare}",
            f"{ratio(*times):.3f} x",
            "at most 1.05 x",
        )
    ]


def loss_times(trainer: DSMDTrainer, batch: dict) -> tuple[Callable[[], float], Callable[[], float]]:
    """Two functions: one times the losses, forward and backward from given embeddings; one their matrix products.

    These are, for each pair, the similarities with the dictionary, the gradient of these for the student, and the
    similarities within the batch. The hardest negatives among the latter need no product for their gradient.
    """
    batch = dict(batch)
    trainer.begin_step([batch])
    with torch.no_grad():
        embeds = [rows.clone() for rows in trainer.embed(trainer.model, batch)]
    student = dict(zip("IT", embeds))
    teacher = {"I": batch["teacher_rows"].image, "T": batch["teacher_rows"].text}
    dictionary = {"I": trainer.image_queue.features, "T": trainer.text_queue.features}

    def losses() -> float:
        leaves = [rows.detach().requires_grad_() for rows in embeds]
        return seconds_of(
            lambda: (trainer.balancer.weights() * summed(trainer.loss_terms(*leaves, batch))).sum().backward()
        )

    @torch.no_grad()
    def products() -> None:
        for query, target in PAIRS:
            similarities = student[query] @ dictionary[target].T
            similarities @ dictionary[target]
            student[query] @ teacher[target].T

    return losses, partial(seconds_of, products)


def quickstart_trainer(trainer_class, rows: datasets.Dataset, folder: str, images: int, **settings):
    """A trainer of the recipe's student on the icons, its queues full."""
    with open("recipes/icons.yaml") as file:
        recipe = yaml.safe_load(file)
    student = HfArgumentParser(StudentArguments).parse_dict(recipe, allow_extra_keys=True)[0]
    captions = [caption for texts in rows["captions"][:] for caption in texts]
    model, processor = build_student(student, captions, len(rows[0]["teacher_image_embeds"]))
    settings = {"use_cpu": True, "report_to": "none", "max_caption_length": 32, "queue_size": 8192, **settings}
    args = DSMDTrainingArguments(output_dir=folder, per_device_train_batch_size=images, **settings)
    trainer = trainer_class(model=model, args=args, train_dataset=rows, processing_class=processor)
    if isinstance(trainer, DSMDTrainer):
        fill_queues(trainer)
    return trainer


def quickstart(rows: datasets.Dataset | None = None, images: int = BATCH, rounds: int = 15) -> list[Row]:
    """Four rows of the table.

    Args:
        rows: rows with teacher features; None: the icons.
        images: images of a batch.
        rounds: how often each side is timed.
    """
    if rows is None:
        rows = load_data(DataArguments(dataset_name="icons"))["train"]
    four = {"contrastive_pairs": list(PAIRS), "hard_negative_pairs": list(PAIRS)}
    two = {"contrastive_pairs": ["II", "TT"], "hard_negative_pairs": ["II", "TT"]}
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            quickstart_trainer(ContrastiveTrainer, rows, folder, images),
            quickstart_trainer(DSMDTrainer, rows, folder, images, **two),
            quickstart_trainer(DSMDTrainer, rows, folder, images, **four),
            quickstart_trainer(DSMDTrainer, rows, folder, images, contrastive_targets="teacher", **four),
        ]
        batches = [collate(trainer, first_examples(trainer, images)) for trainer in trainers]
        steps = [training_step(trainer, batch) for trainer, batch in zip(trainers, batches)]
        plain, in_two, in_four, soft = interleaved(*steps, rounds=rounds, warm_up=2)
        # By themselves: a whole step before the losses would take the dictionary out of the cache, and the products
        # after them would find it there.
        losses, products = interleaved(*loss_times(trainers[2], batches[2]), rounds=2 * rounds, warm_up=2)
    milliseconds = [f"{1000 * statistics.median(column):.0f} ms" for column in (plain, in_two, in_four, soft)]
    against = f"a plain contrastive step: {milliseconds[0]}"
    return [
        Row(
            "the quickstart's step, pairs II and TT",
            milliseconds[1],
            against,
            f"{ratio(in_two, plain):.2f} x",
            "at most 1.2 x",
        ),
        Row(
            "the quickstart's step, four pairs",
            milliseconds[2],
            against,
            f"{ratio(in_four, plain):.2f} x",
            "at most 1.4 x",
        ),
        Row(
            "the quickstart's step, four pairs, the teacher's targets",
            milliseconds[3],
            against,
            f"{ratio(soft, plain):.2f} x",
            "",
        ),
        Row(
            "its losses alone, four pairs",
            f"{1000 * statistics.median(losses):.1f} ms",
            f"their bare matrix products: {1000 * statistics.median(products):.1f} ms",
            f"{ratio(losses, products):.2f} x",
            "at most 1.6 x",
        ),
    ]


def measure() -> list[Row]:
    return [*paper_student(), *quickstart()]


if __name__ == "__main__":
    print_table(measure())
