"""Shortcut rules, alpha schedules and path masks against sheet D (1.1 to 1.6) and sheet R."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mini_resdecay.shortcuts import (
    SHORTCUTS,
    Residual,
    alpha_schedule,
    effective_alpha,
    path_mask,
    paths,
    suggest_alpha_min,
)

TABLE = {  # decay sheet 1.2, alpha_min = 0.6
    4: "1.000000 .942857 .885714 .828571 .771429 .714286 .657143 .600000",
    6: "1.000000 .963636 .927273 .890909 .854545 .818182 .781818 .745455 .709091 .672727 "
    ".636364 .600000",
    12: "1.000000 .982609 .965217 .947826 .930435 .913043 .895652 .878261 .860870 .843478 "
    ".826087 .808696 .791304 .773913 .756522 .739130 .721739 .704348 .686957 .669565 .652174 "
    ".634783 .617391 .600000",
}
PRODUCTS = {4: 0.1503308887, 6: 0.05908313627, 8: 0.02320662298, 12: 0.003578201702}
SOLVED = {  # depth: alpha_min for a product of 1e-3, 10^-2.5, 1e-2
    2: (0.0045, 0.0138, 0.0408),
    3: (0.0226, 0.0583, 0.1286),
    4: (0.0770, 0.1433, 0.2383),
    6: (0.2312, 0.3141, 0.4129),
    8: (0.3593, 0.4387, 0.5280),
    10: (0.4549, 0.5274, 0.6067),
    12: (0.5270, 0.5927, 0.6633),
    16: (0.6270, 0.6815, 0.7389),
    24: (0.7388, 0.7788, 0.8201),
    28: (0.7729, 0.8082, 0.8444),
    32: (0.7992, 0.8307, 0.8629),
}


def stack(depth: int = 6, dim: int = 6, seed: int = 0, rules: list | None = None) -> nn.Module:
    """`depth` residual blocks with tanh branches, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(
            Residual(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()), rule=rules and rules[i])
            for i in range(depth)
        )
    ).double()


def points(n: int = 5, dim: int = 6, seed: int = 7, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=dtype)


def graph(tensor: torch.Tensor) -> list[str]:
    """Names of the autograd nodes behind a tensor, depth first."""
    names, todo = [], [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.append(type(node).__name__)
            todo.extend(parent for parent, _ in node.next_functions)
    return names


# --- alpha schedules ---------------------------------------------------------------------------


@pytest.mark.parametrize("depth", TABLE)
def test_D01_alpha_table(depth):
    expected = [float(word) for word in TABLE[depth].split()]
    assert alpha_schedule(depth, 0.6) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("depth", PRODUCTS)
def test_D01_products(depth):
    assert effective_alpha(alpha_schedule(depth, 0.6)) == pytest.approx(PRODUCTS[depth], rel=1e-9)


def test_D01_depth_24_product():
    assert effective_alpha(alpha_schedule(24, 0.6)) == pytest.approx(1.310287e-5, rel=1e-6)


@pytest.mark.parametrize(("depth", "product"), [(6, 0.0557966707), (12, 0.0031643191)])
def test_D01_cosine_products(depth, product):
    alphas = alpha_schedule(depth, 0.6, kind="cosine")
    assert effective_alpha(alphas) == pytest.approx(product, abs=1e-10)


@pytest.mark.parametrize(("depth", "alpha"), [(4, 0.789098), (6, 0.789991), (12, 0.790805)])
def test_D01_constant_with_the_same_product(depth, alpha):
    ramp = effective_alpha(alpha_schedule(depth, 0.6))
    assert effective_alpha([alpha] * (2 * depth)) == pytest.approx(ramp, rel=2e-5)


@pytest.mark.parametrize(
    ("depth", "alpha_min", "product"),
    [
        (12, 0.4, 8.18e-5), (12, 0.5, 6.08e-4), (12, 0.6, 3.58e-3), (12, 0.7, 1.76e-2),
        (12, 0.8, 7.56e-2), (28, 0.8, 2.43e-3), (28, 0.7, 8.2e-5), (13, 0.6, 2.24e-3),
        (13, 0.7, 1.26e-2), (13, 0.8, 6.1e-2),
    ],
)  # fmt: skip
def test_D01_products_of_the_papers_settings(depth, alpha_min, product):
    assert effective_alpha(alpha_schedule(depth, alpha_min)) == pytest.approx(product, rel=6e-3)


def test_one_factor_a_block_ends_at_alpha_min():
    assert alpha_schedule(5, 0.6, per="block") == pytest.approx((1, 0.9, 0.8, 0.7, 0.6), abs=1e-12)
    assert alpha_schedule(1, 0.6, per="block") == (1.0,)
    assert alpha_schedule(1, 0.6) == pytest.approx((1.0, 0.6))


@given(
    depth=st.integers(1, 40),
    alpha_min=st.floats(1e-3, 1.0),
    kind=st.sampled_from(["linear", "cosine"]),
    per=st.sampled_from(["sublayer", "block"]),
)
@settings(max_examples=80, deadline=None)
def test_alpha_schedule_falls_from_one_to_alpha_min(depth, alpha_min, kind, per):
    alphas = alpha_schedule(depth, alpha_min, kind=kind, per=per)
    assert isinstance(alphas, tuple)
    assert len(alphas) == (2 * depth if per == "sublayer" else depth)
    assert alphas[0] == 1.0
    if len(alphas) > 1:
        assert alphas[-1] == pytest.approx(alpha_min, abs=1e-15)
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(alphas))
    assert min(alphas) > 0 and max(alphas) <= 1


