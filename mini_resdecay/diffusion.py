"""Denoising diffusion: noise schedules, the loss, and two samplers for any callable.

    diffusion = Diffusion(steps=1000, schedule="cosine", target="v")
    loss = diffusion.loss(model, images)             # calls model(x_t, t), or model(x_t, t, y)
    images = diffusion.sample(model, (64, 1, 28, 28), sampler="ddim", steps=50)

Times are int64 [B] in 0…steps - 1, and -1 is the time of an image without noise; images are
floats of any shape [B, ...]. The label -1 means no class. Tables and factors are float64; a
product with them has the type of the images.
"""

import math
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import known, require

Denoiser = Callable[..., Tensor]
TwoTensors = tuple[Tensor, Tensor]


def linear_betas(steps: int) -> Tensor:
    """Variances of the noise that each step adds, [steps], from 1e-4 to .02 in 1000 steps.

    Fewer steps add more each, so that the last state is noise too. Source: arXiv 2006.11239.
    """
    scale = 1000 / steps
    ends = 1e-4 * scale, 0.02 * scale
    return torch.linspace(*ends, steps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(steps: int) -> Tensor:
    """Variances [steps] with which the signal falls as a cosine. Source: arXiv 2102.09672."""
    part = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
    left = (part * math.pi / 2).cos().square()
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


class Diffusion:
    """The process x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, its loss and its samplers.

    `betas` [steps] and `alpha_bars` [steps], the a_t above, are float64. `target` is what a model
    predicts: "eps", the noise, or "v" = sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512).
    Raises ValueError for steps that are not whole or < 1, and unknown names.
    """

    def __init__(self, steps: int = 1000, schedule: str = "linear", target: str = "eps") -> None:
        require(
            "steps", steps, isinstance(steps, SupportsIndex) and steps >= 1,
            "be a whole number, at least 1",
        )  # fmt: skip
        self.steps, self.target = steps, known("target", target, ("eps", "v"))
        self.betas = SCHEDULES[known("schedule", schedule, SCHEDULES)](steps)
        self.alpha_bars = (1 - self.betas).cumprod(0)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: the images `x0` [B, ...] with the share of `noise` that belongs to the times."""
        signal, rest = self._scales(t, x0)
        return signal * x0 + rest * noise

    def velocity(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The target "v": sqrt(a_t) noise - sqrt(1 - a_t) x0, x_t turned by a right angle."""
        signal, rest = self._scales(t, x0)
        return signal * noise - rest * x0

    def parts(self, value: Tensor, x_t: Tensor, t: Tensor, kind: str | None = None) -> TwoTensors:
        """Image x0 and noise in x_t, from a `value` of this kind: "eps", "v", "x0"; else `target`.

        "eps" loses digits where little signal is left, "x0" where little noise is.
        """
        signal, rest = self._scales(t, x_t)
        kind = known("kind", kind or self.target, ("eps", "v", "x0"))
        if kind == "v":
            return signal * x_t - rest * value, rest * x_t + signal * value
        if kind == "eps":
            return (x_t - rest * value) / signal, value
        return value, (x_t - signal * value) / rest

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> TwoTensors:
        """Mean, and variance in float64 [B, 1, ...], of x_s given x_t and x0, for s < t.

        s is t - 1 unless given; that a given one is below t is trusted.
        Source: arXiv 2006.11239, Eqs. 6 and 7.
        """
        before, now = self._bars(t - 1 if s is None else s, x_t), self._bars(t, x_t)
        beta = 1 - now / before
        of_x0 = before.sqrt() * beta / (1 - now)
        of_x_t = (now / before).sqrt() * (1 - before) / (1 - now)
        mean = of_x0.to(x_t) * x0 + of_x_t.to(x_t) * x_t
        return mean, beta * (1 - before) / (1 - now)

    def ddim(self, x0: Tensor, noise: Tensor, t: Tensor, s: Tensor, eta: float = 0.0) -> TwoTensors:
        """Mean, and variance in float64 [B, 1, ...], of x_s for an x_t of these two parts.

        eta = 0 is the deterministic step, which also runs backwards (s > t); eta = 1 is
        `posterior`. That eta lies in [0, 1], and is 0 where s > t, is trusted: `sample` checks it.
        Source: arXiv 2010.02502, Eqs. 12 and 16.
        """
        before, now = self._bars(s, x0), self._bars(t, x0)
        # Of a clean image 1 - now is 0.
        variance = eta**2 * ((1 - before) / (1 - now) if eta else 0) * (1 - now / before)
        rest = (1 - before - variance).clamp(min=0).sqrt()  # rounding may go below 0
        return before.sqrt().to(x0) * x0 + rest.to(x0) * noise, variance

    def loss(
        self,
        model: Denoiser,
        x0: Tensor,
        y: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        drop_label: float = 0.1,
        generator: Generator | None = None,
    ) -> Tensor:
        """Mean squared error of the model's prediction over all values; predicting 0 gives about 1.

        Times (uniform) and noise are drawn unless given. Labels `y` [B] become -1, no class, with
        probability `drop_label`: guidance needs a model that knows both.
        Raises ValueError for images that are no floats, times out of range, noise or predictions
        of another shape, and drop_label outside [0, 1].
        """
        require("drop_label", drop_label, 0 <= drop_label <= 1, "lie in [0, 1]")
        place = generator.device if generator else "cpu"
        if t is None:
            t = torch.randint(self.steps, x0.shape[:1], generator=generator, device=place)
        noise = _normal(x0.shape, x0, generator, noise)
        if y is not None:
            dropped = torch.rand(y.shape, generator=generator, device=place) < drop_label
            y = torch.where(dropped.to(y.device), -1, y)
        x_t = self.q_sample(x0, t, noise)
        require("t", t[:8].tolist(), (t >= 0).all(), f"be in 0…{self.steps - 1}")
        wanted = noise if self.target == "eps" else self.velocity(x0, t, noise)
        return F.mse_loss(guided(model, x_t, t.to(x0.device), y).to(wanted.dtype), wanted)

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        shape: Sequence[int],
        sampler: str = "ddpm",
        steps: int | None = None,
        eta: float = 0.0,
        y: Tensor | None = None,
        guidance: float = 1.0,
        clip: float | None = None,
        noise: Tensor | None = None,
        device: torch.device | str | None = None,
        generator: Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Images of a shape [B, ...] from noise, in `steps` evenly spaced times (all unless given).

        "ddpm" draws from `posterior`, "ddim" from `ddim` with `eta`. `y` [B] and `guidance`: see
        `guided`. `clip` keeps each predicted x0 in [-clip, clip], and the noise is recomputed from
        it (diffusers: `use_clipped_model_output=True`, not its default). The first state is
        `noise`, or drawn; a `generator` on the CPU gives the same numbers on every device. `device`
        is the module's unless given, of a bare function that of `noise` or the CPU. `progress`
        shows a bar after five seconds. A module that behaves otherwise in training must be in
        evaluation mode.
        Raises ValueError for bad settings, FloatingPointError for samples that are not finite.
        Differs from arXiv 2006.11239: x0 is clipped only where asked for.
        """
        known("sampler", sampler, ("ddpm", "ddim"))
        steps = self.steps if steps is None else steps
        require(
            "steps", steps, isinstance(steps, SupportsIndex) and 1 <= steps <= self.steps,
            f"be a whole number in 1…{self.steps}",
        )  # fmt: skip
        ddim = sampler == "ddim"
        require("eta", eta, 0 <= eta <= int(ddim), 'lie in [0, 1], and be 0 for "ddpm"')
        require("clip", clip, clip is None or clip > 0, "be above 0")
        at = next(iter(model.parameters()), noise) if isinstance(model, nn.Module) else noise
        device = device or ("cpu" if at is None else at.device)
        x = _normal(shape, torch.empty(0, device=device), generator, noise)
        require("noise", "NaN or infinity", x.isfinite().all(), "be finite")
        x, y = x.to(device), None if y is None else y.to(device)
        times = [-1, *(k * self.steps // steps for k in range(steps))]
        for k in tqdm(range(steps, 0, -1), desc=sampler, disable=not progress, delay=5):
            t, s = (torch.full((len(x),), time) for time in (times[k], times[k - 1]))
            x0, eps = self.parts(guided(model, x, t.to(device), y, guidance), x, t)
            if clip is not None:
                x0, eps = self.parts(x0.clamp(-clip, clip), x, t, "x0")
            x, variance = self.ddim(x0, eps, t, s, eta) if ddim else self.posterior(x0, x, t, s)
            if variance.any():
                x = x + variance.sqrt().to(x) * _normal(x.shape, x, generator)
        if not x.isfinite().all():
            raise FloatingPointError("samples are not finite: the model returned NaN or infinity")
        return x

    def _bars(self, t: Tensor, x: Tensor) -> Tensor:
        """a_t of each row of x, shaped to multiply it, in float64 on the CPU; 1 for t = -1."""
        require("images", x.dtype, x.is_floating_point(), "be floats (data.to_float)")
        fits = t.shape == x.shape[:1] and t.dtype == torch.int64
        require("t", f"{t.dtype} {list(t.shape)}", fits, f"be int64 [B] = [{len(x)}]")
        t = t.cpu()
        inside = ((t >= -1) & (t < self.steps)).all()
        require("t", t[:8].tolist(), inside, f"be in 0…{self.steps - 1}")
        bars = F.pad(self.alpha_bars, (0, 1), value=1.0)[t]  # the last one is that of t = -1
        return bars.view(-1, *[1] * (x.dim() - 1))

    def _scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        bars = self._bars(t, x)
        return bars.sqrt().to(x), (1 - bars).sqrt().to(x)


def guided(
    model: Denoiser, x_t: Tensor, t: Tensor, y: Tensor | None = None, guidance: float = 1.0
) -> Tensor:
    """The model's prediction, moved away from that without class: u + guidance (c - u).

    guidance = 1 is the prediction for class `y` itself; any other needs two, made in one call.
    Raises ValueError for guidance without `y` or not finite, and predictions of another shape.
    Source: arXiv 2207.12598, whose w is guidance - 1.
    """
    require("guidance", guidance, math.isfinite(guidance), "be finite")
    if guidance != 1:
        if y is None:
            raise ValueError(f"guidance must be 1 without labels y, got {guidance}")
        labels = torch.cat([y, torch.full_like(y, -1)])
        twice = x_t.repeat(2, *[1] * (x_t.dim() - 1))
        with_class, without = guided(model, twice, t.repeat(2), labels).chunk(2)
        return without + guidance * (with_class - without)
    found = model(x_t, t) if y is None else model(x_t, t, y)
    require(
        "model", list(found.shape), found.shape == x_t.shape,
        f"return the shape of x_t, {list(x_t.shape)}",
    )  # fmt: skip
    return found


def _normal(
    shape: Sequence[int], like: Tensor, generator: Generator | None, given: Tensor | None = None
) -> Tensor:
    if given is not None:
        require(
            "noise", list(given.shape), given.shape == tuple(shape),
            f"have the shape {list(shape)}",
        )  # fmt: skip
        return given
    # In float32 where the generator is: the same numbers for every type and device.
    place = generator.device if generator else like.device
    return torch.randn(*shape, generator=generator, device=place, dtype=torch.float32).to(like)
