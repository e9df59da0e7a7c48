import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchjd import scalarization

from trainers import balancers
from trainers.balancers import BALANCERS, DynamicBalancer, FixedBalancer, PublishedBalancer


NAMES = ("contrastive", "feature", "similarity", "hard_negative")
KINDS = tuple(BALANCERS)
ADAPTIVE = tuple(kind for kind in KINDS if kind not in ("fixed", "random"))
FIRST = torch.tensor([4.0, 0.03, 0.4, 0.25])


def make_balancer(kind, names, **settings):
    return balancers.make_balancer(kind, names, **{"steps_per_epoch": 7} if kind == "dwa" else {}, **settings)


def feed(balancer, sequence):
    """Initialise on the first row, update on the others; the weights after each."""
    balancer.initialise(sequence[0])
    weights = [balancer.weights()]
    for losses in sequence[1:]:
        balancer.update(losses)
        weights.append(balancer.weights())
    return torch.stack(weights)


def noisy(seed, steps=150, falls=(0.97, 0.99, 1.0, 1.01)):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.exp(0.2 * torch.randn(steps, 4, generator=generator))
    return FIRST * torch.tensor(falls) ** torch.arange(steps)[:, None] * noise


def reference_dynamic(sequence, temperature, smoothing):
    """From the definition, in float64: weighted means over the whole past, without running state."""
    sequence = np.asarray(sequence, dtype=np.float64)
    weights = []
    for now in range(1, len(sequence) + 1):
        means, largest = [], 0.0
        for step in (1 - smoothing, (1 - smoothing) / 10):
            mean = np.zeros(sequence.shape[1])
            for t in range(now):
                share = max(step, 1 / (t + 1))
                mean = (1 - share) * mean + share * sequence[t]
                if not means:
                    largest = np.maximum(largest, mean)
            means.append(mean)
        fast, slow = (np.maximum(mean, 1e-3 * largest) for mean in means)
        shares = np.exp(np.clip(fast / slow, 0.5, 2) / temperature)
        weights.append(sequence.shape[1] * shares / shares.sum() / fast)
    return np.array(weights)


@pytest.mark.parametrize("temperature, smoothing", [(1.0, 0.9), (0.1, 0.5), (0.3, 0.0)])
def test_dynamic_against_reference(temperature, smoothing):
    sequence = noisy(0, steps=60)
    sequence[20:30, 3] = 0.0
    found = feed(DynamicBalancer(NAMES, temperature=temperature, smoothing=smoothing), sequence)
    np.testing.assert_allclose(found.numpy(), reference_dynamic(sequence, temperature, smoothing), rtol=1e-4)


def test_published_against_reference():
    sequence = noisy(1, steps=40)
    found = feed(PublishedBalancer(NAMES, scale=7.0, temperature=0.5), sequence)
    losses = sequence.double().numpy()
    magnified_before = None
    for step, now in enumerate(losses):
        magnification = now.max() / now
        magnified = magnification * now
        rates = np.ones(4) if magnified_before is None else magnified / magnified_before
        shares = np.exp(rates / 0.5) / np.exp(rates / 0.5).sum()
        np.testing.assert_allclose(found[step].numpy(), magnification * 7.0 * shares, rtol=1e-4)
        magnified_before = magnified


def test_published_is_the_gradient_of_the_sum_of_logs():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(16, 5)
    balancer = PublishedBalancer(NAMES, temperature=0.3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    scales = torch.tensor([10.0, 1.0, 0.1, 0.01])

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), retain_graph=True)])

    for step in range(5):
        losses = ((model(inputs) - torch.arange(4.0)) ** 2).mean(0) * scales
        (balancer.initialise if step == 0 else balancer.update)(losses)
        weighted, logs = flat((balancer.weights() * losses).sum()), flat(losses.log().sum())
        assert torch.cosine_similarity(weighted, logs, dim=0).item() == pytest.approx(1, abs=1e-5)
        optimiser.zero_grad()
        losses.log().sum().backward()
        optimiser.step()


@pytest.mark.parametrize("kind", ["dynamic", "published", "geometric_mean"])
def test_magnitudes_are_right_from_the_first_step(kind):
    weighted = feed(make_balancer(kind, NAMES), FIRST[None])[0] * FIRST
    torch.testing.assert_close(weighted, weighted[:1].expand(4))