@given(alphas=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_effective_alpha_is_the_product(alphas):
    expected = math.exp(math.fsum(math.log(a) for a in alphas))
    assert effective_alpha(alphas) == pytest.approx(expected, rel=1e-12)


@given(depth=st.integers(2, 40), alpha_min=st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_decay_is_linear_and_cosine_is_symmetric_about_the_middle(depth, alpha_min):
    linear = alpha_schedule(depth, alpha_min)
    steps = [b - a for a, b in itertools.pairwise(linear)]
    assert steps == pytest.approx([steps[0]] * len(steps), abs=1e-12)
    cosine = alpha_schedule(depth, alpha_min, kind="cosine")
    sums = [a + b for a, b in zip(cosine, reversed(cosine), strict=True)]
    assert sums == pytest.approx([1 + alpha_min] * len(sums), abs=1e-12)


@pytest.mark.parametrize("depth", SOLVED)
def test_D02_alpha_min_for_a_wanted_product(depth):
    for target, expected in zip((1e-3, 10**-2.5, 1e-2), SOLVED[depth], strict=True):
        assert suggest_alpha_min(depth, target) == pytest.approx(expected, abs=5.1e-5)
    assert suggest_alpha_min(depth) == suggest_alpha_min(depth, 10**-2.5)


@given(
    depth=st.integers(2, 40),
    target=st.floats(1e-4, 0.9),
    kind=st.sampled_from(["linear", "cosine"]),
    per=st.sampled_from(["sublayer", "block"]),
)
@settings(max_examples=60, deadline=None)
def test_D02_solver_round_trip(depth, target, kind, per):
    alpha_min = suggest_alpha_min(depth, target, kind=kind, per=per)
    alphas = alpha_schedule(depth, alpha_min, kind=kind, per=per)
    assert effective_alpha(alphas) == pytest.approx(target, rel=1e-6)


@pytest.mark.parametrize("depth", [0, -3])
def test_depth_below_one_is_an_error(depth):
    with pytest.raises(ValueError, match=rf"depth must be at least 1, got {depth}"):
        alpha_schedule(depth, 0.6)
    with pytest.raises(ValueError, match="depth"):
        suggest_alpha_min(depth)


@pytest.mark.parametrize("alpha_min", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_alpha_outside_its_range_is_an_error(alpha_min):
    with pytest.raises(ValueError, match=rf"alpha_min must .*\(0, 1\].*{alpha_min}"):
        alpha_schedule(4, alpha_min)
    with pytest.raises(ValueError, match=rf"alpha must .*\(0, 1\].*{alpha_min}"):
        SHORTCUTS["decay"](alpha_min)


def test_unknown_schedule_names_are_errors_that_suggest():
    with pytest.raises(ValueError, match=r'kind .*"cosin".*did you mean "cosine"'):
        alpha_schedule(4, 0.6, kind="cosin")
    with pytest.raises(ValueError, match=r'per .*"blocks".*did you mean "block"'):
        alpha_schedule(4, 0.6, per="blocks")


@pytest.mark.parametrize("target", [0.0, -1.0, 1.1, math.nan])
def test_impossible_target_is_an_error(target):
    with pytest.raises(ValueError, match=f"target .*{target}"):
        suggest_alpha_min(4, target)


def test_one_factor_alone_cannot_reach_a_target():
    with pytest.raises(ValueError, match="depth must be at least 2"):
        suggest_alpha_min(1, 0.5, per="block")


# --- Residual and its rules --------------------------------------------------------------------


def test_plain_rule_is_bitwise_the_formula():
    torch.manual_seed(0)
    branch, norm, x = nn.Linear(6, 6), nn.LayerNorm(6), points(dtype=torch.float32)
    assert torch.equal(Residual(branch, norm)(x), x + branch(norm(x)))
    assert torch.equal(Residual(branch)(x), x + branch(x))
    assert torch.equal(Residual(branch, norm, SHORTCUTS["plain"]())(x), x + branch(norm(x)))


def test_plain_graph_is_exactly_add_branch_norm():
    branch, norm, x = nn.Linear(6, 6), nn.LayerNorm(6), points(dtype=torch.float32)
    x.requires_grad_()
    assert graph(Residual(branch, norm)(x)) == graph(x + branch(norm(x)))


def test_decay_of_one_is_plain_values_and_graph():
    torch.manual_seed(0)
    branch, norm, x = nn.Linear(6, 6), nn.LayerNorm(6), points(dtype=torch.float32)
    x.requires_grad_()
    plain, decay = Residual(branch, norm), Residual(branch, norm, SHORTCUTS["decay"](1.0))
    assert torch.equal(plain(x), decay(x))
    assert graph(plain(x)) == graph(decay(x))
    assert "MulBackward0" in graph(Residual(branch, norm, SHORTCUTS["decay"](0.5))(x))


def test_rules_are_their_formulas():
    torch.manual_seed(0)
    branch, norm, x = nn.Linear(6, 6), nn.LayerNorm(6), points(dtype=torch.float32)
    decayed = Residual(branch, norm, SHORTCUTS["decay"](0.7))(x)
    assert torch.equal(decayed, 0.7 * x + branch(norm(x)))
    post = Residual(branch, norm, SHORTCUTS["post-norm"]())(x)
    assert torch.equal(post, norm(x + branch(x)))


def test_every_registered_rule_is_a_module_called_with_x_branch_norm():
    x, seen = points(), []
    for name, rule in SHORTCUTS.items():
        assert issubclass(rule, nn.Module), name
        y = rule()(x, lambda z: seen.append(z.shape) or z.tanh(), nn.Identity())
        assert y.shape == x.shape and y.isfinite().all(), name
    assert len(seen) == len(SHORTCUTS)


def test_a_readers_own_rule_fits():
    class Half(nn.Module):
        def forward(self, x, branch, norm):
            return 0.5 * (x + branch(norm(x)))

    branch, x = nn.Linear(6, 6).double(), points()
    assert torch.equal(Residual(branch, rule=Half())(x), 0.5 * (x + branch(x)))


@pytest.mark.parametrize("name", ["plain", "decay", "post-norm"])
def test_further_arguments_reach_the_branch(name):
    class Scaled(nn.Module):
        def forward(self, x, factor, shift=0.0):
            return factor * x + shift

    x = points()
    block = Residual(Scaled(), rule=SHORTCUTS[name]())
    assert torch.equal(block(x, 3.0, shift=1.0), x + (3.0 * x + 1.0))
    with path_mask(block, [0.5]):
        assert torch.allclose(block(x, 3.0, shift=1.0), x + 0.5 * (3.0 * x + 1.0), atol=1e-15)


def test_norm_and_rule_are_found_as_parameters_and_modules():
    block = Residual(nn.Linear(6, 6), nn.LayerNorm(6))
    assert sum(p.numel() for p in block.parameters()) == 42 + 12


# --- decay: gradients and unrolling ------------------------------------------------------------


def decayed(depth: int, alpha_min: float, dim: int = 6) -> tuple[nn.Module, tuple[float, ...]]:
    alphas = alpha_schedule(depth, alpha_min)
    rules = [SHORTCUTS["decay"](alpha) for alpha in alphas]
    return stack(len(alphas), dim, rules=rules), alphas


@pytest.mark.parametrize(
    ("depth", "ratios"),
    [
        (4, (0.150331, 0.217259, 1.0)),
        (12, (0.003578, 0.003980, 0.005956, 0.012279, 0.035858, 0.153356, 1.0)),
    ],
)
def test_D05_gradient_products_with_zero_branches(depth, ratios):
    net, alphas = decayed(depth, 0.6)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    states = [points().requires_grad_()]
    for block in net:
        states.append(block(states[-1]))
        states[-1].retain_grad()
    upstream = points(seed=8)
    states[-1].backward(upstream)
    for k, expected in zip(range(0, 2 * depth + 1, 4), ratios, strict=True):
        product = math.prod(alphas[k:])
        assert product == pytest.approx(expected, abs=1e-6)
        assert torch.allclose(states[k].grad, product * upstream, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("depth", "weights"),
    [
        (4, ".150331 .150331 .159442 .180015 .217259 .281633 .394286 .6 1"),
        (6, ".059083 .059083 .061313 .066122 .074218 .086851 .106151 .135775 .182137 .256860 "
            ".381818 .6 1"),
    ],
)  # fmt: skip
def test_D06_unrolled_identity(depth, weights):
    net, _ = decayed(depth, 0.6)
    table = [float(word) for word in weights.split()]
    state = points()
    terms = [state]
    for block in net:
        terms.append(block.branch(state))
        state = block(state)
    total = sum(w * term for w, term in zip(table, terms, strict=True))
    assert torch.allclose(state, total, atol=1e-5)  # the table has six decimals


@given(alphas=st.lists(st.floats(0.2, 1.0), min_size=1, max_size=10), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_D06_unrolled_identity_for_any_factors(alphas, seed):
    rules = [SHORTCUTS["decay"](alpha) for alpha in alphas]
    net, state = stack(len(alphas), seed=seed, rules=rules), points(seed=seed)
    total = math.prod(alphas) * state
    for k, block in enumerate(net):
        total = total + math.prod(alphas[k + 1 :]) * block.branch(state)
        state = block(state)
    assert torch.allclose(state, total, rtol=0, atol=1e-12)


def test_D03_gain_equivalence_forward():
    """A decayed pre-norm net is a plain one with rising branch gains (sheet D 1.4)."""
    dim, eps, alphas = 64, 1e-6, alpha_schedule(6, 0.6)
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(dim, dim), nn.Tanh()).double() for _ in alphas]
    x = y = points(17, dim)
    kept = 1.0  # product of the factors so far
    for alpha, branch in zip(alphas, branches, strict=True):
        norm = nn.LayerNorm(dim, eps=eps).double()
        x = Residual(branch, norm, SHORTCUTS["decay"](alpha))(x)
        rescaled = nn.LayerNorm(dim, eps=eps / kept**2).double()
        kept *= alpha
        with path_mask(block := Residual(branch, rescaled), [1 / kept]):
            y = block(y)
        assert torch.allclose(x, kept * y, rtol=1e-12, atol=1e-12)
    assert 1 / kept == pytest.approx(16.925303, abs=1e-6)


# --- path masks --------------------------------------------------------------------------------


def test_paths_are_in_module_order():
    net = stack(4)
    assert paths(net) == list(net)
    assert paths(nn.Linear(2, 2)) == []
    assert paths(net[0]) == [net[0]]


def test_R25_dropped_blocks_get_gradients_of_exact_zero():
    net, x, mask = stack(), points(), torch.tensor([0.0, 0, 1, 0, 1, 1])
    with path_mask(net, mask):
        net(x).square().sum().backward()
    for block, kept in zip(paths(net), mask, strict=True):
        for parameter in block.parameters():
            assert parameter.grad is not None
            assert torch.count_nonzero(parameter.grad).item() == 0 or kept == 1
            assert kept == 0 or parameter.grad.norm() > 0


def test_dropped_blocks_leave_the_state_bitwise_alone():
    net, x = stack(), points()
    with path_mask(net, torch.zeros(6)):
        assert torch.equal(net(x), x)
    with path_mask(net, [0, 0, 0, 0, 0, 1]):
        assert torch.equal(net(x), net[5](x))


def test_mask_multiplies_branch_outputs():
    net, x, mask = stack(3), points(), [0.5, 2.0, -1.0]
    expected = x
    for block, m in zip(net, mask, strict=True):
        expected = expected + m * block.branch(expected)
    with path_mask(net, mask):
        assert torch.allclose(net(x), expected, rtol=0, atol=1e-14)


def test_R40_no_mask_is_bitwise_a_mask_of_ones():
    net, x = stack().float(), points(dtype=torch.float32)
    bare = net(x)
    with path_mask(net, torch.ones(6)):
        assert torch.equal(net(x), bare)
    assert torch.equal(net(x), bare) and torch.equal(net(x), bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.bool, torch.int64])
def test_mask_does_not_change_the_dtype(dtype, mask_dtype):
    net, x = stack(2).to(dtype), points(dtype=torch.float64).to(dtype)
    with path_mask(net, torch.tensor([1, 0]).to(mask_dtype)):
        assert net(x).dtype == dtype


def test_R40_model_is_restored_after_an_exception():
    net, x = stack(), points()
    bare = net(x)
    with pytest.raises(RuntimeError, match="inside"), path_mask(net, torch.zeros(6)):
        raise RuntimeError("inside")
    assert torch.equal(net(x), bare)


def test_nested_masks_restore_the_outer_one():
    net, x = stack(2), points()
    with path_mask(net, [1.0, 0.0]):
        outer = net(x)
        with path_mask(net, [0.0, 0.0]):
            assert torch.equal(net(x), x)
        assert torch.equal(net(x), outer)
        assert torch.equal(outer, net[0](x))
    assert not torch.equal(net(x), outer)


@pytest.mark.parametrize("shape", [(5,), (7,), (1, 6), ()])
def test_wrong_mask_length_is_an_error_and_changes_nothing(shape):
    net, x, mask = stack(), points(), torch.ones(shape)
    bare = net(x)
    with pytest.raises(ValueError, match=r"mask must .*6 .*got"), path_mask(net, mask):
        pass
    assert torch.equal(net(x), bare)


def test_mask_entries_with_axes_of_their_own_are_masks_by_sample():
    net, x = stack(2), points(3)
    mask = torch.tensor([[1.0, 0, 1], [0, 0, 1]], dtype=torch.float64)[:, :, None]
    with path_mask(net, mask):
        out = net(x)
    assert torch.allclose(out[0], net[0](x[0]), rtol=0, atol=1e-14)
    assert torch.equal(out[1], x[1])
    assert torch.allclose(out[2], net(x[2]), rtol=0, atol=1e-14)


# --- path masks that skip ----------------------------------------------------------------------


class Counted(nn.Module):
    """A branch that counts its calls."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.calls = branch, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.branch(x)


def ruled(name: str, depth: int = 4, dim: int = 6) -> nn.Module:
    """`depth` counted tanh blocks with a norm under one rule."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            Residual(
                Counted(nn.Sequential(nn.Linear(dim, dim), nn.Tanh())),
                nn.LayerNorm(dim),
                SHORTCUTS[name](0.7) if name == "decay" else SHORTCUTS[name](),
            )
            for _ in range(depth)
        )
    ).double()


