"""The two-stage step, its control arms, and everything that training puts around them (sheet R)."""

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.utils import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mini_resdecay import droppath
from mini_resdecay.cnn import ResidualCNN
from mini_resdecay.droppath import ARMS, Pair, mixture_step, residual_droppath_step, sample_mask
from mini_resdecay.shortcuts import Residual, path_mask, paths
from mini_resdecay.toy import ResidualMLP, spiral
from mini_resdecay.train import (
    TrainState,
    cosine_schedule,
    fit,
    load_checkpoint,
    make_state,
    save_checkpoint,
)

ROOT = Path(__file__).parents[1]
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=0.01),
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "foreach": partial(AdamW, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": partial(AdamW, lr=1e-2, weight_decay=0.1, fused=True),
}
SKIP = pytest.mark.parametrize("skip", [True, False], ids=["skipped", "masked"])


def toy(depth: int = 6, width: int = 6, seed: int = 0, activation: str = "tanh") -> ResidualMLP:
    torch.manual_seed(seed)
    return ResidualMLP(depth, width, activation).double()


def points(n: int = 400) -> tuple[Tensor, Tensor]:
    x, y = spiral(n)
    return x.double(), y


def loss_of(net: nn.Module, n: int = 400) -> Callable[[], Tensor]:
    """The same points at every call."""
    x, y = points(n)
    return lambda: F.cross_entropy(net(x), y)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def distance(net: nn.Module, other: nn.Module) -> float:
    """Largest difference of a weight."""
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    found = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in found)


