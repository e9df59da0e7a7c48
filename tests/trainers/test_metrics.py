"""Ranks and recalls against loops over float64 numpy, hand values, ties and every bad input."""

import math
import sys

import numpy as np
import pytest
import torch
from rank_references import (
    assert_matches_reference,
    random_problem,
    reference_ranks,
    reference_right,
    with_equal_texts,
)

from trainers import metrics as retrieval
from trainers.metrics import fold_metrics, metrics_from_ranks, ranks, retrieval_metrics


@pytest.mark.parametrize("chunk_size", [3, 16, 1024])
@pytest.mark.parametrize("images_a_group", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_equal_texts_are_right_for_each_image_that_has_one(seed, images_a_group, chunk_size):
    images, texts, image_groups, text_groups, names = with_equal_texts(seed, images_a_group=images_a_group)
    right = reference_right(image_groups.tolist(), text_groups.tolist(), names)
    assert right.sum() > (image_groups[:, None] == text_groups).sum()  # texts of other groups count
    found = ranks(images, texts, image_groups, text_groups, text_ids=names, chunk_size=chunk_size)
    assert found[0].tolist() == reference_ranks(images.double(), texts.double(), None, None, right)
    assert found[1].tolist() == reference_ranks(texts.double(), images.double(), None, None, right.T)
    ids = [names.index(name) for name in names]
    for kind in (ids, torch.tensor(ids), np.array(names)):
        again = ranks(images, texts, image_groups, text_groups, text_ids=kind, chunk_size=chunk_size)
        assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])


def test_a_perfect_model_of_classes_scores_600_and_a_constant_one_0():
    """20 images of each of 15 classes, whose name is the caption of each."""
    classes = torch.arange(300) % 15
    points = torch.eye(15)[classes]
    groups = range(300)
    assert retrieval_metrics(points, points, groups, groups, text_ids=classes)["rsum"] == 600.0
    assert retrieval_metrics(points, points, groups, groups)["rsum"] == 0.0
    assert retrieval_metrics(torch.ones(300, 4), torch.ones(300, 4), groups, groups, text_ids=classes)["rsum"] == 0.0


def test_texts_that_are_equal_in_their_group_alone_change_nothing():
    images, texts, image_groups, text_groups = random_problem(14, images_a_group=2)
    plain = ranks(images, texts, image_groups, text_groups, chunk_size=16)
    for names in (torch.arange(len(texts)), text_groups):
        found = ranks(images, texts, image_groups, text_groups, text_ids=names, chunk_size=16)
        assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


def test_equal_texts_by_hand():
    # Three images at 0, 60 and 120 degrees; images 0 and 2 are both "cat", and 2 is also "black".
    images = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [-0.5, 0.75**0.5]])
    texts = torch.stack([images[2], images[1], images[1], images[0]])
    texts_of = ["cat", "dog", "cat", "black"]
    image_ranks, text_ranks = ranks(images, texts, [0, 1, 2], [0, 1, 2, 2], text_ids=texts_of)
    # Image 0: its best "cat" is at 60 degrees, where "dog" ties, and "black" at 0 degrees comes before both.
    # Image 1: "dog" ties with the "cat" at its place. Image 2: a "cat" is at its place.
    assert image_ranks.tolist() == [3, 2, 1]
    # The "cat" at 120 degrees finds image 2; the one at 60 image 1, the wrong one; "black" image 0, then image 1.
    assert text_ranks.tolist() == [1, 1, 2, 3]


