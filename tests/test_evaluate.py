"""Neighbours, probe, fine-tuning, two clouds: known answers, scikit-learn, bad input."""

import copy
import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from mini_resdecay import evaluate
from mini_resdecay.data import load
from mini_resdecay.evaluate import (
    Probe,
    feature_sources,
    fid,
    fine_tuning_groups,
    frechet_distance,
    knn_accuracy,
    linear_probe,
    moments,
    overlap,
    standardised,
)
from mini_resdecay.train import fit, loss_step, make_state
from mini_resdecay.vit import Classifier, ViT


def clouds(n: int, seed: int = 0, dim: int = 8, classes: int = 4, apart: float = 1.0):
    """Overlapping normal clouds, one a class: x [n, dim] float32, y [n]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=generator)
    return apart * centres[y] + torch.randn(n, dim, generator=generator), y


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = load("digits", "train"), load("digits", "test")
    return (
        train.images.flatten(1).float(),
        train.labels,
        test.images.flatten(1).float(),
        test.labels,
    )


# --- sources -----------------------------------------------------------------------------------


def test_sources_read_tokens_in_three_ways_at_every_layer():
    first, second = torch.randn(2, 5, 4, 3)
    sources = feature_sources([first, second])
    assert list(sources) == [
        f"{how} {k}" for k in (0, 1) for how in ("mean_patch", "mean_all", "cls")
    ]
    torch.testing.assert_close(sources["mean_patch 1"], (second.sum(1) - second[:, 0]) / 3)
    torch.testing.assert_close(sources["mean_all 0"], first.sum(1) / 4)
    assert torch.equal(sources["cls 1"], second[:, 0])


# --- neighbours --------------------------------------------------------------------------------

BANK = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.6, 0.8], [-1, 0]])
LABELS = torch.tensor([0, 1, 1, 1, 2])
FIRST, SECOND = torch.tensor([[1, 0.05]]), torch.tensor([[0.5, 0.9]])


def finds(query: Tensor, label: int, k: int, labels: Tensor = LABELS) -> bool:
    return knn_accuracy(BANK, labels, query, torch.tensor([label]), k=k) == 1.0


def test_D18_known_answers():
    # Of three votes, 1572049.21 go to class 0 and 1568008.28 to class 1.
    assert finds(FIRST, 0, k=1) and finds(FIRST, 0, k=3)
    assert finds(SECOND, 1, k=1) and finds(SECOND, 1, k=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_D18_votes_do_not_overflow_and_are_not_rounded_in_other_types(dtype):
    """In half precision both sums are infinite, and the first class would win either way."""
    for labels, winner in ((LABELS, 0), (torch.tensor([1, 0, 0, 0, 2]), 1)):
        bank, queries = BANK.to(dtype), FIRST.to(dtype)
        found = knn_accuracy(bank, labels, queries, torch.tensor([winner]), k=3)
        assert found == knn_accuracy(
            bank.float(), labels, queries.float(), torch.tensor([winner]), k=3
        )
        assert found == 1.0 or dtype == torch.bfloat16  # its 0.9 is another number
    (x, y), (q, z) = clouds(300), clouds(90, 1)
    x, q = x.to(dtype), q.to(dtype)
    assert knn_accuracy(x, y, q, z) == knn_accuracy(x.float(), y, q.float(), z)


@given(
    n=st.integers(1, 150),
    m=st.integers(1, 300),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.01, 0.07, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_votes_are_those_of_scikit_learn(n, m, k, temperature, seed):
    k, (x, y), (q, _) = min(k, n), clouds(n, seed), clouds(m, seed + 1)
    peer = KNeighborsClassifier(
        k, weights=lambda distance: np.exp(-distance / temperature), metric="cosine"
    ).fit(x.double(), y)
    expected = torch.from_numpy(peer.predict(q.double()))
    assert knn_accuracy(x, y, q, expected, k, temperature) == 1.0


def test_only_directions_count_and_not_the_order_of_the_bank():
    (x, y), (q, z) = clouds(500), clouds(200, 1)
    order, sizes = torch.randperm(500), 2.0 ** torch.randint(-9, 9, (500, 1))
    assert knn_accuracy(x, y, q, z) == knn_accuracy((sizes * x)[order], y[order], q / 64, z)


def test_a_bank_of_many_groups_and_queries_of_many_parts():
    """Digits, 1 and 20 neighbours: more rows than are looked at in one go."""
    x, y, q, z = digits()
    for k in (1, 20):
        peer = KNeighborsClassifier(k, weights=lambda d: np.exp(-d / 0.07), metric="cosine")
        expected = torch.from_numpy(peer.fit(x.double(), y).predict(q.double()))
        assert knn_accuracy(x, y, q, expected, k) >= 1 - 1.01 / len(q)  # ties of whole pixels
    assert knn_accuracy(x, y, q, z) > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 6}, "k must be in 1…5, the rows of bank, got 6"),
        ({"k": 0}, "k must be in 1…5"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
        ({"bank_labels": LABELS[:4]}, r"must be \[n, d\] and \[n\], got \[5, 2\] and \[4\]"),
        ({"queries": torch.ones(1, 3)}, r"got \[1, 3\] and \[1\]"),
        ({"queries": torch.ones(2)}, r"got \[2\] and \[1\]"),
        ({"bank": torch.full((5, 2), math.nan)}, "features must be finite"),
        ({"queries": torch.tensor([[math.inf, 0]])}, "features must be finite"),
        ({"bank_labels": LABELS.float()}, "labels must be int64 from 0 on, got torch.float32"),
        ({"query_labels": torch.tensor([-1])}, "labels must be int64 from 0 on.*least -1"),
        ({"queries": torch.ones(0, 2), "query_labels": LABELS[:0]}, r"got \[0, 2\] and \[0\]"),
    ],
)
def test_bad_input_of_the_vote_is_named(changes, message):
    given = {"bank": BANK, "bank_labels": LABELS, "queries": FIRST, "query_labels": LABELS[:1]}
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**({"k": 1} | given | changes))


# --- linear probe ------------------------------------------------------------------------------


def test_the_probe_agrees_with_scikit_learn_on_digits():
    x, y, q, z = digits()
    scaler = StandardScaler().fit(x)
    peer = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(x), y)
    probe = linear_probe(x, y, q, z, steps=400)
    assert probe.accuracy == pytest.approx(peer.score(scaler.transform(q), z), abs=0.02)
    same = linear_probe(x, y, q, torch.from_numpy(peer.predict(scaler.transform(q))), steps=400)
    assert same.accuracy > 0.96
    assert probe.lr in evaluate.LRS and probe.weight_decay in evaluate.WEIGHT_DECAYS


def test_separable_clouds_are_separated():
    (x, y), (q, z) = clouds(300, apart=8.0), clouds(200, 1, apart=8.0)
    assert linear_probe(x, y, q, z, steps=200).accuracy == 1.0


def together(x: Tensor, y: Tensor, grid: list, steps: int) -> Tensor:
    padded = F.pad(x, (0, 1), value=1.0)
    return evaluate._logistic(padded, F.one_hot(y).float(), grid, steps, seed=0)


def test_the_loss_is_that_of_scikit_learn():
    (x, y), grid = clouds(800, apart=0.4), [(0.01, 0.0), (0.03, 0.0)]
    peer = LogisticRegression(C=math.inf, tol=1e-8, max_iter=2000).fit(x, y)
    best = log_loss(y, peer.predict_proba(x))
    weights = together(x, y, grid, steps=800)
    for w in weights:
        loss = F.cross_entropy(x @ w[:, :-1].T + w[:, -1], y).item()
        assert loss == pytest.approx(best, abs=1e-5)
        torch.testing.assert_close(
            (w - w.mean(0))[:, :-1], torch.from_numpy(peer.coef_).float(), atol=0.02, rtol=0
        )


def one_alone(x: Tensor, y: Tensor, lr: float, weight_decay: float, steps: int) -> Tensor:
    """The reference: one layer, AdamW of torch, autograd; the same batches."""
    net = nn.Linear(x.shape[1], int(y.max()) + 1)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": [net.weight]}, {"params": [net.bias], "weight_decay": 0.0}],
        lr=lr,
        weight_decay=weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (1024,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return torch.cat([net.weight, net.bias[:, None]], 1).detach()


def test_training_the_grid_together_is_training_each_alone():
    (x, y), grid = clouds(3000), [(1e-3, 0.0), (3e-2, 0.5), (1e-2, 1e-2)]
    found = together(x, y, grid, steps=40)
    for weights, (lr, weight_decay) in zip(found, grid, strict=True):
        torch.testing.assert_close(
            weights, one_alone(x, y, lr, weight_decay, 40), atol=1e-5, rtol=1e-4
        )


def test_D19_the_choice_never_sees_the_test_rows():
    (x, y), (q, z), (other, labels) = clouds(400), clouds(150, 1), clouds(90, 2, apart=-3.0)
    sources, seen = {"a": x, "b": x.flip(1) ** 2}, []
    original = evaluate._fit_and_score

    def watched(train_x, train_y, test_x, test_y, grid, *rest):
        seen.append((len(train_x), len(test_x), len(grid)))
        return original(train_x, train_y, test_x, test_y, grid, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_fit_and_score", watched)
        one = linear_probe(sources, y, {"a": q, "b": q.flip(1) ** 2}, z, steps=60)
    assert seen == [(360, 40, 15), (360, 40, 15), (400, 150, 1)]
    two = linear_probe(sources, y, {"a": other, "b": other.flip(1) ** 2}, labels, steps=60)
    assert one[1:] == two[1:]
    assert one.accuracy > 0.6 > two.accuracy


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
def test_D19_the_scale_of_a_feature_says_nothing(scale):
    (x, y), (q, z) = clouds(300), clouds(100, 1)
    factors = torch.where(torch.arange(8) % 2 == 0, scale, 1.0)
    expected = linear_probe(x, y, q, z, steps=50)
    assert linear_probe(x * factors, y, q * factors, z, steps=50) == expected
    assert linear_probe(x * -3.7, y, q * -3.7, z, steps=50).accuracy == expected.accuracy


@pytest.mark.parametrize("seed", range(10))
def test_a_class_of_one_row_may_be_held_out(seed):
    x, y = clouds(20)
    y[0] = 9
    assert 0 <= linear_probe(x, y, x, y, steps=3, seed=seed).accuracy <= 1


def test_constant_features_add_nothing():
    (x, y), (q, z) = clouds(300), clouds(100, 1)
    wide, wide_q = (torch.cat([a, torch.full((len(a), 2), 0.1)], 1) for a in (x, q))
    found = linear_probe(wide, y, wide_q, z, steps=50)
    assert found.accuracy == pytest.approx(linear_probe(x, y, q, z, steps=50).accuracy, abs=1e-9)


def test_the_best_source_and_rate_are_chosen_and_the_same_each_time():
    (x, y), (q, z) = clouds(400), clouds(200, 1)
    noise = torch.randn(600, 8)
    train, test = {"noise": noise[:400], "signal": x}, {"noise": noise[400:], "signal": q}
    found = linear_probe(train, y, test, z, steps=80)
    assert isinstance(found, Probe) and found.source == "signal"
    assert found == linear_probe(train, y, test, z, steps=80)
    assert found[:3] == linear_probe(x, y, q, z, steps=80)[:3]
    slow = linear_probe(x, y, q, z, lrs=[1e-9, 1e-2], weight_decays=[0.0], steps=80)
    assert slow.lr == 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_probe_computes_in_float32(dtype):
    (x, y), (q, z) = clouds(200), clouds(100, 1)
    x, q = x.to(dtype), q.to(dtype)
    assert linear_probe(x, y, q, z, steps=30) == linear_probe(x.float(), y, q.float(), z, steps=30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_x": torch.ones(9, 2), "train_y": torch.zeros(9).long()},
            "at least 10 rows, got 9",
        ),
        ({"train_x": torch.full((20, 2), math.nan)}, "features must be finite"),
        ({"test_x": torch.ones(3, 5)}, r"got \[3, 5\] and \[3\]"),
        ({"train_y": torch.zeros(19).long()}, r"got \[20, 2\] and \[19\]"),
        ({"test_x": {"a": torch.ones(3, 2)}}, r"test_x must have the sources \[''\], got \['a'\]"),
        ({"train_x": {}, "test_x": {}}, r"test_x must have the sources \[\]"),
        ({"test_y": torch.tensor([0, 1, 7])}, "test_y must be classes of train_y, 0…1, got 7"),
    ],
)
def test_bad_input_of_the_probe_is_named(changes, message):
    given = {
        "train_x": torch.randn(20, 2), "train_y": torch.arange(20) % 2,
        "test_x": torch.randn(3, 2), "test_y": torch.zeros(3).long(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_probe(**(given | changes))


# --- fine-tuning -------------------------------------------------------------------------------


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ViT(8, 4, 16, 3, 4, channels=1), classes=4)


def test_rates_fall_from_the_head_down_to_the_stem():
    net = classifier()
    names = {p: name for name, p in net.named_parameters()}
    groups = fine_tuning_groups(net, lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    rates = {names[p]: g["lr"] / 1e-3 for g in groups for p in g["params"]}
    expected = {"head": 1, "vit.norm": 1, "vit.blocks.5": 0.5, "vit.blocks.4": 0.5}
    expected |= {"vit.blocks.3": 0.25, "vit.blocks.1": 0.125, "vit.blocks.0": 0.125}
    expected |= {"vit.blocks.2": 0.25, "vit.stem": 0.0625}
    for name, rate in rates.items():
        part = next(part for part in expected if name.startswith(f"{part}."))
        assert rate == pytest.approx(expected[part]), name
    assert len(rates) == len(names)
    decayed = {names[p] for g in groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert "head.weight" in decayed and "head.bias" not in decayed


def test_fine_tuning_learns_and_moves_the_stem_least():
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = 2 * (images[:, 0, :4].mean((1, 2)) > 0.5) + (images[:, 0, :, :4].mean((1, 2)) > 0.5)
    net, start = classifier(), classifier()
    state = make_state(net, torch.optim.AdamW(fine_tuning_groups(net, 3e-3)), cpu=True)
    step = loss_step(lambda state, batch: F.cross_entropy(state.model(batch[0]), batch[1]))
    fit(state, [(images, labels)] * 40, step, every=1, quiet=True)
    assert state.history[-1]["loss"] < 0.7 * state.history[0]["loss"]
    stem, last = (
        (module(net) - module(start)).abs().mean()
        for module in (
            lambda n: n.vit.stem.embed.weight,
            lambda n: n.vit.blocks[5].branch.out.weight,
        )
    )
    assert last > 2 * stem > 0


def test_bad_input_of_fine_tuning_is_named():
    with pytest.raises(ValueError, match=r"layer_decay must lie in \(0, 1\], got 0.0"):
        fine_tuning_groups(classifier(), 1e-3, layer_decay=0.0)
    with pytest.raises(ValueError, match="net must be a Classifier on a ViT.*got Linear"):
        fine_tuning_groups(nn.Linear(2, 2), 1e-3)


# --- Fréchet distance --------------------------------------------------------------------------


def normal(mean: list, covariance: list) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean).double(), torch.tensor(covariance, dtype=torch.float64)


def test_D17_known_answers():
    one, four = (torch.zeros(3), torch.eye(3)), (torch.ones(3), 4 * torch.eye(3))
    assert frechet_distance(one, four) == pytest.approx(6, abs=1e-12)
    a = normal([0, 0], [[2, 0.5], [0.5, 1]])
    b = normal([1, -1], [[1, -0.3], [-0.3, 2]])
    assert frechet_distance(a, b) == pytest.approx(2.575425893305, abs=1e-11)
    assert frechet_distance(b, a) == pytest.approx(2.575425893305, abs=1e-11)


@given(n=st.integers(2, 60), dim=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_D17_equal_clouds_are_at_no_distance(n, dim, seed):
    x = clouds(n, seed, dim)[0]
    assert 0 <= frechet_distance(x, x) < 1e-8
    assert frechet_distance(x, x + 2) == pytest.approx(4 * dim, rel=1e-5)


def test_D17_features_and_their_moments_give_what_scipy_gives():
    x, y = clouds(300)[0], 2 * clouds(200, 1)[0] + 1
    a, b = ((z.double().mean(0), torch.from_numpy(np.cov(z.double().T))) for z in (x, y))
    root = sqrtm((a[1] @ b[1]).numpy()).real
    expected = (a[0] - b[0]).square().sum() + (a[1] + b[1]).trace() - 2 * np.trace(root)
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(a, y) == pytest.approx(frechet_distance(x, b), rel=1e-12)


@pytest.mark.parametrize(
    ("cloud", "message"),
    [
        (torch.ones(1, 2), "n >= 2"),
        (torch.ones(4), r"features must be \[n, d\] of one width, got \[4\]"),
        (torch.ones(4, 2, 2), r"features must be \[n, d\].*got \[4, 2, 2\]"),
        (torch.full((4, 2), math.nan), "must be finite"),
        ((torch.zeros(3), torch.eye(2)), r"got mean \[3\] and covariance \[2, 2\]"),
        ((torch.full((2,), math.nan), torch.eye(2)), "must be finite"),
        ((torch.zeros(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "symmetric covariance"),
        ((torch.zeros(2), -torch.eye(2)), "covariance must have no negative eig.*got -1 in b"),
        (normal([0, 0], [[1, 5], [5, 1]]), "covariance must have no negative eig.*got -4 in b"),
        (np.ones((9, 2)), "b must be a tensor of features, or a pair of tensors, got ndarray"),
        ((np.zeros(2), np.eye(2)), "b must be a tensor of features, or a pair of .* got tuple"),
        (torch.randn(5, 3), "b must have the width of a, 2, got 3"),
    ],
)
def test_bad_clouds_are_named(cloud, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(torch.randn(9, 2), copy.copy(cloud))


# --- moments in one pass ------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    dim=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_D17_moments_of_batches_are_those_of_numpy(sizes, dim, offset, seed):
    x = clouds(sum(sizes) + 1, seed, dim)[0].double() + offset
    mean, covariance = moments(x.split([*sizes, 1]))
    assert mean.dtype == covariance.dtype == torch.float64
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(x.numpy().T).reshape(dim, dim), atol=1e-11)


def test_moments_keep_their_digits_far_from_zero():
    x = clouds(3000)[0]
    near, far = moments([x.double()]), moments((x.double() + 1e6).split(700))
    torch.testing.assert_close(far[1], near[1], atol=1e-8, rtol=0)
    half = moments(x.half().split(700))
    assert torch.equal(half[1], moments(x.half().double().split(700))[1])


def test_moments_forget_the_batches():
    alive: list[weakref.ref] = []

    def batches() -> Iterator[Tensor]:
        for seed in range(20):
            x = clouds(50, seed)[0]
            alive.append(weakref.ref(x))
            assert sum(ref() is not None for ref in alive) <= 2  # this one and the last
            yield x
            del x

    found = moments(batches())
    whole = torch.cat([clouds(50, seed)[0] for seed in range(20)])
    assert frechet_distance(found, whole) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must hold at least one batch, got none"),
        ([torch.ones(3)], r"features must be \[n, d\] of one width, got \[3\]"),
        ([torch.ones(0, 3)], r"of one width, got \[0, 3\]"),
        ([torch.ones(2, 3), torch.ones(2, 4)], r"of one width, got \[2, 4\]"),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        moments(batches)


class Pixels(nn.Module):
    """Features that anyone can check: the images themselves."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_D17_distance_is_that_of_torchmetrics():
    real, made = clouds(400, 0, 12)[0], 0.7 * clouds(300, 1, 12)[0] + 0.3
    found = fid(Pixels(), real.view(-1, 3, 2, 2).split(90), made.view(-1, 3, 2, 2).split(90))
    assert found == pytest.approx(frechet_distance(real, made), rel=1e-5)
    by_hand = FrechetInceptionDistance(Pixels())
    by_hand.update(real.view(-1, 3, 2, 2), real=True)
    by_hand.update(made.view(-1, 3, 2, 2), real=False)
    assert found == pytest.approx(by_hand.compute().item(), rel=1e-6)


