"""The sum of exponentials in blocks against float64: any temperature, order and length of rows."""

import pytest
import torch
from loss_references import WIDTH, Batch

from trainers import logsumexp
from trainers.losses import (
    PAIRS,
    TeacherRows,
    contrastive_distillation,
)


def test_the_largest_logits_may_come_last_and_be_large(monkeypatch):
    """Blocks whose own groups are struck out, and logits that overflow unless the largest is taken off."""
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", 2)
    query = torch.tensor([[1.0, 0.0]]).requires_grad_()
    columns = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    groups, temperature = torch.tensor([7, 7, 1, 2, 3]), 1e-3
    value = logsumexp.LogSumExp.apply(query, torch.tensor([7]), None, columns, groups, temperature)
    assert value.item() == pytest.approx(600)  # cosine 0.6 over 0.001; the own group's 1.0 would give 1,000
    (gradient,) = torch.autograd.grad(value, query)
    torch.testing.assert_close(gradient, columns[-1:] / temperature)


@pytest.mark.parametrize("temperature", [0.05, 1 / 59.9, 1 / 60.1, 0.002])  # on both sides of NO_SHIFT
@pytest.mark.parametrize("what", ["alike", "opposite", "random", "none"])
def test_log_sum_exp_against_float64(temperature, what):
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=-1).requires_grad_()
    rows = torch.nn.functional.normalize(torch.randn(9000, 8, generator=generator), dim=-1)
    if what in ("alike", "opposite"):
        rows = query.detach()[:1].repeat(9000, 1) * (1 if what == "alike" else -1)
    groups = torch.full((9000,), 5) if what == "none" else torch.arange(9000)
    images, image_of_query = torch.tensor([5, 9001]), torch.tensor([0, 1, 0])
    value = logsumexp.LogSumExp.apply(query, images, image_of_query, rows, groups, temperature)
    logits = query.double() @ rows.double().T / temperature
    logits = logits.masked_fill(images[image_of_query][:, None] == groups, -torch.inf)
    expected = logits.logsumexp(dim=1)
    alone = torch.isinf(expected)
    assert (value[alone] == logsumexp.MASKED).all() and alone.sum() == (2 if what == "none" else 0)
    torch.testing.assert_close(value[~alone].double(), expected[~alone], rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(value.sum(), query)
    (gradient,) = torch.autograd.grad(expected[~alone].sum(), query)
    torch.testing.assert_close(found[~alone].double(), gradient[~alone].double(), rtol=2e-4, atol=1e-4 / temperature)


@pytest.mark.parametrize("lengths", [(1, 0.01), (0.5, 3), (5, 1), (1, 40), (12, 12), (300, 300)])
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_rows_of_any_length_against_float64(monkeypatch, lengths, order):
    """One's own loop may leave rows that are not normalised: the formula's value, not an infinite one."""
    monkeypatch.setattr(logsumexp, "DICTIONARY_BLOCK", 7)
    batch = Batch(31)
    student_image, student_text, *teacher, groups, owners = (tensor.detach() for tensor in batch.tensors())
    inputs = [(rows * lengths[0]).requires_grad_() for rows in (student_image, student_text)]
    teacher = [rows * lengths[1] for rows in teacher]
    columns = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1)) * lengths[1]
    if order != "random":  # of the first caption's logits
        columns = columns[(columns @ student_text[0]).argsort(descending=order == "falling")]
    column_groups = groups[torch.arange(50) % len(groups)]
    whole = TeacherRows(columns, column_groups, columns.flip(0), column_groups.flip(0))
    losses = contrastive_distillation(*inputs, *teacher, groups, owners, dictionary=whole, num_captions=1)
    found = torch.autograd.grad(sum(losses.values()), inputs)

    exact = [rows.detach().double().requires_grad_() for rows in inputs]
    student, own = dict(zip("IT", exact)), dict(zip("IT", (rows.double() for rows in teacher)))
    expected = {}
    for pair in PAIRS:
        of_query, of_target = (
            torch.arange(len(groups)) if pair == "II" else owners if side == "I" else torch.arange(len(owners))
            for side in pair
        )
        queries = student[pair[0]][of_query]
        positives = (queries * own[pair[1]][of_target]).sum(dim=1, keepdim=True)
        rows, of_rows = (columns, column_groups) if pair[1] == "I" else (columns.flip(0), column_groups.flip(0))
        negatives = queries @ rows.double().T
        query_groups = groups if pair == "II" else groups[owners]
        negatives = negatives.masked_fill(query_groups[:, None] == of_rows, -torch.inf)
        logits = torch.cat([positives, negatives], dim=1) / 0.05
        total = (logits.logsumexp(dim=1) - logits[:, 0]).sum()
        expected[pair] = total / (len(groups) if pair == "II" else 1)
    for pair in PAIRS:
        assert losses[pair].item() == pytest.approx(expected[pair].item(), rel=1e-5, abs=1e-5)
    for gradient, of_exact in zip(found, torch.autograd.grad(sum(expected.values()), exact), strict=True):
        scale = of_exact.abs().max()
        torch.testing.assert_close(gradient.double() / scale, of_exact / scale, rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.05, 1 / 59.9])
def test_of_unit_rows_nothing_is_taken_off(temperature):
    """Bit for bit the plain sum of exponentials: what a run with the published temperature was made with."""
    generator = torch.Generator().manual_seed(0)
    query, rows = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (20, 9000))
    query.requires_grad_()
    value = logsumexp.LogSumExp.apply(query, torch.arange(20), None, rows, torch.arange(9000), temperature)
    (found,) = torch.autograd.grad(value.sum(), query)
    total, weighted, scaled = torch.zeros(20, 1), torch.zeros(20, 16), query.detach() / temperature
    for start in range(0, 9000, logsumexp.DICTIONARY_BLOCK):
        block = rows[start : start + logsumexp.DICTIONARY_BLOCK]
        logits = scaled @ block.T
        logits[torch.arange(20)[:, None] == torch.arange(9000)[start : start + len(block)]] = logsumexp.MASKED
        total += logits.exp_().sum(dim=1, keepdim=True)
        weighted.addmm_(logits, block)
    assert torch.equal(value, total.log().squeeze(1)) and torch.equal(found, weighted / (total * temperature))
