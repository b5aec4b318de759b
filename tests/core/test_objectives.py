"""Objectives against the papers' equations in float64: what is predicted, how times are drawn, how errors count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loha_core import LoHaError
from loha_core.training.data.batches import BatchSampler
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.objectives import PREDICTIONS, Objective
from loha_core.training.randomness import generator

ONE = torch.ones(1)
sigmas = st.floats(0.001, 0.999)


def column(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def plan(prediction: str, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(α, σ) where the prediction is used: flow matching is a straight line, the others keep the variance."""
    alpha = 1 - sigma if prediction == "flow" else math.sqrt(1 - sigma**2)
    return column(alpha), column(sigma)


def picture(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(seed, "picture")
    return tuple(torch.randn(1, 4, 3, 5, generator=rng, dtype=torch.float64) for _ in range(2))  # type: ignore


# What each paper says x₀ is, given x and the output; nothing here looks at `PREDICTIONS`.
RECONSTRUCT = {
    "epsilon": lambda x, y, a, s: (x - s * y) / a,
    "v": lambda x, y, a, s: a * x - s * y,
    "x0": lambda x, y, a, s: y,
    "flow": lambda x, y, a, s: x - s * y,
}


@given(st.sampled_from(sorted(PREDICTIONS)), sigmas)
def test_the_target_gives_the_picture_back_and_the_gain_is_its_slope(prediction, sigma):
    x0, noise = picture()
    alpha, s = plan(prediction, sigma)
    x = alpha * x0 + s * noise
    kind = PREDICTIONS[prediction]
    output = kind.target(x0, noise, alpha, s).requires_grad_()
    found = RECONSTRUCT[prediction](x, output, alpha, s)
    torch.testing.assert_close(found, x0)
    (slope,) = torch.autograd.grad(found.sum(), output)
    torch.testing.assert_close(kind.gain(alpha, s).expand_as(slope), slope)


def signal(prediction: str, sigma: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """gain (1,), SNR (1,), and the SNR as a number."""
    alpha, s = plan(prediction, sigma)
    snr = (alpha / s).square().flatten()
    return PREDICTIONS[prediction].gain(alpha, s).flatten(), snr, float(snr)


# arXiv 2303.09556, section 3.4, and its appendix for v.
MIN_SNR = {
    "epsilon": lambda snr, g: min(snr, g) / snr,
    "v": lambda snr, g: min(snr, g) / (snr + 1),
    "x0": lambda snr, g: min(snr, g),
}


@given(st.sampled_from(sorted(MIN_SNR)), sigmas, st.floats(0.1, 20))
def test_min_snr_is_the_papers_weight_for_each_prediction(prediction, sigma, gamma):
    gain, snr, number = signal(prediction, sigma)
    found = Objective(min_snr_gamma=gamma).weight(gain, snr)
    assert float(found) == pytest.approx(MIN_SNR[prediction](number, gamma), rel=1e-9)


@given(sigmas)
def test_debiased_is_one_over_the_root_of_snr(sigma):
    gain, snr, number = signal("epsilon", sigma)
    assert float(Objective(debiased=True).weight(gain, snr)) == pytest.approx(min(number**-0.5, 1000), rel=1e-9)


def test_without_a_weighting_all_times_count_alike():
    gain, snr, _ = signal("epsilon", 0.3)
    assert float(Objective().weight(gain, snr)) == 1


@pytest.mark.parametrize("objective", [Objective(min_snr_gamma=5), Objective(debiased=True)])
def test_the_loss_is_weighted(objective):
    x0, noise = picture()
    gain, snr, _ = signal("epsilon", 0.3)
    plain = Objective().loss(x0, noise, gain, snr)
    expected = plain * objective.weight(gain, snr)[0]
    assert not math.isclose(float(expected), float(plain), rel_tol=0.05)
    torch.testing.assert_close(objective.loss(x0, noise, gain, snr), expected.float(), check_dtype=False)


# --- distances ------------------------------------------------------------------------------------


def mse(e, delta):
    return e * e


def l1(e, delta):
    return abs(e)


def huber(e, delta):
    return e * e if abs(e) <= delta else 2 * delta * abs(e) - delta * delta


@given(
    st.sampled_from([mse, l1, huber]),
    st.floats(0.01, 3),
    st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=4, max_size=4),
)
def test_distances(distance, delta, pairs):
    output, target = (torch.tensor(side, dtype=torch.float64).reshape(1, 1, 2, 2) for side in zip(*pairs, strict=True))
    found = Objective(loss_type=distance.__name__, huber_delta=delta).loss(output, target, ONE, ONE)
    expected = sum(distance(a - b, delta) for a, b in pairs) / 4
    assert float(found) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_loss_is_computed_in_float32():
    output = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)  # its square is beyond float16
    found = Objective().loss(output, torch.zeros_like(output), ONE, ONE)
    assert found.dtype == torch.float32 and float(found) == 90_000