def plain_steps(net: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    loss_fn = loss_of(net)
    for _ in range(n):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()


class Watch:
    """What each call of `optimizer.step` found and did, by the ids of the parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.grads: list[dict[int, Tensor]] = []
        self.before: list[dict] = []
        self.after: list[dict] = []
        optimizer.register_step_pre_hook(self.start)
        optimizer.register_step_post_hook(lambda o, *_: self.after.append(self.snapshot(o)))

    def start(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.grads.append({id(p): p.grad.clone() for p in held if p.grad is not None})
        self.before.append(self.snapshot(optimizer))

    @staticmethod
    def snapshot(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return {
            id(p): {"value": p.detach().clone()}
            | {
                k: torch.as_tensor(v).clone()
                for k, v in optimizer.state.get(p, {}).items()
                if v is not None
            }
            for p in held
        }

    def updates(self, net: nn.Module) -> list[int]:
        """How often each path was updated: all of its parameters or none."""
        return [
            sum(all(id(p) in grads for p in block.parameters()) for grads in self.grads)
            for block in paths(net)
        ]

    def still(self, call: int, parameter: nn.Parameter) -> bool:
        """Whether call number `call` left a parameter and its optimiser state bit-identical."""
        old, new = self.before[call][id(parameter)], self.after[call][id(parameter)]
        return old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call with the masks that come next, instead of random ones."""

    def force(*masks: tuple[int, ...]) -> None:
        coming = iter([torch.tensor(mask, dtype=torch.float32) for mask in masks])
        monkeypatch.setattr(droppath, "sample_mask", lambda *_: next(coming))

    return force


# --- frozen means no gradient at all -----------------------------------------------------------


class Sum(nn.Module):
    """Two paths side by side, each with one weight of 1: the gradient of a kept one is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(nn.Linear(1, 1, bias=False)) for _ in range(2))
        self.double()
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return sum(block(x) for block in self.blocks).sum()


def after_a_frozen_step(optimizer: Callable, forced: Callable, skip: bool) -> float:
    """The first weight after a step with gradient 1, and one in which it is dropped."""
    net = Sum()
    made, x = optimizer(net.parameters()), torch.ones(1, 1, dtype=torch.float64)
    forced((1, 1), (0, 1))
    for _ in range(2):
        residual_droppath_step(
            net, made, lambda: net(x), 0.5, seeded(0), scale="none", freeze="all", skip=skip
        )
    return net.blocks[0].branch.weight.item()


def after_a_step_of_zeros(optimizer: Callable) -> float:
    """The mistake: a gradient of zeros instead of none."""
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    made = optimizer([weight])
    for gradient in (1.0, 0.0):
        weight.grad = torch.full_like(weight, gradient)
        made.step()
    return weight.item()


@SKIP
def test_R17_momentum(forced, skip):
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    assert after_a_frozen_step(optimizer, forced, skip) == pytest.approx(0.9, abs=1e-9)
    assert after_a_step_of_zeros(optimizer) == pytest.approx(0.81, abs=1e-9)


@SKIP
def test_R18_weight_decay(forced, skip):
    optimizer = partial(SGD, lr=0.1, weight_decay=0.1)
    assert after_a_frozen_step(optimizer, forced, skip) == pytest.approx(0.89, abs=1e-9)
    assert after_a_step_of_zeros(optimizer) == pytest.approx(0.8811, abs=1e-9)


@SKIP
@pytest.mark.parametrize(
    ("optimizer", "frozen", "zeroed"),
    [
        (partial(torch.optim.Adam, lr=0.1), 0.900000001, 0.8329941765),
        (partial(AdamW, lr=0.1, weight_decay=0.1), 0.890000001, 0.8140941765),
        (partial(AdamW, lr=0.1, weight_decay=0.1, foreach=True), 0.890000001, 0.8140941765),
        (partial(AdamW, lr=0.1, weight_decay=0.1, fused=True), 0.890000001, 0.8140941765),
    ],
    ids=["adam", "adamw", "foreach", "fused"],
)
def test_R19_adam(forced, optimizer, frozen, zeroed, skip):
    assert after_a_frozen_step(optimizer, forced, skip) == pytest.approx(frozen, abs=1e-9)
    assert after_a_step_of_zeros(optimizer) == pytest.approx(zeroed, abs=1e-9)


def assert_frozen_exactly(watch: Watch, call: int, net: nn.Module, trained: set[int]) -> None:
    """In this call of `optimizer.step`, `trained` had gradients, and all else stayed as it was."""
    assert watch.grads[call].keys() == trained
    for parameter in net.parameters():
        assert id(parameter) in trained or watch.still(call, parameter)


def split(net: nn.Module, mask: Tensor) -> tuple[set[int], set[int]]:
    """Ids of the parameters of dropped paths, and of all others."""
    everything = {id(p) for p in net.parameters()}
    chosen = [b for b, kept in zip(paths(net), mask.tolist(), strict=True) if kept == 0]
    dropped = {id(p) for block in chosen for p in block.parameters()}
    return dropped, everything - dropped


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@SKIP
def test_R20_frozen_weights_and_their_state_are_bit_identical(optimizer, skip):
    net = toy()
    made = OPTIMIZERS[optimizer](net.parameters())
    plain_steps(net, made, 3)
    watch, loss_fn = Watch(made), loss_of(net)
    pair = residual_droppath_step(net, made, loss_fn, 0.5, seeded(1), clip=0.1, skip=skip)
    dropped, others = split(net, pair.mask)
    assert dropped and len(watch.grads) == 2
    assert_frozen_exactly(watch, 0, net, others)
    assert_frozen_exactly(watch, 1, net, dropped)
    moved = [p for p in net.parameters() if not watch.still(1, p)]
    assert {id(p) for p in moved} == dropped
    held = {"sgd": {"value"}, "momentum": {"value", "momentum_buffer"}}
    held["nesterov"] = held["momentum"]
    expected = held.get(optimizer, {"value", "exp_avg", "exp_avg_sq", "step"})
    assert all(found.keys() == expected for found in watch.before[0].values())


@given(
    depth=st.integers(1, 5),
    data=st.data(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    freeze=st.sampled_from(["complement", "random", "none", "all"]),
    skip=st.booleans(),
)
@settings(max_examples=40)
def test_only_what_a_stage_may_touch_changes(depth, data, optimizer, freeze, skip):
    rates = data.draw(st.lists(st.floats(0, 1), min_size=depth, max_size=depth))
    net, masks = toy(depth, 3), seeded(data.draw(st.integers(0, 99)))
    made = OPTIMIZERS[optimizer](net.parameters())
    plain_steps(net, made, 1)
    watch, p = Watch(made), torch.tensor(rates)
    again = torch.Generator()
    again.set_state(masks.get_state())
    residual_droppath_step(net, made, loss_of(net, 20), rates, masks, freeze=freeze, skip=skip)
    mask = sample_mask(p, again)
    dropped, others = split(net, mask)
    stage_two = {
        "complement": lambda: dropped,
        "random": lambda: split(net, sample_mask(p, again))[0],
        "none": lambda: dropped | others,
        "all": set,
    }[freeze]()
    assert_frozen_exactly(watch, 0, net, others)
    assert len(watch.grads) == 1 + bool(stage_two)
    if stage_two:
        assert_frozen_exactly(watch, 1, net, stage_two)
    assert torch.equal(masks.get_state(), again.get_state())


# --- one update a path and pair ----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "foreach", "fused"])
@SKIP
def test_R21_every_path_is_updated_once_a_pair(optimizer, skip):
    net = toy()
    made, masks = OPTIMIZERS[optimizer](net.parameters()), seeded(0)
    watch, loss_fn = Watch(made), loss_of(net, 40)
    for _ in range(20):
        residual_droppath_step(net, made, loss_fn, 0.5, masks, skip=skip)
    assert watch.updates(net) == [20] * 6
    if optimizer in ("adamw", "foreach", "fused"):
        assert {int(made.state[p]["step"]) for p in net.blocks.parameters()} == {20}
        assert {int(made.state[p]["step"]) for p in net.head.parameters()} == {20}


@SKIP
def test_R21_updates_of_the_arms_without_the_freeze(skip):
    found = {}
    for arm in ("no-freeze", "droppath", "mixture"):
        net = toy()
        made, masks = SGD(net.parameters(), lr=0.05), seeded(0)
        watch, loss_fn = Watch(made), loss_of(net, 40)
        for _ in range(20):
            ARMS[arm][0](net, made, loss_fn, 0.5, masks, skip=skip)
        found[arm] = watch.updates(net)
    assert found["no-freeze"] == [30, 31, 28, 32, 30, 28]
    assert found["droppath"] == [10, 11, 8, 12, 10, 8]
    assert found["mixture"] == [20] * 6


@given(depth=st.integers(1, 8), data=st.data(), skip=st.booleans())
@settings(max_examples=40)
def test_each_path_decays_exactly_once_a_pair(depth, data, skip):
    """With no gradient and a decay of one half, a pair halves every weight, whatever p is."""
    p = data.draw(st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=depth, max_size=depth))
    net, masks = toy(depth, 2), seeded(data.draw(st.integers(0, 999)))
    start = weights(net)
    made, (x, _) = SGD(net.parameters(), lr=0.5, weight_decay=1.0), points(4)
    for _ in range(3):
        residual_droppath_step(net, made, lambda: 0.0 * net(x).sum(), p, masks, skip=skip)
    for old, new in zip(start, net.parameters(), strict=True):
        assert torch.equal(new, old / 8)


# --- masks -------------------------------------------------------------------------------------


def bits(mask: Tensor) -> str:
    return "".join(str(int(bit)) for bit in mask)


def test_R22_masks_are_a_function_of_the_seed():
    p = torch.full((6,), 0.5)
    masks = seeded(1234)
    assert [bits(sample_mask(p, masks)) for _ in range(3)] == ["000001", "001011", "110101"]
    rows_of_one = torch.rand(3, 6, generator=seeded(1234)) >= 0.5
    assert [bits(row) for row in rows_of_one] == ["000001", "001011", "110101"]
    masks = seeded(0)
    found = [bits(sample_mask(p, masks)) for _ in range(2)]
    later = torch.Generator()
    later.set_state(masks.get_state())
    found += [bits(sample_mask(p, later)) for _ in range(2)]
    assert found == ["010001", "010100", "000111", "001101"]


def test_R22_a_pair_leaves_the_global_generator_alone():
    net, masks = toy(), seeded(1234)
    made, before = SGD(net.parameters(), lr=0.1), torch.get_rng_state()
    drawn = [residual_droppath_step(net, made, loss_of(net), 0.5, masks).mask for _ in range(3)]
    assert [bits(mask) for mask in drawn] == ["000001", "001011", "110101"]
    assert torch.equal(torch.get_rng_state(), before)


def test_R23_law_of_the_masks():
    masks, p = seeded(0), torch.full((8,), 0.2)
    drawn = torch.stack([sample_mask(p, masks) for _ in range(100_000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.mean(0) - 0.8).abs().max() < 0.002
    assert (torch.corrcoef(drawn.T) - torch.eye(8)).abs().max() < 0.012


@given(rates=st.lists(st.floats(0, 1), min_size=1, max_size=9), seed=st.integers(0, 999))
def test_a_mask_is_one_call_of_rand(rates, seed):
    p = torch.tensor(rates)
    mask = sample_mask(p, seeded(seed))
    assert mask.dtype == torch.float32 and mask.shape == p.shape
    assert torch.equal(mask == 1, torch.rand(len(p), generator=seeded(seed)) >= p)
    assert mask[p == 0].all() and not mask[p == 1].any()


def test_law_of_masks_by_sample():
    p = torch.tensor([0.0, 0.2, 0.5, 1.0])
    drawn = sample_mask(p, seeded(0), samples=100_000)
    assert drawn.shape == (4, 100_000) and drawn.dtype == torch.float32
    assert drawn.mean(1).tolist() == pytest.approx([1.0, 0.8, 0.5, 0.0], abs=0.005)
    assert drawn[0].all() and not drawn[3].any()
    assert abs(torch.corrcoef(drawn[1:3])[0, 1].item()) < 0.012


def test_masks_by_sample_drop_the_paths_of_each_sample_alone():
    net, (x, _) = toy(), points(8)
    mask = sample_mask(torch.full((6,), 0.5), seeded(0), samples=8)
    assert len({bits(column) for column in mask.T}) > 4
    with path_mask(net, mask[:, :, None]):
        found = net(x)
    for i, column in enumerate(mask.T):
        with path_mask(net, column, skip=True):
            torch.testing.assert_close(found[i : i + 1], net(x[i : i + 1]), rtol=0, atol=1e-12)


# --- gradients and degenerate cases ------------------------------------------------------------


class CutAtFrozen(nn.Module):
    """The mistake: frozen branches without a graph."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.branch(x)


@SKIP
def test_R24_gradients_flow_through_frozen_paths(forced, skip):
    net = toy()
    loss_fn = loss_of(net)
    loss_fn().backward()
    weight = net.blocks[0].branch[0].weight
    ordinary = weight.grad.clone()
    made = SGD(net.parameters(), lr=0.0)
    watch = Watch(made)
    forced((0, 1, 1, 1, 1, 1))
    residual_droppath_step(net, made, loss_fn, 0.2, seeded(0), skip=skip)
    found = watch.grads[1][id(weight)]
    assert torch.equal(found, ordinary)
    assert found.norm().item() == pytest.approx(0.2488, abs=1e-3)

    for block in net.blocks[1:]:
        block.branch = CutAtFrozen(block.branch)
    net.zero_grad()
    loss_fn().backward()
    assert (weight.grad - ordinary).norm() / ordinary.norm() > 0.1


@SKIP
def test_R25_dropped_paths_have_no_gradient_when_the_optimizer_steps(forced, skip):
    net = toy()
    made = SGD(net.parameters(), lr=0.1)
    watch = Watch(made)
    forced((0, 0, 1, 0, 1, 1))
    residual_droppath_step(net, made, loss_of(net), 0.5, seeded(0), skip=skip)
    dropped, others = split(net, torch.tensor([0, 0, 1, 0, 1, 1]))
    assert [set(grads) for grads in watch.grads] == [others, dropped]
    assert all(grad.norm() > 0 for grads in watch.grads for grad in grads.values())


@SKIP
def test_R26_no_rate_is_plain_training(skip):
    one, other, masks = toy(), toy(), seeded(0)
    made = AdamW(one.parameters(), lr=1e-2)
    watch = Watch(made)
    pairs = [
        residual_droppath_step(one, made, loss_of(one), 0.0, masks, skip=skip) for _ in range(10)
    ]
    plain_steps(other, AdamW(other.parameters(), lr=1e-2), 10)
    assert same_state(one, other)
    assert len(watch.grads) == 10 and all(pair.stage2 is None for pair in pairs)


@SKIP
def test_R27_rate_one_is_plain_training_of_the_paths(skip):
    one, other, masks = toy(), toy(), seeded(0)
    x, y = points()
    stem_and_head = F.cross_entropy(one.head(one.stem(x)), y)
    made = AdamW(one.blocks.parameters(), lr=1e-2)
    pairs = [
        residual_droppath_step(one, made, loss_of(one), 1.0, masks, skip=skip) for _ in range(10)
    ]
    plain_steps(other, AdamW(other.blocks.parameters(), lr=1e-2), 10)
    assert same_state(one, other)
    assert all(torch.equal(pair.stage1, stem_and_head) for pair in pairs)
    assert all(parameter.isfinite().all() for parameter in one.parameters())


@SKIP
@pytest.mark.parametrize(("bit", "steps"), [(1, 1), (0, 2)], ids=["all kept", "all dropped"])
def test_R28_all_kept_is_one_step_and_all_dropped_two(forced, bit, steps, skip):
    net = toy()
    made = AdamW(net.parameters(), lr=1e-2)
    watch = Watch(made)
    forced((bit,) * 6)
    pair = residual_droppath_step(net, made, loss_of(net), 0.5, seeded(0), skip=skip)
    assert len(watch.grads) == steps
    assert watch.updates(net) == [1] * 6
    assert (pair.stage2 is None) == (steps == 1)
    assert all(int(held["step"]) == 1 for held in made.state.values())


def mean_displacement(p: float, lr: float, forced: Callable) -> list[Tensor]:
    """Average over all masks of what a pair does to the paths, divided by -lr."""
    total = [torch.zeros_like(w) for w in weights(toy(3).blocks)]
    for mask in itertools.product([0, 1], repeat=3):
        net = toy(3)
        before = weights(net.blocks)
        forced(mask)
        made = SGD(net.parameters(), lr=lr)
        residual_droppath_step(net, made, loss_of(net), p, seeded(0))
        share = (1 - p) ** sum(mask) * p ** (3 - sum(mask))
        for mean, old, new in zip(total, before, net.blocks.parameters(), strict=True):
            mean += share * (new.detach() - old) / -lr
    return total


def mixture_gradient(p: float) -> list[Tensor]:
    """Gradient of E L_m + p L_full by autograd, over all masks."""
    net = toy(3)
    loss_fn = loss_of(net)
    total = p * loss_fn()
    for mask in itertools.product([0.0, 1.0], repeat=3):
        with path_mask(net, torch.tensor(mask, dtype=torch.float64) / (1 - p)):
            share = (1 - p) ** sum(mask) * p ** (3 - sum(mask))
            total = total + share * loss_fn()
    return list(torch.autograd.grad(total, list(net.blocks.parameters())))


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (found, expected))
    return ((a - b).norm() / b.norm()).item()


