"""Run by torchrun in trainers/test_processes on 2 and 4 processes, and by the test itself on one: the same cases."""

import json
import sys
from pathlib import Path

import datasets
import torch
from conftest import DIM, make_rows, make_student, with_names
from safetensors.torch import save_file
from torch.nn.functional import normalize
from transformers import TrainerCallback

from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments
from trainers.contrastive_trainer import contrastive_loss
from trainers.losses import (
    TeacherRows,
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
)
from trainers.run import distributed
from trainers.step_rows import other_students


STEP = 16  # images, over all processes
PAIR_SETS = {"II": ["II"], "TT": ["TT"], "IT": ["IT"], "TI": ["TI"], "all": ["II", "TT", "IT", "TI"]}
# One case an optimiser step: its settings, and the losses that count in it.
CASES = {
    "feature": (["feature"], {}),
    "similarity": (["similarity"], {}),
    **{
        f"contrastive {name}, queue 60": (["contrastive"], {"contrastive_pairs": pairs})
        for name, pairs in PAIR_SETS.items()
    },
    **{
        f"hard_negative {name}, {kind}": (
            ["hard_negative"],
            {"hard_negative_pairs": pairs, "hard_negative_margin_kind": kind},
        )
        for name, pairs in PAIR_SETS.items()
        for kind in ("fixed", "teacher")
    },
}
NO_QUEUE = {
    f"contrastive {name}, queue 0": (["contrastive"], {"contrastive_pairs": pairs})
    for name, pairs in PAIR_SETS.items()
}
# Of rows with captions of several images, which fall on other processes: the texts must be gathered too.
NAMED = {f"named, {name}": ([name], {}) for name in ("contrastive", "hard_negative")}
NAMED_BASELINE = {"named baseline": (None, {})}
SMOOTH = ["contrastive", "feature", "similarity"]
ACCUMULATED = {f"accumulated, step {step}": (SMOOTH, {}) for step in range(2)}
DYNAMIC = {f"dynamic, step {step}": (None, {}) for step in range(3)}
BASELINE = {f"baseline, step {step}": (None, {}) for step in range(2)}
SPLITS = (30, 3, 1)  # rows to evaluate on: odd shares, and fewer than processes
SHARDS = (1, 4)