def test_folds_see_equal_texts_of_their_own_alone():
    images, texts, image_groups, text_groups, names = with_equal_texts(3, num_images=12)
    order = np.argsort(image_groups.numpy())
    owner = torch.tensor([order.tolist().index(image_groups.tolist().index(group)) for group in text_groups.tolist()])
    images, image_groups = images[order], image_groups[order]
    ids = torch.tensor([names.index(name) for name in names])
    found = fold_metrics(images, texts, image_groups, owner, 6, ids)
    halves = []
    for half in (0, 1):
        c = (owner // 6 == half).nonzero()[:, 0]
        own = slice(6 * half, 6 * half + 6)
        halves.append(
            retrieval_metrics(images[own], texts[c], image_groups[own], image_groups[owner[c]], text_ids=ids[c])
        )
    assert found["rsum"] == pytest.approx((halves[0]["rsum"] + halves[1]["rsum"]) / 2)
    assert found["rsum"] > fold_metrics(images, texts, image_groups, owner, 6)["rsum"]


def test_hand_values():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # By cosine: image 0 likes its own 0.8 after the wrong 1.0; image 1 has 1.0 for its own.
    texts = torch.tensor([[8.0, 6.0], [5.0, 0.0], [0.0, 0.1]])
    image_ranks, text_ranks = ranks(images, texts, ["a", "b"], ["a", "b", "b"])
    assert image_ranks.tolist() == [2, 1]
    assert text_ranks.tolist() == [1, 2, 1]
    metrics = retrieval_metrics(images, texts, ["a", "b"], ["a", "b", "b"])
    assert metrics["image_to_text_r1"] == 50.0
    assert metrics["text_to_image_r1"] == pytest.approx(200 / 3)
    assert metrics["image_to_text_median_rank"] == 1.5
    assert metrics["text_to_image_median_rank"] == 1.0
    assert metrics["rsum"] == pytest.approx(50 + 200 / 3 + 400)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("images_a_group", [1, 3, 40])
def test_matches_loops_over_numpy(seed, images_a_group):
    image_ranks, _ = assert_matches_reference(*random_problem(seed, images_a_group=images_a_group), chunk_size=16)
    # The problem is neither trivial nor hopeless (with one group for all there are no wrong items).
    assert (image_ranks.max() > 1) == (images_a_group < 40)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 10_000])
def test_chunk_size_changes_nothing(chunk_size):
    problem = random_problem(5, num_images=30, images_a_group=2)
    for ours, expected in zip(ranks(*problem, chunk_size=chunk_size), ranks(*problem), strict=True):
        assert ours.tolist() == expected.tolist()


def test_more_images_than_a_block_of_the_first_pass():
    # 150 images of few groups: a group's pairs span several blocks of rows and of columns.
    assert_matches_reference(*random_problem(6, num_images=150, images_a_group=70, max_captions=2), chunk_size=130)


def test_order_of_rows_changes_nothing():
    images, texts, image_groups, text_groups = random_problem(7, images_a_group=2)
    image_ranks, text_ranks = ranks(images, texts, image_groups, text_groups, chunk_size=8)
    p, q = torch.randperm(len(images)), torch.randperm(len(texts))
    p_ranks, q_ranks = ranks(images[p], texts[q], image_groups[p], text_groups[q], chunk_size=8)
    assert p_ranks.tolist() == image_ranks[p].tolist()
    assert q_ranks.tolist() == text_ranks[q].tolist()


def test_directions_mirror_each_other():
    images, texts, image_groups, text_groups = random_problem(8)
    forth = ranks(images, texts, image_groups, text_groups)
    back = ranks(texts, images, text_groups, image_groups)
    assert forth[0].tolist() == back[1].tolist()
    assert forth[1].tolist() == back[0].tolist()