# --- mask and weights -------------------------------------------------------------------------------


@given(st.sampled_from([(2, 3), (2, 2, 3)]), st.integers(0, 2**31))
def test_a_mask_takes_the_mean_over_what_it_shows(size, seed):
    rng = generator(seed)
    output, target = (torch.randn(2, 3, *size, generator=rng) for _ in range(2))
    mask = torch.rand(2, 1, *size, generator=rng).round(decimals=1)
    mask[:, :, 0] = 1
    found = Objective().loss(output, target, torch.ones(2), torch.ones(2), mask=mask)
    expected = 0.0
    for n in range(2):
        error = ((output[n] - target[n]).double() ** 2).mean(0)  # over channels: all under one mask
        expected += float((error * mask[n, 0]).sum() / mask[n, 0].sum()) / 2
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_what_is_masked_gets_no_gradient():
    output = torch.randn(1, 2, 2, 2, requires_grad=True)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.5]]]])
    Objective().loss(output, torch.zeros(1, 2, 2, 2), ONE, ONE, mask=mask).backward()
    assert torch.equal(output.grad != 0, (mask != 0).expand_as(output))


def test_sample_weights():
    output, target = torch.zeros(3, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    three = torch.ones(3)
    found = Objective().loss(output, target, three, three, sample_weight=torch.tensor([1.0, 0.5, 0.0]))
    assert float(found) == pytest.approx((1 * 1 + 0.5 * 4 + 0 * 9) / 3)


# --- noise and times ------------------------------------------------------------------------------


def times(count: int = 4000, **settings) -> torch.Tensor:
    objective, rng = Objective(**settings), generator(1, "times")
    return torch.tensor([objective.time(rng) for _ in range(count)], dtype=torch.float64)


P = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)


def test_uniform_times():
    torch.testing.assert_close(times().quantile(P), P, atol=0.03, rtol=0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.4)])
def test_logit_normal_times(mean, std):
    found = torch.logit(times(timesteps="logit-normal", logit_mean=mean, logit_std=std))
    torch.testing.assert_close(float(found.mean()), mean, atol=0.06 * std, rtol=0)
    torch.testing.assert_close(float(found.std()), std, atol=0, rtol=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_shifted_times(shift):
    """arXiv 2403.03206, eq. 23: for √(m/n) = shift, t_m = shift·t_n / (1 + (shift − 1)·t_n)."""
    found = times(timesteps="shifted", shift=shift).quantile(P)
    torch.testing.assert_close(found, shift * P / (1 + (shift - 1) * P), atol=0.03, rtol=0)


@given(
    st.sampled_from(["uniform", "logit-normal", "shifted", "heavy-tail", "beta"]),
    st.floats(-1e4, 1e4),
    st.floats(1e-3, 1e4),
    st.floats(1e-6, 1e6),
    st.integers(0, 100),
)
def test_a_time_is_never_at_an_end(timesteps, mean, std, shift, seed):
    objective = Objective(timesteps=timesteps, logit_mean=mean, logit_std=std, shift=shift)
    time = objective.time(generator(seed))
    assert 0 < time < 1 and time == objective.time(generator(seed))


U = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)


def density(grid: torch.Tensor, **settings) -> torch.Tensor:
    """By differences of the quantile function, in float64."""
    objective, h = Objective(**settings), 1e-4
    slopes = [(objective.quantile(float(u) + h) - objective.quantile(float(u) - h)) / (2 * h) for u in grid]
    return 1 / torch.tensor(slopes, dtype=torch.float64)


