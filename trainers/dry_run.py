"""What a model does with a tiny batch, tried before it is trained on a large one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from PIL import Image
from torch import nn

from .batches import RetrievalCollator


CAPTIONS = ("a tiny batch of noise to be tried before training", "noise of two images")
Autocast = Callable[[], AbstractContextManager]


def tiny_batch(collator: RetrievalCollator, device: torch.device) -> dict:
    """Two images of noise and their captions, as training makes its batches; its tensors are on `device`."""
    generator = np.random.default_rng(0)
    examples = [
        {
            "image_id": str(i),
            "group": i,
            "captions": [caption],
            "image": Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)),
        }
        for i, caption in enumerate(CAPTIONS)
    ]
    batch = collator(examples)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@torch.no_grad()
def check_embeds(model: nn.Module, batch: dict, autocast: Autocast = nullcontext) -> None:
    """Refuses a model that does not embed a modality by itself, as evaluation asks it to.

    Raises:
        ValueError: it fails, or its embeddings are missing, not `projection_dim` wide or not L2-normalised.
    """
    was_training = model.training
    model.eval()
    name, width = type(model).__name__, model.config.projection_dim
    what_to_do = "give a DSMDModel, such as DSMDModel.from_vision_text_pretrained makes of two towers."
    for field, inputs in (("image_embeds", ("pixel_values",)), ("text_embeds", ("input_ids", "attention_mask"))):
        given = " and ".join(inputs)
        try:
            with autocast():
                rows = getattr(model(**{key: batch[key] for key in inputs}), field, None)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever model there is
            if "text_buckets" in inspect.signature(model.forward).parameters:
                if isinstance(error, ValueError):  # a DSMDModel says what is wrong itself
                    raise
                what_to_do = "take another tower, or more of its layers."
            raise ValueError(
                f"{name} gives no {field} for {given} alone ({type(error).__name__}: {error}): {what_to_do}"
            ) from error
        if rows is None or rows.shape != (2, width):
            found = "None" if rows is None else list(rows.shape)
            raise ValueError(f"{name} gives {found} as {field} of 2 rows for {given} alone: {what_to_do}")
        lengths = torch.linalg.vector_norm(rows.float(), dim=1)
        if (((lengths - 1).abs() > 0.02) & (lengths > 0)).any():  # a row of zeros stays one, normalised or not
            raise ValueError(f"{field} of {name} are of length {lengths[0]:.3g}, not L2-normalised: {what_to_do}")
    model.train(was_training)


@torch.no_grad()
def check_text_pooling(model: nn.Module, batch: dict, autocast: Autocast = nullcontext) -> None:
    """Refuses a text pooling that takes a token which sees no other: all captions would have the same embedding.

    The first token of a causal tower (CLIP's, GPT's, Qwen's) is such a one. It is tried: other words must change a
    caption's embedding.

    Raises:
        ValueError: they do not; it names the poolings with which they do.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    position = torch.arange(ids.shape[1], device=ids.device)
    between = (position > 0) & (position < mask.sum(dim=1, keepdim=True) - 1)  # [C, L]: not the first, not the last
    if not between.any():
        return
    other_words = torch.where(between, (ids + 1) % (ids.max() + 1), ids)
    was_training = model.training
    model.eval()

    def sees_words() -> bool:
        with autocast():
            one, other = (model(input_ids=of, attention_mask=mask).text_embeds for of in (ids, other_words))
        return not torch.equal(one, other)

    config = model.config
    pooling = getattr(config, "text_pooling", None)
    if not sees_words():
        seeing = []
        for config.text_pooling in ("pooler", "mean", "cls") if pooling is not None else ():
            try:
                if sees_words():
                    seeing.append(repr(config.text_pooling))
            except (ValueError, RuntimeError):  # the tower has no such pooling
                continue
        config.text_pooling = pooling
        tower = type(getattr(model, "text_model", model)).__name__
        raise ValueError(
            f"text_pooling={pooling!r} gives every caption the same embedding: of {tower} it takes a token that sees "
            f"no other word (a causal tower's first). Use {' or '.join(seeing) or 'another text tower'}."
        )
    model.train(was_training)


def unused_parameters(model: nn.Module, batch: dict, autocast: Autocast = nullcontext) -> list[str]:
    """Names of the trainable parameters that no embedding depends on: DDP would wait for their gradients.

    Neither the model nor the random states are changed.
    """
    device = batch["pixel_values"].device
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    was_training, buffers = model.training, [buffer.clone() for buffer in model.buffers()]
    unused: list[set[str]] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        for training in (False, True):  # training may drop layers, evaluation leaves out parts that only training has
            model.train(training).zero_grad()
            with autocast():
                output = model(**inputs)
            embeds = output.image_embeds.float(), output.text_embeds.float()
            loss = sum((rows * torch.randn_like(rows)).sum() for rows in embeds)
            if loss.requires_grad:
                loss.backward()
            without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
            unused.append(without)
            model.zero_grad()
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    model.train(was_training)
    return sorted(unused[0] & unused[1])


def leave_out_unused(model: nn.Module, batch: dict, autocast: Autocast = nullcontext) -> list[str]:
    """Names of the [`unused_parameters`], which get no gradient from now on; the temperature is the loss's matter."""
    unused = [name for name in unused_parameters(model, batch, autocast) if name != "logit_scale"]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    return unused
