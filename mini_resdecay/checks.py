"""Answers to the exercises: right, or the name of the mistake.

    check("ex-01-3", my_function)        # Not yet: it looks as if you left out the shortcut.

An exercise is a solution, cases to try it on, and the mistakes that people make, each of them
written out: an answer that behaves like a mistake is told which one it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from . import known


@dataclass(frozen=True)
class Exercise:
    """`solution` and `mistakes` (message -> answer) are functions, tried on `cases`, or values.

    A case is a tuple of arguments. `tolerance` is relative, and absolute near zero.
    """

    solution: Any
    mistakes: Mapping[str, Any]
    cases: Sequence[tuple[Any, ...]] = ()
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Verdict:
    """What `check` says: true in an `assert` if the answer is right; printed as its message."""

    right: bool
    message: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.message}"


def check(label: str, answer: Any) -> Verdict:
    """Compare an answer (a value, or a function) with the exercise `label`, such as "ex-01-3".

    Raises ValueError for an unknown label.
    """
    exercise = EXERCISES[known("label", label, EXERCISES)]
    if callable(exercise.solution) and not callable(answer):
        return Verdict(False, f"this exercise wants a function, got {type(answer).__name__}.")
    try:
        got = _outcomes(answer, exercise.cases)
    except Exception as error:  # whatever a reader's code raises is an answer of its own
        return Verdict(False, f"your code stopped with {type(error).__name__}: {error}")
    if any(value is None for value in got):
        return Verdict(False, "nothing came back yet. Does the function return its result?")
    if _same(got, _outcomes(exercise.solution, exercise.cases), exercise.tolerance):
        return Verdict(True, "well done.")
    for message, mistake in exercise.mistakes.items():
        if _same(got, _outcomes(mistake, exercise.cases), exercise.tolerance):
            return Verdict(False, message)
    return Verdict(False, "not one of the usual mistakes. Try it on a case you can do by hand.")


def _outcomes(answer: Any, cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [answer(*_copied(case)) for case in cases] if callable(answer) else [answer]


def _copied(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """A reader's function may write into its arguments; the next one must not see that."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in case)


def _same(got: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, str | bool) or isinstance(got, str | bool):
        return type(got) is type(wanted) and got == wanted
    if isinstance(wanted, list | tuple) and isinstance(got, list | tuple):
        pairs = zip(got, wanted, strict=False)
        return len(got) == len(wanted) and all(_same(a, b, tolerance) for a, b in pairs)
    try:
        a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (got, wanted))
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- Chapter 1 -------------------------------------------------------------------------------


def _blocks(x: Tensor, weights: Tensor, biases: Tensor, keep: float = 1.0) -> Tensor:
    for weight, bias in zip(weights, biases, strict=True):
        x = keep * x + torch.relu(x @ weight.T + bias)
    return x


