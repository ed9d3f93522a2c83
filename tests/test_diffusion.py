"""Schedules, loss, samplers: tables of the sheet, schedulers of diffusers, exact denoisers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mini_resdecay import diffusion as module
from mini_resdecay.diffusion import Diffusion, guided

THEIRS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
KINDS = {"eps": "epsilon", "v": "v_prediction"}
both_schedules = pytest.mark.parametrize("schedule", ["linear", "cosine"])
both_targets = pytest.mark.parametrize("target", ["eps", "v"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def every(*times: int) -> Tensor:
    return torch.tensor(times)


def close(found: Tensor, expected: Tensor | float, atol: float = 1e-6, rtol: float = 0.0) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype).expand_as(found)
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def shipped(scheduler: type, schedule: str, target: str = "eps", clip: float | None = None):
    """A scheduler of diffusers as it is: its tables are float32 products."""
    return scheduler(
        beta_schedule=THEIRS[schedule],
        prediction_type=KINDS[target],
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )


def peer(*settings: object):
    """The same, but the signal is summed up in float64, from their float32 betas."""
    theirs = shipped(*settings)
    theirs.betas = theirs.betas.double()
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    return theirs


# ---- tables ----


@pytest.mark.parametrize(
    ("schedule", "betas", "bars", "half"),
    [
        (
            "linear",
            {0: 1e-4, 499: 0.01004004004, 999: 0.02},
            {
                0: 0.9999,
                249: 0.524085373825,
                499: 0.0785872428818,
                500: 0.077796658365,
                749: 0.00335055043894,
                999: 4.03582976538e-5,
            },
            259,
        ),
        (
            "cosine",
            {0: 4.128422482e-5, 499: 0.00314588623, 999: 0.999},
            {
                0: 0.999958715775,
                249: 0.847012161327,
                499: 0.493843590441,
                500: 0.492285172449,
                749: 0.144272102386,
                999: 2.42876690703e-9,
            },
            496,
        ),
    ],
)
def test_D15_tables(schedule, betas, bars, half):
    diffusion = Diffusion(schedule=schedule)
    assert diffusion.betas.dtype == diffusion.alpha_bars.dtype == torch.float64
    assert diffusion.betas[list(betas)].tolist() == pytest.approx(list(betas.values()), rel=1e-8)
    found = diffusion.alpha_bars[list(bars)].tolist()
    assert found == pytest.approx(list(bars.values()), rel=1e-9)
    assert int((diffusion.alpha_bars < 0.5).nonzero()[0]) == half


@pytest.mark.parametrize(
    ("steps", "first", "at", "middle", "last"),
    [(100, 0.999, 49, 0.0741969967, 2.0390e-5), (200, 0.9995, 99, 0.0766589049, 3.0318e-5)],
)
def test_D15_short_linear_chains_end_in_noise_too(steps, first, at, middle, last):
    bars = Diffusion(steps).alpha_bars
    assert len(bars) == steps
    assert bars[[0, at]].tolist() == pytest.approx([first, middle], rel=1e-9)
    assert bars[-1].item() == pytest.approx(last, rel=1e-4)


@both_schedules
@given(steps=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_the_signal_only_falls(schedule, steps):
    diffusion = Diffusion(steps, schedule)
    assert ((diffusion.betas > 0) & (diffusion.betas <= 0.999)).all()
    assert (diffusion.alpha_bars.diff() < 0).all() and diffusion.alpha_bars[-1] > 0


@both_schedules
def test_tables_are_those_of_diffusers(schedule):
    theirs, ours = DDPMScheduler(beta_schedule=THEIRS[schedule]), Diffusion(schedule=schedule)
    close(ours.betas.float(), theirs.betas)
    close(ours.alpha_bars.float(), theirs.alphas_cumprod)


# ---- states, conversions, posterior ----


def test_D15_values_at_t_500():
    diffusion, t, x0, noise = Diffusion(), every(500), torch.tensor([2.0]), torch.tensor([-1.0])
    x0, noise = x0.double(), noise.double()
    close(diffusion.q_sample(x0, t, noise), -0.402473142252, 1e-11)
    close(diffusion.velocity(x0, t, noise), -2.19954890143, 1e-10)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    of_x0, variance = diffusion.posterior(one, zero, t)
    close(of_x0, 0.00305805707563, 1e-13)
    close(diffusion.posterior(zero, one, t)[0], 0.994104350757, 1e-11)
    close(variance, 0.0100513357789, 1e-12)
    assert variance.log().item() == pytest.approx(-4.60004974, abs=1e-8)


def test_D15_variance_of_the_last_steps():
    x = torch.zeros(2, 1).double()
    variance = Diffusion().posterior(x, x, every(1, 0))[1]
    assert variance[0].item() == pytest.approx(5.4531876613e-5, rel=1e-9)
    assert variance[1].item() == 0


@both_schedules
def test_states_and_velocities_are_those_of_diffusers(schedule):
    theirs, ours = peer(DDPMScheduler, schedule), Diffusion(schedule=schedule)
    t, x0 = torch.arange(0, 1000, 37), normal(28, 3, 4, 4).double()
    noise = normal(28, 3, 4, 4, seed=1).double()
    close(ours.q_sample(x0, t, noise), theirs.add_noise(x0, noise, t))
    close(ours.velocity(x0, t, noise), theirs.get_velocity(x0, noise, t))


@both_schedules
@given(seed=st.integers(0, 99), times=st.lists(st.integers(0, 990), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_conversions_round_trip(schedule, seed, times):
    diffusion, t = Diffusion(schedule=schedule), every(*times)
    x0, eps = (normal(len(t), 2, 3, seed=seed + k, dtype=torch.float64) for k in (0, 100))
    x_t, v = diffusion.q_sample(x0, t, eps), diffusion.velocity(x0, t, eps)
    for kind, value in {"x0": x0, "eps": eps, "v": v}.items():
        found = diffusion.parts(value, x_t, t, kind)
        close(found[0], x0, 1e-9)
        close(found[1], eps, 1e-9)
        close(diffusion.velocity(found[0], t, found[1]), v, 1e-9)
    close(Diffusion(schedule=schedule, target="v").parts(v, x_t, t)[0], x0, 1e-9)


def test_time_minus_one_is_the_image_itself():
    x0, noise = normal(2, 3), normal(2, 3, seed=1)
    assert torch.equal(Diffusion().q_sample(x0, every(-1, -1), noise), x0)


@both_schedules
@given(seed=st.integers(0, 99), t=st.integers(1, 999))
@settings(max_examples=25, deadline=None)
def test_D15_ddim_with_eta_1_and_stride_1_is_the_posterior(schedule, seed, t):
    diffusion, x0 = Diffusion(schedule=schedule), normal(1, 3, seed=seed, dtype=torch.float64)
    eps, now, then = normal(1, 3, seed=seed + 100, dtype=torch.float64), every(t), every(t - 1)
    x_t = diffusion.q_sample(x0, now, eps)
    mean, variance = diffusion.ddim(x0, eps, now, then, eta=1.0)
    expected, spread = diffusion.posterior(x0, x_t, now)
    close(mean, expected, 1e-7 if t == 999 else 1e-11)
    close(variance, spread, 5e-17)


# ---- steps and loops of diffusers ----


def rounding(schedule: str, target: str, t: int) -> float:
    """The relative error that the last cosine beta of diffusers brings, .999 in float32.

    It leaves 1 - beta right to 1.3e-5, and an x0 from the noise, here of 20 000 and more, is
    divided by its root.
    """
    return 1e-5 if (schedule, target, t) == ("cosine", "eps", 999) else 0.0


@both_schedules
@both_targets
@pytest.mark.parametrize("clip", [None, 0.7])
def test_a_ddpm_step_is_that_of_diffusers(schedule, target, clip):
    theirs, ours = peer(DDPMScheduler, schedule, target, clip), Diffusion(1000, schedule, target)
    output, x, z = (normal(2, 3, 4, 4, seed=k, dtype=torch.float64) for k in (0, 1, 7))
    for t in (0, 1, 20, 500, 900, 990, 999):
        times, generator = every(t, t), torch.Generator().manual_seed(7)
        expected = theirs.step(output, t, x, generator=generator)
        x0 = ours.parts(output, x, times)[0]
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        torch.testing.assert_close(x0, expected.pred_original_sample, atol=1e-6, rtol=1e-5)
        mean, variance = ours.posterior(x0, x, times)
        found = mean + variance.sqrt() * z * (t > 0)
        close(found, expected.prev_sample, rtol=rounding(schedule, target, t))


@both_schedules
@both_targets
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_a_ddim_step_is_that_of_diffusers(schedule, target, eta, steps):
    theirs = peer(DDIMScheduler, schedule, target)
    theirs.set_timesteps(steps)
    ours, stride = Diffusion(1000, schedule, target), 1000 // steps
    output, x, z = (normal(2, 3, seed=k, dtype=torch.float64) for k in (0, 1, 2))
    for t in (0, stride, 500, 1000 - 2 * stride, 999):
        expected = theirs.step(output, t, x, eta, variance_noise=z if eta else None).prev_sample
        now, then = every(t, t), torch.full((2,), max(t - stride, -1))
        mean, variance = ours.ddim(*ours.parts(output, x, now), now, then, eta)
        close(mean + variance.sqrt() * z, expected, rtol=rounding(schedule, target, t))


@both_schedules
@both_targets
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_single_steps_are_those_of_diffusers_as_shipped(scheduler, schedule, target):
    """To the rounding of its float32 tables."""
    theirs, ours = shipped(scheduler, schedule, target), Diffusion(1000, schedule, target)
    theirs.set_timesteps(1000)
    output, x, z = (normal(2, 3, 4, 4, seed=k, dtype=torch.float64) for k in (0, 1, 7))
    for t in (0, 1, 2, 20, 500, 900, 990, 999):
        generator, now = torch.Generator().manual_seed(7), every(t, t)
        found = ours.parts(output, x, now)
        if scheduler is DDPMScheduler:
            mean, variance = ours.posterior(found[0], x, now)
        else:
            mean, variance = ours.ddim(*found, now, now - 1)
        expected = theirs.step(output, t, x, generator=generator).prev_sample
        close(mean + variance.sqrt() * z * (t > 0), expected, 1e-3)


class Net(nn.Module):
    """A smooth stand-in for a denoiser, with outputs of the size of noise."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        shift = 0 if y is None else (y + 1) / 10
        return (x + (t / 1000 + shift).to(x)[:, None, None, None]).tanh()