def test_R29_the_mean_pair_follows_the_mixture_to_first_order(forced):
    found, expected = mean_displacement(0.4, 1e-6, forced), mixture_gradient(0.4)
    assert relative(found, expected) < 1e-5
    assert relative(found, mixture_gradient(1e-9)) > 0.1  # without the share of the whole net


def test_R29_a_small_rate_gives_the_plain_gradient(forced):
    net = toy(3)
    plain = list(torch.autograd.grad(loss_of(net)(), list(net.blocks.parameters())))
    assert relative(mean_displacement(1e-6, 1e-6, forced), plain) < 1e-5


def normed(depth: int = 2) -> nn.Module:
    """Paths with BatchNorm inside; tokens [B, 2] to logits [B, 2]."""
    torch.manual_seed(0)
    blocks = [
        Residual(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())) for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(2, 6), *blocks, nn.Linear(6, 2)).double()


def statistics_of(net: nn.Module) -> list[Tensor]:
    return [b.clone() for name, b in net.named_buffers() if "running" in name]


def test_R30_a_dropped_path_spoils_its_running_statistics():
    net, (x, _) = normed(), points()
    before = statistics_of(net)
    with path_mask(net, torch.zeros(2)):
        net(x)
    assert not any(torch.equal(a, b) for a, b in zip(before, statistics_of(net), strict=True))


