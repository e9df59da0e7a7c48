"""Steps whose gradient is NaN or infinite: skipped, and named with their losses and rows."""

from __future__ import annotations

import logging

import torch
from transformers import TrainerCallback


logger = logging.getLogger(__name__)


class SkipNonFiniteSteps(TrainerCallback):
    """Skips a step whose gradient is not finite, says so, and stops the run after `limit` of them in a row.

    The fused optimiser skips on the device, so that nothing waits for it; what happened is read once in `limit` steps
    and where the run logs. Averaged gradients are the same on all ranks, and so is what is skipped.

    Args:
        trainer: has `gradient_norm`, `optimizer` and `latest_losses()`.
        limit: 1 or more.
    """

    def __init__(self, trainer, limit: int):
        self.trainer = trainer
        self.limit = limit
        self.in_a_row = 0
        self.rows: list[tuple[list[str], torch.Tensor]] = []  # of this step: names, and whether each is not finite [N]
        self.pending: list[tuple] = []  # of the steps since the last look: step, skipped [], losses [n], rows

    def note_rows(self, names: list[str], broken: torch.Tensor) -> None:
        """Notes the names of a micro-batch's rows, and which have embeddings that are not finite: bool `[N]`."""
        self.rows.append((names, broken))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        norm = self.trainer.gradient_norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
        skipped = ~torch.isfinite(torch.as_tensor(norm))
        self.pending.append((state.global_step + 1, skipped, self.trainer.latest_losses().clone(), self.rows))
        self.rows = []
        if self.trainer.accelerator.scaler is not None:
            return  # the scaler of fp16 skips by itself
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = skipped.float()
        elif skipped:  # waits for the device
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_save or len(self.pending) >= self.limit:
            self.look()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.look()

    def look(self) -> None:
        """Reads which of the pending steps were skipped.

        Raises:
            ValueError: `limit` steps in a row were.
        """
        flags = torch.stack([skipped for _, skipped, _, _ in self.pending]).tolist() if self.pending else []
        for (step, _, losses, rows), skipped in zip(self.pending, flags):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if not skipped:
                continue
            text = f"Step {step} is skipped, its gradient is not finite ({_values(losses)}; {_named(rows)})."
            if self.in_a_row == self.limit:
                raise ValueError(
                    f"{text} That makes {self.limit} in a row: the run stops. No weight has changed in these steps, "
                    "and the checkpoints before them are good. Look at the rows named above, lower learning_rate or "
                    "train in float32 (--bf16 False, no --fp16), and go on by --resume_from_checkpoint last "
                    "--allow_changes."
                )
            logger.warning(text)
        self.pending.clear()


def _values(losses: torch.Tensor) -> str:
    return f"losses {', '.join(f'{value:.4g}' for value in losses.tolist())}"


def _named(rows: list[tuple[list[str], torch.Tensor]]) -> str:
    broken = [name for ids, flags in rows for name, flag in zip(ids, flags.tolist()) if flag]
    if broken:
        return f"embeddings that are not finite: {', '.join(map(repr, broken[:10]))}"
    ids = [name for names, _ in rows for name in names]
    return f"all embeddings are finite; its rows: {', '.join(map(repr, ids[:10]))}{', ...' * (len(ids) > 10)}"