def at(grid: torch.Tensor, tokens: int = 4096, **settings) -> torch.Tensor:
    objective = Objective(**settings)
    return torch.tensor([objective.quantile(float(u), tokens) for u in grid], dtype=torch.float64)


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (0.5, 0.5), (1.5, 1.0), (0.2, 3.0), (40.0, 7.0), (1.0, 1.0)])
def test_beta_has_its_density(a, b):
    settings = {"timesteps": "beta", "beta_a": a, "beta_b": b}
    t = at(U, **settings)
    inside = (t > 1e-4) & (t < 1 - 1e-4)
    log = torch.distributions.Beta(torch.tensor(a).double(), torch.tensor(b).double()).log_prob(t[inside])
    torch.testing.assert_close(density(U, **settings)[inside], log.exp(), rtol=0.03, atol=0)
    # Its moments, over the middles of a thousand shares.
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert float(at(middles, **settings).mean()) == pytest.approx(a / (a + b), abs=2e-4)


@pytest.mark.parametrize(
    ("a", "b", "cumulative"),
    [
        (2.0, 2.0, lambda t: 3 * t**2 - 2 * t**3),
        (1.5, 1.0, lambda t: t**1.5),
        (0.5, 0.5, lambda t: 2 / math.pi * t.sqrt().asin()),
        (0.2, 3.0, lambda t: (t**0.2 / 0.2 - 2 * t**1.2 / 1.2 + t**2.2 / 2.2) * 0.2 * 1.2 * 2.2 / 2),
    ],
)
def test_beta_where_its_integral_has_a_closed_form(a, b, cumulative):
    t = at(U, timesteps="beta", beta_a=a, beta_b=b)
    torch.testing.assert_close(cumulative(t)[t > 1.1e-6], U[t > 1.1e-6], atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.81, 1.29, 1.75])
def test_heavy_tails_are_the_papers(scale):
    """arXiv 2403.03206, eq. 20: f_mode(u; s) of a uniform u, which is as often 1 − u; there t = 1 is noise, too."""
    mode = 1 - U - scale * (torch.cos(math.pi / 2 * U) ** 2 - 1 + U)
    torch.testing.assert_close(at(U, timesteps="heavy-tail", mode_scale=scale), mode.flip(0))
    found = times(timesteps="heavy-tail", mode_scale=scale)
    assert kolmogorov_smirnov(found, mode.sort().values) < 0.035
    ends = float(((found < 0.1) | (found > 0.9)).double().mean())
    assert ends > 0.22 if scale < 0 else ends < 0.18 if scale > 0 else ends == pytest.approx(0.2, abs=0.02)


def kolmogorov_smirnov(samples: torch.Tensor, quantiles: torch.Tensor) -> float:
    """The largest distance of the samples' share below a quantile from its own."""
    below = torch.searchsorted(samples.sort().values, quantiles).double() / len(samples)
    return float((below - torch.linspace(0, 1, len(quantiles), dtype=torch.float64)).abs().max())


DISTRIBUTIONS = [
    {},
    {"timesteps": "logit-normal", "logit_mean": 0.5},
    {"timesteps": "shifted"},
    {"timesteps": "heavy-tail"},
    {"timesteps": "beta", "beta_a": 0.7},
]


@pytest.mark.parametrize("settings", DISTRIBUTIONS, ids=str)
def test_draws_follow_the_quantiles(settings):
    assert kolmogorov_smirnov(times(**settings), at(torch.linspace(1e-6, 1 - 1e-6, 2001), **settings)) < 0.03


@pytest.mark.parametrize("settings", DISTRIBUTIONS, ids=str)
def test_a_range_is_the_distribution_on_the_condition_of_being_in_it(settings):
    low, high = 0.3, 0.8
    plain, found = times(20_000, **settings), times(4000, **settings, min_timestep=low, max_timestep=high)
    assert low <= found.min() and found.max() <= high
    inside = plain[(plain >= low) & (plain <= high)].sort().values
    assert kolmogorov_smirnov(found, inside) < 0.04


@pytest.mark.parametrize("low", [0.0, 0.999])
def test_a_range_in_which_next_to_nothing_lies(low):
    settings = {"timesteps": "logit-normal", "logit_mean": -9.0 if low else 9.0, "logit_std": 0.1}
    found = times(50, **settings, min_timestep=low, max_timestep=low + 0.001)
    assert found.min() >= low and found.max() <= low + 0.001