@pytest.mark.parametrize("arm", ["two-stage", "mixture"])
@pytest.mark.parametrize("momentum", [0.1, None])
@SKIP
def test_R30_running_statistics_come_from_the_whole_net_only(forced, arm, momentum, skip):
    net, (x, y), seen = normed(), points(), []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = momentum

    def loss() -> Tensor:
        out = F.cross_entropy(net(x), y)
        seen.append(statistics_of(net))
        return out

    before = statistics_of(net)
    forced((0, 1))
    ARMS[arm][0](net, SGD(net.parameters(), lr=0.1), loss, 0.5, seeded(0), skip=skip)
    assert all(torch.equal(a, b) for a, b in zip(before, seen[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, seen[1], strict=True))
    counts = [int(b) for name, b in net.named_buffers() if "num_batches" in name]
    assert counts == [1 if skip else 2, 2]
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm1d)] == [momentum] * 2


class Scalars(nn.Module):
    """(1 + c1 a1)(1 + c2 a2) with a = (0.5, 0.25): the example of the sheet."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Residual(nn.Linear(1, 1, bias=False)) for _ in range(2))
        ).double()
        for block, a in zip(self.blocks, (0.5, 0.25), strict=True):
            nn.init.constant_(block.branch.weight, a)

    def forward(self) -> Tensor:
        return self.blocks(torch.ones(1, 1, dtype=torch.float64)).square().sum() / 2


@SKIP
@pytest.mark.parametrize(
    ("arm", "scale", "p", "expected"),
    [
        ("two-stage", "none", 0.0, (0.265625, -0.03125)),
        ("droppath", "none", 0.5, (0.35, 0.25)),
        ("two-stage", "none", 0.5, (0.35, 0.0221875)),
        ("two-stage", "inverse", 0.5, (0.1, 0.09875)),
        ("no-freeze", "none", 0.5, (0.1390625, 0.0221875)),
        ("mixture", "none", 0.5, (0.2328125, 0.109375)),
    ],
    ids=["plain", "droppath", "two-stage", "two-stage scaled", "no-freeze", "mixture"],
)
def test_R32_five_arms_on_two_numbers(forced, arm, scale, p, expected, skip):
    net = Scalars()
    forced((1, 1) if p == 0 else (1, 0))
    ARMS[arm][0](net, SGD(net.parameters(), lr=0.1), net, p, seeded(0), scale=scale, skip=skip)
    found = [block.branch.weight.item() for block in net.blocks]
    assert found == pytest.approx(expected, abs=1e-9)


@SKIP
@pytest.mark.parametrize("arm", ARMS)
def test_losses_are_those_of_the_two_stages(forced, arm, skip):
    """Half of ((1 + c1 a1)(1 + c2 a2)) squared, with the first path kept and then with both."""
    net = Scalars()
    forced((1, 0), (1, 0))
    made = SGD(net.parameters(), lr=0.0)
    found = ARMS[arm][0](net, made, net, 0.5, seeded(0), scale="none", skip=skip)
    assert found.mask.tolist() == [1, 0]
    assert found.stage1.item() == pytest.approx(1.5**2 / 2) and not found.stage1.requires_grad
    if arm == "droppath":
        assert found.stage2 is None
    else:
        assert found.stage2.item() == pytest.approx(1.875**2 / 2) and not found.stage2.requires_grad


def test_random_freeze_trains_the_complement_of_a_second_mask(forced):
    net = Scalars()
    forced((1, 0), (0, 1))
    made = SGD(net.parameters(), lr=0.1)
    ARMS["random-freeze"][0](net, made, net, 0.5, seeded(0), scale="none")
    found = [block.branch.weight.item() for block in net.blocks]
    # 0.5 - 0.1 * 1.5 = 0.35, then 0.35 - 0.1 * 1.35 * 1.25 ** 2
    assert found == pytest.approx([0.1390625, 0.25], abs=1e-9)


# --- AMP, clipping, accumulation ---------------------------------------------------------------


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


def test_R33_a_stage_with_nothing_to_step_does_not_fail():
    net = toy()
    made, amp = AdamW(net.parameters(), lr=1e-2), scaler()
    amp.scale(loss_of(net)()).backward()
    made.zero_grad(set_to_none=True)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        amp.step(made)
    for p in (0.0, 1.0):
        residual_droppath_step(net, made, loss_of(net), p, seeded(0), scaler=scaler())
    only_stem = AdamW(net.stem.parameters(), lr=1e-2)  # the second stage has nothing to step
    residual_droppath_step(net, only_stem, loss_of(net), 1.0, seeded(0), scaler=scaler())


@pytest.mark.parametrize("stage", [0, 1])
def test_R33_infinite_gradients_of_frozen_paths_do_not_count(forced, stage):
    net, amp = toy(), scaler()
    made = AdamW(net.parameters(), lr=1e-2)
    watch, start = Watch(made), weights(net)
    forced((0, 1, 1, 0, 1, 1))
    frozen = net.blocks[0 if stage == 0 else 1].branch[0].weight
    other = net.blocks[1 if stage == 0 else 0].branch[0].weight
    calls = []

    def plant(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * math.inf if len(calls) == stage + 1 else gradient

    frozen.register_hook(plant)
    before = amp.get_scale()
    residual_droppath_step(net, made, loss_of(net), 0.5, seeded(0), scaler=amp, skip=False)
    assert len(calls) == 2 and len(watch.grads) == 2
    assert not watch.still(stage, other)
    assert amp.get_scale() == 2 * before  # two good steps
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(start, net.parameters(), strict=True))


def test_an_infinite_gradient_in_use_leaves_the_stage_out_and_halves_the_scale(forced):
    net, amp = toy(), scaler()
    made = AdamW(net.parameters(), lr=1e-2)
    start = copy.deepcopy(net)
    forced((1,) * 6)
    residual_droppath_step(net, made, lambda: loss_of(net)() * math.inf, 0.5, seeded(0), scaler=amp)
    assert same_state(net, start)
    assert amp.get_scale() == 512.0


@pytest.mark.parametrize("arm", ARMS)
@SKIP
def test_scaled_gradients_give_the_same_training(arm, skip):
    """A scale of a power of two is exact in float64, clipping at the true norm included."""
    nets = [toy(), toy()]
    for net, amp in zip(nets, (None, scaler()), strict=True):
        made, masks = AdamW(net.parameters(), lr=1e-2), seeded(0)
        for _ in range(3):
            ARMS[arm][0](net, made, loss_of(net), 0.5, masks, scaler=amp, clip=0.1, skip=skip)
    assert distance(*nets) < 1e-12
    assert amp.get_scale() > 1024


@SKIP
def test_R34_the_norm_is_of_the_updated_weights_only(monkeypatch, forced, skip):
    net, real, norms = toy(), nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda *a, **k: norms.append(real(*a, **k)) or norms[-1]
    )
    mask = (0, 1, 1, 0, 1, 0)
    dropped, others = split(net, torch.tensor(mask))
    loss_fn, expected = loss_of(net), []
    for coefficients, chosen in ((mask, others), ((1,) * 6, dropped)):
        with path_mask(net, torch.tensor(coefficients)):
            gradients = torch.autograd.grad(loss_fn(), list(net.parameters()))
        used = [g for g, p in zip(gradients, net.parameters(), strict=True) if id(p) in chosen]
        expected.append(torch.cat([g.flatten() for g in used]).norm().item())
    forced(mask)
    made = SGD(net.parameters(), lr=0.0)
    residual_droppath_step(net, made, loss_fn, 0.5, seeded(0), scale="none", clip=0.5, skip=skip)
    assert [norm.item() for norm in norms] == pytest.approx(expected, rel=1e-9)


@SKIP
def test_a_clipped_stage_moves_by_the_bound(forced, skip):
    net = toy()
    made = SGD(net.parameters(), lr=1.0)
    watch = Watch(made)
    forced((0, 1, 0, 1, 1, 1))
    residual_droppath_step(net, made, loss_of(net), 0.5, seeded(0), clip=0.01, skip=skip)
    for grads in watch.grads:
        total = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        assert total == pytest.approx(0.01, rel=1e-3)


def in_parts(net: nn.Module, parts: int) -> Callable[[], Tensor]:
    """The points in `parts` pieces of one size, one piece a call, over and over."""
    x, y = points()
    order = torch.randperm(400, generator=seeded(5))
    pieces = itertools.cycle(order.chunk(parts))

    def loss() -> Tensor:
        rows = next(pieces)
        return F.cross_entropy(net(x[rows]), y[rows])

    return loss


@pytest.mark.parametrize("arm", ARMS)
@SKIP
def test_R35_four_micro_batches_are_the_whole_batch(monkeypatch, arm, skip):
    calls, found = [], []
    monkeypatch.setattr(droppath, "sample_mask", lambda *a: calls.append(1) or sample_mask(*a))
    for parts in (1, 4):
        net = toy()
        made = SGD(net.parameters(), lr=0.0)
        watch = Watch(made)
        # the mixture calls its loss twice for each part: the pieces must not move on in between
        pieces = loss_of(net) if arm == "mixture" else in_parts(net, parts)
        pair = ARMS[arm][0](net, made, pieces, 0.5, seeded(0), micro_batches=parts, skip=skip)
        names = {id(p): name for name, p in net.named_parameters()}
        grads = [{names[key]: grad for key, grad in held.items()} for held in watch.grads]
        found.append((grads, pair))
    assert len(calls) == (4 if arm == "random-freeze" else 2)
    (whole, pair), (split_up, same) = found
    assert [held.keys() for held in whole] == [held.keys() for held in split_up]
    for one, other in zip(whole, split_up, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-12)
    assert same.stage1.item() == pytest.approx(pair.stage1.item(), abs=1e-12)
    assert same.stage2 is pair.stage2 or same.stage2.item() == pytest.approx(pair.stage2.item())


def test_every_stage_may_draw_a_batch_of_its_own(forced):
    net, (x, y), taken = toy(), points(), []
    pieces = itertools.cycle(range(4))

    def loss() -> Tensor:
        taken.append(i := next(pieces))
        return F.cross_entropy(net(x[i::4]), y[i::4])

    forced((0, 1, 1, 1, 1, 1), (1,) * 6)
    made = SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        residual_droppath_step(net, made, loss, 0.2, seeded(0), micro_batches=2)
    assert taken == [0, 1, 2, 3, 0, 1]  # two stages, then one


# --- skipped branches --------------------------------------------------------------------------


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = ResidualCNN(1, 3, widths=(8, 16), blocks=2).double()
    x = torch.randn(6, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    return net, x, torch.arange(6) % 3


NETS = {
    "mlp": lambda: (toy(8, 6, activation="relu"), *points(60)),
    "cnn": cnn,
}


def trained(arm: str, net: str, skip: bool, p: float = 0.4, pairs: int = 6) -> tuple:
    model, x, y = NETS[net]()
    made, masks = AdamW(model.parameters(), lr=1e-2), seeded(3)
    found = [
        ARMS[arm][0](model, made, lambda: F.cross_entropy(model(x), y), p, masks, skip=skip)
        for _ in range(pairs)
    ]
    return model, found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("arm", ARMS)
def test_skipped_and_masked_training_are_the_same(arm, net):
    (one, skipped), (other, masked) = trained(arm, net, True), trained(arm, net, False)
    assert any(pair.mask.min() == 0 for pair in skipped)
    for a, b in zip(skipped, masked, strict=True):
        assert torch.equal(a.mask, b.mask)
        assert a.stage1.item() == pytest.approx(b.stage1.item(), abs=1e-6)
        assert (a.stage2 is None) == (b.stage2 is None)
        assert a.stage2 is None or a.stage2.item() == pytest.approx(b.stage2.item(), abs=1e-6)
    assert distance(one, other) < 1e-6


@pytest.mark.parametrize("shortcut", ["plain", "decay", "post-norm"])
def test_skipped_and_masked_pairs_are_the_same_under_every_rule(shortcut):
    nets = []
    for skip in (True, False):
        torch.manual_seed(0)
        nets.append(net := ResidualMLP(6, 6, "tanh", shortcut=shortcut).double())
        made, masks = AdamW(net.parameters(), lr=1e-2), seeded(0)
        for _ in range(3):
            residual_droppath_step(net, made, loss_of(net, 40), 0.3, masks, skip=skip)
    assert distance(*nets) < 1e-6


@SKIP
def test_weights_that_the_loss_does_not_reach_or_that_are_fixed_stay(skip):
    net = toy()
    net.extra = nn.Linear(3, 3).double()
    net.stem.requires_grad_(False)
    net.blocks[2].requires_grad_(False)
    start, masks = copy.deepcopy(net), seeded(0)
    made = AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    watch = Watch(made)
    for p in (0.5, 1.0, 0.5):
        residual_droppath_step(net, made, loss_of(net, 40), p, masks, skip=skip)
    assert watch.updates(net) == [3, 3, 0, 3, 3, 3]
    for name in ("extra", "stem", "blocks.2"):
        assert same_state(net.get_submodule(name), start.get_submodule(name))
    assert not same_state(net.head, start.head)


class Spy(nn.Module):
    """A branch that counts its calls."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.calls = branch, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.branch(x)