@pytest.mark.parametrize("name", SHORTCUTS)
@pytest.mark.parametrize("mask", [[0, 2, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0.5, -1, 2]])
def test_skipping_gives_what_the_mask_gives_and_runs_less(name, mask):
    net, x = ruled(name), points()
    with path_mask(net, mask):
        masked = net(x)
    calls = [block.branch.calls for block in net]
    with path_mask(net, mask, skip=True):
        skipped = net(x)
    assert skipped.shape == masked.shape and skipped.dtype == masked.dtype
    assert torch.allclose(skipped, masked, rtol=0, atol=1e-14)
    more = [block.branch.calls - before for block, before in zip(net, calls, strict=True)]
    assert calls == [1] * 4 and more == [int(m != 0) for m in mask]


@pytest.mark.parametrize("name", ["plain", "decay", "post-norm"])
def test_skipping_leaves_gradients_of_the_kept_as_they_are(name):
    net, x, grads = ruled(name), points(), []
    for skip in (False, True):
        net.zero_grad()
        with path_mask(net, [0, 2, 0, 1], skip=skip):
            net(x).square().sum().backward()
        grads.append([[p.grad for p in block.branch.parameters()] for block in net])
    for masked, skipped, kept in zip(*grads, [0, 1, 0, 1], strict=True):
        for a, b in zip(masked, skipped, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-14) if kept else (b is None and not a.any())


