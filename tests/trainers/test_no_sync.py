"""A step reads nothing back from the device and copies nothing to it that would make the host wait.

The device is `meta`: its tensors have no values, so whatever needs one fails, as it would wait for a GPU. Numbers that
`torch.tensor` puts on the device by itself go unseen here; `benchmarks.gpu.training` counts every wait on a GPU.
"""

import contextlib

import pytest
import torch
from conftest import NAMES, make_student, with_names
from tiny_trainer import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments, FeatureQueue, base_trainer
from trainers.balancers import BALANCERS
from trainers.losses import PAIRS
from trainers.pixel_bytes import pixel_table


class NoSynchronisation(TorchDispatchMode):
    """Refuses what reads a tensor's value on the host, and copies between the host and the device."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.is_meta for tensor in tensors)
        if on_device and name in self.READS:
            raise AssertionError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        from_host = [tensor for tensor in tensors if not tensor.is_meta and tensor.numel()]
        if from_host and name in ("_to_copy", "copy_") and any(tensor.is_meta for tensor in made):
            raise AssertionError(f"{func} copies {[list(tensor.shape) for tensor in from_host]} to the device")
        self.calls += on_device
        return result


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: torch.repeat_interleave(x, x.long(), dim=0),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.arange(3).to(x.device),
    ],
    ids="item float bool tolist numpy cpu mask repeat copy to".split(),
)
def test_waits_are_seen(wait):
    x = torch.ones(3, device="meta")
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError, TypeError)), NoSynchronisation():
        wait(x)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """`meta` is no device that autocast knows, not even to be switched off."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())


@pytest.fixture(autouse=True)
def pixels_as_bytes(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(base_trainer, "table_on", lambda device, processor: pixel_table(processor))


def to_device(trainer, batch: dict) -> dict:
    """Brings all of a trainer to the device, and a batch, as Trainer does before `begin_step`."""
    trainer.model.to("meta")
    trainer.pixel_table = trainer.pixel_table.to("meta")
    if isinstance(trainer, DSMDTrainer):
        trainer.balancer.to("meta")
        for name in ("image_queue", "text_queue"):
            queue = getattr(trainer, name)
            setattr(trainer, name, FeatureQueue(queue.size, queue.dim, device="meta"))
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def take_two_steps(trainer, micro_batches: int = 1) -> NoSynchronisation:
    size = 8
    spans = [list(range(size * i, size * (i + 1))) for i in range(micro_batches)]
    batches = [trainer.data_collator(trainer.train_dataset.__getitems__(span)) for span in spans]
    for batch in batches:
        batch.pop("unreadable")
    batches = [to_device(trainer, batch) for batch in batches]
    optimizer = trainer.create_optimizer()
    watch = NoSynchronisation()
    for _ in range(2):  # the first also sets the balancer, the second finds rows in the queues
        inputs = [dict(batch) for batch in batches]
        with watch:
            trainer.begin_step(inputs)
            for batch in inputs:
                trainer.compute_loss(trainer.model, batch).backward()
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(trainer, DSMDTrainer):
                trainer.end_step()
    return watch


@pytest.mark.parametrize(
    "balancer, hardest",
    [("published", False)] + [(balancer, True) for balancer in BALANCERS if balancer != "published"],
)
def test_distillation_step(tmp_path, rows, balancer, hardest):
    settings = {"contrastive_pairs": list(PAIRS), "hard_negative_margin_kind": "teacher", "optim": "adamw_torch"}
    trainer = make_trainer(tmp_path, rows, balancer=balancer, hardest_negative=hardest, **settings)
    assert take_two_steps(trainer).calls > 1000


def test_distillation_step_of_two_micro_batches_without_queue(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows, queue_size=0, optim="adamw_torch", gradient_accumulation_steps=2)
    assert take_two_steps(trainer, micro_batches=2).calls > 1000


def test_distillation_step_with_equal_captions(tmp_path, rows):
    """The second micro-batch has images with more shared texts than the first, so lists are filled up."""
    rows = with_names(rows)
    captions = [[*NAMES, *own][: len(own)] if i >= 8 else own for i, own in enumerate(rows["captions"])]
    rows = rows.remove_columns("captions").add_column("captions", captions, feature=rows.features["captions"])
    settings = {"captions_per_image": 1, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, rows, **settings)
    assert take_two_steps(trainer, micro_batches=2).calls > 1000
    assert trainer.image_queue.texts.shape[1] == len(NAMES)


def test_contrastive_step(tmp_path, rows):
    student, processor = make_student()
    settings = {"use_cpu": True, "report_to": "none", "optim": "adamw_torch", "per_device_train_batch_size": 8}
    args = DSMDTrainingArguments(output_dir=str(tmp_path), **settings)
    trainer = ContrastiveTrainer(model=student, args=args, train_dataset=rows, processing_class=processor)
    assert take_two_steps(trainer).calls > 500
