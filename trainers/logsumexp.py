"""The log-sum-exp over the dictionary in the contrastive loss, with its gradient, without storing the logits."""

from __future__ import annotations

import torch


# Stands for "not a negative": finite, so that a row without any negative has finite (zero) gradients.
MASKED = torch.finfo(torch.float32).min
NO_SHIFT = 60.0  # e^60 times a dictionary is still a float32 number, and so is e^-60
DICTIONARY_BLOCK = 4096  # rows of the dictionary that are compared at once: what the processor's cache likes best


def join_equal_texts(same: torch.Tensor, row_texts: torch.Tensor | None, column_texts: torch.Tensor | None) -> None:
    """Adds, in place, to what counts as the same thing the pairs of a row and a column that have a text in common.

    Args:
        same: `[R, Q]` bool.
        row_texts: `[R, K]`, the text_ids of each row; None: no text is equal to another.
        column_texts: `[Q, L]`.
    """
    if row_texts is not None and column_texts is not None:
        for row_text in row_texts.unbind(1):
            for column_text in column_texts.unbind(1):
                same |= row_text[:, None] == column_text[None, :]


class LogSumExp(torch.autograd.Function):
    """`log sum_j e^{q . d_j / tau}` of each query over the dictionary rows of other groups and other texts.

    Only the queries need a gradient: the mean of the dictionary rows, weighted by the softmax, over tau. It is made
    with the value, block by block (online softmax, Milakov and Gimelshein 2018), so the `[B, Q]` logits are never
    stored, and cost one matrix product for the value and one for the gradient.

    Args of `apply`:
        queries: `[B, D]` float32, rows of any length: no exponential overflows.
        image_groups: `[N]`, the group of each image.
        image_of_query: `[B]`, the image of each caption; None if the queries are the N images.
        dictionary: `[Q, D]` float32.
        dictionary_groups: `[Q]`.
        temperature: tau, above 0.
        query_texts: `[B, K]`, the text_ids of each query; where the queries are captions, its own. Default: no text is
            equal to another.
        dictionary_texts: `[Q, L]`.

    Returns: `[B]`; MASKED for a query without negatives.
    """

    @staticmethod
    def forward(
        ctx,
        queries,
        image_groups,
        image_of_query,
        dictionary,
        dictionary_groups,
        temperature,
        query_texts=None,
        dictionary_texts=None,
    ):
        queries = queries / temperature
        # Unit rows of such a temperature need no shift; one of 0 leaves their sums as they are to the last bit.
        no_shift = NO_SHIFT if 1 / temperature <= NO_SHIFT else 0.0
        largest = shift = queries.new_full((len(queries), 1), MASKED)
        total = torch.zeros_like(largest)  # of e^{logit - shift}
        weighted = torch.zeros_like(queries)  # dictionary rows, weighted so
        for start in range(0, len(dictionary), DICTIONARY_BLOCK):
            block = slice(start, start + DICTIONARY_BLOCK)
            rows = dictionary[block]
            same = image_groups[:, None] == dictionary_groups[None, block]
            logits = queries @ rows.T
            # Captions have the group of their image, so groups are compared once per image.
            same = same if image_of_query is None else same.index_select(0, image_of_query)
            join_equal_texts(same, query_texts, None if dictionary_texts is None else dictionary_texts[block])
            logits.masked_fill_(same, MASKED)
            largest = largest.maximum(logits.amax(dim=1, keepdim=True))
            before, shift = shift, torch.where(largest.abs() <= no_shift, 0.0, largest)
            shrink = (before - shift).exp_()
            total.mul_(shrink)
            weighted.mul_(shrink)
            logits.sub_(shift).exp_()
            total.add_(logits.sum(dim=1, keepdim=True))
            if ctx.needs_input_grad[0]:
                weighted.addmm_(logits, rows)
        ctx.save_for_backward(weighted.div_(total.clamp(min=torch.finfo(torch.float32).tiny) * temperature))
        # A query without negatives has a total of 0, or only masked logits.
        none = (total == 0) | (largest == MASKED)
        return torch.where(none, MASKED, shift + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], *[None] * 7