def scalarized_gradient(scalarizer, losses):
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(scalarizer(losses), losses)[0]


def test_geometric_mean_against_torchjd():
    sequence = noisy(10, steps=20)
    for weights, losses in zip(feed(make_balancer("geometric_mean", NAMES), sequence), sequence):
        gradient = scalarized_gradient(scalarization.GeometricMean(), losses)
        torch.testing.assert_close(weights / weights.sum(), gradient / gradient.sum())


@pytest.mark.parametrize("temperature", [2.0, 0.1])
def test_dwa_against_torchjd(temperature):
    sequence = noisy(11, steps=40)
    balancer = make_balancer("dwa", NAMES, temperature=temperature)
    balancer.initialise(sequence[0])
    reference = scalarization.DWA(temperature)
    seen = []
    for step, losses in enumerate(sequence, start=1):
        weights = balancer.weights()
        torch.testing.assert_close(weights, scalarized_gradient(reference, losses))
        seen.append(weights)
        balancer.update(losses)
        if step % 7 == 0:
            reference.step()
    assert torch.equal(seen[13], torch.ones(4)) and not torch.equal(seen[14], torch.ones(4))


def test_uncertainty_against_torchjd():
    sequence = noisy(12, steps=80)
    balancer = make_balancer("uncertainty", NAMES, rate=0.1)
    balancer.initialise(sequence[0])
    reference = scalarization.UW(4)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for losses in sequence:
        torch.testing.assert_close(balancer.weights(), scalarized_gradient(reference, losses))
        optimizer.zero_grad()
        reference(losses).backward()
        optimizer.step()
        balancer.update(losses)
    for _ in range(2000):
        balancer.update(FIRST)
    torch.testing.assert_close(balancer.log_variance, FIRST.log(), rtol=1e-3, atol=1e-3)  # at rest: geometric mean


def test_uncertainty_takes_bounded_steps():
    balancer = make_balancer("uncertainty", NAMES, rate=1.0)
    balancer.update(torch.tensor([1e6, 1.0, 0.0, 1e30]))
    torch.testing.assert_close(balancer.log_variance, torch.tensor([1.0, 0.0, -0.5, 1.0]))


def test_dwa_rates_are_bounded():
    balancer = make_balancer("dwa", NAMES, temperature=1.0)
    losses = torch.tensor([1.0, 1.0, 1.0, 1.0])
    for factors in (torch.ones(4), torch.tensor([1e-5, 1.0, 1e5, 0.0])):
        for _ in range(7):
            balancer.update(losses * factors)
    # A mean of 0 has rate 1.
    torch.testing.assert_close(balancer.weights(), 4 * torch.softmax(torch.tensor([0.1, 1.0, 10.0, 1.0]), dim=0))


def test_random_against_torchjd():
    """The same distribution: of torchjd's weights mean and spread, and no two steps alike."""
    balancer = make_balancer("random", NAMES)
    weights = feed(balancer, FIRST.repeat(4000, 1))
    torch.manual_seed(0)
    reference = torch.stack([4 * scalarized_gradient(scalarization.Random(), FIRST) for _ in range(4000)])
    torch.testing.assert_close(weights.sum(dim=1), torch.full((4000,), 4.0))
    torch.testing.assert_close(weights.mean(dim=0), reference.mean(dim=0), rtol=0, atol=0.06)
    torch.testing.assert_close(weights.std(dim=0), reference.std(dim=0), rtol=0, atol=0.06)
    assert len(weights[:, 0].unique()) > 3990
    assert not torch.equal(weights[0], make_balancer("random", NAMES, seed=1).weights())


def test_fixed():
    given = dict(zip(NAMES, (1.0, 0.0, 2.5, 3.0), strict=True))
    balancer = FixedBalancer(NAMES, dict(reversed(given.items())))
    assert torch.equal(feed(balancer, noisy(2)), torch.tensor([1.0, 0.0, 2.5, 3.0]).expand(150, 4))
    assert torch.equal(FixedBalancer(NAMES).weights(), torch.ones(4))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("factor", [1e-6, 0.37, 1e5])