def test_skipping_does_not_change_the_dtype():
    net, x = stack(2).float(), points(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for mask in ([0, 1], [1, 0], [0, 0]):
            with path_mask(net, mask):
                expected = net(x).dtype
            with path_mask(net, mask, skip=True):
                assert net(x).dtype == expected


def test_skipping_ends_with_the_block_after_an_error_too():
    net, x = stack(3), points()
    bare = net(x)
    with path_mask(net, [0, 0, 1], skip=True):
        assert torch.equal(net(x), net[2](x))
    assert torch.equal(net(x), bare)
    with pytest.raises(RuntimeError, match="inside"), path_mask(net, [0, 1, 1], skip=True):
        raise RuntimeError("inside")
    assert torch.equal(net(x), bare)
    assert not any(block.skipped for block in net)


def test_a_mask_inside_a_skip_runs_its_branches_and_gives_the_skip_back():
    net, x = stack(2), points()
    with path_mask(net, [0, 1], skip=True):
        outer = net(x)
        with path_mask(net, [1, 0]):
            assert torch.equal(net(x), net[0](x))
        with path_mask(net, [1, 1]):
            inner = net(x)
        assert torch.equal(net(x), outer)
    assert torch.equal(net(x), inner)


def test_a_wrong_mask_skips_nothing():
    net, x = stack(), points()
    bare = net(x)
    with pytest.raises(ValueError, match="mask must"), path_mask(net, [0.0] * 5, skip=True):
        pass
    assert torch.equal(net(x), bare)


def test_skipping_by_sample_runs_a_branch_that_any_sample_keeps():
    net, x = ruled("plain", 3), points(3)
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.float64)[:, :, None]
    with path_mask(net, mask, skip=True):
        out = net(x)
    assert [block.branch.calls for block in net] == [1, 0, 1]
    assert torch.allclose(out[0], net[0](x[0]), rtol=0, atol=1e-14)
    assert torch.equal(out[1], x[1])
    assert torch.allclose(out[2], net[2](x[2]), rtol=0, atol=1e-14)


