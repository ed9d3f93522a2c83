"""The spiral, its baselines, the linear residual net and joint training (sheet R, 2 and 6)."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

from mini_resdecay.shortcuts import Residual, alpha_schedule, path_mask, paths
from mini_resdecay.toy import ResidualMLP, StackedNets, accuracy, spiral, train_together

FIXTURE = Path(__file__).parent / "fixtures" / "spiral-400.csv"  # made by a script of its own


def net(seed: int, *args: object, **kwargs: object) -> ResidualMLP:
    torch.manual_seed(seed)
    return ResidualMLP(*args, **kwargs)


def train_alone(model: nn.Module, x, y, steps: int, lr: float = 1e-3) -> list[float]:
    """The reference: one net, one ordinary loop."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- data --------------------------------------------------------------------------------------


def test_R39_known_points():
    x, y = spiral(400, 0.05, 0)
    assert x.shape == (400, 2) and x.dtype == torch.float32
    assert y.shape == (400,) and y.dtype == torch.int64
    assert x[0].tolist() == pytest.approx((0.239197, -0.829531), abs=1e-5)
    assert x[1].tolist() == pytest.approx((-0.584394, -0.070429), abs=1e-5)
    assert x[200].tolist() == pytest.approx((0.545259, 0.272549), abs=1e-5)
    assert x.double().sum(0).tolist() == pytest.approx((8.18408, 2.21287), abs=6e-5)
    assert y.tolist() == [0] * 200 + [1] * 200


def test_R39_all_points_equal_the_stored_fixture():
    table = np.loadtxt(FIXTURE, delimiter=",", skiprows=1)
    x, y = spiral()
    assert table.shape == (400, 3)
    assert np.abs(x.numpy() - table[:, :2]).max() < 1e-7
    assert (y.numpy() == table[:, 2]).all()


def test_R39_without_noise_all_radii_are_in_range():
    x, y = spiral(400, 0.0, 3)
    radius = x.double().norm(dim=1)
    assert radius.min() >= 0.2 - 1e-7 and radius.max() < 1
    angle = (radius * 5 * math.pi - math.pi) / 2  # r = (2 theta + pi) / (5 pi)
    sign = 1 - 2 * y.double()
    arm = (sign * radius)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    assert torch.allclose(x.double(), arm, atol=1e-5)


def test_noise_has_the_stated_size():
    clean, noisy = spiral(4000, 0.0, 5)[0], spiral(4000, 0.1, 5)[0]
    assert (noisy - clean).std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.05)


@given(n=st.integers(2, 60), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_spiral_is_a_pure_function_of_its_seed(n, seed):
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    x, y = spiral(n, seed=seed)
    again, _ = spiral(n, seed=seed)
    assert torch.equal(x, again)
    assert not torch.equal(x, spiral(n, seed=seed + 1)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert y.tolist() == [0] * math.ceil(n / 2) + [1] * (n // 2)  # y = 0 for i < n/2


def test_baselines_linear_and_nearest_neighbour():
    """Sheet 2.1: .760 train, .7355 test; 1-NN .9995. Oracle: scikit-learn."""
    (x, y), (test_x, test_y) = spiral(), spiral(2000, seed=12345)
    line = LinearRegression().fit(x.double(), 2 * y - 1)
    train = ((line.predict(x.double()) >= 0) == y.numpy()).mean()
    test = ((line.predict(test_x.double()) >= 0) == test_y.numpy()).mean()
    assert (train, test) == pytest.approx((0.760, 0.7355), abs=1e-9)
    nearest = KNeighborsClassifier(1).fit(x, y)
    assert nearest.score(test_x, test_y) == pytest.approx(0.9995, abs=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 0}, "n must be at least 2, got 0"),
        ({"n": -4}, "n must be at least 2, got -4"),
        ({"noise": -0.1}, "noise must .*got -0.1"),
        ({"noise": math.nan}, "noise must .*got nan"),
    ],
)
def test_impossible_spirals_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        spiral(**kwargs)


# --- the net -----------------------------------------------------------------------------------


def by_hand(depth: int, width: int, seed: int) -> dict[str, list[torch.Tensor]]:
    """Weights drawn in the order stem, blocks, head with torch's own default."""
    torch.manual_seed(seed)
    stem = nn.Linear(2, width)
    blocks = [nn.Linear(width, width) for _ in range(depth)]
    layers = [stem, *blocks, nn.Linear(width, 2)]
    return [p for layer in layers for p in layer.parameters()]