def spied(depth: int = 6) -> tuple[nn.Module, list[Spy]]:
    net = toy(depth)
    for block in net.blocks:
        block.branch = Spy(block.branch)
    return net, [block.branch for block in net.blocks]


@pytest.mark.parametrize(
    ("skip", "calls"),
    [(True, [1, 2, 2, 1, 2, 1]), (None, [1, 2, 2, 1, 2, 1]), (False, [2] * 6)],
    ids=["skipped", "default", "masked"],
)
@pytest.mark.parametrize("arm", ["two-stage", "mixture"])
def test_a_skipped_branch_is_not_called(forced, arm, skip, calls):
    net, spies = spied()
    forced((0, 1, 1, 0, 1, 0))
    ARMS[arm][0](net, SGD(net.parameters(), lr=0.1), loss_of(net), 0.5, seeded(0), skip=skip)
    assert [spy.calls for spy in spies] == calls


@pytest.mark.parametrize("dropped", [0, 1, 2, 5])
def test_frozen_weights_get_no_gradient_computed_where_branches_are_skipped(forced, dropped):
    net, seen = toy(), []
    for i, block in enumerate(net.blocks):
        block.branch[0].weight.register_hook(lambda g, i=i: seen.append(i))
    forced(tuple(int(i != dropped) for i in range(6)))
    made = SGD(net.parameters(), lr=0.1)
    residual_droppath_step(net, made, loss_of(net), 0.5, seeded(0))
    assert sorted(seen) == list(range(6))


