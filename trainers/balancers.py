"""Balancers: they set the weights of several losses during training.

A training loop calls `initialise` once with the first step's losses, reads `weights` during a step, and calls `update`
with the step's raw losses after it. Weights carry no gradient and are finite for any finite losses; everything that
changes is in buffers and so in the `state_dict`. No call waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


# Losses are clamped to this range before they are divided or added up, so that the results are finite in float32.
SMALLEST, LARGEST = 1e-30, 1e30


class LossBalancer(nn.Module):
    """What every balancer has. `names` gives the order of the losses in every `[n]` tensor."""

    starts_from_losses = True  # whether the first step's losses count for its own weights

    def __init__(self, names: Sequence[str]):
        super().__init__()
        if isinstance(names, str) or not names or len(set(names)) != len(names):
            raise ValueError(f"names is {names!r}; expected one or more different names of losses")
        self.names = tuple(names)
        self._starts: dict[str, float] = {}

    def _add_state(self, name: str, start: float = 0.0, shape: Sequence[int] | None = None) -> None:
        """A buffer of the checkpoint, `[n]` unless a shape is given, float32 or, where `start` is an int, int64.

        Args:
            start: what it is filled with before the first step.
        """
        self._starts[name] = start
        self.register_buffer(name, torch.full((len(self.names),) if shape is None else shape, start))

    def weights(self) -> Tensor:
        """`[n]` float32, no gradient; constant until the next `update`."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, losses: Tensor) -> None:
        """Forget the past and start from the raw losses `[n]` of the first step."""
        self._read(losses)
        for name, start in self._starts.items():
            self.get_buffer(name).fill_(start)
        if self.starts_from_losses:
            self.update(losses)

    def update(self, losses: Tensor) -> None:
        """Take in the raw losses `[n]` of a step. A loss that is not finite leaves its own state as it was."""
        raise NotImplementedError

    def _read(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The losses `[n]` as float32 in [0, LARGEST], 0 where not finite, and a mask `[n]` of the finite ones."""
        if losses.shape != (len(self.names),):
            expected = f"[{len(self.names)}], one each for {', '.join(self.names)}"
            raise ValueError(f"losses has shape {list(losses.shape)}; expected {expected}")
        losses = losses.to(next(self.buffers()).device, torch.float32)
        finite = torch.isfinite(losses)
        return torch.where(finite, losses, 0.0).clamp(0.0, LARGEST), finite


class FixedBalancer(LossBalancer):
    """Weights that are given and stay as they are.

    Args:
        names: the losses.
        weights: a weight for each name, 0 or more; None: 1 for each.
    """

    def __init__(self, names: Sequence[str], weights: dict[str, float] | None = None):
        super().__init__(names)
        weights = {name: 1.0 for name in self.names} if weights is None else weights
        if set(weights) != set(self.names):
            raise ValueError(f"weights are given for {sorted(weights)}; expected one for each of {sorted(self.names)}")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name} is {weight}; expected a finite number, 0 or more")
        # Not in the checkpoint: a resumed run takes the weights from its settings.
        self.register_buffer("given", torch.tensor([float(weights[n]) for n in self.names]), persistent=False)

    def weights(self) -> Tensor:
        return self.given.clone()

    def update(self, losses: Tensor) -> None:
        self._read(losses)


class PublishedBalancer(LossBalancer):
    """The formula of DSMD's published code, made safe: `m_i K softmax(r / T)_i` with `m_i = max_j L_j / L_i`, `A_i =
    m_i L_i` and `r_i = A_i(t) / A_i(t-1)`.

    It does not adapt to how fast losses fall, though it looks so: `A_i = max_j L_j` for every i, so all rates are
    equal and the softmax is always 1/n. What is left is `(K / n) max_j L_j sum_i grad L_i / L_i`: the direction of
    `grad sum_i log L_i`, the geometric mean of the losses.

    Unlike the published code it starts from the first step's magnitudes instead of weights of 1, and a loss of 0
    (there: weights of NaN) counts as a millionth of the largest.

    Args:
        names: the losses.
        scale: K, above 0.
        temperature: T, above 0; without effect, see above.
    """

    def __init__(self, names: Sequence[str], scale: float = 10.0, temperature: float = 1.0):
        super().__init__(names)
        _check_positive("scale", scale)
        _check_positive("temperature", temperature)
        self.scale = scale
        self.temperature = temperature
        self._add_state("previous")  # A_i(t-1); 0 before the first step
        self._add_state("current", 1.0)

    def weights(self) -> Tensor:
        return self.current.clone()

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        losses, finite = self._read(losses)
        largest = losses.max().clamp(min=SMALLEST)
        losses = losses.maximum(1e-6 * largest)
        magnification = largest / losses
        magnified = magnification * losses
        # The rates differ only by rounding, which grows with their size: clamped, they neither overflow nor let the
        # rounding show in the softmax.
        rates = torch.where(self.previous > 0, magnified / self.previous.clamp(min=SMALLEST), 1.0).clamp(max=10.0)
        weights = magnification * self.scale * torch.softmax(rates / self.temperature, dim=0)
        self.previous.copy_(torch.where(finite, magnified, self.previous))
        self.current.copy_(torch.where(finite, weights, self.current))


class DynamicBalancer(LossBalancer):
    """Weights from each raw loss's magnitude and from how fast it falls; the default.

    Each loss has two running means, a fast and a slow one. `rate_i = fast_i / slow_i` is 1 where the loss stands still
    and below 1 where it falls. Then `weight_i = n softmax(rate / temperature)_i / fast_i`: the weighted losses are
    shares of n, and a loss that falls more slowly than the others has a larger share (as in DWA, Liu et al. 2019, per
    epoch). Multiplying a loss by c divides its weight by c and leaves the other weights alone.

    Rates are clamped to [0.5, 2]. Both means count as at least a thousandth of the largest value that the fast one has
    had, so that a loss that touches 0 keeps a bounded weight. Mean and rate of a loss that was never positive
    count as 1.

    Args:
        names: the losses.
        temperature: above 0; the lower, the more the rates matter: between rates of 1 and 0.8 the shares differ by a
            factor of 1.2 at 1, of 7.4 at 0.1.
        smoothing: decay per update of the fast mean, in [0, 1); the slow one forgets ten times as slowly (0.9 and
            0.99). Each begins as the plain mean of the losses so far, until a plain mean would forget more slowly: so
            the first loss has no lasting weight, and all rates are 1 during the first 1 / (1 - smoothing) updates.
    """

    def __init__(self, names: Sequence[str], temperature: float = 1.0, smoothing: float = 0.9):
        super().__init__(names)
        _check_positive("temperature", temperature)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is {smoothing}; expected a number in [0, 1)")
        self.temperature = temperature
        self.smoothing = smoothing
        # How many losses the means have taken in, from the first positive one on.
        self._add_state("seen", 0)
        self._add_state("fast")
        self._add_state("slow")
        self._add_state("largest")

    @torch.no_grad()
    def weights(self) -> Tensor:
        floor = (1e-3 * self.largest).clamp(min=SMALLEST)
        magnitudes = torch.where(self.seen > 0, self.fast.maximum(floor), 1.0)
        rates = torch.where(self.seen > 0, magnitudes / self.slow.maximum(floor), 1.0).clamp(0.5, 2.0)
        return len(self.names) * torch.softmax(rates / self.temperature, dim=0) / magnitudes

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        losses, finite = self._read(losses)
        taken = finite & ((losses > 0) | (self.seen > 0))
        self.seen.add_(taken)
        plain = 1 / self.seen.clamp(min=1)
        for mean, step in ((self.fast, 1 - self.smoothing), (self.slow, (1 - self.smoothing) / 10)):
            mean.copy_(torch.where(taken, mean + plain.clamp(min=step) * (losses - mean), mean))
        self.largest.copy_(self.largest.maximum(self.fast))


class GeometricMeanBalancer(LossBalancer):
    """`1 / L_i`: the direction of `grad sum_i log L_i`, and so of the losses' geometric mean (GLS, Chennupati et al.
    2019), with the losses of the step before. Each loss counts as at least a millionth of the largest.

    Args:
        names: the losses.
    """

    def __init__(self, names: Sequence[str]):
        super().__init__(names)
        self._add_state("current", 1.0)

    def weights(self) -> Tensor:
        return self.current.clone()

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        losses, finite = self._read(losses)
        smallest = (1e-6 * losses.max()).clamp(min=SMALLEST)
        self.current.copy_(torch.where(finite, 1 / losses.maximum(smallest), self.current))


class DWABalancer(LossBalancer):
    """Dynamic weight average (Liu et al. 2019): `n softmax(r / T)_i`, where `r_i` is the mean of a loss over the last
    whole epoch divided by its mean over the epoch before. It follows how fast losses fall, not how large they are.

    Rates are clamped to [0.1, 10]. They are 1 until two epochs are whole, and for a loss whose mean was 0.

    Args:
        names: the losses.
        steps_per_epoch: updates that make an epoch, 1 or more.
        temperature: T, above 0; the paper's is 2.
    """

    starts_from_losses = False

    def __init__(self, names: Sequence[str], steps_per_epoch: int, temperature: float = 2.0):
        super().__init__(names)
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch is {steps_per_epoch}; expected 1 or more")
        _check_positive("temperature", temperature)
        self.steps_per_epoch = steps_per_epoch
        self.temperature = temperature
        self._add_state("updates", 0, shape=())
        self._add_state("seen")  # finite losses of this epoch
        self._add_state("mean")  # the mean of these
        self._add_state("last")  # mean of the last whole epoch; 0: none yet
        self._add_state("before")  # mean of the epoch before it

    @torch.no_grad()
    def weights(self) -> Tensor:
        known = (self.last > 0) & (self.before > 0)
        rates = torch.where(known, self.last / self.before.clamp(min=SMALLEST), 1.0).clamp(0.1, 10.0)
        return len(self.names) * torch.softmax(rates / self.temperature, dim=0)

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        losses, finite = self._read(losses)
        self.seen.add_(finite)
        self.mean.add_(torch.where(finite, (losses - self.mean) / self.seen.clamp(min=1), 0.0))
        self.updates.add_(1)
        over = self.updates % self.steps_per_epoch == 0
        self.before.copy_(torch.where(over, self.last, self.before))
        self.last.copy_(torch.where(over, self.mean, self.last))
        for sums in (self.seen, self.mean):
            sums.copy_(torch.where(over, 0.0, sums))


class UncertaintyBalancer(LossBalancer):
    """Learned uncertainties (Kendall et al. 2018): `e^{-s_i} / 2`, where `s_i` starts at 0 and descends the gradient
    of `sum_i e^{-s_i} L_i / 2 + s_i / 2`.

    The gradient has a closed form, `(1 - e^{-s_i} L_i) / 2`, so s needs no optimiser. It is 0 at `s_i = log L_i`,
    where the weights are `1 / (2 L_i)`, the direction of the geometric mean; what differs is how slowly it gets there.

    Args:
        names: the losses.
        rate: step size of s, above 0. One update moves no s by more than 1.
    """

    starts_from_losses = False

    def __init__(self, names: Sequence[str], rate: float = 0.025):
        super().__init__(names)
        _check_positive("rate", rate)
        self.rate = rate
        self._add_state("log_variance")

    @torch.no_grad()
    def weights(self) -> Tensor:
        return torch.exp(-self.log_variance) / 2

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        losses, finite = self._read(losses)
        steps = (self.rate * (1 - torch.exp(-self.log_variance) * losses) / 2).clamp(-1.0, 1.0)
        # Clamped to log SMALLEST and log LARGEST, so that the weights stay finite.
        self.log_variance.sub_(torch.where(finite, steps, 0.0)).clamp_(math.log(SMALLEST), math.log(LARGEST))


class RandomBalancer(LossBalancer):
    """Random weights (RLW, Lin et al. 2022): `n softmax(z)`, z standard normal and new in each step. A baseline: a
    balancer is worth what it gains over this one.

    Args:
        names: the losses.
        seed: of the random numbers, which repeat after 16,384 steps.
    """

    starts_from_losses = False

    def __init__(self, names: Sequence[str], seed: int = 0):
        super().__init__(names)
        numbers = torch.randn(16384, len(self.names), generator=torch.Generator().manual_seed(seed))
        # Drawn ahead: so they are the same on every rank and in a resumed run, and lie on the device.
        self.register_buffer("numbers", numbers, persistent=False)
        self._add_state("updates", 0, shape=(1,))

    @torch.no_grad()
    def weights(self) -> Tensor:
        numbers = self.numbers.index_select(0, self.updates % len(self.numbers))[0]
        return len(self.names) * torch.softmax(numbers, dim=0)

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        self._read(losses)
        self.updates.add_(1)


# Kind -> its class and the settings of this.
BALANCERS = {
    "dynamic": (DynamicBalancer, ("temperature", "smoothing")),
    "published": (PublishedBalancer, ("scale", "temperature")),
    "geometric_mean": (GeometricMeanBalancer, ()),
    "dwa": (DWABalancer, ("steps_per_epoch", "temperature")),
    "uncertainty": (UncertaintyBalancer, ("rate",)),
    "random": (RandomBalancer, ("seed",)),
    "fixed": (FixedBalancer, ("weights",)),
}


def make_balancer(kind: str, names: Sequence[str], **settings) -> LossBalancer:
    """A new balancer.

    Args:
        kind: one of `BALANCERS`.
        names: the losses, in the order of every `[n]` tensor.
        **settings: those of the kind's class.

    Raises: ValueError for an unknown kind or setting, naming the choices, and for a setting that is missing.
    """
    if kind not in BALANCERS:
        raise ValueError(f"balancer kind is {kind!r}; expected one of {', '.join(BALANCERS)}")
    balancer, known = BALANCERS[kind]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"the {kind} balancer has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    if kind == "dwa" and "steps_per_epoch" not in settings:
        raise ValueError("the dwa balancer needs the setting steps_per_epoch")
    return balancer(names, **settings)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; expected a finite number above 0")