@pytest.mark.parametrize("residual", [True, False])
def test_weights_are_drawn_stem_blocks_head(residual):
    model = net(3, 4, 5, residual=residual)
    expected = by_hand(4, 5, 3)
    found = list(model.parameters())
    assert len(found) == len(expected) == 12
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    drawn = [*model.stem.parameters(), *model.blocks.parameters(), *model.head.parameters()]
    assert all(a is b for a, b in zip(found, drawn, strict=True))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("residual", [True, False])
def test_forward_is_the_formula(activation, residual):
    model, (x, _) = net(0, 3, 5, activation=activation, residual=residual), spiral(8)
    act = {"relu": torch.relu, "tanh": torch.tanh}[activation]
    w = by_hand(3, 5, 0)
    h = F.linear(x, w[0], w[1])
    for layer in range(3):
        f = act(F.linear(h, w[2 + 2 * layer], w[3 + 2 * layer]))
        h = h + f if residual else f
    assert torch.allclose(model(x), F.linear(h, w[-2], w[-1]), atol=1e-6)


def test_default_is_relu_plain_residual():
    model, explicit = net(0, 3, 5), net(0, 3, 5, "relu", True, "plain", 1.0)
    assert torch.equal(model(spiral(8)[0]), explicit(spiral(8)[0]))
    assert all(isinstance(block, Residual) for block in model.blocks)
    assert paths(model) == list(model.blocks)


def test_alpha_min_below_one_means_decay():
    model, named = net(0, 4, 5, alpha_min=0.4), net(0, 4, 5, shortcut="decay", alpha_min=0.4)
    x, _ = spiral(8)
    assert torch.equal(model(x), named(x))
    h = model.stem(x)
    for alpha, block in zip(alpha_schedule(4, 0.4, per="block"), model.blocks, strict=True):
        h = alpha * h + block.branch(h)
    assert torch.allclose(model(x), model.head(h), atol=1e-6)


def test_decay_of_one_is_bitwise_plain():
    x, y = spiral(64)
    plain, decay = net(0, 6, 6), net(0, 6, 6, shortcut="decay", alpha_min=1.0)
    assert train_alone(plain, x, y, 5) == train_alone(decay, x, y, 5)
    assert torch.equal(plain(x), decay(x))


def grad_of_block_one(model: nn.Module) -> torch.Tensor:
    x, y = spiral()
    model = model.double()
    F.cross_entropy(model(x.double()), y).backward()
    return model.blocks[0].branch[0].weight.grad


def test_R24_gradient_norm_of_the_first_block():
    assert grad_of_block_one(net(0, 6, 6, "tanh")).norm().item() == pytest.approx(0.2488, abs=1e-3)


@pytest.mark.parametrize(("activation", "low", "high"), [("relu", 400, 1600), ("tanh", 4, 14)])
def test_growth_of_the_state_at_initialisation(activation, low, high):
    """Sheet 2.2: about 8e2 for ReLU, about 7 for tanh, depth 32 and width 32."""
    x, _ = spiral()
    growth = []
    for seed in range(3):
        model = net(seed, 32, 32, activation)
        h = first = model.stem(x)
        for block in model.blocks:
            h = block(h)
        growth.append((h.norm() / first.norm()).item())
    assert all(low < g < high for g in growth), growth


def test_first_loss_of_the_relu_net_is_of_order_a_hundred():
    x, y = spiral()
    losses = [F.cross_entropy(net(seed, 32, 32)(x), y).item() for seed in range(3)]
    assert 30 < sorted(losses)[1] < 1000, losses