class Linears(nn.Module):
    """Ten linear paths above a trained offset, which costs no product."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.offset = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.Sequential(*(Residual(nn.Linear(dim, dim)) for _ in range(10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x + self.offset).square().mean()


def block_units(arm: str, p: float, skip: bool) -> float:
    """Products of one pair, in units of the forward pass of one block."""
    net, x = Linears(), torch.ones(16, 8)
    made = SGD(net.parameters(), lr=0.0)
    with FlopCounterMode(display=False) as counter:
        ARMS[arm][0](net, made, lambda: net(x), p, seeded(0), skip=skip)
    return counter.get_total_flops() / (2 * 16 * 8 * 8)


@pytest.mark.parametrize(("p", "cost"), [(0.5, 40), (0.2, 46), (0.8, 34)])
def test_R37_cost_of_a_pair(forced, p, cost):
    mask = (0,) * round(10 * p) + (1,) * round(10 - 10 * p)
    assert 10 * ARMS["two-stage"][1](p) == pytest.approx(cost)
    forced(mask)
    # Nothing below the first path is trained in stage 2, so that its input needs no gradient.
    assert block_units("two-stage", p, skip=True) == cost - 1
    forced(mask)
    assert block_units("two-stage", p, skip=False) == 60


@pytest.mark.parametrize("arm", ["droppath", "no-freeze", "mixture"])
@pytest.mark.parametrize("p", [0.5, 0.2, 0.8])
def test_R37_cost_of_the_other_arms(forced, arm, p):
    forced((0,) * round(10 * p) + (1,) * round(10 - 10 * p))
    assert block_units(arm, p, skip=True) == pytest.approx(10 * ARMS[arm][1](p))


def test_R37_cost_of_a_plain_step():
    assert block_units("two-stage", 0.0, skip=True) == 30
    assert block_units("two-stage", 0.0, skip=False) == 30


# --- in the loop: EMA, evaluation, resume ------------------------------------------------------


def pair_step(arm: str = "two-stage", p: float = 0.5, **options: object) -> Callable:
    """A step for `train.fit`: a fresh batch for each stage, masks of the state's generator.

    The optimizer is the one inside accelerate's, which would scale and skip by itself.
    """

    def step(state: TrainState, batch: tuple) -> dict[str, Tensor]:
        draws = iter(batch)

        def loss() -> Tensor:
            x, y = next(draws)
            return F.cross_entropy(state.model(x), y)

        made, amp = state.optimizer.optimizer, state.accelerator.scaler
        take = partial(ARMS[arm][0], state.model, made, loss, scaler=amp, **options)
        pair = take(p, state.generator)
        return {"loss": pair.stage1, "dropped": (pair.mask == 0).float().mean()}

    return step


def batches(pairs: int = 8, size: int = 32) -> list:
    x, y = points()
    order = torch.stack([torch.randperm(400, generator=seeded(i))[:size] for i in range(2 * pairs)])
    drawn = [(x[rows], y[rows]) for rows in order]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def state_of(net: nn.Module, lr: float = 1e-2, **options: object) -> TrainState:
    made = AdamW(net.parameters(), lr=lr)
    return make_state(net, made, cpu=True, **options)


def test_R38_the_ema_follows_pairs(forced):
    net = toy()
    state = state_of(net, ema_decay=0.999)
    before, watch = weights(net), Watch(state.optimizer.optimizer)
    state.step = 10_000  # after the warm-up of the decay
    forced((0, 1, 1, 0, 1, 1))
    fit(state, [batches(1)[0]] * 10_001, pair_step())
    assert len(watch.grads) == 2 and state.step == 10_001
    for mean, old, new in zip(state.ema.parameters(), before, net.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.999 * old + 0.001 * new, rtol=0, atol=1e-12)
        assert not torch.equal(old, new)


def test_R40_evaluation_is_never_masked():
    net, (x, _) = toy(), points()
    made, masks = AdamW(net.parameters(), lr=1e-2), seeded(0)
    for arm, _ in ARMS.values():
        for skip in (True, False):
            arm(net, made, loss_of(net), 0.5, masks, skip=skip)
    net.eval()
    bare = net(x)
    with path_mask(net, torch.ones(6)):
        assert torch.equal(net(x), bare)
    assert torch.equal(net(x), bare)
    assert all(block.mask is None and not block.skipped for block in net.blocks)


@pytest.mark.parametrize("arm", ARMS)
@SKIP
def test_a_loss_that_fails_leaves_no_mask(arm, skip):
    net = normed()

    def loss() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ARMS[arm][0](net, SGD(net.parameters(), lr=0.1), loss, 0.5, seeded(0), skip=skip)
    assert all(block.mask is None and not block.skipped for block in paths(net))
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm1d)] == [0.1, 0.1]


@pytest.mark.parametrize("arm", ARMS)
def test_fp16_scaling_in_the_loop_changes_nothing_but_the_scale(arm):
    found = []
    for amp in (None, scaler()):
        state = state_of(toy())
        state.accelerator.scaler = amp  # what accelerate holds in fp16 on a GPU
        found.append(fit(state, batches(4), pair_step(arm, clip=0.5)).net)
    assert distance(*found) < 1e-12
    assert amp.get_scale() > 1024


def resumable(seed: int) -> TrainState:
    set_seed(seed)
    net = nn.Sequential(
        nn.Linear(2, 6),
        *(Residual(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh())) for _ in range(4)),
        nn.Linear(6, 2),
    ).double()
    made = AdamW(net.parameters(), lr=1e-2)
    return make_state(
        net, made, scheduler=cosine_schedule(made, 8), ema_decay=0.9, seed=seed, cpu=True
    )


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("cut", [3, 5])
def test_a_resumed_run_is_bit_exact(tmp_path, arm, cut):
    whole = fit(resumable(0), batches(), pair_step(arm))
    save_checkpoint(tmp_path, fit(resumable(0), batches(), pair_step(arm), until=cut))
    resumed = load_checkpoint(tmp_path, resumable(9))
    assert resumed.step == cut
    fit(resumed, batches(), pair_step(arm))
    assert same_state(resumed.net, whole.net) and same_state(resumed.ema, whole.ema)
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())
    held, again = (s.optimizer.state_dict()["state"] for s in (whole, resumed))
    assert all(torch.equal(held[i][k], again[i][k]) for i in held for k in held[i])


# --- torch.compile and two processes -----------------------------------------------------------


def compiled_pairs(net: nn.Module, fast: nn.Module, forced: Callable) -> list[Pair]:
    """Four pairs with four masks, through the compiled net."""
    x, y = points(40)
    forced((1, 0, 1), (0, 1, 1), (1, 1, 0), (0, 0, 0))
    made, masks = AdamW(net.parameters(), lr=1e-2), seeded(0)
    return [
        residual_droppath_step(fast, made, lambda: F.cross_entropy(fast(x), y), 0.5, masks)
        for _ in range(4)
    ]


@pytest.mark.parametrize("in_place", [False, True])
def test_R36_four_masks_are_one_compiled_graph(forced, in_place):
    pytest.importorskip("torch._dynamo.testing", reason="no torch.compile here")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    net, eager = toy(3), toy(3)
    if in_place:
        net.compile(backend=counter)
    fast = net if in_place else torch.compile(net, backend=counter)
    found = compiled_pairs(net, fast, forced)
    assert counter.frame_count == 2  # one for all masks, one for the whole net of stage 2
    expected = compiled_pairs(eager, eager, forced)
    assert distance(net, eager) < 1e-6
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.mask, b.mask)
        assert a.stage1.item() == pytest.approx(b.stage1.item(), abs=1e-6)
    torch._dynamo.reset()


PROCESSES = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from safetensors.torch import save_file
from test_droppath import ARMS, process_run, refused
rank = int(os.environ["RANK"])
for arm in ARMS:
    state = process_run(arm)
    save_file(state.net.state_dict(), {folder!r} + f"/{{arm}}-{{rank}}.out")
with open({folder!r} + f"/refused-{{rank}}.txt", "w") as file:
    file.write(refused(rank))
state.accelerator.wait_for_everyone()
os._exit(0)  # torch takes its time to unload, and there is nothing left to do
"""


