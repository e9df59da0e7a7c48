"""The sum over the dictionary in the contrastive loss, with its gradient, without storing the logits."""

from __future__ import annotations

import torch


# Stands for "not a negative": finite, so that a row without any negative has finite (zero) gradients.
MASKED = torch.finfo(torch.float32).min
LARGEST_LOGIT = 60.0  # e^60 times a dictionary is still a float32 number, and so is e^-60
DICTIONARY_BLOCK = 4096  # rows of the dictionary that are compared at once: what the processor's cache likes best


class LogSumExp(torch.autograd.Function):
    """`log sum_j e^{q . d_j / tau}` of each query over the dictionary rows of other groups, `[B]`.

    The dictionary is constant, so the gradient, its mean under the softmax, is made beside the value, block by block
    (online softmax, Milakov and Gimelshein 2018): the `[B, Q]` logits are never stored, and cost one product each way.
    Without negatives the value is MASKED.
    """

    @staticmethod
    def forward(ctx, queries, image_groups, image_of_query, dictionary, dictionary_groups, temperature):
        queries = queries / temperature
        # Rows of length 1 have logits of 1 / tau at most: where their exponentials and the sums of those are float32
        # numbers, no largest one has to be found and taken off.
        bounded = 1 / temperature <= LARGEST_LOGIT
        largest = queries.new_full((len(queries), 1), 0.0 if bounded else MASKED)
        total = torch.zeros_like(largest)  # of e^{logit - largest}
        weighted = torch.zeros_like(queries)  # dictionary rows, weighted so
        for start in range(0, len(dictionary), DICTIONARY_BLOCK):
            rows = dictionary[start : start + DICTIONARY_BLOCK]
            same = image_groups[:, None] == dictionary_groups[None, start : start + DICTIONARY_BLOCK]
            logits = queries @ rows.T
            # Captions have their image's group: compared once an image.
            logits.masked_fill_(same if image_of_query is None else same.index_select(0, image_of_query), MASKED)
            if not bounded:
                before, largest = largest, largest.maximum(logits.amax(dim=1, keepdim=True))
                shrink = (before - largest).exp_()
                total.mul_(shrink)
                weighted.mul_(shrink)
                logits.sub_(largest)
            logits.exp_()
            total.add_(logits.sum(dim=1, keepdim=True))
            if ctx.needs_input_grad[0]:
                weighted.addmm_(logits, rows)
        ctx.save_for_backward(weighted.div_(total.clamp(min=torch.finfo(torch.float32).tiny) * temperature))
        # A row without negatives has a total of 0, or only struck logits.
        none = (total == 0) | (largest == MASKED)
        return torch.where(none, MASKED, largest + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None, None, None, None