def test_dynamic_scaling_one_loss_divides_its_weight(factor, temperature):
    sequence = noisy(3)
    scaled = sequence * torch.tensor([1.0, factor, 1.0, 1.0])
    plain = feed(DynamicBalancer(NAMES, temperature), sequence)
    found = feed(DynamicBalancer(NAMES, temperature), scaled)
    torch.testing.assert_close(found[:, 1] * factor, plain[:, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[:, [0, 2, 3]], plain[:, [0, 2, 3]], rtol=1e-4, atol=0)


def test_dynamic_follows_rates():
    steps = torch.arange(100)[:, None]
    equal = FIRST * 0.98**steps
    balancer = DynamicBalancer(NAMES, temperature=0.1)
    shares = feed(balancer, equal) * torch.stack([balancer.fast / equal[-1] * row for row in equal])
    torch.testing.assert_close(shares[-1], torch.ones(4), rtol=1e-4, atol=0)  # equal rates, equal shares

    different = FIRST * torch.tensor([0.99, 0.994, 0.997, 1.0]) ** steps
    for temperature in (1.0, 0.1):
        balancer = DynamicBalancer(NAMES, temperature)
        shares = feed(balancer, different)[-1] * balancer.fast
        assert (shares.diff() > 0.05).all()  # the slower a loss falls, the larger its share
        assert shares.sum().item() == pytest.approx(4, rel=1e-5)


def test_dynamic_swings_no_more_than_the_rates_allow():
    sequence = FIRST.repeat(300, 1)
    sequence[150:, 0] *= 100
    sequence[150:, 1] /= 100
    balancer = DynamicBalancer(NAMES, temperature=0.5)
    balancer.initialise(sequence[0])
    for losses in sequence:
        balancer.update(losses)
        shares = balancer.weights() * balancer.fast
        assert (shares.max() / shares.min()).item() <= math.exp((2 - 0.5) / 0.5) * 1.001


@pytest.mark.parametrize(
    "kind, settings",
    [(kind, {}) for kind in ADAPTIVE] + [(kind, {"temperature": 0.05}) for kind in ("dynamic", "published", "dwa")],
)
@pytest.mark.parametrize("seed", range(10))
def test_weights_are_finite_for_any_finite_losses(seed, kind, settings):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 0.0, 1e-45, 1e-38, 1e-30, 1e-8, 1e-3, 1.0, 1e30, 3.4e38, torch.finfo().max, -1e-7])
    sequence = values[torch.randint(0, len(values), (200, 4), generator=generator)]
    if seed < 4:
        sequence[:50, seed] = 0.0  # never positive for a while, then anything
    if seed == 4:
        sequence[:] = 0.0
    if seed == 5:
        sequence = torch.finfo().max * (1 - 0.5 * torch.rand(200, 4, generator=generator))
        sequence[:, 0] = torch.finfo().max
    weights = feed(make_balancer(kind, NAMES, **settings), sequence)
    assert torch.isfinite(weights).all() and (weights >= 0).all()


@pytest.mark.parametrize("kind", ["dynamic", "published", "geometric_mean"])
def test_a_loss_that_touches_zero_and_comes_back(kind):
    """The published code has weights of NaN here."""
    sequence = FIRST.repeat(800, 1)
    sequence[100:200, 3] = 0.0
    weights = feed(make_balancer(kind, NAMES), sequence)
    assert (weights[:, 3] <= weights[0, 3] * 1e6 * 1.01).all()
    torch.testing.assert_close(weights[-1], weights[0], rtol=1e-2, atol=0)
    if kind == "dynamic":
        assert (weights[:, 3] <= weights[0, 3] * 1e3 * 1.01).all()
        torch.testing.assert_close(weights[:100], weights[:1].expand(100, 4))