class EachCase(TrainerCallback):
    """Sets the case of each optimiser step; copies its gradients and the losses that are logged of it."""

    def __init__(self, trainer, cases):
        self.trainer, self.cases, self.gradients, self.logged = trainer, cases, {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.name = list(self.cases)[state.global_step]
        losses, settings = self.cases[self.name]
        for name, value in settings.items():
            setattr(args, name, value)
        if losses is not None:
            self.trainer.balancer.given.copy_(torch.tensor([float(name in losses) for name in args.losses]))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients |= {f"{self.name}/{n}": p.grad.clone() for n, p in named if p.grad is not None}

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.logged[self.name] = torch.tensor([v for name, v in logs.items() if name.startswith("loss")])


def make_trainer(
    folder: Path, rows, step: int = STEP, trainer_class=DSMDTrainer, vision=None, **settings
) -> DSMDTrainer | ContrastiveTrainer:
    model, processor = make_student(vision)
    share = distributed.world_size() * settings.get("gradient_accumulation_steps", 1)
    settings = {
        "per_device_train_batch_size": step // share,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "queue_size": 0,
        "balancer": "fixed",
        "learning_rate": 0.0,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if distributed.world_size() > 1 else None,
        **settings,
    }
    args = DSMDTrainingArguments(output_dir=str(folder / "run"), **settings)
    return trainer_class(model, args, train_dataset=rows, processing_class=processor)


def trained(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients `{case}/{parameter}` and logged losses; the weights stay the same: each step is a case of its own."""
    rows, gradients, logged = make_rows(2 * STEP), {}, {}
    accumulation = 1 if distributed.world_size() == 1 else 2  # one process takes the whole batch at once
    named = with_names(rows)
    for cases, settings in (
        (CASES, {"queue_size": 60}),
        (NAMED, {"queue_size": 60, "rows": named}),
        (NAMED_BASELINE, {"trainer_class": ContrastiveTrainer, "rows": named}),
        (NO_QUEUE, {"queue_size": 0}),
        # A queue that is smaller than the step's captions, not than its images: the same on any number of processes.
        (ACCUMULATED, {"losses": SMOOTH, "queue_size": 24, "gradient_accumulation_steps": accumulation}),
        (DYNAMIC, {"balancer": "dynamic", "queue_size": 60}),
        (BASELINE, {"trainer_class": ContrastiveTrainer}),
    ):
        trainer = make_trainer(folder, max_steps=len(cases), **{"rows": rows, **settings})
        each = EachCase(trainer, cases)
        trainer.add_callback(each)
        trainer.train()
        gradients.update(each.gradients)
        logged.update(each.logged)
    return gradients, logged


def uneven_batches() -> dict[str, torch.Tensor]:
    """The plain losses of batches of 5, 3, 1 and 7 images: values, and gradients of all rows."""
    shares = {1: [16], 2: [5, 11], 4: [5, 3, 1, 7]}[distributed.world_size()]
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(16).repeat_interleave(torch.randint(1, 5, (16,), generator=generator))
    start = sum(shares[: distributed.rank()])
    stop = start + shares[distributed.rank()]
    mine = (owners >= start) & (owners < stop)
    caption_to_image = owners[mine] - start
    groups = torch.arange(16).where(torch.arange(16) % 5 != 4, torch.arange(16) - 1)[start:stop]
    teacher = [normalize(torch.randn(count, DIM, generator=generator)) for count in (16, len(owners))]
    student = [normalize(rows + 0.1 * torch.randn(rows.shape, generator=generator)) for rows in teacher]
    queue = normalize(torch.randn(20, DIM, generator=generator))
    teacher_image, teacher_text = teacher[0][start:stop], teacher[1][mine]
    image, text = student[0][start:stop].requires_grad_(), student[1][mine].requires_grad_()
    counts = distributed.gather_counts([[len(image), len(text)]])[:, 0].T.tolist()
    means = {"num_images": sum(counts[0]), "num_captions": sum(counts[1])}
    rows = (image, text, teacher_image, teacher_text)
    whose = (groups, caption_to_image)
    step_images, step_captions = distributed.gather_rows(teacher_image, counts[0]), teacher[1]
    assert torch.equal(distributed.gather_rows(teacher_text, counts[1]), step_captions)
    image_groups = distributed.gather_rows(groups, counts[0])
    text_groups = distributed.gather_rows(groups[caption_to_image], counts[1])
    step = TeacherRows(step_images, image_groups, step_captions, text_groups)
    own = TeacherRows(teacher_image, groups, teacher_text, groups[caption_to_image])
    row_counts = [*counts, counts[1], [0] * len(counts[0])]  # every caption has its image, no image is alone
    batch = {"teacher_rows": own, "caption_to_image": caption_to_image, "row_counts": row_counts}
    dictionaries = {
        "step": step,
        "queue": TeacherRows(queue, torch.arange(20) % 7, queue.flip(0), torch.arange(20) % 9),
    }
    losses = {
        "feature": lambda: feature_distillation(*rows, **means),
        "similarity": lambda: similarity_distillation(*rows, **means),
    }
    for pairs in PAIR_SETS:
        for dictionary, columns in dictionaries.items():
            losses[f"contrastive {pairs}, {dictionary}"] = lambda pairs=pairs, columns=columns: (
                contrastive_distillation(*rows, *whose, dictionary=columns, pairs=PAIR_SETS[pairs], **means)
            )
        for kind in ("fixed", "teacher"):
            for hardest in (True, False):
                settings = {"margin_kind": kind, "hardest": hardest, "pairs": PAIR_SETS[pairs], "margin": 0.9}
                # Step rows at right angles to every query: no violation in the first direction.
                nothing = torch.zeros(1, DIM), torch.tensor([-1])
                blank = TeacherRows(*nothing, *nothing)
                for directions, columns in (("both directions", step), ("second direction", blank)):
                    losses[f"hard_negative {pairs}, {kind}, {hardest}, {directions}"] = (
                        lambda settings=settings, columns=columns: hard_negative_distillation(
                            *rows,
                            *whose,
                            step=columns,
                            **settings,
                            **means,
                            others=other_students(image, text, batch),
                        )
                    )

    def baseline():
        offset = sum(counts[0][: distributed.rank()])
        all_rows = (distributed.gather_rows(r, c, differentiable=True) for r, c in zip((image, text), counts))
        owner = distributed.gather_rows(caption_to_image + offset, counts[1])
        # Every rank has the whole loss, and gets its rows' gradient from each.
        return {
            "pairs": contrastive_loss(*all_rows, image_groups, owner, torch.tensor(20.0)) / distributed.world_size()
        }

    found = {}
    for name, loss in {**losses, "baseline": baseline}.items():
        value = sum(loss().values())
        gradients = torch.autograd.grad(value, (image, text), allow_unused=True)
        for side, rows_of, gradient, count in zip(("image", "text"), (image, text), gradients, counts):
            gradient = torch.zeros_like(rows_of) if gradient is None else gradient
            found[f"{name}/{side}"] = distributed.gather_rows(gradient, count)
        found[f"{name}/value"] = distributed.sum_over_ranks(value)
    return found


def evaluations(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    trainer = make_trainer(folder, None)
    embeds, metrics = {}, {}
    for count in SPLITS:
        rows = make_rows(count, seed=1)
        embeds[f"{count}/image"], embeds[f"{count}/text"] = trainer.encode(rows)
        metrics[str(count)] = trainer.evaluate(rows)
    return embeds, metrics


def after_20_steps(folder: Path) -> dict[str, torch.Tensor]:
    settings = {"max_steps": 20, "learning_rate": 1e-3, "balancer": "dynamic", "queue_size": 60, "max_grad_norm": 1.0}
    trainer = make_trainer(folder, make_rows(64), captions_per_image=2, **settings)
    trainer.train()
    baseline = make_trainer(folder, make_rows(64), trainer_class=ContrastiveTrainer, **{**settings, "max_steps": 5})
    baseline.train()
    return {
        **{f"distilled.{name}": tensor for name, tensor in trainer.model.state_dict().items()},
        **{f"state.{name}": tensor for name, tensor in trainer.distillation_state().items()},
        **{f"baseline.{name}": tensor for name, tensor in baseline.model.state_dict().items()},
    }


def embeds_with_batch_norm(folder: Path) -> dict[str, torch.Tensor]:
    """Each process's running means are its own; the saved ones count."""
    vision = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    trainer = make_trainer(folder, make_rows(32), vision=vision, learning_rate=1e-3, max_steps=2)
    trainer.train()
    trainer.save_model(str(folder / "batch_norm"))
    image, text = trainer.encode(make_rows(10, seed=1))
    return {"image": image, "text": text}


def streamed_ids(folder: Path) -> dict[str, torch.Tensor]:
    """Ids of each step `[steps, images]` of this process, three images a step, for two passes over 24 rows."""
    ids = {}
    for shards in SHARDS:
        names = sorted(map(str, folder.glob(f"stream-{shards}-*.parquet")))
        stream = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        world = distributed.world_size()
        trainer = make_trainer(folder, stream, step=3 * world, max_steps=16 // world, shuffle_buffer_size=5)
        begin_step, steps = trainer.begin_step, []

        def record(batches, begin_step=begin_step, steps=steps):
            steps.append(torch.cat([batch["image_groups"] for batch in batches]))
            begin_step(batches)

        trainer.begin_step = record
        trainer.train()
        ids[str(shards)] = torch.stack(steps)
    return ids


def main(folder: Path) -> None:
    DSMDTrainingArguments(output_dir=str(folder), use_cpu=True, ddp_backend="gloo").device  # noqa: B018
    rank = distributed.rank()
    embeds, metrics = evaluations(folder)
    gradients, logged = trained(folder)
    results = {
        "gradients": gradients,
        "logged": logged,
        "uneven": uneven_batches(),
        "embeds": embeds,
        "after_20_steps": after_20_steps(folder),
        "batch_norm": embeds_with_batch_norm(folder),
        "streamed": streamed_ids(folder),
    }
    for name, tensors in results.items():
        tensors = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
        save_file(tensors, folder / f"{name}-{rank}.safetensors")
    (folder / f"metrics-{rank}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.run_launched(lambda: main(Path(sys.argv[1])))