def _without_shortcut(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    return _blocks(x, weights, biases, keep=0.0)


def _shortcut_doubled(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    return _blocks(x, weights, biases, keep=2.0)


def _weights_transposed(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    return _blocks(x, weights.mT, biases)


def _activation_after_the_sum(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    for weight, bias in zip(weights, biases, strict=True):
        x = torch.relu(x + x @ weight.T + bias)
    return x


def _shortcut_from_the_input(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    h = x
    for weight, bias in zip(weights, biases, strict=True):
        h = x + torch.relu(h @ weight.T + bias)
    return h


def _only_the_first_block(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    return _blocks(x, weights[:1], biases[:1])


def _blocks_case(seed: int, points: int, width: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (points, width), (depth, width, width), (depth, width)
    x, weights, biases = (torch.randn(shape, generator=g) for shape in shapes)
    return x, weights, biases


def _slope(values: Tensor) -> Tensor:
    layers = torch.arange(len(values)).double()
    centred = layers - layers.mean()
    return centred @ values.double() / (centred @ centred)


def _log_slope(norms: Tensor) -> Tensor:
    return _slope(norms.log10())


def _slope_without_centring(norms: Tensor) -> Tensor:
    layers = torch.arange(len(norms)).double()
    return layers @ norms.double().log10() / (layers @ layers)


def _slope_of_the_ends(norms: Tensor) -> Tensor:
    return (norms[-1].log10() - norms[0].log10()) / (len(norms) - 1)


CHAPTER_1: dict[str, Exercise] = {
    "ex-01-2": Exercise(
        solution=_blocks,
        mistakes={
            "it looks as if you left out the shortcut: each block should add to the old state.": _without_shortcut,
            "your activation comes after the sum. It belongs to the branch alone.": _activation_after_the_sum,
            "the shortcut seems to count twice in each block.": _shortcut_doubled,
            "your shortcuts all start at x. Where does the shortcut of the second block start?": _shortcut_from_the_input,
            "your matrices seem to be transposed: row i of W should make output i.": _weights_transposed,
            "only the first block was used. Is the return inside the loop?": _only_the_first_block,
        },
        cases=(_blocks_case(0, 3, 4, 2), _blocks_case(1, 2, 3, 3)),
    ),
    "ex-01-3": Exercise(
        solution=_log_slope,
        mistakes={
            "that is the slope of the norms themselves. Take their logarithm first.": _slope,
            "your unit is not decades: which base has your logarithm?": lambda norms: _slope(
                norms.log()
            ),
            "you fit a line through the origin. Centre the layer numbers first.": _slope_without_centring,
            "you use the two ends only. All layers should have a say in the fit.": _slope_of_the_ends,
            "the sign is turned round. Layers are counted from the stem to the head.": lambda norms: (
                -_log_slope(norms)
            ),
        },
        cases=(
            (torch.tensor([1.0, 20.0, 100.0, 3000.0]),),
            (torch.tensor([5.0, 2.0, 1.0, 0.1, 0.09]),),
        ),
    ),
    "ex-01-4": Exercise(
        solution=0.7355,
        mistakes={
            "that is the accuracy on the points that you fitted. Score the test points.": 0.76,
            "that is the level of targets 0 and 1 with a threshold at 0. Where is the middle?": 0.5145,
            "your threshold is 0.5, which is the middle of 0 and 1. Your targets are -1 and 1.": 0.729,
            "the line was fitted to the test points. Fit it to the training points.": 0.7455,
            "that is pure chance: does your line give every point the same class?": 0.5,
        },
        tolerance=1e-3,
    ),
}

# ---- Chapter 2 -------------------------------------------------------------------------------


def _arm_point(u: float, arm: int) -> list[float]:
    angle = 2 * math.pi * math.sqrt(u)
    radius = (1 - 2 * arm) * (2 * angle + math.pi) / (5 * math.pi)
    return [radius * math.cos(angle), radius * math.sin(angle)]


def _arm_with_linear_angle(u: float, arm: int) -> list[float]:
    return _arm_point(u**2, arm)


def _arm_mirrored(u: float, arm: int) -> list[float]:
    first, second = _arm_point(u, 0)
    return [-first if arm else first, second]


def _arm_without_sign(u: float, arm: int) -> list[float]:
    return _arm_point(u, 0)


def _arm_without_offset(u: float, arm: int) -> list[float]:
    angle = 2 * math.pi * math.sqrt(u)
    radius = (1 - 2 * arm) * 2 * angle / (5 * math.pi)
    return [radius * math.cos(angle), radius * math.sin(angle)]


def _arm_unscaled(u: float, arm: int) -> list[float]:
    return [5 * math.pi * value for value in _arm_point(u, arm)]


def _arm_swapped(u: float, arm: int) -> list[float]:
    return _arm_point(u, arm)[::-1]


def _z(x: Tensor, correction: int = 0) -> Tensor:
    return (x - x.mean()) / x.std(correction=correction)


def _w1(a: Tensor, b: Tensor) -> Tensor:
    return (a.sort().values - b.sort().values).abs().mean()


CHAPTER_2: dict[str, Exercise] = {
    "ex-02-2": Exercise(
        solution=_arm_point,
        mistakes={
            "your angle grows like u. Look at what the formula does to u before the factor 2π.":
                _arm_with_linear_angle,
            "your second arm is a mirror image of the first. ε multiplies both coordinates.":
                _arm_mirrored,
            "both of your arms are the same. What does ε do when arm is 1?": _arm_without_sign,
            "your arms start at the origin. The radius has an offset.": _arm_without_offset,
            "your points lie far outside the unit disc. What is the radius divided by?":
                _arm_unscaled,
            "your two coordinates are exchanged. Which of them takes the cosine?": _arm_swapped,
        },
        cases=((0.25, 0), (0.5, 1), (0.09, 1), (0.0, 0)),
    ),
    "ex-02-3": Exercise(
        solution=lambda a, b: _w1(_z(a), _z(b)),
        mistakes={
            "you compare point by point. A histogram does not know which point is which: what "
            "must happen to both samples first?": lambda a, b: (_z(a) - _z(b)).abs().mean(),
            "your samples keep their own mean and scale. Make both z-scores first.": _w1,
            "you removed the means and kept the scales. What else is in a z-score?":
                lambda a, b: _w1(a - a.mean(), b - b.mean()),
            "you averaged squared differences. W1 averages something else.":
                lambda a, b: (_z(a).sort().values - _z(b).sort().values).square().mean(),
            "you compare each value with every value of the other sample. Then even a sample "
            "and itself are apart.": lambda a, b: (_z(a)[:, None] - _z(b)).abs().mean(),
            "your standard deviation divides by n - 1. The measure of this book divides by n.":
                lambda a, b: _w1(_z(a, 1), _z(b, 1)),
        },
        cases=(
            (torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.0, 5.0, 4.0, 3.0])),
            (torch.tensor([0.0, 1.0, 5.0, 2.0, 2.5]), torch.tensor([9.0, -3.0, 1.0, 1.0, 4.0])),
            (torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([7.0, 5.0, 6.0, 9.0])),
        ),
    ),
}  # fmt: skip

# ---- Chapter 3 -------------------------------------------------------------------------------


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centred(x), _centred(y)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def _cka_not_centred(x: Tensor, y: Tensor) -> Tensor:
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def _cka_cross_not_squared(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centred(x), _centred(y)
    return (y.T @ x).norm() / ((x.T @ x).norm() * (y.T @ y).norm())


def _cka_own_norms_squared(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centred(x), _centred(y)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() ** 2 * (y.T @ y).norm() ** 2)


def _cka_over_feature_norms(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centred(x), _centred(y)
    return (y.T @ x).norm() ** 2 / (x.norm() ** 2 * y.norm() ** 2)


def _cosine_of_flattened(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centred(x).flatten(), _centred(y).flatten()
    return (x @ y) / (x.norm() * y.norm())


def _cka_case(seed: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return x + 1.0, y + 0.5 * x


def _rise_after_low(r: Tensor) -> Tensor:
    return (r - r.cummin(0).values).max()


def _rise_from_the_lowest(r: Tensor) -> Tensor:
    return r[r.argmin() :].max() - r.min()


def _fall_after_high(r: Tensor) -> Tensor:
    return (r.cummax(0).values - r).max()


def _entropy(share: Tensor) -> Tensor:
    return -(share * share.log()).sum()


def _spectrum(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x)


def _shares(values: Tensor) -> Tensor:
    return values / values.sum()


def _effective_rank(x: Tensor) -> Tensor:
    return _entropy(_shares(_spectrum(x))).exp()


CHAPTER_3: dict[str, Exercise] = {
    "ex-03-2": Exercise(
        solution=_cka,
        mistakes={
            "your features keep their offset. What does the c in X_c stand for?": _cka_not_centred,
            "the norm of the cross product should be squared.": _cka_cross_not_squared,
            "below the line the norms are squared, and they should not be.": _cka_own_norms_squared,
            "below the line you have norms of the features. Take those of X_c^T X_c and Y_c^T Y_c.": _cka_over_feature_norms,
            "that is the square root of CKA. Compare it with the formula once more.": lambda x, y: (
                _cka(x, y).sqrt()
            ),
            "that is a cosine of flattened features. It sees rotations, and CKA should not.": _cosine_of_flattened,
            "nothing is normalised yet: twice the features, four times the value.": lambda x, y: (
                (_centred(y).T @ _centred(x)).norm() ** 2
            ),
        },
        cases=(_cka_case(0, 12, 3), _cka_case(1, 9, 4)),
    ),
    "ex-03-3": Exercise(
        solution=_rise_after_low,
        mistakes={
            "that is highest minus lowest anywhere. The low has to come first.": lambda r: (
                r.max() - r.min()
            ),
            "you look at the last layer only. The profile may rise and fall again before it.": lambda r: (
                r[-1] - r.min()
            ),
            "that is the largest fall: your minimum runs over the layers that come later.": _fall_after_high,
            "that is how far the profile falls below its start. How far does it come back?": lambda r: (
                r[0] - r.min()
            ),
            "that is the largest single step up. A rise may take several layers.": lambda r: (
                r.diff().max().clamp(min=0)
            ),
            "you start from the lowest point of all. A higher low may come before a larger rise.": _rise_from_the_lowest,
        },
        cases=tuple(
            (torch.tensor(r, dtype=torch.float64),)
            for r in (
                [1, 0.9, 0.5, 0.6, 0.55, 0.8],
                [0.4, 0.9, 0.3, 0.6, 0.2],
                [0.2, 0.9, 0.5, 0.6],
            )
        ),
    ),
    "ex-03-4": Exercise(
        solution=_effective_rank,
        mistakes={
            "those are shares of the squares: take the singular values themselves.": lambda x: (
                _entropy(_shares(_spectrum(x).square())).exp()
            ),
            "your singular values do not sum to 1 yet. An entropy needs shares.": lambda x: (
                _entropy(_spectrum(x)).exp()
            ),
            "your logarithm has base 2 and your exponential base e. Use one base for both.": lambda x: (
                (_entropy(_shares(_spectrum(x))) / math.log(2)).exp()
            ),
            "that is the entropy, in nats. One step is left to a number of dimensions.": lambda x: (
                _entropy(_shares(_spectrum(x)))
            ),
            "you centred the columns first. That is another quantity, centre=True in the package.": lambda x: (
                _effective_rank(_centred(x))
            ),
            "that is the participation ratio, a cousin that listens to large directions more.": lambda x: (
                _shares(_spectrum(x).square()).square().sum().reciprocal()
            ),
        },
        cases=((_cka_case(2, 7, 3)[0],), (_cka_case(3, 5, 4)[1] / 4,)),
    ),
    "ex-03-5": Exercise(
        solution=14_592.0,
        mistakes={
            "that is d / n = 0.05. The width stands below the line as well.": 15_360.0,
            "points and width are swapped: more points should lower the level.": 768 / 19,
            "that brings the level to 0.5, ten times too high.": 768.0,
            "that is the number of points for a level of 0.01. The text asks for 0.05.": 768 * 99.0,
        },
        tolerance=1e-4,
    ),
}


# ---- Chapter 4 -------------------------------------------------------------------------------


def _step(w: Tensor, v: Tensor, g: Tensor, lr: float, beta: float) -> tuple[Tensor, Tensor]:
    v = beta * v + g
    return w - lr * v, v


def _stage_two(w: Tensor, v: Tensor, g: Tensor, mask: Tensor, lr: float, beta: float) -> list:
    new_w, new_v = _step(w, v, g, lr, beta)
    return [torch.where(mask == 1, w, new_w), torch.where(mask == 1, v, new_v)]


def _gradient_zeroed(
    w: Tensor, v: Tensor, g: Tensor, mask: Tensor, lr: float, beta: float
) -> list[Tensor]:
    return [*_step(w, v, g * (1 - mask), lr, beta)]


def _velocity_runs_on(
    w: Tensor, v: Tensor, g: Tensor, mask: Tensor, lr: float, beta: float
) -> list[Tensor]:
    new_w, new_v = _step(w, v, g * (1 - mask), lr, beta)
    return [torch.where(mask == 1, w, new_w), new_v]


def _velocity_updated(
    w: Tensor, v: Tensor, g: Tensor, mask: Tensor, lr: float, beta: float
) -> list[Tensor]:
    new_w, new_v = _step(w, v, g, lr, beta)
    return [torch.where(mask == 1, w, new_w), new_v]


def _velocity_forgotten(
    w: Tensor, v: Tensor, g: Tensor, mask: Tensor, lr: float, beta: float
) -> list[Tensor]:
    return [*_step(w, v * (1 - mask), g * (1 - mask), lr, beta)]


def _two_stage_case(seed: int, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float]:
    g = torch.Generator().manual_seed(seed)
    w, v, gradient = torch.randn(3, blocks, generator=g, dtype=torch.float64)
    mask = (torch.rand(blocks, generator=g) >= 0.5).double()
    return w, v, gradient, mask, 0.1, 0.9


CHAPTER_4: dict[str, Exercise] = {
    "ex-04-1": Exercise(
        solution=(0.35, 0.0221875),
        mistakes={
            "that is one plain step. In stage 1 branch 2 is not there, and not updated either.": (0.265625, -0.03125),
            "that is where stage 1 leaves you. Stage 2 is missing.": (0.35, 0.25),
            "both gradients are those of the starting point. Stage 2 comes after stage 1: which a1 does it see?": (0.35, -0.03125),
            "your kept branch moved in stage 2 as well. What does frozen mean?": (0.1390625, 0.0221875),
            "you scaled the kept branch by 1/(1 - p) = 2. The text sets the scale to 1.": (0.1, 0.09875),
            "that is the mixture: one update on a sum of losses. Make two updates, one after the other.": (0.2328125, 0.109375),
        },
        tolerance=1e-4,
    ),
    "ex-04-2": Exercise(
        solution=_stage_two,
        mistakes={
            "kept blocks still coast on their velocity: a gradient of zero is an update, too.": _gradient_zeroed,
            "the weights stand still now, but the velocity of kept blocks fades. Optimizer state is frozen, too.": _velocity_runs_on,
            "the weights stand still, but the gradient still enters the velocity of kept blocks. It moves them one pair later.": _velocity_updated,
            "you erase the velocity of kept blocks. Then they stand still now, and start from nothing in the next pair.": _velocity_forgotten,
            "you froze the dropped blocks and moved the kept ones. Which bit means kept?": lambda w, v, g, mask, lr, beta: (
                _stage_two(w, v, g, 1 - mask, lr, beta)
            ),
            "every block moves: where did the mask go?": lambda w, v, g, mask, lr, beta: [
                *_step(w, v, g, lr, beta)
            ],
        },
        cases=(_two_stage_case(0, 6), _two_stage_case(1, 5)),
    ),
    "ex-04-3": Exercise(
        solution=(1.8, 1.0, 1.6),
        mistakes={
            "no-freeze updates a kept block twice: once in each stage.": (1.0, 1.0, 1.6),
            "random-freeze trains in stage 2 as many blocks as were dropped, whichever they are.": (1.8, 1.8, 1.6),
            "random-freeze: on average, over masks. A block may get 0, 1 or 2 in one pair.": (1.8, 2.0, 1.6),
            "two steps of droppath are two chances to be kept.": (1.8, 1.0, 0.8),
            "you took p for the chance of being kept. It is that of being dropped.": (1.2, 1.0, 0.4),
        },
        tolerance=1e-6,
    ),
    "ex-04-4": Exercise(
        solution="mixture",
        mistakes={
            "it freezes nothing in stage 2, yes. But count: its blocks get N (2 - p) updates, so that more updates and no freezing come together.": "no-freeze",
            "it still freezes as many blocks. What it takes away is the link between dropped and trained.": "random-freeze",
            "it has no stage 2 at all: that asks whether full passes are needed, not whether freezing is.": "droppath",
            "it has neither dropping nor freezing. A difference would not say which of the two made it.": "plain-half",
            "it has the same compute, but also no dropping. A difference would not say what made it.": "plain-eq",
            "it has the same number of iterations, twice the updates, and no dropping: three differences at once.": "plain",
        },
    ),
    "ex-04-5": Exercise(
        solution=0.8**6,
        mistakes={
            "so near to 0? Either you counted masks that drop all blocks, or there are more than six.": 0.2**6,
            "that is the share in which something is dropped, so that stage 2 runs.": 1 - 0.8**6,
            "that is the share for one block alone. There are six, and all must be kept.": 0.8,
            "that is the rate of p = 0.5. Take p = 0.2.": 0.5**6,
        },
        tolerance=0.01,
    ),
}  # fmt: skip


# ---- Chapter 5 -------------------------------------------------------------------------------


def _ramp(
    depth: int, alpha_min: float, layers: int = 2, first: int = 0, last: int = -1
) -> list[float]:
    n = layers * depth
    return [1 - (1 - alpha_min) * (k + first) / (n + last) for k in range(n)]


def _ramp_by_block_twice(depth: int, alpha_min: float) -> list[float]:
    return [alpha for alpha in _ramp(depth, alpha_min, layers=1) for _ in range(2)]


def _equal_ratios(depth: int, alpha_min: float) -> list[float]:
    return [alpha_min ** (k / (2 * depth - 1)) for k in range(2 * depth)]


def _twin(
    alphas: Sequence[float], eps: float, own: int = 1, norm: int = 0, power: int = 2
) -> list[list[float]]:
    passed = [math.prod(alphas[:k]) for k in range(len(alphas) + 1)]
    every = range(len(alphas))
    gains = [1 / passed[k + own] for k in every]
    return [gains, [eps / passed[k + norm] ** power for k in every]]


def _factors_behind(alphas: Sequence[float], eps: float) -> list[list[float]]:
    gains, rescaled = _twin(alphas[::-1], eps)
    return [gains[::-1], rescaled[::-1]]


def _shares_not_gains(alphas: Sequence[float], eps: float) -> list[list[float]]:
    gains, rescaled = _twin(alphas, eps)
    return [[1 / gain for gain in gains], rescaled]


def _each_factor_alone(alphas: Sequence[float], eps: float) -> list[list[float]]:
    return [[1 / alpha for alpha in alphas], _twin(alphas, eps)[1]]


CHAPTER_5: dict[str, Exercise] = {
    "ex-05-1": Exercise(
        solution=(0.192, 0.24, 1 / 0.192),
        mistakes={
            "you have one factor a block. The ramp counts sub-layers: how many are there in two blocks?": (0.4, 1.0, 2.5),
            "your first factor is already below 1. In the published code the ramp starts at 1.": (0.1309, 0.22, 1 / 0.1309),
            "the weight of a branch contains factors behind it, and not the one of its own sub-layer.": (0.192, 0.192, 1 / 0.192),
            "those are the factors in front of branch 1. Which ones act after its output was added?": (0.192, 0.8, 1 / 0.192),
            "the last gain lacks its own factor: that one has weakened the state before the branch is added.": (0.192, 0.24, 1 / 0.48),
            "you added the factors up. Each acts on what the one before it left.": (2.8, 1.0, 1 / 2.8),
        },
        tolerance=2e-3,
    ),
    "ex-05-2": Exercise(
        solution=_ramp,
        mistakes={
            "that is one factor a block. Attention and MLP have one each.": lambda depth, alpha_min: (
                _ramp(depth, alpha_min, layers=1)
            ),
            "the two sub-layers of a block share a factor in yours. The ramp falls within a block, too.": _ramp_by_block_twice,
            "your first factor is already below 1: that is the text's indexing, not the code's.": lambda depth, alpha_min: (
                _ramp(depth, alpha_min, first=1, last=0)
            ),
            "the last factor does not reach alpha_min. How many steps lie between n factors?": lambda depth, alpha_min: (
                _ramp(depth, alpha_min, last=0)
            ),
            "it rises. Which end of the net keeps its shortcut whole?": lambda depth, alpha_min: (
                _ramp(depth, alpha_min)[::-1]
            ),
            "equal ratios, not equal steps: the ends are right, and between them it is no straight line.": _equal_ratios,
        },
        cases=((2, 0.4), (6, 0.6), (12, 0.75)),
    ),
    "ex-05-3": Exercise(
        solution=_twin,
        mistakes={
            "the gains lack the layer's own factor. The state is weakened before the branch is added to it.": lambda alphas, eps: (
                _twin(alphas, eps, own=0)
            ),
            "eps is added to a variance: the factor enters it squared.": lambda alphas, eps: _twin(
                alphas, eps, power=1
            ),
            "norm k reads the state before factor k: one factor too many in your eps.": lambda alphas, eps: (
                _twin(alphas, eps, norm=1)
            ),
            "the gains are right, and eps is left as it was. The plain net's states are larger.": lambda alphas, eps: (
                _twin(alphas, eps, power=0)
            ),
            "eps goes the wrong way. Larger states need a larger eps to be damped as much.": lambda alphas, eps: (
                _twin(alphas, eps, power=-2)
            ),
            "you multiplied the factors behind the layer. The states of the twin are divided by those in front.": _factors_behind,
            "those are the shares that are left, not the gains: turn them over.": _shares_not_gains,
            "each gain has one factor only. They pile up along the net.": _each_factor_alone,
        },
        cases=(([1.0, 0.8, 0.6, 0.4], 1.0), ([0.9, 0.5, 0.7], 0.01)),
    ),
    "ex-05-4": Exercise(
        solution=0.57173,
        mistakes={
            "you used all 24 factors. How many has the input of the last norm passed?": 0.60465,
            "that is where the variance is at nine tenths. The text asks for the standard deviation.": 0.59607,
            "that is the answer for eps = 1e-5. Which eps does the text give?": 0.64867,
            "your product enters without its square, but eps is compared with a variance.": 0.27450,
            "your ramp has one factor a block.": 0.22099,
            "that is where one tenth is left, not where one tenth is lost.": 0.39567,
        },
        tolerance=5e-3,
    ),
    "ex-05-5": Exercise(
        solution=6,
        mistakes={
            "one is missing: does your gain lack the layer's own factor?": 5,
            "none? 1 / alpha_k is the gain of one layer alone. They pile up, and the depth is 12.": 0,
            "that is the count for SGD, where gains enter squared.": 11,
            "those are the ones that are not.": 18,
        },
    ),
}  # fmt: skip


# ---- Chapter 6 -------------------------------------------------------------------------------


def _cut(images: Tensor, p: int, pattern: str = "b c (h p) (w q) -> b (h w) (p q c)") -> Tensor:
    return rearrange(images, pattern, p=p, q=p)


def _cut_by_reshape(images: Tensor, p: int) -> Tensor:
    return images.reshape(len(images), -1, p * p * images.shape[1])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5, axis: int = 1) -> Tensor:
    return torch.softmax(q @ k.mT / k.shape[1] ** scale, dim=axis) @ v


def _attend_without_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ k.mT / k.shape[1] ** 0.5 @ v


def _attend_over_tokens_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / len(k) ** 0.5, dim=1) @ v


def _attend_case(seed: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, tokens, width, generator=torch.Generator().manual_seed(seed))
    return q, k, v


def _images_case(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


CHAPTER_6: dict[str, Exercise] = {
    "ex-06-1": Exercise(
        solution=[True, False, True],
        mistakes={
            "without attention every token is still told its place, and the same stroke elsewhere is another token.": [True, False, False],
            "no positions, and yet the order of the patches counts? Which part of that net could see it?": [True, True, True],
            "the whole net adds a position to each patch before anything else. Exchange two patches: what do they get?": [False, False, False],
            "you have them upside down. True stands for logits that change.": [False, True, False],
            "who tells the net without positions where a patch was? And is the net without attention not told?": [True, True, False],
        },
    ),
    "ex-06-2": Exercise(
        solution=_cut,
        mistakes={
            "the channel is slowest in your patches. The text wants it fastest: (p q c).": lambda images, p: (
                _cut(images, p, "b c (h p) (w q) -> b (h w) (c p q)")
            ),
            "your patches run down the columns of the grid. Take them row by row.": lambda images, p: (
                _cut(images, p, "b c (h p) (w q) -> b (w h) (p q c)")
            ),
            "each patch is on its side: its pixels run down the columns.": lambda images, p: (
                _cut(images, p, "b c (h p) (w q) -> b (h w) (q p c)")
            ),
            "a reshape alone cuts stripes out of rows, not squares. Some axes have to change places first.": _cut_by_reshape,
            "you took every (H/p)-th pixel: split an axis into (h, p), not into (p, h).": lambda images, p: (
                _cut(images, p, "b c (p h) (q w) -> b (h w) (p q c)")
            ),
        },
        cases=((_images_case(1, 2, 4, 4), 2), (_images_case(2, 3, 6, 4), 2)),
    ),
    "ex-06-3": Exercise(
        solution=_attend,
        mistakes={
            "the columns sum to 1. Each token that looks shares out its own attention: which axis is that?": lambda q, k, v: (
                _attend(q, k, v, axis=0)
            ),
            "the scores are not scaled. Where is the square root of d?": lambda q, k, v: (
                _attend(q, k, v, scale=0)
            ),
            "you divide by d. The formula divides by its square root.": lambda q, k, v: (
                _attend(q, k, v, scale=1)
            ),
            "you divide by the root of the number of tokens. d is the number of channels.": _attend_over_tokens_root,
            "there is no softmax: your weights may be negative, and their sum may be anything.": _attend_without_softmax,
            "queries and keys have changed places: who looks, and who is looked at?": lambda q, k, v: (
                _attend(k, q, v)
            ),
        },
        cases=(_attend_case(0, 3, 4), _attend_case(1, 5, 2)),
    ),
    "ex-06-4": Exercise(
        solution=85_054_464.0,
        mistakes={
            "those are the weight matrices. Biases and LayerNorms count, too.": 84_934_656.0,
            "that is one block of the twelve.": 7_087_872.0,
            "the LayerNorms are missing: two in each block, 2 D numbers each.": 85_017_600.0,
            "that is the whole net, with stem and final norm. Count the blocks.": 85_054_464.0 + 768 * 768 + 4 * 768,
            "the MLPs are missing, with their norms: you counted attention.": 12 * (4.0 * 768**2 + 6 * 768),
            "your MLP is as wide as the stream. Its hidden layer has 4 D channels.": 12 * (6.0 * 768**2 + 10 * 768),
        },
        tolerance=1e-6,
    ),
    "ex-06-5": Exercise(
        solution=2.0,
        mistakes={
            "after one attention layer patches still differ by about 10 %.": 1.0,
            "you counted sub-layers. Every other one is an MLP.": 3.0,
            "the first number that apart gives belongs to the stem: no layer was passed yet.": 4.0,
            "that is where rounding is reached. Below 1 % comes earlier.": 5.0,
        },
    ),
}  # fmt: skip


# ---- Chapter 7 -------------------------------------------------------------------------------


def _patches(image: Tensor, p: int) -> Tensor:
    return rearrange(image, "c (h p) (w q) -> (h w) (p q c)", p=p, q=p)


def _masked_error(pred: Tensor, patches: Tensor, mask: Tensor, correction: int = 1) -> Tensor:
    variance, mean = torch.var_mean(patches, -1, correction=correction, keepdim=True)
    return _removed(pred, (patches - mean) / (variance + 1e-6).sqrt(), mask)


def _removed(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def _one_scale_for_all(pred: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    variance, mean = torch.var_mean(patches)
    return _removed(pred, (patches - mean) / (variance + 1e-6).sqrt(), mask)


def _divided_by_all(pred: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    return _masked_error(pred, patches, mask) * mask.mean()


def _masked_case(seed: int, patches: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    pred, images = torch.randn(2, 2, patches, size, generator=g, dtype=torch.float64)
    return pred, 3 * images + 1, (torch.arange(patches) % 3 > 0).double().expand(2, -1)


CHAPTER_7: dict[str, Exercise] = {
    "ex-07-1": Exercise(
        solution=((1, 0, 1, 0, 1), (2, 0, 4, 1, 3)),
        mistakes={
            "your mask marks what stays. Here 1 means removed.": ((0, 1, 0, 1, 0), (2, 0, 4, 1, 3)),
            "your second list is the shuffle: which patch comes first, second, … Restore is its inverse: the place of each patch.": ((1, 0, 1, 0, 1), (1, 3, 0, 4, 2)),
            "you kept the patches with the most noise. The least noise stays.": ((1, 1, 0, 1, 0), (2, 4, 0, 3, 1)),
            "your mask is still in the order of noise: the kept ones first. Put it back in the order of the image.": ((0, 0, 1, 1, 1), (2, 0, 4, 1, 3)),
        },
    ),
    "ex-07-2": Exercise(
        solution=_patches,
        mistakes={
            "your patches hold channel after channel, as a convolution's weights do. Here the channel runs fastest.": lambda image, p: (
                rearrange(image, "c (h p) (w q) -> (h w) (c p q)", p=p, q=p)
            ),
            "you walk down the columns of the image. Patches come row by row.": lambda image, p: (
                rearrange(image, "c (h p) (w q) -> (w h) (p q c)", p=p, q=p)
            ),
            "each patch is turned over its diagonal: within a patch, pixels come row by row, too.": lambda image, p: (
                rearrange(image, "c (h p) (w q) -> (h w) (q p c)", p=p, q=p)
            ),
            "you cut the image into strips of p * p * C numbers. Those are no squares: name the axes first.": lambda image, p: (
                image.reshape(-1, p * p * len(image))
            ),
        },
        cases=((torch.arange(36.0).view(1, 6, 6), 3), (torch.arange(72.0).view(3, 4, 6), 2)),
    ),
    "ex-07-3": Exercise(
        solution=_masked_error,
        mistakes={
            "your variance divides by P. The reference divides by P - 1: the loss is off by a part in P.": lambda pred, patches, mask: (
                _masked_error(pred, patches, mask, correction=0)
            ),
            "you average over all patches. What the encoder has seen is no test: only removed ones count.": lambda pred, patches, mask: (
                _masked_error(pred, patches, torch.ones_like(mask))
            ),
            "your loss looks at the kept patches. 1 means removed.": lambda pred, patches, mask: (
                _masked_error(pred, patches, 1 - mask)
            ),
            "your target is raw pixels. Standardise each patch first.": _removed,
            "you standardise all patches together. Each has a mean and a deviation of its own.": _one_scale_for_all,
            "you sum over removed patches and divide by all of them.": _divided_by_all,
        },
        cases=(_masked_case(0, 6, 5), _masked_case(1, 9, 12)),
    ),
    "ex-07-4": Exercise(
        solution=0.3774,
        mistakes={
            "that is (P - 1)/P, the loss if every patch varied. Many of these are one flat grey.": 47 / 48,
            "that is the share of patches that vary. A varying patch costs (P - 1)/P, not 1.": 0.3856,
            "that is the share of patches of one flat grey: they cost nothing.": 0.6144,
            "that is for patches of 8 × 8 pixels. Take 4 × 4.": 0.5923,
        },
        tolerance=3e-3,
    ),
    "ex-07-5": Exercise(
        solution=(23, 21, 19, 17, 15, 13, 11, 9),
        mistakes={
            "right taps, wrong way round: what was put down last is taken up first.": (9, 11, 13, 15, 17, 19, 21, 23),
            "those are the shallowest eight. The rule takes the deepest, as many as the decoder has blocks.": (15, 13, 11, 9, 7, 5, 3, 1),
            "a tap is the state after the second block of a pair: counted from 0, odd numbers.": (22, 20, 18, 16, 14, 12, 10, 8),
            "that is one tap for each pair. The decoder has eight blocks to take them.": (23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1),
        },
    ),
}  # fmt: skip


# ---- Chapter 8 -------------------------------------------------------------------------------


def _overflow(k: int, T: float, start: float = 65_504.0) -> float:
    return T * math.log(start / k)


def _flattery(scores: Tensor, choose: int = 0, read: int = 1) -> Tensor:
    best = scores[:, choose].argmax(1, keepdim=True)
    return (scores[:, 0].gather(1, best) - scores[:, read].gather(1, best)).mean()


def _two_maxima(scores: Tensor) -> Tensor:
    return (scores[:, 0].amax(1) - scores[:, 1].amax(1)).mean()


def _best_less_average(scores: Tensor) -> Tensor:
    return (scores[:, 0].amax(1) - scores[:, 0].mean(1)).mean()


def _best_on_average(scores: Tensor) -> Tensor:
    return _flattery(scores.mean(0, keepdim=True))


def _scores_case(seed: int, draws: int, settings: int) -> tuple[Tensor]:
    return (torch.rand(draws, 2, settings, generator=torch.Generator().manual_seed(seed)),)


CHAPTER_8: dict[str, Exercise] = {
    "ex-08-1": Exercise(
        solution=(0, 1, 0.07213),
        mistakes={
            "right winners, wrong tie: one vote of weight exp(0.95/T) meets two of exp(0.90/T).": (0, 1, 0.05),
            "you have the winners upside down. A low temperature listens to the nearest.": (1, 0, 0.07213),
            "at T = 0.2 the nearest weighs 1.28 times one of the others, and there are two of them.": (0, 0, 0.07213),
            "work out exp(0.05/0.07): is it above or below 2?": (1, 1, 0.07213),
            "your logarithm is to the base 10. The votes are powers of e.": (0, 1, 0.16610),
        },
        tolerance=2e-3,
    ),
    "ex-08-2": Exercise(
        solution=_overflow,
        mistakes={
            "that is where one vote overflows. k of them are added up.": lambda k, T: _overflow(1, T),
            "where is the temperature? The exponent is c / T.": lambda k, T: _overflow(k, 1.0),
            "c / T is the logarithm, so multiply by T.": lambda k, T: _overflow(k, 1.0) / T,
            "k votes overflow earlier than one, not later.": lambda k, T: _overflow(1, T, 65_504.0 * k),
            "a logarithm to the base 10 does not undo exp.": lambda k, T: (
                _overflow(k, T) / math.log(10)
            ),
            "that is where single precision ends. Half precision ends at 65 504.": lambda k, T: (
                _overflow(k, T, 3.4028e38)
            ),
        },
        cases=((20, 0.07), (5, 0.5)),
    ),
    "ex-08-3": Exercise(
        solution=(21.637, 39.661),
        mistakes={
            "that is the entropy. Effective rank is its exponential.": (3.0744, 3.6804),
            "you have them the wrong way round.": (39.661, 21.637),
            "your singular values are squared: that is the participation ratio.": (1.2714, 13.122),
            "both are centred. The first wants the cloud as it lies.": (39.661, 39.661),
            "that is x as it is. Add 100 first.": (29.572, 39.661),
            "those are the test digits. The bank is x.": (21.100, 38.555),
        },
        tolerance=5e-3,
    ),
    "ex-08-4": Exercise(
        solution=_flattery,
        mistakes={
            "you take the best of both parts. What was chosen on the first has to be read on the second.": _two_maxima,
            "you compare with an average setting. The question is what the chosen one scores on new images.": _best_less_average,
            "you chose on the second part: then nothing honest is left.": lambda scores: (
                -_flattery(scores.flip(1))
            ),
            "you average over draws before you choose. Each draw makes a choice of its own.": _best_on_average,
            "chosen and read on the same part the difference is 0, always.": lambda scores: (
                _flattery(scores, read=0)
            ),
        },
        cases=(_scores_case(0, 20, 6), _scores_case(1, 50, 3)),
    ),
    "ex-08-5": Exercise(
        solution=61_875.0,
        mistakes={
            "that makes the binomial error as large as the spread of the seeds, not a third of it.": 6_875.0,
            "the error falls with the root of n, so a third of it takes nine times as many, not three.": 20_625.0,
            "you left out the root: sqrt(p (1 - p) / n).": 123.75,
            "that is for an accuracy of one half.": 62_500.0,
        },
        tolerance=2e-3,
    ),
}  # fmt: skip


# ---- Chapter 9 -------------------------------------------------------------------------------


def _alpha_min(depth: int, target: float, per_block: int = 2, first: int = 0) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        a = (low + high) / 2
        kept = math.prod(_ramp(depth, a, per_block, first, last=first - 1))
        low, high = (a, high) if kept < target else (low, a)
    return low


def _shown(
    arm: Tensor,
    controls: Tensor,
    points: float = 0.01,
    deviations: float = 2.0,
    correction: int = 1,
    seeds: bool = True,
) -> bool:
    gap = (arm - controls).mean(1)
    pooled = ((arm.var(correction=correction) + controls.var(1, correction=correction)) / 2).sqrt()
    enough = (gap >= points) & (gap >= deviations * pooled)
    return bool((enough & ((arm > controls).all(1) | (not seeds))).all())


def _some_control(arm: Tensor, controls: Tensor) -> bool:
    return any(_shown(arm, one[None]) for one in controls)


def _deviation_of_pairs(arm: Tensor, controls: Tensor) -> bool:
    off = arm - controls
    enough = (off.mean(1) >= 0.01) & (off.mean(1) >= 2 * off.std(1))
    return bool((enough & (off > 0).all(1)).all())


def _table(arm: list[float], *controls: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(arm).double(), torch.tensor(controls).double()


CHAPTER_9: dict[str, Exercise] = {
    "ex-09-1": Exercise(
        solution=1e3,
        mistakes={
            "that is the product. The gain of the last sub-layer is its inverse.": 1e-3,
            "that is the inverse of the last factor alone. All factors before it count too.": 1 / 0.3593,
            "that is the sub-layer before the last: its own factor belongs to the product as well.": 359.3,
            "that is the factor for SGD. Under AdamW it is the gain, not its square.": 1e6,
            "that is the centre of the window. Take its lower end.": 10**2.5,
            "that is the upper end of the window, where the product is largest.": 100.0,
        },
        tolerance=1e-2,
    ),
    "ex-09-2": Exercise(
        solution=_alpha_min,
        mistakes={
            "you count blocks. A block has two sub-layers, and each has a factor.": lambda d, t: (
                _alpha_min(d, t, per_block=1)
            ),
            "your first factor is below 1. The ramp of the code starts at exactly 1.": lambda d, t: (
                _alpha_min(d, t, first=1)
            ),
            "that is the constant factor with this product. A ramp has to end lower.": lambda d, t: (
                t ** (1 / (2 * d))
            ),
            "that is what the last shortcut loses. alpha_min is what it keeps.": lambda d, t: (
                1 - _alpha_min(d, t)
            ),
            "that is for the square of the target.": lambda d, t: _alpha_min(d, t**2),
        },
        cases=((10, 10**-2.5), (5, 1e-2), (14, 1e-3)),
        tolerance=1e-4,
    ),
    "ex-09-3": Exercise(
        solution=_shown,
        mistakes={
            "one control is enough for you. The rule asks for all of them.": _some_control,
            "you compare means. The arm has to be ahead in every single seed as well.": lambda arm, controls: (
                _shown(arm, controls, seeds=False)
            ),
            "where is the 1 point? A tiny gap with tinier deviations is not enough.": lambda arm, controls: (
                _shown(arm, controls, points=0.0)
            ),
            "one deviation is not two.": lambda arm, controls: (
                _shown(arm, controls, deviations=1.0)
            ),
            "your deviation divides by n. Of three seeds it has to divide by n - 1.": lambda arm, controls: (
                _shown(arm, controls, correction=0)
            ),
            "your pooled deviation is the root of the sum of variances. Take the root of their mean.": lambda arm, controls: (
                _shown(arm, controls, deviations=8**0.5)
            ),
            "you use the deviation of the differences. The rule pools those of the two arms.": _deviation_of_pairs,
        },
        cases=(
            _table([0.50, 0.51, 0.50], [0.40, 0.41, 0.40], [0.42, 0.41, 0.43]),
            _table([0.50, 0.51, 0.50], [0.40, 0.41, 0.40], [0.52, 0.52, 0.53]),
            _table([0.50, 0.50, 0.50, 0.50, 0.445], [0.45, 0.45, 0.45, 0.45, 0.45]),
            _table([0.406, 0.4061, 0.4062], [0.400, 0.4001, 0.4002]),
            _table([0.44, 0.45, 0.46], [0.425, 0.435, 0.445]),
            _table([0.45, 0.44, 0.46], [0.41, 0.43, 0.42]),
            _table([0.44, 0.45, 0.46], [0.422, 0.432, 0.442]),
            _table([0.44, 0.45, 0.46], [0.415, 0.425, 0.435]),
        ),
    ),
    "ex-09-4": Exercise(
        solution=(2, -0.08887),
        mistakes={
            "right gap, but you count the blocks where decay is behind.": (4, -0.08887),
            "right gap. Count again: in how many of the six is the mean over seeds above 0?": (1, -0.08887),
            "you have the arms the wrong way round.": (4, 0.08887),
            "that is the gap to the standard arm. Subtract skips-only.": (2, -0.0886),
            "that is the gap between the best blocks. Take the last.": (2, -0.0268),
        },
        tolerance=2e-4,
    ),
    "ex-09-5": Exercise(
        solution=("rate", "taps", "head"),
        mistakes={
            "a rate that is too high makes losses jump, and B alone jumps.": ("taps", "rate", "head"),
            "C learns, so that its head does. What do all its predictions have in common?": ("rate", "head", "taps"),
            "D does not learn at all. Taps at zero leave the mean image to be learned.": ("rate", "norms", "taps"),
            "the eps of norms changes the loss in the third digit. That is none of these.": ("rate", "norms", "head"),
        },
    ),
    "ex-09-6": Exercise(
        solution=(1.0, 0.0, 0.3141, 0.3141),
        mistakes={
            "that is decay, the arm in question.": (0.3141, 0.0, 0.0, 0.0),
            "that is decay in other words: rates and taps together are the shortcut.": (1.0, 0.3141, 0.3141, 0.3141),
            "nearly: its norms differ from those of decay too. Give it the same eps.": (1.0, 0.0, 0.3141, 0.0),
            "that tests the step sizes. The claim is about taps.": (1.0, 0.3141, 0.0, 0.3141),
            "that has neither quieter taps nor higher rates: the fourth cell.": (1.0, 0.0, 0.0, 0.3141),
            "decay has quieter taps already; scaled twice they are quieter still.": (0.3141, 0.0, 0.3141, 0.0),
        },
    ),
}  # fmt: skip


# ---- Chapter 10 ------------------------------------------------------------------------------


def _from_velocity(
    x_t: Tensor, v: Tensor, bar: float, of_x: float = 0.5, of_v: float = 0.5, sign: float = -1.0
) -> Tensor:
    return bar**of_x * x_t + sign * (1 - bar) ** of_v * v


def _as_if_noise(x_t: Tensor, v: Tensor, bar: float) -> Tensor:
    return _from_velocity(x_t, v, bar, of_x=0.0) / bar**0.5


def _follow(bars: Tensor, times: Sequence[int], var: float, before: Sequence[int]) -> Tensor:
    """One number through DDIM; `before` are the times that steps lead to, -2 for a clean image."""
    x = torch.ones((), dtype=torch.float64)
    for t, s in zip(times[::-1], before[::-1], strict=True):
        now, after = bars[t], torch.ones(()) if s == -2 else bars[s]
        eps = (1 - now).sqrt() * x / (now * var + 1 - now)
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    return x


def _chain_case(step: int, last: float, var: float) -> tuple[Tensor, list[int], float]:
    betas = torch.linspace(1e-4, last, 100, dtype=torch.float64)
    return (1 - betas).cumprod(0), list(range(0, 100, step)), var


CHAPTER_10: dict[str, Exercise] = {
    "ex-10-1": Exercise(
        solution=(0.73, 1.0, 1.0),
        mistakes={
            "you left the factors unsquared. A factor sqrt(a) on x is a factor a on its variance.": (0.95, 1.0, 1.0),
            "signal and noise have changed places: a belongs to the image.": (0.52, 1.0, 1.0),
            "that is the noise alone. The image is still there.": (0.64, 1.0, 1.0),
            "that is the deviation. Its square was asked for.": (0.73**0.5, 1.0, 1.0),
            "the last state is noise of variance 1, whatever the images were.": (0.73, 0.25, 1.0),
        },
        tolerance=2e-3,
    ),
    "ex-10-2": Exercise(
        solution=_from_velocity,
        mistakes={
            "a sign: v holds minus the image, so that v is taken off.": lambda x_t, v, bar: (
                _from_velocity(x_t, v, bar, sign=1.0)
            ),
            "that is the noise. Turn the other way: the image has the factor sqrt(bar) in x_t.": lambda x_t, v, bar: (
                _from_velocity(x_t, v, 1 - bar, sign=1.0)
            ),
            "your two factors have changed places.": lambda x_t, v, bar: _from_velocity(x_t, v, 1 - bar),
            "the factors are roots. Their squares sum to 1.": lambda x_t, v, bar: (
                _from_velocity(x_t, v, bar, of_x=1.0, of_v=1.0)
            ),
            "you treat v as if it were the noise.": _as_if_noise,
        },
        cases=(
            (torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.3, 1.0, -2.0]), 0.36),
            (torch.tensor([[0.2], [0.7]]), torch.tensor([[-1.0], [0.4]]), 0.9),
        ),
    ),
    "ex-10-3": Exercise(
        solution=lambda bars, times, var: _follow(bars, times, var, [-2, *times[:-1]]),
        mistakes={
            "each step still leads to the time *one* below, as if no time were left out. Which time is visited next?": lambda bars, times, var: (
                _follow(bars, times, var, [t - 1 for t in times])
            ),
            "right in between, but look at the last step: in Python the entry -1 is the last one, nearly 0, which throws the image away.": lambda bars, times, var: (
                _follow(bars, times, var, [times[-1], *times[:-1]])
            ),
            "the end is right: 1 is what belongs to a clean image. The other steps still go down by one time only.": lambda bars, times, var: (
                _follow(bars, times, var, [-2, *(t - 1 for t in times[1:])])
            ),
            "you stop at time 0, where a little noise is left. One more step leads to the image.": lambda bars, times, var: (
                _follow(bars, times[1:], var, times[:-1])
            ),
            "the last step wraps around to the end of the table, and throws the image away.": lambda bars, times, var: (
                _follow(bars, times, var, [-1, *times[:-1]])
            ),
        },
        cases=(_chain_case(20, 0.2, 0.25), _chain_case(10, 0.3, 2.0)),
        tolerance=1e-6,
    ),
    "ex-10-4": Exercise(
        solution=(56, 30),
        mistakes={
            "you have the two schedules the wrong way round.": (30, 56),
            "that is for 1 %. Five were asked for.": (291, 155),
            "those are the steps of DDPM. DDIM needs fewer.": (133, 68),
            "one step too few: both are still just outside.": (55, 29),
        },
        tolerance=1e-6,
    ),
    "ex-10-5": Exercise(
        solution=(366, 545, 336, 267),
        mistakes={
            "the mean of 16 pixels has a 16th of the noise's variance: ln SNR shifts by ln 16, not by ln 4.": (366, 545, 372, 431),
            "wrong way: the enlarged digit can be told under *more* noise.": (366, 545, 200, 385),
            "the second pair repeats the first. Sixteen noisy copies of a pixel tell more than one.": (366, 545, 366, 545),
            "you shifted by 16. The ratio is a logarithm.": (366, 545, 0, 0),
            "right numbers; the linear schedule comes first.": (545, 366, 267, 336),
        },
        tolerance=4e-3,
    ),
}  # fmt: skip


# ---- Chapter 11 ------------------------------------------------------------------------------


def _u_ramp(depth: int, alpha_min: float) -> list[float]:
    return _ramp(depth + 1, alpha_min)


def _half_ramps(depth: int, alpha_min: float) -> tuple[list[float], list[float]]:
    """A ramp to the middle block's end, and another one over the out blocks."""
    return _ramp(depth + 2, alpha_min, layers=1), _ramp(depth, alpha_min, layers=1)


def _ramp_that_restarts(depth: int, alpha_min: float) -> list[float]:
    down, again = _half_ramps(depth, alpha_min)
    return down + again


def _ramp_that_climbs_back(depth: int, alpha_min: float) -> list[float]:
    down, again = _half_ramps(depth, alpha_min)
    return down + again[::-1]


def _ramp_that_waits(depth: int, alpha_min: float) -> list[float]:
    return _half_ramps(depth, alpha_min)[0] + [alpha_min] * depth


def _fold_join(
    weight: Tensor,
    bias: Tensor,
    alphas: Sequence[float],
    k: int,
    parts: tuple[int, int, int] = (0, 1, 1),
    block: int = 0,
    tap: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`parts`: powers of tap / stream on the two halves of weight, of 1 / stream on the bias."""
    half, skips = len(weight), len(alphas) // 4
    stream = math.prod(alphas[: 2 * (skips + 1 + k + block)])
    kept = math.prod(alphas[: 2 * (skips - k) if tap is None else 2 * tap]) / stream
    scale = torch.tensor([kept ** parts[0]] * half + [kept ** parts[1]] * half)
    return weight * scale, bias / stream ** parts[2]


def _join_case(seed: int, skips: int, k: int) -> tuple[Tensor, Tensor, list[float], int]:
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    return weight[:, 1:], weight[:, 0], _u_ramp(2 * skips, 0.6), k


CHAPTER_11: dict[str, Exercise] = {
    "ex-11-1": Exercise(
        solution=(0.1512, 0.27, 0.504),
        mistakes={
            "you have one factor a block. Attention and MLP have one each: six in all.": (0.375, 0.5, 0.75),
            "0.9 is what is put down as the tap. The block that takes it up has two factors of its own.": (0.1512, 0.9, 0.504),
            "the tap is put down behind the first block, so that both factors of that block have acted on it.": (0.1512, 0.3, 0.504),
            "your last number is what comes to the middle. What is left behind it?": (0.1512, 0.27, 0.9),
            "trunk and tap are two routes. The second number asks for the tap alone.": (0.1512, 0.4212, 0.504),
            "your first factor is 11/12. The ramp of the published code starts at 1.": (0.1114, 0.2228, 0.3819),
        },
        tolerance=2e-3,
    ),
    "ex-11-2": Exercise(
        solution=(26, 0.6191),
        mistakes={
            "those are twelve blocks. The one in the middle has a number to itself.": (24, 0.5927),
            "you gave each block one factor. How many shortcuts are in a block?": (13, 0.3495),
            "the ramp has 26 factors, and your alpha_min is that of a ramp with 24.": (26, 0.5927),
            "that puts the product at 1e-3, the lower end of the window.": (26, 0.5566),
            "that puts the product at 1e-2, the upper end of the window.": (26, 0.6860),
            "26 sub-layers are 13 blocks. Your alpha_min is for 26 blocks.": (26, 0.7945),
        },
        tolerance=2e-3,
    ),
    "ex-11-3": Exercise(
        solution=_u_ramp,
        mistakes={
            "it starts again at 1 in the first out block: two ramps in one net. Print the factors and look for the jump.": _ramp_that_restarts,
            "it climbs back to 1 on the way out. Then the last shortcut would be whole.": _ramp_that_climbs_back,
            "it reaches alpha_min in the middle and stays there. It should reach it at the very end.": _ramp_that_waits,
            "both sub-layers of a block have one factor in yours. The ramp falls within a block, too.": lambda depth, alpha_min: (
                _ramp_by_block_twice(depth + 1, alpha_min)
            ),
            "the block in the middle is missing: depth does not count it.": lambda depth, alpha_min: (
                _ramp(depth, alpha_min)
            ),
            "the last factor is above alpha_min. How many steps lie between n factors?": lambda depth, alpha_min: (
                _ramp(depth + 1, alpha_min, last=0)
            ),
        },
        cases=((4, 0.234), (2, 0.5), (12, 0.62)),
    ),
    "ex-11-4": Exercise(
        solution=_fold_join,
        mistakes={
            "your tap became quieter. In the plain net all states are larger, and late ones most.": partial(_fold_join, parts=(0, -1, 1)),
            "weights are right. The bias is added in the decayed net's units, too.": partial(_fold_join, parts=(0, 1, 0)),
            "the wrong half: the first D columns read the stream, the others the tap.": partial(_fold_join, parts=(1, 0, 1)),
            "both halves are scaled. The stream is in the right units already.": partial(_fold_join, parts=(1, 1, 1)),
            "the join comes before its block: the factors of that block have not acted on the stream yet.": partial(_fold_join, block=1),
            "join 0 takes the tap that was put down last. Yours takes the first.": lambda weight, bias, alphas, k: (
                _fold_join(weight, bias, alphas, k, tap=k + 1)
            ),
            "you multiplied the bias by the share instead of dividing by it.": partial(_fold_join, parts=(0, 1, -1)),
        },
        cases=(_join_case(0, 2, 0), _join_case(1, 3, 2), _join_case(2, 3, 0)),
    ),
    "ex-11-5": Exercise(
        solution=0.3819,
        mistakes={
            "that is the ramp over all 13 blocks, with the middle somewhere on the way.": 0.6191,
            "the six in blocks alone. The middle block shall be decayed, too.": 0.3141,
            "you counted seven factors. Seven blocks have fourteen.": 0.0979,
            "that puts 1e-3 behind the middle. The exercise asks for the centre of the window.": 0.2998,
            "that puts 1e-2 behind the middle. The exercise asks for the centre of the window.": 0.4763,
        },
        tolerance=2e-3,
    ),
}  # fmt: skip


# ---- Chapter 12 ------------------------------------------------------------------------------


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _cross(cov_a: Tensor, cov_b: Tensor) -> Tensor:
    return torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()


def _fd(
    mean_a: Tensor,
    cov_a: Tensor,
    mean_b: Tensor,
    cov_b: Tensor,
    cross: Any = _cross,
    power: int = 2,
) -> Tensor:
    far = ((mean_a - mean_b) ** 2).sum() ** (power / 2)
    return far + (cov_a + cov_b).trace() - 2 * cross(cov_a, cov_b)


def _balls(
    a: Tensor, b: Tensor, k: int, own: int = 1, of_a: bool = True, asked_b: bool = False
) -> Tensor:
    """Share of b in a ball around a; or of a whose ball is reached (the parts of mistakes)."""
    reach = torch.cdist(a, a if of_a else b).kthvalue(k + own).values
    inside = torch.cdist(b, a) <= reach
    return inside.any(0 if asked_b else 1).double().mean()


def _two_shares(real: Tensor, made: Tensor, k: int, **change: Any) -> tuple[Tensor, Tensor]:
    return _balls(real, made, k, **change), _balls(made, real, k, **change)


def _normal_case(seed: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, width, 2 * width, generator=g, dtype=torch.float64)
    means = torch.randn(2, width, generator=g, dtype=torch.float64)
    return means[0], a @ a.T / width, means[1], b @ b.T / width


def _two_clouds(seed: int, n: int, m: int, k: int) -> tuple[Tensor, Tensor, int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=g), 0.5 + 0.6 * torch.randn(m, 2, generator=g), k


CHAPTER_12: dict[str, Exercise] = {
    "ex-12-1": Exercise(
        solution=30.0,
        mistakes={
            "the distance of the means enters squared: 25, not 5.": 10.0,
            "that is the part of the means. The spreads differ too.": 25.0,
            "that is the part of the spreads. The means differ too.": 5.0,
            "you subtracted variances. Deviations are compared: their roots.": 98.0,
            "that is the root. FD is a squared distance and stays one.": 30.0**0.5,
            "2 and 1 are differences of deviations. Square each, then add.": 28.0,
        },
        tolerance=1e-3,
    ),
    "ex-12-2": Exercise(
        solution=(0.10, 50_000),
        mistakes={
            "right limit. The bias is 500/n: when is that 0.01?": (0.10, 500),
            "right limit; you are out by a factor of ten. Solve c/n = 0.01.": (0.10, 5_000),
            "two equations: FD(500) = limit + c/500, FD(2000) = limit + c/2000. Subtract them.": (0.35, 50_000),
            "right limit. From 10 000 on the excess is at most 0.05.": (0.10, 10_000),
            "the bias falls as 1/n, not as 1/sqrt(n).": (-0.40, 50_000),
        },
        tolerance=1e-3,
    ),
    "ex-12-3": Exercise(
        solution=_fd,
        mistakes={
            "the root is taken number by number. It has to be the root of the matrix.": partial(_fd, cross=lambda a, b: (a @ b).abs().sqrt().trace()),
            "you multiply the two roots. That is the root of the product only if the matrices commute.": partial(_fd, cross=lambda a, b: (_root(a) @ _root(b)).trace()),
            "no root at all: eigenvalues of the product are squares of what is summed.": partial(_fd, cross=lambda a, b: (a @ b).trace()),
            "that is the root of the sum. The product belongs under it.": partial(_fd, cross=lambda a, b: _root(a + b).trace()),
            "only the diagonals enter in yours. Correlated features are then the same as others.": partial(_fd, cross=lambda a, b: (a.diagonal() * b.diagonal()).sqrt().sum()),
            "the spreads are right. The distance of the means enters squared.": partial(_fd, power=1),
        },
        cases=(_normal_case(0, 2), _normal_case(1, 4)),
    ),
    "ex-12-4": Exercise(
        solution=_two_shares,
        mistakes={
            "you have the two the wrong way round: precision is about the made points.": lambda real, made, k: (
                _two_shares(made, real, k)
            ),
            "a point is its own nearest neighbour: your balls reach the neighbour before the k-th.": partial(
                _two_shares, own=0
            ),
            "your balls reach into the other cloud. A ball is measured in its own.": partial(
                _two_shares, own=0, of_a=False
            ),
            "you count balls that hold a point. Count the points that lie in a ball.": partial(
                _two_shares, asked_b=True
            ),
            "precision is right; the other one is coverage. Recall has balls around made points.": lambda real, made, k: (
                _balls(real, made, k), _balls(real, made, k, asked_b=True)
            ),
        },
        cases=(_two_clouds(0, 40, 30, 3), _two_clouds(1, 25, 50, 2)),
    ),
    "ex-12-5": Exercise(
        solution=(2.0, 1.0),
        mistakes={
            "you have the two the wrong way round.": (1.0, 2.0),
            "right for FD. Recall has fallen below 0.9 there.": (2.0, 2.0),
            "right for FD. A larger w still has a recall above 0.9.": (2.0, 0.0),
            "precision and agreement change no more there. Where is FD lowest?": (6.0, 1.0),
            "at w = 1 nothing is guided. FD still falls behind it.": (1.0, 1.0),
        },
        tolerance=1e-3,
    ),
    "ex-12-6": Exercise(
        solution=("copies", "classes", "guidance", "blurred"),
        mistakes={
            "recall 0.00 means balls without size: points on top of each other. Which illness makes those?": ("classes", "copies", "guidance", "blurred"),
            "a density above 1 says that all crowd in the middle of the real cloud. Blur leaves the cloud.": ("copies", "classes", "blurred", "guidance"),
            "guidance leaves out no class: it makes each of them narrower. Whose density is 1, as if drawn from real?": ("copies", "guidance", "classes", "blurred"),
            "noise is not among the four. What else takes digits out of the cloud?": ("copies", "classes", "guidance", "noise"),
        },
    ),
    "ex-12-7": Exercise(
        solution=("samples", "nearest", "seeds"),
        mistakes={
            "seeds are missing in the third. In the first, look at the two numbers behind @.": ("seeds", "nearest", "samples"),
            "the floor is there: it is the FD of fresh images. Who can be nearer than they?": ("samples", "floor", "seeds"),
            "a second judge never harms. But what is the *first* thing to ask of one training run?": ("samples", "nearest", "judge"),
            "the first compares two values of n. That comes before all else.": ("floor", "nearest", "seeds"),
        },
    ),
}  # fmt: skip


EXERCISES: dict[str, Exercise] = {
    **CHAPTER_1,
    **CHAPTER_2,
    **CHAPTER_3,
    **CHAPTER_4,
    **CHAPTER_5,
    **CHAPTER_6,
    **CHAPTER_7,
    **CHAPTER_8,
    **CHAPTER_9,
    **CHAPTER_10,
    **CHAPTER_11,
    **CHAPTER_12,
}