def test_a_net_of_unknown_width_is_named():
    with pytest.raises(ValueError, match="inception must have num_features.*got Flatten"):
        fid(nn.Flatten(), [], [])


# --- overlap of two clouds ----------------------------------------------------------------------


def test_overlap_known_answer():
    """On a line: balls of radius 1 around 0, 1, 2 and of 8 around 10; then of 2, 2 and 5."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    made = torch.tensor([[1.5], [3.5], [8.5]])
    found = overlap(real, made, k=1)
    # 1.5 is in the balls of 1 and 2; 3.5 and 8.5 in that of 10 alone: 4 balls for 3 points.
    assert found.precision == 1.0 and found.density == pytest.approx(4 / 3)
    # From 1.5: 1 and 2 and 0; from 3.5: 2; from 8.5: 10.
    assert found.recall == 1.0
    assert found.coverage == 0.75  # nothing made lies within 1 of 0


@given(
    n=st.integers(6, 60),
    m=st.integers(6, 60),
    k=st.integers(1, 5),
    apart=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_overlap_is_what_neighbours_of_scikit_learn_say(n, m, k, apart, seed):
    real, made = clouds(n, seed, 3)[0].double(), clouds(m, seed + 1, 3)[0].double() + apart
    trees = [NearestNeighbors().fit(x) for x in (real, made)]
    radii = [tree.kneighbors(n_neighbors=k)[0][:, -1] for tree in trees]

    def in_balls(points: Tensor, tree: NearestNeighbors, radius: np.ndarray) -> np.ndarray:
        distance, index = tree.kneighbors(points, n_neighbors=len(radius))
        return (distance <= radius[index]).sum(1)

    in_real, in_made = in_balls(made, trees[0], radii[0]), in_balls(real, trees[1], radii[1])
    nearest = trees[1].kneighbors(real, n_neighbors=1)[0][:, 0]
    expected = (in_real > 0).mean(), (in_made > 0).mean(), in_real.mean() / k
    assert overlap(real, made, k) == pytest.approx((*expected, (nearest <= radii[0]).mean()))


def test_overlap_tells_missing_modes_from_bad_points():
    real = torch.cat([clouds(400, 0)[0], clouds(400, 1)[0] + 30])
    half, wild = clouds(800, 2)[0], torch.cat([clouds(400, 3)[0], clouds(400, 4)[0] - 30])
    found = overlap(real, half)
    assert found.precision > 0.9 and found.recall < 0.55 and found.coverage < 0.55
    found = overlap(real, torch.cat([real + 0.01, wild]))
    assert found.precision < 0.8 and found.recall > 0.95 and found.coverage > 0.95
    same = overlap(clouds(800, 5)[0], clouds(800, 6)[0])
    assert min(same) > 0.8 and same.density == pytest.approx(1, abs=0.15)
    nothing = overlap(real, real - 1000)
    assert nothing == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"made": torch.ones(9, 3)}, r"made must be finite features \[n, d\], got \[9, 3\]"),
        ({"real": torch.ones(9)}, r"real must be finite features \[n, d\], got \[9\]"),
        ({"made": torch.full((9, 2), math.nan)}, "made must be finite features"),
        ({"k": 0}, "k must be in 1…8, the other rows of real, got 0"),
        ({"k": 7, "made": torch.ones(7, 2)}, "k must be in 1…6, the other rows of made, got 7"),
    ],
)
def test_bad_input_of_overlap_is_named(changes, message):
    given = {"real": torch.randn(9, 2), "made": torch.randn(9, 2), "k": 3}
    with pytest.raises(ValueError, match=message):
        overlap(**(given | changes))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        *({"lrs": lrs} for lrs in ((), (0.0,), (math.nan,), (1e-3, math.inf))),
        *({"weight_decays": decays} for decays in ((), (-0.1,), (math.nan,), (0.0, math.inf))),
    ],
)
def test_a_grid_that_trains_nothing_is_named(wrong):
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    with pytest.raises(ValueError, match="steps must be at least 1, lrs above 0, .*got"):
        linear_probe(x, y, x, y, **wrong)


def test_standardised_by_the_first_and_constants_are_zero():
    x, y = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[5.0, 7.0]])
    fit, new = standardised(x, y)
    torch.testing.assert_close(fit, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]) * 0.5**0.5)
    torch.testing.assert_close(new, torch.tensor([[3.0, 0.0]]) * 0.5**0.5)