def test_R27_all_dropped_is_the_head_of_the_stem():
    model, (x, _) = net(0, 6, 6), spiral(16)
    with path_mask(model, torch.zeros(6)):
        assert torch.equal(model(x), model.head(model.stem(x)))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0, 6), {}, "depth must be a whole number, at least 1, got 0"),
        ((-2, 6), {}, "depth must be a whole number, at least 1, got -2"),
        (("4", 6), {}, "depth must be a whole number, at least 1, got '4'"),
        ((4.5, 6), {}, "depth must be a whole number, at least 1, got 4.5"),
        ((6, 0), {}, "width must be at least 1, got 0"),
        ((6, 6), {"alpha_min": 0.0}, r"alpha_min must .*\(0, 1\].*got 0"),
        ((6, 6), {"alpha_min": 1.2}, r"alpha_min must .*\(0, 1\].*got 1.2"),
        ((6, 6), {"activation": "rleu"}, r'activation .*"rleu".*did you mean "relu"'),
        ((6, 6), {"shortcut": "decy"}, r'shortcut .*"decy".*did you mean "decay"'),
        ((6, 6), {"shortcut": "post-norm", "alpha_min": 0.6}, r"alpha_min .*post-norm.*0\.6"),
        ((6, 6), {"residual": False, "alpha_min": 0.6}, r"alpha_min .*0\.6"),
        ((6, 6), {"residual": False, "shortcut": "decy"}, r"shortcut"),
    ],
)
def test_impossible_nets_are_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ResidualMLP(*args, **kwargs)


def test_accuracy_is_the_share_of_right_points():
    class Known(nn.Module):
        def forward(self, x):
            return torch.stack([-x[:, 0], x[:, 0]], 1)

    x = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [-2, 0]])
    assert accuracy(Known(), x, torch.tensor([1, 1, 0, 1])) == 0.75
    assert accuracy(Known(), x, torch.tensor([0, 1, 1, 1])) == 0.25


# --- training together -------------------------------------------------------------------------


def test_training_together_is_training_one_after_another():
    """Float32, depth 32: losses to 1e-5 (relative where the loss is above 1)."""
    (x, y), seeds = spiral(), (0, 1, 2)
    nets = [net(seed, 32, 32) for seed in seeds]
    losses, _ = train_together(nets, x, y, steps=100, lr=1e-3)
    alone = [train_alone(net(seed, 32, 32), x, y, 100) for seed in seeds]
    assert losses.shape == (100, 3)
    assert torch.allclose(losses.double(), torch.tensor(alone).double().T, rtol=1e-5, atol=1e-5)


def test_training_together_writes_the_weights_back():
    """In float64 rounding does not grow, so the weights themselves can be compared."""
    x, y = spiral(100)
    x, seeds = x.double(), (0, 1, 2)
    nets = [net(seed, 6, 6, "tanh").double() for seed in seeds]
    before = [copy.deepcopy(model.state_dict()) for model in nets]
    losses, _ = train_together(nets, x, y, steps=50, lr=1e-2)
    for i, (seed, model) in enumerate(zip(seeds, nets, strict=True)):
        reference = net(seed, 6, 6, "tanh").double()
        alone = train_alone(reference, x, y, 50, lr=1e-2)
        assert losses[:, i].tolist() == pytest.approx(alone, rel=1e-6)
        for name, value in reference.state_dict().items():
            assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=1e-9), name
            assert not torch.equal(before[i][name], value), name
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_a_net_does_not_feel_its_neighbours():
    x, y = spiral(100)
    pair, alone = [net(0, 6, 6), net(1, 6, 6)], [net(0, 6, 6)]
    both, _ = train_together(pair, x, y, steps=30)
    one, _ = train_together(alone, x, y, steps=30)
    assert torch.allclose(both[:, 0], one[:, 0], atol=1e-6)


def test_training_twice_is_the_same():
    x, y = spiral(100)
    first, _ = train_together([net(0, 6, 6)], x, y, steps=20)
    second, _ = train_together([net(0, 6, 6)], x, y, steps=20)
    assert torch.equal(first, second)


def test_adams_eps_is_the_callers():
    """Adam damps a gradient that is far below eps: with a huge one hardly anything moves."""
    x, y = spiral(100)
    ends = [train_together([net(0, 6, 6)], x, y, steps=20, eps=eps)[0] for eps in (1e-8, 1e8)]
    assert ends[0][-1] < ends[0][0] - 1e-3
    assert ends[1][-1] == pytest.approx(ends[1][0].item(), abs=1e-5)


def test_snapshots_are_the_nets_at_those_steps():
    x, y = spiral(100)
    nets = [net(0, 4, 6), net(1, 4, 6)]
    start = nets[0](x).detach()
    losses, taken = train_together(nets, x, y, steps=20, snapshots=(0, 10, 20))
    assert sorted(taken) == [0, 10, 20]
    assert torch.allclose(taken[0][0](x), start, atol=1e-6)
    assert torch.equal(taken[20][1](x), nets[1](x))
    assert taken[20][1] is not nets[1]
    loss_10 = F.cross_entropy(taken[10][1](x), y).item()  # before update 10
    assert loss_10 == pytest.approx(losses[10, 1].item(), abs=1e-6)