def test_dynamic_a_loss_that_was_never_positive():
    sequence = FIRST.repeat(60, 1)
    sequence[:30, 3] = 0.0
    weights = feed(DynamicBalancer(NAMES), sequence)
    torch.testing.assert_close(weights[:30], torch.tensor([0.25, 100 / 3, 2.5, 1.0]).expand(30, 4))
    torch.testing.assert_close(weights[30:, 3], torch.full((30,), 4.0))  # at once by its first positive value


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_change_nothing_of_theirs(kind, bad):
    balancer = make_balancer(kind, NAMES)
    feed(balancer, noisy(5, steps=20))
    before = copy.deepcopy(balancer.state_dict())
    weights = balancer.weights()
    balancer.update(torch.tensor([bad, 0.1, 0.2, bad]))
    for name, value in balancer.state_dict().items():
        if value.ndim:
            assert torch.equal(value[[0, 3]], before[name][[0, 3]])
            assert not torch.equal(value[[1, 2]], before[name][[1, 2]]) or name in ("largest", "last", "before")
    assert torch.isfinite(balancer.weights()).all()
    balancer.load_state_dict(before)
    balancer.update(torch.full((4,), bad))
    assert torch.equal(balancer.weights(), weights)

    balancer.initialise(torch.tensor([bad, 0.1, 0.2, 0.3]))  # a first step may be bad too
    assert torch.isfinite(balancer.weights()).all()
    balancer.update(FIRST)
    assert torch.isfinite(balancer.weights()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_and_weights_that_stay(kind):
    balancer = make_balancer(kind, NAMES)
    losses = FIRST.clone().requires_grad_()
    balancer.initialise(losses * 2)
    balancer.update(losses * 3)
    weights = balancer.weights()
    assert weights.dtype == torch.float32 and weights.shape == (4,) and not weights.requires_grad
    assert not list(balancer.parameters())
    (weights * losses).sum().backward()
    assert torch.equal(losses.grad, weights)
    kept = weights.clone()
    balancer.update(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(weights, kept)  # handed out, so no longer the balancer's to change
    balancer.weights().zero_()
    assert (balancer.weights() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip_is_exact(kind):
    sequence = noisy(6)
    balancer, other = make_balancer(kind, NAMES), make_balancer(kind, NAMES)
    feed(balancer, sequence[:40])
    feed(other, sequence[80:90])
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    for losses in sequence[40:]:
        assert torch.equal(balancer.weights(), other.weights())
        balancer.update(losses)
        other.update(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_initialise_forgets_the_past(kind):
    sequence = noisy(7)
    fresh, used = make_balancer(kind, NAMES), make_balancer(kind, NAMES)
    feed(used, noisy(8))
    assert torch.equal(feed(fresh, sequence), feed(used, sequence))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="'famo'; expected one of dynamic, published, geometric_mean"):
        make_balancer("famo", NAMES)
    for kind, setting, choices in (
        ("dynamic", "scale", "temperature, smoothing"),
        ("published", "smoothing", "scale, temperature"),
        ("fixed", "temperature", "weights"),
        ("dwa", "smoothing", "steps_per_epoch, temperature"),
        ("uncertainty", "temperature", "rate"),
        ("random", "temperature", "seed"),
    ):
        with pytest.raises(ValueError, match=f"no setting {setting}; it has {choices}"):
            make_balancer(kind, NAMES, **{setting: 0.5})
    for kind, setting, value in (
        ("dynamic", "temperature", 0.0),
        ("dynamic", "temperature", math.nan),
        ("dynamic", "smoothing", 1.0),
        ("dynamic", "smoothing", -0.1),
        ("published", "scale", -1.0),
        ("published", "temperature", math.inf),
        ("dwa", "temperature", 0.0),
        ("uncertainty", "rate", 0.0),
    ):
        with pytest.raises(ValueError, match=setting):
            make_balancer(kind, NAMES, **{setting: value})
    with pytest.raises(ValueError, match="the dwa balancer needs the setting steps_per_epoch"):
        balancers.make_balancer("dwa", NAMES)
    with pytest.raises(ValueError, match="steps_per_epoch is 0"):
        balancers.make_balancer("dwa", NAMES, steps_per_epoch=0)
    for weights in ({"feature": 1.0}, {**dict.fromkeys(NAMES, 1.0), "extra": 1.0}):
        with pytest.raises(ValueError, match="weights are given for"):
            make_balancer("fixed", NAMES, weights=weights)
    with pytest.raises(ValueError, match="weight of feature is -1"):
        make_balancer("fixed", NAMES, weights={**dict.fromkeys(NAMES, 1.0), "feature": -1.0})
    for names in ((), ("a", "a"), "ab"):
        with pytest.raises(ValueError, match="names"):
            make_balancer("dynamic", names)
    for kind in KINDS:
        balancer = make_balancer(kind, NAMES)
        for call in (balancer.initialise, balancer.update):
            with pytest.raises(ValueError, match=r"\[3\]; expected \[4\]"):
                call(torch.ones(3))