def test_perfect_model_scores_600():
    images = torch.eye(30)
    metrics = retrieval_metrics(images, images.repeat_interleave(5, 0), range(30), np.arange(150) // 5)
    assert metrics["rsum"] == 600.0
    assert metrics["image_to_text_median_rank"] == metrics["text_to_image_median_rank"] == 1.0
    assert list(metrics) == [
        "image_to_text_r1",
        "image_to_text_r5",
        "image_to_text_r10",
        "text_to_image_r1",
        "text_to_image_r5",
        "text_to_image_r10",
        "rsum",
        "image_to_text_median_rank",
        "text_to_image_median_rank",
    ]
    assert all(type(value) is float for value in metrics.values())


# Rows of equal entries round worst: at 768 and 3072 columns blocks of different shape disagree by 2e-6 and 9e-6.
@pytest.mark.parametrize("dim", [1, 3, 100, 768, 3072])
@pytest.mark.parametrize("entries", ["equal", "random"])
@pytest.mark.parametrize("chunk_size", [1, 3, 17, 64, 1024])
def test_constant_model_scores_0(dim, entries, chunk_size):
    point = torch.ones(dim) if entries == "equal" else torch.randn(dim, generator=torch.Generator().manual_seed(0))
    images, texts = point.expand(23, dim), point.expand(69, dim)
    image_ranks, text_ranks = ranks(images, texts, range(23), torch.arange(69) % 23, chunk_size=chunk_size)
    # Every wrong item ties, and no right one counts.
    assert image_ranks.tolist() == [1 + 66] * 23
    assert text_ranks.tolist() == [1 + 22] * 69
    assert metrics_from_ranks(image_ranks, text_ranks)["rsum"] == 0.0


@pytest.mark.parametrize("chunk_size", [5, 13, 50, 1024])
def test_duplicates_in_other_blocks_are_ties(chunk_size):
    # Every caption and image returns under 3 more groups, at another scale, far away in the sorted order.
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(31, 77, generator=generator)
    texts = images + torch.randn(31, 77, generator=generator)
    scaled_images = torch.cat([images * scale for scale in (1.0, 3.0, 0.7, 11.0)])
    scaled_texts = torch.cat([texts * scale for scale in (1.0, 0.3, 7.0, 5.0)])
    groups = torch.arange(124)
    image_ranks, text_ranks = ranks(scaled_images, scaled_texts, groups, groups, chunk_size=chunk_size)
    images, texts = images.repeat(4, 1).double(), texts.repeat(4, 1).double()
    assert image_ranks.tolist() == reference_ranks(images, texts, groups.tolist(), groups.tolist())
    assert text_ranks.tolist() == reference_ranks(texts, images, groups.tolist(), groups.tolist())
    assert image_ranks.min() == text_ranks.min() == 4


def test_integer_grid_with_many_exact_ties():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 2, (60, 4), generator=generator).float() + torch.tensor([1.0, 0, 0, 0])
    texts = torch.randint(0, 2, (90, 4), generator=generator).float() + torch.tensor([1.0, 0, 0, 0])
    image_groups, text_groups = torch.arange(60) % 25, torch.arange(90) % 25
    assert_matches_reference(images, texts, image_groups, text_groups, chunk_size=11)


def test_a_score_just_below_the_right_one_is_no_tie_but_rounding_is():
    angles = torch.tensor([0.3, 0.3 + 1e-4, 0.3 + 1e-7], dtype=torch.float64)
    texts = torch.stack([angles.cos(), angles.sin()], 1)
    images = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    assert ranks(images[:2], texts[:2], [0, 1], [0, 1])[0].tolist() == [1, 2]
    assert ranks(images[:2], texts[[0, 2]], [0, 1], [0, 1])[0].tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    images, texts, image_groups, text_groups = random_problem(9)
    assert_matches_reference(images.to(dtype), texts.to(dtype), image_groups, text_groups, chunk_size=16)
    ours = ranks(images.to(dtype), texts.float(), image_groups, text_groups)
    expected = ranks(images.to(dtype).float(), texts, image_groups, text_groups)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1e20, 1e37])
def test_any_scale_is_normalised(scale):
    images, texts, image_groups, text_groups = random_problem(10, num_images=8)
    images = torch.sign(images) * 2.0
    expected = ranks(images, texts, image_groups, text_groups)
    ours = ranks(images * scale, texts, image_groups, text_groups)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    ours = ranks(images.double() * 1e200, texts, image_groups, text_groups)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_inputs_are_untouched_and_carry_no_gradient():
    images, texts, image_groups, text_groups = random_problem(11)
    before = images.clone(), texts.clone()
    image_ranks, _ = ranks(images.requires_grad_(), texts.T.contiguous().T, image_groups, text_groups, chunk_size=4)
    assert torch.equal(images, before[0]) and torch.equal(texts, before[1])
    assert not image_ranks.requires_grad