@both_schedules
@both_targets
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [("ddpm", 100, 0.0), ("ddim", 50, 0.0), ("ddim", 20, 0.8)],
)
def test_a_whole_run_is_that_of_diffusers(schedule, target, clip, sampler, steps, eta):
    """The same generator: noise is drawn in the same order. With clip, theirs as in Glide."""
    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]
    theirs, net = peer(scheduler, schedule, target, clip), Net()
    theirs.set_timesteps(steps)
    start = normal(2, 1, 3, 3)
    generator = torch.Generator().manual_seed(5)
    more = {"eta": eta, "use_clipped_model_output": True} if sampler == "ddim" else {}
    x = start
    for t in theirs.timesteps:
        x = theirs.step(net(x, t.expand(2)), t, x, generator=generator, **more).prev_sample
    ours = Diffusion(1000, schedule, target)
    generator.manual_seed(5)
    found = ours.sample(
        net, (2, 1, 3, 3), sampler, steps, eta, clip=clip, noise=start, generator=generator
    )
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


# ---- exact denoisers ----


def gaussian(diffusion: Diffusion, mean: Tensor, covariance: Tensor):
    """The best denoiser for data N(mean, covariance), in the terms of the target."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, eye = diffusion.alpha_bars[t[0]], torch.eye(len(mean), dtype=torch.float64)
        off = x - a.sqrt() * mean
        eps = (1 - a).sqrt() * off @ torch.linalg.inv(a * covariance + (1 - a) * eye)
        if diffusion.target == "eps":
            return eps
        return (eps - (1 - a).sqrt() * x) / a.sqrt()  # v, from v and x_t at right angles

    return denoise


def centred(diffusion: Diffusion, deviation: float = 0.5):
    one = torch.ones(1, dtype=torch.float64)
    return gaussian(diffusion, 0 * one, deviation**2 * one[None])


@pytest.mark.parametrize(
    ("steps", "deviation"), [(10, 0.374128), (50, 0.472439), (250, 0.494286), (1000, 0.498495)]
)
def test_D15_ddim_of_a_gaussian_known_answers(steps, deviation):
    """Every step is linear here, so the deviation of the samples is where 1 goes."""
    diffusion, one = Diffusion(), torch.ones(1, 1, dtype=torch.float64)
    close(diffusion.sample(centred(diffusion), (1, 1), "ddim", steps, noise=one), deviation, 1e-6)


def test_D15_ddpm_of_a_gaussian_known_answer():
    """Linear too: x goes to factor * x with new noise, so the variance is followed exactly."""
    diffusion, x, variance = Diffusion(), torch.ones(1, 1, dtype=torch.float64), 1.0
    for time in reversed(range(1000)):
        t = every(time)
        x0, _ = diffusion.parts(centred(diffusion)(x, t), x, t)
        factor, fresh = diffusion.posterior(x0, x, t)
        variance = factor.item() ** 2 * variance + fresh.item()
    assert variance**0.5 == pytest.approx(0.496110, abs=1e-6)


@both_schedules
@both_targets
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("ddim", 250)])
def test_a_gaussian_is_sampled_back_to_its_mean_and_covariance(schedule, target, sampler, steps):
    diffusion, start = Diffusion(1000, schedule, target), normal(5000, 2, dtype=torch.float64)
    mean = torch.tensor([1.0, -0.5], dtype=torch.float64)
    covariance = torch.tensor([[0.6, 0.3], [0.3, 0.4]], dtype=torch.float64)
    found = diffusion.sample(
        gaussian(diffusion, mean, covariance),
        start.shape,
        sampler,
        steps,
        noise=start,
        generator=torch.Generator().manual_seed(2),
    )
    close(found.mean(0), mean, 0.04)
    close(found.T.cov(), covariance, 0.04)


@pytest.mark.parametrize(("deviation", "least"), [(0.5, 0.173053), (1.0, 0.275513)])
def test_D15_loss_of_the_best_denoiser(deviation, least):
    """No net can have less: a trained one that has sees what it should not."""
    diffusion, x0 = Diffusion(), deviation * normal(20, 1000, 50, dtype=torch.float64)

    def best(x: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bars[t][:, None]
        return (1 - a).sqrt() * x / (a * deviation**2 + 1 - a)

    generator = torch.Generator().manual_seed(0)
    for t, sampling_error in ((torch.arange(1000), 0.001), (None, 0.004)):
        losses = [diffusion.loss(best, row, t=t, generator=generator).item() for row in x0]
        assert sum(losses) / len(losses) == pytest.approx(least, abs=3 * sampling_error / 2)


@both_targets
def test_D15_predicting_zero_costs_the_power_of_the_target(target):
    diffusion, x0 = Diffusion(target=target), normal(5000, 8)
    loss = diffusion.loss(lambda x, t: torch.zeros_like(x), x0)
    assert loss.item() == pytest.approx(1, abs=0.03)  # images and noise have variance 1


@both_targets
def test_the_loss_of_the_target_itself_is_zero(target):
    diffusion, x0, noise, t = Diffusion(target=target), normal(4, 6), normal(4, 6), every(0, 9, 99)
    t = torch.cat([t, every(999)])
    seen = []

    def model(x: Tensor, times: Tensor) -> Tensor:
        seen.append((x, times))
        return noise if target == "eps" else diffusion.velocity(x0, times, noise)

    assert diffusion.loss(model, x0, t=t, noise=noise).item() == 0
    assert torch.equal(seen[0][0], diffusion.q_sample(x0, t, noise))
    assert torch.equal(seen[0][1], t)


# ---- DDIM without noise ----


def test_ddim_without_noise_depends_on_its_start_alone():
    diffusion, start = Diffusion(), normal(3, 1, 4, 4)
    runs = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        shape = (3, 1, 4, 4)
        runs.append(diffusion.sample(Net(), shape, "ddim", 20, noise=start, generator=generator))
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())
    assert torch.equal(*runs)
    noisy = diffusion.sample(Net(), (3, 1, 4, 4), "ddim", 20, eta=1.0, noise=start)
    assert not torch.equal(noisy, runs[0])


def invert(diffusion: Diffusion, denoise, x: Tensor, steps: int) -> Tensor:
    """DDIM backwards, from an almost clean x to noise."""
    times = [k * diffusion.steps // steps for k in range(steps)]
    for now, then in zip(times[:-1], times[1:], strict=True):
        t, s = torch.full((len(x),), now), torch.full((len(x),), then)
        x, _ = diffusion.ddim(*diffusion.parts(denoise(x, t), x, t), t, s)
    return x


def test_ddim_from_a_clean_image_adds_the_noise_that_it_is_told():
    process, x0 = Diffusion(100), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    noise, clean, t = torch.randn_like(x0), torch.full((3,), -1), torch.tensor([0, 50, 99])
    x_t, variance = process.ddim(x0, noise, clean, t)
    assert not variance.any()
    torch.testing.assert_close(x_t, process.q_sample(x0, t, noise), rtol=0, atol=1e-12)


def test_ddim_inverts():
    diffusion, x0 = Diffusion(), normal(5, 1, dtype=torch.float64) / 2
    errors = []
    for steps in (20, 100, 500):
        start = invert(diffusion, centred(diffusion), x0, steps)
        back = diffusion.sample(centred(diffusion), (5, 1), "ddim", steps, noise=start)
        errors.append((back - x0).abs().max().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.02


def test_ddim_inverts_to_rounding_where_all_images_are_one():
    """Then the noise is the same at every time of a path, and no step errs."""
    diffusion, image = Diffusion(), torch.tensor([0.3], dtype=torch.float64)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bars[t][:, None]
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    first, noise = every(0, 0, 0), normal(3, 1, dtype=torch.float64)
    x = diffusion.q_sample(image.expand(3, 1), first, noise)
    start = invert(diffusion, denoise, x, 20)
    close(start, diffusion.q_sample(image.expand(3, 1), first + 950, noise), 1e-10)
    close(diffusion.sample(denoise, (3, 1), "ddim", 20, noise=start), image, 1e-10)


# ---- labels and guidance ----


class Counted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor | None] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append(y)
        return super().forward(x, t, y)


def test_guidance_1_is_the_conditional_prediction_in_one_call():
    net, x, t, y = Counted(), normal(3, 1, 2, 2), every(1, 50, 999), every(0, 4, 2)
    assert torch.equal(guided(net, x, t, y), Net()(x, t, y))
    assert len(net.calls) == 1 and torch.equal(net.calls[0], y)
    assert torch.equal(guided(net, x, t), Net()(x, t)) and net.calls[1] is None


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_moves_away_from_no_class_in_one_call(guidance):
    net, x, t, y = Counted(), normal(3, 1, 2, 2), every(1, 50, 999), every(0, 4, 2)
    found = guided(net, x, t, y, guidance)
    assert len(net.calls) == 1 and net.calls[0].tolist() == [0, 4, 2, -1, -1, -1]
    without, with_class = Net()(x, t, torch.full((3,), -1)), Net()(x, t, y)
    close(found, (1 - guidance) * without + guidance * with_class)


def test_guidance_in_the_sampler():
    diffusion, start, y = Diffusion(), normal(3, 1, 2, 2), every(0, 4, 2)

    def run(guidance: float, labels: Tensor | None = y, net: nn.Module | None = None) -> Tensor:
        size = (3, 1, 2, 2)
        more = {"y": labels, "guidance": guidance, "noise": start}
        return diffusion.sample(net or Net(), size, "ddim", 10, **more)

    class Fixed(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t, y)

    assert torch.equal(run(1.0), run(1.0, None, Fixed()))
    close(run(0.0), run(1.0, torch.full((3,), -1)), 1e-5)
    assert not torch.allclose(run(2.0), run(1.0), atol=1e-2)


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_labels_are_dropped_as_often_as_asked(drop):
    net, y = Counted(), torch.arange(4000) % 7
    generator = torch.Generator().manual_seed(0)
    Diffusion().loss(net, normal(4000, 1, 1, 1), y, drop_label=drop, generator=generator)
    seen = net.calls[0]
    assert (seen == -1).double().mean().item() == pytest.approx(drop, abs=0.015)
    assert torch.equal(seen[seen >= 0], y[seen >= 0])
    assert y.min() == 0  # the labels that were given are as they were


def test_without_labels_the_model_gets_none():
    net = Counted()
    Diffusion().loss(net, normal(2, 1, 2, 2))
    assert net.calls == [None]


# ---- seeds, devices, the bar ----


def test_a_seed_gives_the_same_losses_and_samples():
    diffusion, x0, y = Diffusion(), normal(4, 1, 2, 2), every(0, 1, 2, 3)

    def both(seed: int) -> tuple[float, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        loss = diffusion.loss(Net(), x0, y, generator=generator)
        return loss.item(), diffusion.sample(Net(), (4, 1, 2, 2), steps=9, generator=generator)

    (a, x), (b, same), (c, other) = both(1), both(1), both(2)
    assert a == b != c
    assert torch.equal(x, same) and not torch.allclose(x, other)
    torch.manual_seed(3)
    first = diffusion.loss(Net(), x0, y), diffusion.sample(Net(), (4, 1, 2, 2), steps=9)
    torch.manual_seed(3)
    again = diffusion.loss(Net(), x0, y), diffusion.sample(Net(), (4, 1, 2, 2), steps=9)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_type_of_the_noise_and_no_graph(dtype):
    net = nn.Conv2d(1, 1, 1).to(dtype)
    found = Diffusion(10).sample(
        lambda x, t: net(x), (2, 1, 3, 3), noise=normal(2, 1, 3, 3).to(dtype)
    )
    assert found.dtype == dtype and not found.requires_grad


def test_half_precision_outputs_leave_the_states_in_float32():
    class Half(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return super().forward(x, t).bfloat16()

    start = normal(2, 1, 3, 3)
    for target in ("eps", "v"):
        diffusion = Diffusion(1000, "linear", target)
        half, full = (
            diffusion.sample(net, (2, 1, 3, 3), "ddim", 20, clip=1.0, noise=start)
            for net in (Half(), Net())
        )
        assert half.dtype == torch.float32
        assert (half - full).abs().max() < 0.1
        assert diffusion.loss(Half(), start).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 600, 999, 1000])
def test_any_number_of_steps_spans_the_whole_chain(steps):
    times = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        times.append(int(t[0]))
        return x

    Diffusion().sample(model, (1, 1), "ddim", steps)
    assert len(times) == steps and times[-1] == 0
    assert times == sorted(set(times), reverse=True)
    gaps = {a - b for a, b in zip(times[:-1], times[1:], strict=True)} | {1000 - times[0]}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_is_shown_where_asked_for_and_after_five_seconds(monkeypatch, progress):
    seen = []

    def watched(steps, **options):
        seen.append(options)
        return steps

    monkeypatch.setattr(module, "tqdm", watched)
    Diffusion(5).sample(Net(), (1, 1, 2, 2), progress=progress)
    assert seen[0]["disable"] is not progress and seen[0]["delay"] == 5


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ({"steps": 10.5}, "steps must be a whole number, at least 1, got 10.5"),
        ({"steps": None}, "steps must be a whole number, at least 1, got None"),
        ({"schedule": "cosin"}, 'schedule must be one of linear, cosine, got "cosin"'),
        ({"target": "x0"}, 'target must be one of eps, v, got "x0"'),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "euler"}, 'sampler must be one of ddpm, ddim, got "euler"'),
        ({"steps": 0}, "steps must be a whole number in 1…20, got 0"),
        ({"steps": 21}, "steps must be a whole number in 1…20, got 21"),
        ({"steps": 5.5}, "steps must be a whole number in 1…20, got 5.5"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"clip": -1.0}, "clip must be above 0, got -1.0"),
        ({"clip": math.nan}, "clip must be above 0, got nan"),
        ({"eta": 0.5}, r'eta must lie in \[0, 1\], and be 0 for "ddpm", got 0.5'),
        ({"eta": 1.5, "sampler": "ddim"}, r"eta must lie in \[0, 1\].*got 1.5"),
        ({"eta": math.nan, "sampler": "ddim"}, "eta must lie in .*got nan"),
        ({"guidance": 2.0}, "guidance must be 1 without labels y, got 2.0"),
        ({"guidance": math.nan, "y": every(0, 1)}, "guidance must be finite, got nan"),
        ({"guidance": math.inf, "y": every(0, 1)}, "guidance must be finite, got inf"),
        ({"noise": torch.zeros(2, 1)}, r"noise must have the shape \[2, 1, 3, 3\], got \[2, 1\]"),
        ({"noise": torch.full((2, 1, 3, 3), math.nan)}, "noise must be finite, got NaN or"),
        ({"noise": torch.zeros(2, 1, 3, 3).int()}, "images must be floats"),
        (
            {"model": lambda x, t: x[:, :, :1]},
            r"model must return the shape of x_t, \[2, 1, 3, 3\], got \[2, 1, 1, 3\]",
        ),
        (
            {"model": lambda x, t, y: x[:1], "y": every(0, 1), "guidance": 2.0},
            r"model must return the shape of x_t, \[4, 1, 3, 3\], got \[1, 1, 3, 3\]",
        ),
    ],
)
def test_bad_input_of_the_sampler_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(20).sample(**({"model": Net(), "shape": (2, 1, 3, 3)} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.zeros(2, 1, 3, 3).byte()}, r"images must be floats \(data.to_float\).*uint8"),
        ({"t": every(0, 20)}, r"t must be in 0…19, got \[0, 20\]"),
        ({"t": every(0, -2)}, r"t must be in 0…19, got \[0, -2\]"),
        ({"t": every(0, -1)}, "t must be in 0…19"),
        ({"noise": torch.zeros(2, 1, 1, 1)}, r"noise must have the shape \[2, 1, 3, 3\], got"),
        ({"model": lambda x, t: x[:1]}, r"model must return the shape of x_t.*got \[1, 1, 3, 3\]"),
        ({"t": every(0)}, r"t must be int64 \[B\] = \[2\], got torch.int64 \[1\]"),
        ({"t": every(0, 1).float()}, r"t must be int64 \[B\] = \[2\], got torch.float32 \[2\]"),
        ({"drop_label": 1.1}, r"drop_label must lie in \[0, 1\], got 1.1"),
        ({"drop_label": math.nan}, r"drop_label must lie in \[0, 1\], got nan"),
    ],
)
def test_bad_input_of_the_loss_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(20).loss(**({"model": Net(), "x0": torch.zeros(2, 1, 3, 3)} | changes))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match='kind must be one of eps, v, x0, got "score"'):
        Diffusion().parts(torch.zeros(1, 2), torch.zeros(1, 2), every(3), "score")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_breaks_is_not_silent(value):
    with pytest.raises(FloatingPointError, match="samples are not finite: the model returned"):
        Diffusion(4).sample(lambda x, t: x * value, (2, 1, 3, 3))


def test_a_bare_function_samples_where_its_noise_is(monkeypatch):
    monkeypatch.setattr(Tensor, "isfinite", lambda x: torch.ones(1))  # on "meta" nothing is known

    class Seen(Exception):
        pass

    def denoise(x, t):
        raise Seen(x.device.type)

    for noise, kind in ((None, "cpu"), (torch.zeros(2, 3, device="meta"), "meta")):
        with pytest.raises(Seen, match=kind):
            Diffusion(10).sample(denoise, (2, 3), noise=noise)