@pytest.mark.parametrize("settings", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9216])
def test_the_shift_by_resolution_is_fluxs(settings, tokens):
    """As diffusers has it for sampling: µ from 0.5 at 256 tokens to 1.15 at 4096, and t → e^µ / (e^µ + 1/t − 1)."""
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = tokens * slope + 0.5 - slope * 256
    t = at(U, **settings)
    expected = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    torch.testing.assert_close(at(U, tokens, **settings, resolution_shift=True), expected)


def test_the_shift_by_resolution_is_diffusers_own():
    pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (300, 4096):
        expected = scheduler.time_shift(calculate_shift(tokens), 1.0, U)
        torch.testing.assert_close(at(U, tokens, resolution_shift=True), expected)


def test_a_larger_picture_of_a_batch_sampler_gets_more_noise():
    def time(side: int, channels: int = 16) -> float:
        objective = Objective(resolution_shift=True)
        return BatchSampler(Dataset([Item(torch.zeros(channels, side, side))]), objective, 1, 0).batch(0).times[0]

    assert time(8) < time(64) < time(128)
    assert time(64, channels=128) == time(128)  # Flux.2's latents are packed: a token each


def test_what_a_mask_leaves_out_is_kept():
    """m·(o − t)² + w·(1 − m)·(o − b)², over the sum of m + w·(1 − m)."""
    g = torch.Generator().manual_seed(0)
    output, target, base = (torch.randn(2, 3, 4, 4, generator=g).requires_grad_() for _ in range(3))
    mask, one = torch.rand(2, 1, 4, 4, generator=g), torch.ones(2)
    for weight in (0.0, 0.5, 2.0):
        m = mask.expand_as(output)
        errors = m * (output - target) ** 2 + weight * (1 - m) * (output - base) ** 2
        expected = (errors.flatten(1).sum(1) / (m + weight * (1 - m)).flatten(1).sum(1)).mean()
        found = Objective(masked_preservation=weight).loss(output, target, one, one, mask=mask, kept=base)
        torch.testing.assert_close(found, expected)
    plain = Objective().loss(output, target, one, one, mask=mask)
    torch.testing.assert_close(Objective().loss(output, target, one, one, mask=mask, kept=base), plain)


def test_preservation_without_masks_is_refused():
    with pytest.raises(LoHaError, match="no picture has a mask"):
        BatchSampler(Dataset([Item(torch.zeros(4, 8, 8))]), Objective(masked_preservation=1.0), 1, 0)


def test_noise_is_the_generators_and_its_offset_is_one_number_per_channel():
    shape = (64, 32, 32)
    plain, offset = (Objective(noise_offset=o).noise(shape, generator(3)) for o in (0, 0.5))
    assert plain.std() == pytest.approx(1, abs=0.02)
    assert plain.flatten(1).mean(1).std() == pytest.approx(1 / 32, rel=0.3)
    more = (offset - plain).flatten(1)
    torch.testing.assert_close(more, more[:, :1].expand_as(more), atol=1e-5, rtol=0)
    assert more[:, 0].std() == pytest.approx(0.5, rel=0.3)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"timesteps": "cosine"}, "timesteps is 'cosine'; expected one of uniform"),
        ({"loss_type": "l2"}, "loss_type is 'l2'"),
        ({"huber_delta": 0}, "huber_delta is 0"),
        ({"shift": -1}, "shift is -1"),
        ({"logit_std": math.nan}, "logit_std is nan"),
        ({"logit_mean": math.inf}, "logit_mean"),
        ({"noise_offset": math.nan}, "noise_offset"),
        ({"min_snr_gamma": -5}, "min_snr_gamma is -5"),
        ({"debiased": True, "min_snr_gamma": 5}, "choose one"),
        ({"mode_scale": 2.0}, "mode_scale is 2.0; expected a finite number from -1 up to 1.75"),
        ({"beta_a": 0}, "beta_a is 0"),
        ({"beta_b": math.inf}, "beta_b is inf"),
        ({"min_timestep": 1.0}, "min_timestep is 1"),
        ({"max_timestep": 500}, "max_timestep is 500"),
        ({"min_timestep": 0.5, "max_timestep": 0.5}, "the first must be less"),
        ({"masked_preservation": -1}, "masked_preservation is -1"),
    ],
)
def test_values_out_of_range(settings, says):
    with pytest.raises(LoHaError, match=says):
        Objective(**settings)