def test_low_precision_settings_change_nothing_and_are_kept():
    images, texts, image_groups, text_groups = random_problem(12, num_images=200, dim=64)
    expected = ranks(images, texts, image_groups, text_groups)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = ranks(images, texts, image_groups, text_groups)
            assert (images @ texts.T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_kinds_of_groups_agree():
    images, texts, image_groups, text_groups = random_problem(13)
    expected = ranks(images, texts, image_groups, text_groups)
    # Neighbours above 2**53, which floats cannot tell apart.
    big_images, big_texts = image_groups + 2**62, text_groups + 2**62
    for image_kind, text_kind in (
        (image_groups.tolist(), text_groups),
        (image_groups.numpy(), text_groups.tolist()),
        (image_groups.to(torch.int32), text_groups.numpy().astype(np.int32)),
        (list(image_groups.numpy()), text_groups),
        ([f"g{g}" for g in image_groups.tolist()], np.array([f"g{g}" for g in text_groups.tolist()])),
        (tuple(str(g) for g in image_groups.tolist()), [str(g) for g in text_groups.tolist()]),
        (big_images, big_texts.tolist()),
    ):
        ours = ranks(images, texts, image_kind, text_kind)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_neighbouring_64_bit_groups_stay_apart():
    eye = torch.eye(2)
    unsigned = np.array([2**63 + 1, 2**63 + 2], dtype=np.uint64)
    assert ranks(eye, eye.flip(0), unsigned, [2**63 + 1, 2**63 + 2])[0].tolist() == [2, 2]
    signed = torch.tensor([2**62 + 1, 2**62 + 2])
    assert ranks(eye, eye.flip(0), signed, signed)[0].tolist() == [2, 2]


def test_memory_is_bounded_by_the_blocks():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    # One group holds half of all pairs, so that the right pairs alone are as many as N x M / 4.
    images, texts = torch.randn(600, 4), torch.randn(900, 4)
    image_groups, text_groups = torch.arange(600).clamp(max=300), torch.arange(900).clamp(max=300)
    for text_ids in (None, torch.arange(900) % 40):
        with Watch():
            ranks(images, texts, image_groups, text_groups, text_ids=text_ids, chunk_size=50)
        assert largest == 900 * 4


def test_progress_of_large_problems_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(retrieval, "PAIRS_OF_A_BAR", 20_000)
    groups = torch.arange(141)
    embeds = torch.eye(141)
    ranks(embeds, embeds, groups, groups, chunk_size=100)  # 19,881 pairs
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(retrieval, "PAIRS_OF_A_BAR", 19_000)
    ranks(embeds, embeds, groups, groups, chunk_size=100)
    assert "rank:   0%" in capsys.readouterr().err
    monkeypatch.setattr(retrieval, "_rank", lambda: 1)  # one process shows it
    ranks(embeds, embeds, groups, groups, chunk_size=100)
    assert capsys.readouterr().err == ""


def test_metrics_from_ranks():
    metrics = metrics_from_ranks(torch.tensor([1, 5, 6, 11]), torch.tensor([10, 2, 1]))
    assert [metrics[f"image_to_text_r{k}"] for k in (1, 5, 10)] == [25.0, 50.0, 75.0]
    assert [metrics[f"text_to_image_r{k}"] for k in (1, 5, 10)] == pytest.approx([100 / 3, 200 / 3, 100.0])
    assert metrics["rsum"] == pytest.approx(350.0)
    assert metrics["image_to_text_median_rank"] == 5.5
    assert metrics["text_to_image_median_rank"] == 2.0


@pytest.mark.parametrize("bad", [[], [0, 1], [[1]]])
def test_bad_ranks(bad):
    with pytest.raises(ValueError, match="text_to_image ranks"):
        metrics_from_ranks(torch.tensor([1]), torch.tensor(bad, dtype=torch.int64))


def changed(rows, row, column, value):
    rows = rows.clone()
    rows[row, column] = value
    return rows


EYE, GROUPS = torch.eye(3), [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((changed(EYE, 1, 2, math.nan), EYE, GROUPS, GROUPS), "image_embeds must be finite, but row 1 holds nan"),
        ((EYE, changed(EYE, 2, 0, -math.inf), GROUPS, GROUPS), "text_embeds must be finite, but row 2 holds -inf"),
        (
            (EYE.half(), changed(EYE.half(), 0, 0, 1e9), GROUPS, GROUPS),
            "text_embeds must be finite, but row 0 holds inf",
        ),
        ((changed(EYE, 1, 1, 0.0), EYE, GROUPS, GROUPS), "image_embeds must have a direction, but row 1 is all 0"),
        ((EYE, torch.zeros(3, 3), GROUPS, GROUPS), r"text_embeds .* row 0 is all 0 \(3 such rows\)"),
        ((EYE, EYE, GROUPS, [0, 1, 1]), "image row 2 of group 2 has none"),
        ((EYE, EYE, [7, 7, 8], [7, 9, 8]), "text row 1 of group 9 has none"),
        ((EYE, EYE, ["a", "b", "c"], ["b", "a", "x"]), "image row 2 of group 'c' has none"),
        ((EYE, torch.ones(3, 4), GROUPS, GROUPS), "image_embeds are 3 wide and text_embeds 4"),
        ((EYE, EYE, [0, 1], GROUPS), "image_groups must name a group for each of the 3 image_embeds, got 2"),
        ((EYE, EYE, GROUPS, torch.arange(4)), "text_groups must name a group for each of the 3 text_embeds, got 4"),
        ((EYE[:1], EYE, torch.tensor(0), GROUPS), "image_groups .* got a single value"),
        ((EYE[:0], EYE, [], GROUPS), r"image_embeds are empty, of shape \(0, 3\)"),
        ((EYE, EYE[:, :0], GROUPS, GROUPS), r"text_embeds are empty, of shape \(3, 0\)"),
        ((EYE[0], EYE, GROUPS, GROUPS), r"image_embeds must be a floating point tensor .* torch.float32 \(3,\)"),
        ((EYE, EYE.long(), GROUPS, GROUPS), "text_embeds must be a floating point tensor .* torch.int64"),
        ((EYE.numpy(), EYE, GROUPS, GROUPS), "image_embeds must be a floating point tensor .* got ndarray"),
        ((EYE, EYE, GROUPS, ["0", "1", "2"]), "0 in image_groups, row 0 and '0' in text_groups, row 0"),
        ((EYE, EYE, [0, "1", 2], GROUPS), "all integers or all strings"),
        (
            (EYE, EYE, torch.arange(3.0), GROUPS),
            r"image_groups must be integers or strings, but row 0 is 0.0 \(float\)",
        ),
        ((EYE, EYE, GROUPS, [0, None, 2]), "text_groups .* row 1 is None"),
        ((EYE, EYE, GROUPS, [True, False, True]), "text_groups .* row 0 is True"),
        ((EYE, EYE, torch.arange(3)[:, None], GROUPS), r"image_groups .* row 0 is \[0\] \(list\)"),
    ],
)
def test_bad_input_is_named(arguments, message):
    for function in (ranks, retrieval_metrics):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", "b"], "text_ids must name an id for each of the 3 text_embeds, got 2"),
        (["a", None, "b"], r"text_ids must be integers or strings, but row 1 is None"),
        (["a", 1, "b"], "'a' in text_ids, row 0 and 1 in text_ids, row 1"),
    ],
)
def test_bad_texts_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(EYE, EYE, GROUPS, GROUPS, text_ids=texts)


def test_bad_chunk_size():
    with pytest.raises(ValueError, match="chunk_size must be 1 or more, got 0"):
        retrieval_metrics(EYE, EYE, GROUPS, GROUPS, chunk_size=0)


def test_other_device_is_named():
    with pytest.raises(ValueError, match="text_embeds on meta"):
        ranks(EYE, _OnMeta(EYE), GROUPS, GROUPS)


class _OnMeta(torch.Tensor):
    """Values of the processor under the name of another device, which every machine has."""

    @property
    def device(self):
        return torch.device("meta")
