"""A trainer of the tiny student that tests share, and what they compare of it."""

import torch
from conftest import make_student
from transformers import TrainerCallback

from trainers import DSMDTrainer, DSMDTrainingArguments


def make_trainer(
    folder, rows, model=None, callbacks=None, eval_dataset=None, trainer_class=DSMDTrainer, **settings
) -> DSMDTrainer:
    student, processor = make_student()
    settings = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": 1,
        "logging_steps": 1,
        "queue_size": 24,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    args = DSMDTrainingArguments(output_dir=str(folder), **settings)
    return trainer_class(
        model=model or student,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=callbacks,
    )


class KeepGradients(TrainerCallback):
    """Copies the gradients of the first optimiser step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


def first_gradients(folder, rows, **settings) -> tuple[dict[str, torch.Tensor], DSMDTrainer]:
    keep = KeepGradients()
    trainer = make_trainer(folder, rows, callbacks=[keep], **settings)
    trainer.train()
    return keep.gradients, trainer


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over all tensors, relative to the largest entry of any."""
    assert a.keys() == b.keys() and a
    largest = max(tensor.abs().max().item() for tensor in a.values() if tensor.is_floating_point())
    return max((a[name] - b[name]).abs().max().item() for name in a) / largest
