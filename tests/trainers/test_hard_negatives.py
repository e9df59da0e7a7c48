"""The hard-negative loss where rows have no partner, against loops; see also test_losses."""

import pytest
from loss_references import Batch, hinge, reference_hinge

from trainers.losses import PAIRS


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("kind", ["fixed", "teacher"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_texts", [False, True])
def test_hinge_against_loops(seed, kind, hardest, with_texts):
    batch = Batch.mixed(seed, with_texts=with_texts)
    step = Batch.mixed(seed + 100, num_images=12, with_texts=with_texts)
    losses = hinge(batch, step, margin=0.3, margin_kind=kind, hardest=hardest)
    for pair in PAIRS:
        by_hand = reference_hinge(batch, step, pair, 0.3, kind, hardest)
        assert losses[pair].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)