def test_a_step_size_that_blows_up_is_an_error():
    x, y = spiral(50)
    with pytest.raises(ValueError, match="lr"):
        train_together([net(0, 32, 32)], x, y, steps=60, lr=1e8)


def test_nan_points_are_an_error_and_leave_the_nets_alone():
    x, y = spiral(50)
    x[3, 0] = math.nan
    model = net(0, 4, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        train_together([model], x, y, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [
        {"activation": "tanh"}, {"alpha_min": 0.5}, {"residual": False}, {"shortcut": "post-norm"},
    ],
)  # fmt: skip
def test_nets_of_unlike_kind_are_an_error_not_a_silent_wrong_number(other):
    x, y = spiral(50)
    with pytest.raises(ValueError):
        train_together([net(0, 4, 6), net(1, 4, 6, **other)], x, y, steps=2)


def test_no_nets_is_an_error():
    with pytest.raises(ValueError):
        train_together([], *spiral(50), steps=2)


def test_deep_net_learns_with_shortcuts_and_not_without():
    (x, y), seeds = spiral(), (0, 1, 2)
    residual = [net(seed, 32, 32, "tanh") for seed in seeds]
    feedforward = [net(seed, 32, 32, "tanh", residual=False) for seed in seeds]
    train_together(residual, x, y, steps=100)
    train_together(feedforward, x, y, steps=100)
    linear = 0.760
    assert all(accuracy(model, x, y) > 0.95 for model in residual)
    assert all(accuracy(model, x, y) < linear for model in feedforward)


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
@pytest.mark.parametrize("kind", [{}, {"residual": False}, {"alpha_min": 0.4}])
def test_gradients_written_out_are_those_of_autograd(activation, kind):
    x, y = spiral(60)
    x = x.double()
    nets = [net(seed, 5, 7, activation, **kind).double() for seed in (0, 1)]
    stacked = StackedNets(nets, len(x))
    for _ in range(2):  # the second pass works in used memory
        stacked.zero_grad()
        logits = stacked(x)
        sum(F.cross_entropy(part, y) for part in logits).backward()
    for s, model in enumerate(nets):
        found = model(x)
        torch.testing.assert_close(logits[s], found)
        F.cross_entropy(found, y).backward()
        for k, block in enumerate(model.blocks):
            torch.testing.assert_close(stacked.weight.grad[k, s], block.branch[0].weight.grad)
            torch.testing.assert_close(stacked.bias.grad[k, s, 0], block.branch[0].bias.grad)
        torch.testing.assert_close(stacked.stem.weight.grad[s], model.stem.weight.grad)
        torch.testing.assert_close(stacked.head.bias.grad[s], model.head.bias.grad)


def test_a_masked_net_is_not_trained_as_if_it_were_whole():
    model = net(0, 3, 4)
    with path_mask(model, [1, 0, 1]), pytest.raises(ValueError, match="path mask"):
        train_together([model], *spiral(50), steps=2)


@pytest.mark.parametrize(
    "branch",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.GELU()),
        nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU()),
        nn.Linear(4, 4),
    ],
    ids=["two maps", "GELU", "convolution", "bare"],
)
def test_branches_that_joint_training_does_not_know_are_an_error(branch: nn.Module) -> None:
    """The last map of `two maps` was once left out without a word."""
    net = ResidualMLP(2, 4)
    for block in paths(net):
        block.branch = copy.deepcopy(branch)
    with pytest.raises(ValueError, match="nets must have branches of a linear layer and ReLU"):
        train_together([net], *spiral(8), steps=1)


@pytest.mark.parametrize("shortcut", ["learned", "identity-drop", "scaled-sum", "branch-scaled"])
def test_rules_that_joint_training_does_not_know_are_an_error(shortcut):
    odd = ResidualMLP(2, 4, shortcut=shortcut)
    assert odd(spiral(8)[0]).isfinite().all()
    with pytest.raises(ValueError, match="nets that train together must be plain or decay"):
        train_together([odd], *spiral(8), steps=1)