def process_run(arm: str, seed: int = 0) -> TrainState:
    """Six pairs with clipping and EMA; the same for any number of processes."""
    set_seed(0)
    net = ResidualMLP(6, 6, "tanh").double()
    made = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    state = make_state(net, made, ema_decay=0.9, seed=seed, cpu=True)
    return fit(state, batches(6), pair_step(arm, clip=0.5))


def refused(rank: int) -> str:
    """What a run says whose processes have mask generators of different seeds."""
    try:
        process_run("two-stage", seed=rank)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_R36_two_processes(tmp_path, launch):
    script = tmp_path / "run.py"
    text = PROCESSES.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    script.write_text(text)
    launch(script, tmp_path)
    for arm in ARMS:
        found = [safetensors.torch.load_file(tmp_path / f"{arm}-{rank}.out") for rank in (0, 1)]
        for name, value in process_run(arm).net.state_dict().items():
            assert torch.equal(found[0][name], found[1][name]), (arm, name)
            torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-9)
    for rank in (0, 1):
        said = (tmp_path / f"refused-{rank}.txt").read_text()
        assert said == "generator must have the same seed in every process"


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("p", "message"),
    [
        (-0.1, r"p must lie in \[0, 1\], got -0\.1"),
        (1.5, r"p must lie in \[0, 1\], got 1\.5"),
        (math.nan, r"p must lie in \[0, 1\], got nan"),
        (math.inf, r"p must lie in \[0, 1\], got inf"),
    ],
)
def test_impossible_rates_are_errors(arm, p, message):
    assert_refused(ARMS[arm][0], message, p=p)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"p": [0.5] * 5}, r"p must be one rate or one for each of 6 paths, got \[0\.5, "),
        ({"p": [[0.5] * 6]}, "p must be one rate or one for each of 6 paths"),
        ({"p": []}, r"p must be one rate or one for each of 6 paths, got \[\]"),
        ({"p": [0.1] * 5 + [1.1]}, r"p must lie in \[0, 1\], got \[0\.1, .*1\.1\]"),
        ({"p": [0.1] * 5 + [math.nan]}, r"p must lie in \[0, 1\], got .*nan"),
        (
            {"freeze": "complment"},
            "freeze must be one of complement, random, none, all, "
            'got "complment"; did you mean "complement"?',
        ),
        ({"freeze": "ranodm"}, 'freeze must .*got "ranodm"; did you mean "random"'),
        ({"freeze": "xyz"}, 'freeze must be one of .*, got "xyz"$'),
        ({"scale": "invers"}, 'scale must .*inverse, none, got "invers"; did you mean "inverse"'),
        ({"micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ({"micro_batches": -2}, "micro_batches must be at least 1, got -2"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"clip": math.nan}, "clip must be above 0, got nan"),
    ],
)
def test_impossible_arguments_are_errors(changed, message):
    assert_refused(residual_droppath_step, message, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": "invers"}, 'scale must .*inverse, none, got "invers"; did you mean "inverse"'),
        ({"micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ({"p": [0.5] * 6}, r"p must be one rate in the mixture, got \[0\.5, "),
        ({"p": [0.5] * 5}, r"p must be one rate or one for each of 6 paths, got \[0\.5, "),
    ],
)
def test_impossible_arguments_of_the_mixture_are_errors(changed, message):
    assert_refused(mixture_step, message, **changed)


def assert_refused(step: Callable, message: str, p: object = 0.5, **changed: object) -> None:
    """A ValueError, and a net that is as it was."""
    net = toy()
    start, made = copy.deepcopy(net), SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        step(net, made, loss_of(net, 20), p, seeded(0), **changed)
    assert same_state(net, start)
    assert all(block.mask is None and not block.skipped for block in net.blocks)


@pytest.mark.parametrize("arm", ARMS)
def test_a_net_without_paths_is_an_error(arm):
    net = nn.Sequential(nn.Linear(2, 2))
    made = SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="model must have Residual blocks to drop, got Sequential"):
        ARMS[arm][0](net, made, lambda: net(torch.ones(1, 2)).sum(), 0.5, seeded(0))


def test_every_arm_takes_the_same_arguments():
    """What chapters pass to one arm they can pass to all of them."""
    for arm, _ in ARMS.values():
        names = list(inspect.signature(arm).parameters)
        assert names[:5] == ["model", "optimizer", "loss_fn", "p", "generator"]
