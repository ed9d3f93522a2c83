"""Shortcut rules, alpha schedules and path masks against sheet D (1.1 to 1.6) and sheet R."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from mini_resdecay.shortcuts import (
    SHORTCUTS,
    Residual,
    alpha_schedule,
    branch_gains,
    decay_groups,
    effective_alpha,
    fold_gains,
    gain_groups,
    output_projections,
    path_mask,
    paths,
    rescale_norms,
    restoring,
    suggest_alpha_min,
)
from mini_resdecay.vit import Classifier, ViT

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


def tiny(depth: int, shortcut: str = "plain", alpha_min: float = 1.0, **changes) -> ViT:
    """A ViT in float64 on 8 x 8 images; branches are silent at first unless told otherwise."""
    torch.manual_seed(0)
    sizes = {"zero_init": True, "final_norm": False} | changes
    return ViT(8, 2, 16, depth, 4, shortcut=shortcut, alpha_min=alpha_min, **sizes).double()


def pictures(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)


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
    alphas = alpha_schedule(depth, 0.6, kind="constant")
    assert alphas == pytest.approx([alpha] * (2 * depth), abs=1e-6)
    assert effective_alpha(alphas) == pytest.approx(PRODUCTS[depth], rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "product", "decayed"), [("attention", 0.0684, 0), ("mlp", 0.0523, 1)]
)
def test_D01_one_kind_of_sub_layer_alone(kind, product, decayed):
    alphas = alpha_schedule(12, 0.6, kind=kind)
    assert effective_alpha(alphas) == pytest.approx(product, abs=5e-5)
    ramp = [float(word) for word in TABLE[12].split()]
    assert alphas[decayed::2] == pytest.approx(ramp[decayed::2], abs=1e-6)
    assert alphas[1 - decayed :: 2] == (1.0,) * 12


def test_D01_one_kind_of_sub_layer_needs_sub_layers():
    with pytest.raises(ValueError, match='per must be "sublayer" for kind="mlp", got "block"'):
        alpha_schedule(4, 0.6, kind="mlp", per="block")


def test_D01_the_form_without_a_dial_keeps_a_share_of_2_to_the_minus_12():
    vit, images = tiny(12, shortcut="scaled-sum"), pictures(0)
    assert torch.allclose(vit(images), 2.0**-12 * vit.stem(images), rtol=1e-12, atol=0)


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
    kind=st.sampled_from(["linear", "cosine", "constant"]),
    per=st.sampled_from(["sublayer", "block"]),
)
@settings(max_examples=60, deadline=None)
def test_D02_solver_round_trip(depth, target, kind, per):
    alpha_min = suggest_alpha_min(depth, target, kind=kind, per=per)
    alphas = alpha_schedule(depth, alpha_min, kind=kind, per=per)
    assert effective_alpha(alphas) == pytest.approx(target, rel=1e-6)


@pytest.mark.parametrize("depth", [0, -3, 4.5, "4"])
def test_depth_below_one_or_not_whole_is_an_error(depth):
    told = f"depth must be a whole number, at least 1, got {depth!r}"
    with pytest.raises(ValueError, match=told):
        alpha_schedule(depth, 0.6)
    with pytest.raises(ValueError, match="depth"):
        suggest_alpha_min(depth)


@pytest.mark.parametrize("alpha_min", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_alpha_outside_its_range_is_an_error(alpha_min):
    with pytest.raises(ValueError, match=rf"alpha_min must .*\(0, 1\].*{alpha_min}"):
        alpha_schedule(4, alpha_min)
    for rule in ("decay", "learned", "identity-drop"):
        with pytest.raises(ValueError, match=rf"alpha must .*\(0, 1\].*{alpha_min}"):
            SHORTCUTS[rule](alpha_min)


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


def test_a_product_out_of_reach_is_an_error_that_says_what_is_in_reach():
    # Attention has the factors 1 and 1 - (2/3) (1 - alpha_min) of four.
    with pytest.raises(ValueError, match=r"target must be at least 0.333 here, got 0.1"):
        suggest_alpha_min(2, 0.1, kind="attention")
    assert suggest_alpha_min(2, 0.4, kind="attention") == pytest.approx(0.1)


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
    for name, share_x, share_f in (("scaled-sum", 0.5, 0.5), ("branch-scaled", 1, 0.5)):
        expected = share_x**0.5 * x + share_f**0.5 * branch(norm(x))
        torch.testing.assert_close(Residual(branch, norm, SHORTCUTS[name]())(x), expected)


@pytest.mark.parametrize(("alpha_min", "start"), [(1.0, [1.0] * 4), (0.4, [1.0, 0.8, 0.6, 0.4])])
def test_learned_factors_start_at_one_or_at_the_ramp_and_are_trained(alpha_min, start):
    learned, fixed = tiny(2, "learned", alpha_min), tiny(2, alpha_min=alpha_min)
    alphas = [block.rule.alpha for block in learned.blocks]
    assert [a.item() for a in alphas] == pytest.approx(start, abs=1e-6)
    images = pictures(0)
    torch.testing.assert_close(learned(images), fixed(images), rtol=1e-6, atol=1e-6)
    learned(images).sum().backward()
    assert all(a.grad.abs() > 0 for a in alphas)
    assert not [a for group in decay_groups(learned, 1e-3, 0.1) if group["weight_decay"]
                for a in group["params"] if a.dim() == 0]  # fmt: skip


def test_D20_identity_drop_is_decay_on_average_where_branches_are_linear():
    torch.manual_seed(0)
    alphas, n = (1.0, 0.8, 0.6, 0.4), 100_000
    rules = [SHORTCUTS["identity-drop"](alpha) for alpha in alphas]
    net = nn.Sequential(*(Residual(nn.Linear(3, 3), rule=rule) for rule in rules)).double()
    x = points(1, 3)
    with torch.no_grad():
        out = net(x.expand(n, 3))
        expected = net.eval()(x)
        for block, alpha in zip(net, alphas, strict=True):
            block.rule = SHORTCUTS["decay"](alpha)
        torch.testing.assert_close(expected, net(x), atol=1e-15, rtol=0)
        for block in net:
            block.rule = SHORTCUTS["plain"]()
        plain = net(x)
    error = out.std(0) / n**0.5
    assert ((out.mean(0) - expected[0]).abs() < 4 * error).all()
    assert ((out.mean(0) - plain[0]).abs() > 20 * error).all()
    assert len(out.unique(dim=0)) == 8  # the first factor is 1: nothing to draw


def test_D20_identity_drop_keeps_all_of_a_sample_or_nothing():
    vit, images = tiny(2, "identity-drop", 0.4), pictures(0).repeat(50, 1, 1, 1)
    torch.manual_seed(1)
    x = vit.stem(images)  # branches are silent: what is left of it is 0 or 1
    kept = (vit(images) / x).flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (kept == kept[:, :1]).all()
    assert kept[:, 0].mean().item() == pytest.approx(0.8 * 0.6 * 0.4, abs=0.1)
    assert torch.allclose(vit.eval()(images), 0.8 * 0.6 * 0.4 * x, rtol=1e-12, atol=0)


def test_identity_drop_draws_from_the_global_generator():
    rule, x = SHORTCUTS["identity-drop"](0.5), torch.ones(64, 1)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(rule(x, torch.zeros_like, nn.Identity()))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", ["scaled-sum", "branch-scaled"])
def test_a_rule_without_factors_refuses_alpha_min(name):
    with pytest.raises(ValueError, match=f'alpha_min must be 1 for shortcut="{name}", got 0.5'):
        tiny(2, name, alpha_min=0.5)


def test_the_vit_takes_every_schedule():
    for kind in ("linear", "cosine", "constant", "attention", "mlp"):
        alphas = [block.rule.alpha for block in tiny(3, alpha_min=0.5, kind=kind).blocks]
        assert tuple(alphas) == alpha_schedule(3, 0.5, kind)


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


# --- decay is a gain is a learning rate --------------------------------------------------------

GAINS = {  # decay sheet 1.4, alpha_min = 0.6
    4: {0: 1.0, 1: 1.060606, 2: 1.197458, 3: 1.445208, 4: 1.873418, 5: 2.622786, 6: 3.991196,
        7: 6.651993},
    6: {11: 16.925303},
    12: {12: 4.3367, 18: 28.6965, 23: 279.4700},
}  # fmt: skip


@pytest.mark.parametrize("depth", GAINS)
def test_D03_gains_of_the_sheet(depth):
    gains = branch_gains(alpha_schedule(depth, 0.6))
    assert {k: gains[k] for k in GAINS[depth]} == pytest.approx(GAINS[depth], rel=2e-6, abs=5e-5)


def test_D03_gain_profiles_of_the_other_forms():
    half = 0.5**0.5
    rising = branch_gains([half] * 8, branch=half)
    assert rising == pytest.approx([2 ** (k / 2) for k in range(8)])
    assert branch_gains([1.0] * 8, branch=half) == (half,) * 8


@pytest.mark.parametrize("alpha", [0, -0.5, math.nan, math.inf])
def test_gains_of_impossible_factors_are_an_error(alpha):
    with pytest.raises(ValueError, match=rf"alphas must be above 0 and finite, got .*{alpha}"):
        branch_gains((1, alpha))
    assert branch_gains((2.0, 0.25)) == (0.5, 2.0)  # factors above 1 undo others


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=["f64", "f32"]
)
def test_D03_gain_equivalence_forward(dtype, tolerance):
    """At every sub-layer a decayed net is a plain one with rising branch gains (sheet D 1.4)."""
    alphas = alpha_schedule(6, 0.6)
    start, images = {"zero_init": False}, pictures(0).to(dtype)
    decayed, plain, folded = (tiny(6, alpha_min=a, **start).to(dtype) for a in (0.6, 1, 1))
    rescale_norms(plain, alphas)
    x = y = decayed.stem(images)
    with path_mask(plain, gains := branch_gains(alphas)):
        for one, other, gain in zip(decayed.blocks, plain.blocks, gains, strict=True):
            x, y = one(x), other(y)
            assert ((x - y / gain).norm() / x.norm()).item() < tolerance
    fold_gains(folded, alphas)
    assert ((folded(images) - y).norm() / y.norm()).item() < tolerance


def test_D03_without_rescaled_norms_the_equivalence_is_not_exact():
    decayed, plain = tiny(6, alpha_min=0.6, zero_init=False), tiny(6, zero_init=False)
    gains = branch_gains(alpha_schedule(6, 0.6))
    with path_mask(plain, gains):
        other = plain(pictures(0)) / gains[-1]
    expected = decayed(pictures(0))
    assert 1e-9 < ((expected - other).norm() / expected.norm()).item() < 1e-4


def trained(net, optimizer: str, groups: list, steps: int = 60) -> torch.Tensor:
    """Losses of `steps` steps toward fixed random features; the same batches for every net."""
    rule = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](groups)
    losses = []
    for step in range(steps):
        loss = (net(pictures(step)) - points(16, 16, seed=step)[:, None, None]).square().mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


RATES = {"adamw": (2e-3, 0.05, 1), "sgd": (0.05, 1e-3, 2)}  # lr, weight decay, power of the gains


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("zero_init", [True, False])
def test_D03_decay_is_a_gain_is_a_learning_rate(optimizer, zero_init):
    """60 steps: the same losses by shortcut, by branch gain and by learning rate."""
    (lr, wd, power), alphas = RATES[optimizer], alpha_schedule(4, 0.6)
    start = {"zero_init": zero_init, "final_norm": True}
    decayed, scaled, folded, plain = (tiny(4, alpha_min=a, **start) for a in (0.6, 1, 1, 1))
    expected = trained(decayed, optimizer, decay_groups(decayed, lr, wd))
    rescale_norms(scaled, alphas)
    with path_mask(scaled, branch_gains(alphas)):
        by_gain = trained(scaled, optimizer, decay_groups(scaled, lr, wd))
    fold_gains(folded, alphas)
    by_rate = trained(folded, optimizer, gain_groups(folded, alphas, lr, wd, power=power))
    untouched = trained(plain, optimizer, decay_groups(plain, lr, wd))
    assert torch.allclose(by_gain, expected, rtol=0, atol=1e-13)
    assert torch.allclose(by_rate, expected, rtol=0, atol=1e-13)
    assert (untouched - expected).abs().max() > 1e-2
    assert expected[-1] < expected[0]


def hugging_face() -> ViTModel:
    torch.manual_seed(0)
    shape = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, layer_norm_eps=1e-6,
    )  # fmt: skip
    net = ViTModel(shape, add_pooling_layer=False).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_D03_a_vit_of_hugging_face_follows_its_decayed_self():
    alphas, theirs, folded = alpha_schedule(3, 0.3), hugging_face(), hugging_face()

    def decayed(images):
        x = theirs.embeddings(images)
        for layer, keep, keep_too in zip(theirs.layers, alphas[::2], alphas[1::2], strict=True):
            x = keep * x + layer.attention(layer.layernorm_before(x))[0]
            x = keep_too * x + layer.mlp(layer.layernorm_after(x))
        return theirs.layernorm(x)

    expected = trained(decayed, "adamw", decay_groups(theirs, 2e-3, 0.05))
    fold_gains(folded, alphas)
    groups = gain_groups(folded, alphas, 2e-3, 0.05)
    by_rate = trained(lambda x: folded(x).last_hidden_state, "adamw", groups)
    assert torch.allclose(by_rate, expected, rtol=0, atol=1e-12)


def masked_autoencoder() -> ViTMAEForPreTraining:
    shape = ViTMAEConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, decoder_hidden_size=8, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4, decoder_intermediate_size=32,
    )  # fmt: skip
    return ViTMAEForPreTraining(shape)


def names(net: nn.Module, chosen: list[nn.Parameter]) -> set[str]:
    return {name for name, p in net.named_parameters() if any(p is q for q in chosen)}


def test_gain_groups_of_an_autoencoder_change_its_encoder_alone():
    net, alphas = masked_autoencoder(), alpha_schedule(2, 0.5)
    groups = gain_groups(net, alphas, 1e-3, 0.1, eps=1e-6, within=net.vit)
    rates = {n: g["lr"] / 1e-3 for g in groups for n in names(net, g["params"])}
    raised = {name for name, rate in rates.items() if rate > 1 + 1e-9}
    assert raised == {
        f"vit.layers.{layer}.{kind}"
        for layer, parts in ((0, ["mlp.fc2"]), (1, ["attention.o_proj", "mlp.fc2"]))
        for part in parts
        for kind in (f"{part}.weight", f"{part}.bias")
    }
    weight, bias = (
        next(g for g in groups if f"vit.layers.1.mlp.fc2.{kind}" in names(net, g["params"]))
        for kind in ("weight", "bias")
    )
    gain = 1 / math.prod(alphas)
    assert (weight["lr"], weight["eps"]) == pytest.approx((1e-3 * gain, 1e-6 / gain))
    assert (weight["weight_decay"], bias["weight_decay"]) == pytest.approx((0.1 / gain, 0))
    trained_ones = {n for n, p in net.named_parameters() if p.requires_grad}
    assert set(rates) == trained_ones and "decoder.decoder_pos_embed" not in rates


def test_output_projections_are_found_in_nets_of_all_kinds():
    layer = nn.TransformerEncoderLayer(16, 4, 32, norm_first=True)
    stacked = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    expected = [
        part for block in stacked.layers for part in (block.self_attn.out_proj, block.linear2)
    ]
    assert output_projections(stacked) == expected
    ours = Classifier(tiny(2), classes=3)
    assert output_projections(ours) == [block.branch.out for block in ours.vit.blocks]
    theirs = masked_autoencoder().vit
    assert output_projections(theirs) == [
        part for block in theirs.layers for part in (block.attention.o_proj, block.mlp.fc2)
    ]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: nn.Linear(2, 2), "model must have Residual paths, or blocks .*, got Linear"),
        (
            lambda: BertModel(BertConfig(hidden_size=24, num_hidden_layers=1)),
            "model must have .*, got BertModel",
        ),
        (lambda: nn.TransformerEncoderLayer(16, 4, 32), "must have their norms first"),
        (lambda: tiny(2, alpha_min=0.5), r"must have rule Plain.*\n.*"),
        (lambda: Residual(nn.Linear(2, 2)), "paths must have rule Plain, LayerNorm"),
        (lambda: Residual(nn.Tanh(), nn.LayerNorm(2)), "LayerNorm, linear layers"),
        (
            lambda: nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2), nn.Linear(2, 2)),
            "end in attention and a two-layer MLP",
        ),
    ],
)
def test_a_net_that_has_no_such_layers_is_told_what_is_missing(net, message):
    with pytest.raises(ValueError, match=message):
        gain_groups(net(), [1.0, 0.5], 1e-3, 0.05)


def test_factors_must_count_the_sub_layers():
    net, alphas = tiny(2), alpha_schedule(2, 0.5, per="block")
    with pytest.raises(ValueError, match="alphas must be one a sub-layer, 4, got 2"):
        gain_groups(net, alphas, 1e-3, 0.05)
    with pytest.raises(ValueError, match="alphas must be one a LayerNorm, 4, got 2"):
        rescale_norms(net, alphas)
    odd = tiny(1, zero_init=False)
    odd.extra = nn.Sequential(nn.LayerNorm(2), nn.Sequential(nn.LayerNorm(2)))
    before = odd.blocks[1].branch.out.weight.clone()
    with pytest.raises(ValueError, match="alphas must be one a LayerNorm, 4, got 2"):
        fold_gains(odd, (1.0, 0.5))
    assert torch.equal(odd.blocks[1].branch.out.weight, before)


def test_D14_weight_decay_leaves_out_biases_and_all_with_one_axis():
    net = Classifier(tiny(1, "learned", 0.5, final_norm=True), classes=3)
    net.vit.norm.weight.requires_grad_(False)
    kept, free = decay_groups(net, lr=1e-3, weight_decay=0.05)
    if kept["weight_decay"] == 0:
        kept, free = free, kept
    assert (kept["lr"], kept["weight_decay"]) == (1e-3, 0.05)
    assert (free["lr"], free["weight_decay"]) == (1e-3, 0.0)
    assert names(net, kept["params"]) == {
        "vit.stem.cls", "vit.stem.embed.weight", "vit.blocks.0.branch.qkv.weight",
        "vit.blocks.0.branch.out.weight", "vit.blocks.1.branch.inner.weight",
        "vit.blocks.1.branch.out.weight", "head.weight",
    }  # fmt: skip
    rest = {n for n, p in net.named_parameters() if p.requires_grad} - names(net, kept["params"])
    assert names(net, free["params"]) == rest
    torch.optim.AdamW([kept, free])


def test_D14_tokens_of_an_autoencoder_are_decayed_and_its_positions_frozen():
    net = masked_autoencoder()
    groups = decay_groups(net, 1e-3, 0.05)
    decayed = {n for g in groups if g["weight_decay"] for n in names(net, g["params"])}
    assert {"vit.embeddings.cls_token", "decoder.mask_token"} <= decayed
    everywhere = {n for g in groups for n in names(net, g["params"])}
    assert not [n for n in everywhere if "pos" in n]


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


def test_what_is_restored_comes_back_after_an_error_too():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1).eval())
    before = [layer.training for layer in layers]
    with pytest.raises(KeyError), restoring(list(layers), "training"):
        layers.eval()
        raise KeyError
    assert [layer.training for layer in layers] == before == [True, False]


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