def test_mask_is_in_no_state_dict():
    net = stack(2)
    names = list(net.state_dict())
    with path_mask(net, [1.0, 0.0]):
        assert list(net.state_dict()) == names
    assert not [name for name in names if "mask" in name]
    stack(2, seed=1).load_state_dict(net.state_dict())  # strict


def test_masks_of_two_nets_do_not_meet():
    one, two, x = stack(seed=0), stack(seed=1), points()
    bare = two(x)
    with path_mask(one, torch.zeros(6)):
        assert torch.equal(two(x), bare)


def linear_branches(depth: int, dim: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(nn.Linear(dim, dim)) for _ in range(depth))).double()


def expected_output(net: nn.Module, x: torch.Tensor, p: float, scale: float) -> torch.Tensor:
    """Mean output over all masks, each weighted by its probability."""
    total, depth = torch.zeros_like(x), len(paths(net))
    for bits in itertools.product([0.0, 1.0], repeat=depth):
        kept = sum(bits)
        with path_mask(net, scale * torch.tensor(bits, dtype=torch.float64)):
            total = total + (1 - p) ** kept * p ** (depth - kept) * net(x)
    return total.detach()


def test_R31_expectation_over_masks_for_linear_branches():
    net, x, p = linear_branches(3, 4), points(dim=4), 0.3
    assert torch.allclose(expected_output(net, x, p, 1 / (1 - p)), net(x), rtol=0, atol=1e-12)
    with path_mask(net, [0.7] * 3):  # Huang's rule at test time
        scaled = net(x)
    assert torch.allclose(expected_output(net, x, p, 1.0), scaled, rtol=0, atol=1e-12)


def test_R31_expectation_fails_for_tanh():
    net = nn.Sequential(Residual(nn.Tanh()), Residual(nn.Tanh()))
    x = torch.ones(1, 1, dtype=torch.float64)
    assert expected_output(net, x, 0.5, 2.0).item() == pytest.approx(2.636000, abs=1e-6)
    assert net(x).item() == pytest.approx(2.704275, abs=1e-6)


def compiled_frames(net: nn.Module, x: torch.Tensor, masks: list[torch.Tensor]) -> int:
    """How many graphs `torch.compile` makes for these masks; outputs are compared on the way."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(net, backend=counter)
    for mask in masks:
        with path_mask(net, mask):
            assert torch.allclose(fast(x), net(x), atol=1e-6)
    return counter.frame_count


def test_R36_four_masks_one_compiled_graph():
    dynamo_testing = pytest.importorskip("torch._dynamo.testing", reason="no torch.compile here")
    assert dynamo_testing is not None
    net, x = stack(3).float(), points(dtype=torch.float32)
    masks = [torch.tensor(m) for m in ([1.0, 1, 1], [0.0, 1, 1], [1.0, 0, 1], [0.0, 0, 0])]
    assert compiled_frames(net, x, masks) == 1
