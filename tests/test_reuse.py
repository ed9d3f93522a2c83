"""The diagnosis: known answers (sheet R, 6), independent oracles, properties, bad input."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from mini_resdecay.cnn import ResidualCNN
from mini_resdecay.reuse import (
    block_influence,
    centred_cosine,
    cka_null,
    cosine,
    debiased_cka,
    effective_rank,
    keep_random,
    layer_features,
    linear_cka,
    logit_lens,
    map_rebound,
    mean_path_length,
    node_correlation,
    node_distance,
    participation_ratio,
    path_share,
    probe_accuracy,
    probe_weights,
    rank_entropy,
    rebound,
    remove_top_component,
    residual_norm,
    returning_nodes,
    similarity_map,
    skip_one,
)
from mini_resdecay.shortcuts import Residual, path_mask, paths
from mini_resdecay.toy import ResidualMLP, accuracy, spiral

pytestmark = pytest.mark.filterwarnings("ignore:debiased CKA is noisy")

P4 = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
P6 = torch.cat([P4, torch.tensor([[1.0, 1], [-1, -1]], dtype=torch.float64)])
SHIFT = torch.tensor([10.0, 0], dtype=torch.float64)
MEASURES = {
    "cosine": cosine,
    "centred cosine": centred_cosine,
    "linear CKA": linear_cka,
    "debiased CKA": debiased_cka,
}
FEW = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10_000)


def turn(degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def orthogonal(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def near(value: float, tolerance: float = 1e-9):
    return pytest.approx(value, abs=tolerance)


# --- similarity: known answers -----------------------------------------------------------------


@pytest.mark.parametrize("y", [P4, -P4, P4 @ turn(90), 7 * P4, P4 + SHIFT])
def test_R01_cka_of_equal_features(y):
    assert linear_cka(P4, y) == near(1.0, 1e-12)


def test_R01_cosine_of_turned_and_mirrored_points():
    assert cosine(P4, P4 @ turn(90)) == near(0.0, 1e-15)
    assert cosine(P4, -P4) == near(-1.0, 1e-15)


def test_R02_cka_with_one_column():
    assert linear_cka(P4, P4[:, :1]) == near(0.7071067811865475, 1e-12)


def test_R03_nested_and_overlapping_columns():
    x = normal(400, 6)
    q = torch.linalg.qr(x - x.mean(0)).Q
    assert linear_cka(q[:, :4], q[:, :1]) == near(0.5)
    assert linear_cka(q, q[:, :3]) == near(0.70710678, 1e-8)
    assert linear_cka(q[:, :3], q[:, 3:]) < 1e-25
    assert linear_cka(q[:, :4], q[:, 2:6]) == near(0.5)


def test_R04_cka_feels_anisotropic_scaling():
    scaled = P4 @ torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert linear_cka(P4, scaled) == near(0.8574929257)


def test_R05_offset_trap():
    x, y = P4 + SHIFT, P4 @ turn(90) + SHIFT
    assert cosine(x, y) == near(0.9950371902)
    assert cosine(x, y, centre=True) == near(0.0, 1e-12)


def test_R06_one_dimension():
    x = torch.arange(5, dtype=torch.float64)[:, None]
    assert linear_cka(x, x**2) == near(0.9195402298850575, 1e-12)
    assert debiased_cka(x, x**2) == near(0.9623608058)


def test_R07_debiased_known_answers():
    assert linear_cka(P6, P6[:, :1]) == near(0.7905694150)
    assert debiased_cka(P6, P6[:, :1]) == near(0.7637626158)
    assert debiased_cka(P6, P6) == near(1.0, 1e-12)


def test_R07_debiased_refuses_four_points():
    with pytest.raises(ValueError, match=r"(at least|>=) 5 .*got 4"):
        debiased_cka(P4, P4)
    with pytest.raises(ValueError, match=r"(at least|>=) 5 .*got 4"):
        similarity_map([P4, P4], debiased_cka)


def test_R08_debiased_is_blind_to_shifts():
    x, y = normal(60, 7, seed=1), normal(60, 3, seed=2)
    value = debiased_cka(x, y)
    assert debiased_cka(x - x.mean(0), y - y.mean(0)) == near(value)
    assert debiased_cka(x + 5, y - 3) == near(value)


def test_R09_null_level():
    plain, debiased = [], []
    for seed in range(100):
        x, y = normal(2, 400, 32, seed=seed)
        plain.append(linear_cka(x, y))
        debiased.append(debiased_cka(x, y))
    assert np.mean(plain) == near(0.0741, 0.0015)
    assert cka_null(400, 32, 32) == near(32 / 432, 1e-12)
    assert abs(np.mean(debiased)) < 0.002
    wide = [linear_cka(*normal(2, 64, 128, seed=seed)) for seed in range(100)]
    assert np.mean(wide) == near(0.667, 0.004)


def test_R10_detour():
    e1, e2 = torch.eye(2, dtype=torch.float64)
    profile = [cosine(e1[None], h[None]) for h in (e1, e1 + e2, e1)]
    assert profile == pytest.approx([1, 0.70710678, 1], abs=1e-8)
    assert rebound(profile) == near(0.29289322, 1e-8)
    assert rebound([1, 0.8, 0.6]) == 0
    assert rebound([1, 0.9, 0.5, 0.6, 0.55, 0.8]) == near(0.3, 1e-12)
    assert rebound([0.37]) == 0


def test_R11_cka_does_not_see_a_rotation():
    states = [P4, P4 @ turn(45), P4 @ turn(90)]
    assert similarity_map(states, linear_cka)[0].tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    expected = [1, 0.70710678, 0]
    assert similarity_map(states, cosine)[0].tolist() == pytest.approx(expected, abs=1e-8)


def test_random_walk_reference():
    """Sheet 5.6, d >> n: cosine 1 / sqrt(k+1), debiased CKA 1 / (k+1), plain CKA stays above .9."""
    walk = list(torch.cumsum(normal(4, 200, 2048), 0))
    assert similarity_map(walk, cosine)[0, 1:].tolist() == pytest.approx(
        [0.7071, 0.5774, 0.5], abs=0.01
    )
    assert similarity_map(walk, debiased_cka)[0, 1:].tolist() == pytest.approx(
        [1 / 2, 1 / 3, 1 / 4], abs=0.03
    )
    assert (similarity_map(walk, linear_cka)[0, 1:] > 0.9).all()


# --- similarity: independent oracles -----------------------------------------------------------


@given(n=st.integers(2, 20), d=st.integers(1, 8), seed=seeds)
@FEW
def test_cosine_equals_sklearn(n, d, seed):
    x, y = normal(2, n, d, seed=seed)
    assert cosine(x, y) == near(np.diag(cosine_similarity(x, y)).mean(), 1e-12)
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = np.diag(cosine_similarity(xc, yc)).mean()
    assert cosine(x, y, centre=True) == near(expected, 1e-10)
    assert centred_cosine(x, y) == near(expected, 1e-10)


def test_cosine_equals_torchmetrics():
    from torchmetrics.functional import cosine_similarity as torchmetrics_cosine

    x, y = normal(2, 50, 6)
    assert cosine(x, y) == near(torchmetrics_cosine(x, y, reduction="mean").item(), 1e-6)


@given(n=st.integers(3, 20), p=st.integers(1, 8), q=st.integers(1, 8), seed=seeds)
@FEW
def test_linear_cka_equals_hsic_with_centring_matrices(n, p, q, seed):
    x, y = normal(n, p, seed=seed).numpy(), normal(n, q, seed=seed + 1).numpy()
    h = np.eye(n) - np.ones((n, n)) / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    expected = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == near(expected)


def hsic_u_statistic(k: np.ndarray, m: np.ndarray) -> float:
    """Unbiased HSIC by its definition: the mean over all quadruples of distinct indices."""
    terms = [
        k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q]
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return float(np.mean(terms))


@pytest.mark.parametrize(("n", "p", "q", "seed"), [(5, 2, 3, 0), (5, 1, 1, 1), (6, 3, 2, 2)])
def test_debiased_cka_equals_the_u_statistic(n, p, q, seed):
    x, y = normal(n, p, seed=seed).numpy(), normal(n, q, seed=seed + 9).numpy()
    k, m = x @ x.T, y @ y.T
    product = hsic_u_statistic(k, k) * hsic_u_statistic(m, m)
    expected = hsic_u_statistic(k, m) / math.sqrt(product)
    assert debiased_cka(torch.from_numpy(x), torch.from_numpy(y)) == near(expected)


# --- similarity: properties --------------------------------------------------------------------

INVARIANCES = {  # name: (map of x [n, d], measures that must not notice it)
    "turn of one side": (lambda x, s: x @ orthogonal(x.shape[1], s), ("linear", "debiased")),
    "scale of one side": (lambda x, s: 0.01 * (s + 1) * x, ("all",)),
    "shift of one side": (lambda x, s: x + normal(x.shape[1], seed=s),
                          ("centred", "linear", "debiased")),
}  # fmt: skip


@given(n=st.integers(6, 30), d=st.integers(2, 8), seed=seeds)
@FEW
@pytest.mark.parametrize("change", INVARIANCES)
def test_invariance(change, n, d, seed):
    x, y = normal(2, n, d, seed=seed)
    function, kinds = INVARIANCES[change]
    for name, measure in MEASURES.items():
        if "all" in kinds or name.split()[0] in kinds:
            assert measure(function(x, seed), y) == near(measure(x, y), 1e-7), name


@given(n=st.integers(6, 30), d=st.integers(2, 8), seed=seeds)
@FEW
def test_turning_both_sides_changes_nothing(n, d, seed):
    x, y = normal(2, n, d, seed=seed)
    q = orthogonal(d, seed)
    for name, measure in MEASURES.items():
        assert measure(x @ q, y @ q) == near(measure(x, y), 1e-8), name


@given(n=st.integers(6, 30), d=st.integers(2, 8), seed=seeds)
@FEW
def test_bounds_symmetry_and_order_of_points(n, d, seed):
    x, y = normal(2, n, d, seed=seed)
    order = np.random.default_rng(seed).permutation(n)
    for name, measure in MEASURES.items():
        value = measure(x, y)
        assert isinstance(value, float), name
        assert measure(y, x) == near(value, 1e-12), name
        assert measure(x[order], y[order]) == near(value), name
        assert measure(x, x) == near(1.0), name
    assert -1 - 1e-12 <= cosine(x, y) <= 1 + 1e-12
    assert -1e-12 <= linear_cka(x, y) <= 1 + 1e-12


def test_debiased_is_not_clipped():
    values = [debiased_cka(*normal(2, 64, 32, seed=seed)) for seed in range(20)]
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("name", MEASURES)
def test_tokens_count_as_rows(name):
    x, y = normal(2, 10, 6, 4)
    flat = MEASURES[name](x.reshape(60, 4), y.reshape(60, 4))
    assert MEASURES[name](x, y) == near(flat, 1e-12)


def test_float32_features_are_measured_in_float64():
    x, y = normal(2, 50, 6).float()
    for name, measure in MEASURES.items():
        assert measure(x, y) == near(measure(x.double(), y.double()), 1e-12), name


def test_a_row_without_length_is_left_out_of_the_cosine():
    x, y = normal(2, 10, 4)
    expected = cosine(x[1:], y[1:])
    x[0] = 0
    with pytest.warns(UserWarning, match=r"\b1\b"):
        assert cosine(x, y) == near(expected, 1e-12)


# --- maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(("n", "d"), [(40, 7), (12, 30)])
def test_map_equals_pairwise_calls(name, n, d):
    features = [normal(n, d, seed=seed) + seed for seed in range(6)]
    found = similarity_map(features, MEASURES[name])
    assert found.shape == (6, 6) and found.dtype == torch.float64
    expected = [[MEASURES[name](x, y) for y in features] for x in features]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_map_default_is_linear_cka_and_takes_any_measure():
    features = [normal(10, 3, seed=seed) for seed in range(3)]
    assert torch.equal(similarity_map(features), similarity_map(features, linear_cka))

    def distance(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).norm())

    found = similarity_map(features, distance)
    assert found[0, 1].item() == near(distance(features[0], features[1]), 1e-12)


def test_map_of_layers_with_unlike_widths():
    features = [normal(30, d, seed=d) for d in (3, 5, 9)]
    for measure in (linear_cka, debiased_cka):
        found = similarity_map(features, measure)
        assert found[0, 2].item() == near(measure(features[0], features[2]), 1e-10)


@given(layers=st.integers(1, 6), n=st.integers(6, 20), d=st.integers(2, 6), seed=seeds)
@FEW
def test_maps_are_symmetric_with_unit_diagonal(layers, n, d, seed):
    features = list(normal(layers, n, d, seed=seed))
    for name, measure in MEASURES.items():
        found = similarity_map(features, measure)
        assert torch.allclose(found, found.T, rtol=0, atol=1e-12), name
        assert torch.allclose(found.diagonal(), torch.ones(layers, dtype=torch.float64)), name


# --- rebound -----------------------------------------------------------------------------------

profiles = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20)


@given(profile=profiles)
@FEW
def test_rebound_is_the_largest_rise(profile):
    rises = [b - a for a, b in itertools.combinations_with_replacement(profile, 2)]
    assert rebound(profile) == near(max(rises), 1e-12)
    falls = all(b <= a for a, b in itertools.pairwise(profile))
    assert (rebound(profile) == 0) == falls
    assert rebound(profile) >= 0


@given(profile=profiles, shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
@FEW
def test_rebound_scales_and_forgets_offsets(profile, shift, scale):
    moved = [scale * value + shift for value in profile]
    assert rebound(moved) == near(scale * rebound(profile), 1e-9)
    assert rebound(torch.tensor(profile, dtype=torch.float64)) == near(rebound(profile), 1e-12)


def test_map_rebound_is_the_mean_over_anchors():
    s = torch.tensor([[1, 0.5, 0.9], [0.5, 1, 0.2], [0.9, 0.2, 1]], dtype=torch.float64)
    assert map_rebound(s) == near((0.4 + 0.0) / 2, 1e-12)  # anchors 0 and 1, sheet 3.6


# --- nodes -------------------------------------------------------------------------------------


def two_layers(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [x[:, None].double(), y[:, None].double()]


def test_R12_permuted_points_have_the_same_histogram_but_no_correlation():
    x = torch.linspace(-1, 1, 400, dtype=torch.float64)
    shuffled = x[np.random.default_rng(0).permutation(400)]
    assert node_distance(two_layers(x, shuffled))[0, 0, 1] == 0
    assert abs(node_correlation(two_layers(x, shuffled))[0, 0, 1]) < 0.2


def test_R12_shift_and_scale_are_standardised_away():
    x = torch.tensor([0.0, 1, 2, 3])
    assert node_distance(two_layers(x, x + 2))[0, 0, 1].item() == near(0.0, 1e-12)
    assert node_distance(two_layers(x, 5 * x))[0, 0, 1].item() == near(0.0, 1e-12)


def test_node_distance_equals_scipy():
    features = list(normal(4, 50, 3))
    features[2] = features[2] ** 3 + 1
    found = node_distance(features)
    assert found.shape == (3, 4, 4) and found.dtype == torch.float64
    for j, a, b in itertools.product(range(3), range(4), range(4)):
        z = [scipy.stats.zscore(features[i][:, j].numpy()) for i in (a, b)]
        assert found[j, a, b].item() == near(scipy.stats.wasserstein_distance(*z), 1e-10)


def test_node_correlation_equals_numpy():
    features = list(normal(4, 50, 3))
    found = node_correlation(features)
    assert found.shape == (3, 4, 4)
    for j in range(3):
        expected = np.corrcoef(np.stack([f[:, j].numpy() for f in features]))
        assert np.abs(found[j].numpy() - expected).max() < 1e-10


def test_scale_of_the_distance_between_equal_laws():
    """Sheet 3.7: two samples of 400 from N(0, 1): mean 0.089, 95th percentile 0.148."""
    raw = [
        scipy.stats.wasserstein_distance(*normal(2, 400, seed=seed).numpy()) for seed in range(400)
    ]
    assert np.mean(raw) == near(0.089, 0.005)
    assert np.quantile(raw, 0.95) == near(0.148, 0.02)
    found = node_distance(list(normal(2, 400, 400)))[:, 0, 1]  # z-scored: mean and sd are taken out
    assert 0.03 < found.mean() < 0.089


def returning() -> list[torch.Tensor]:
    """Node 0 comes back point by point, node 1 only as a histogram, node 2 never leaves."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal(400))
    two_peaks = torch.sign(x) + 0.01 * x
    shuffled = x[rng.permutation(400)]
    columns = [(x, two_peaks, x), (x, two_peaks, shuffled), (x, x, x)]
    return [torch.stack(layer, 1) for layer in zip(*columns, strict=True)]


def test_returning_nodes():
    assert returning_nodes(returning()).tolist() == [True, True, False]
    assert returning_nodes(returning(), rho=0.9).tolist() == [True, False, False]


def test_two_layers_cannot_return():
    assert not returning_nodes(returning()[:2]).any()


def test_shuffling_each_layer_keeps_returns_by_histogram_only():
    rng = np.random.default_rng(1)
    shuffled = [layer[rng.permutation(400)] for layer in returning()]
    assert returning_nodes(shuffled).tolist() == [True, True, False]
    assert not returning_nodes(shuffled, rho=0.9).any()


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_node_that_dies_in_one_layer_has_not_returned_there(dead):
    features = returning()
    assert returning_nodes(features)[0]
    features[dead][:, 0] = 0.0
    assert returning_nodes(features).tolist() == [False, True, False]


def test_returning_takes_any_two_layers_with_another_between():
    x, two_peaks = returning()[0][:, :1], returning()[1][:, :1]
    assert returning_nodes([x, x, two_peaks, two_peaks, x]).tolist() == [True]
    assert returning_nodes([two_peaks, x, x, two_peaks]).tolist() == [True]
    assert returning_nodes([x, x, two_peaks, two_peaks]).tolist() == [False]
    assert returning_nodes([x, two_peaks, x**3]).tolist() == [False]


def test_a_dead_node_is_not_scored():
    features = returning()
    for layer in features:
        layer[:, 0] = 3.0
    assert returning_nodes(features).tolist() == [False, True, False]
    assert node_distance(features)[0].isnan().all()
    assert not node_distance(features)[1:].isnan().any()


# --- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "after", "influence", "norm"),
    [
        ((3.0, 4), (7.0, 1), 0.29289322, 1.0),
        ((3.0, 4), (9.0, 12), 0.0, 2.0),
        ((3.0, 4), (-3.0, -4), 2.0, 2.0),
    ],
)
def test_R13_block_influence_and_residual_norm(h, after, influence, norm):
    features = [torch.tensor([row], dtype=torch.float64) for row in (h, after)]
    assert block_influence(features).tolist() == pytest.approx([influence], abs=1e-8)
    assert residual_norm(features).tolist() == pytest.approx([norm], abs=1e-12)


def test_block_measures_by_numpy():
    features = [normal(30, 4, seed=seed) for seed in range(4)]
    influence = [
        1 - np.diag(cosine_similarity(a, b)).mean() for a, b in itertools.pairwise(features)
    ]
    norms = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in itertools.pairwise(features)]
    assert block_influence(features).tolist() == pytest.approx(influence, abs=1e-12)
    assert residual_norm(features).tolist() == pytest.approx(norms, abs=1e-12)


@given(q=st.floats(0.01, 5), angle=st.floats(0, 360))
@FEW
def test_cosine_after_an_orthogonal_step(q, angle):
    h = torch.tensor([[1.0, 0]], dtype=torch.float64) @ turn(angle)
    features = [h, h + q * h @ turn(90)]
    assert block_influence(features)[0].item() == near(1 - 1 / math.sqrt(1 + q * q), 1e-12)
    assert residual_norm(features)[0].item() == near(q, 1e-12)


# --- rank --------------------------------------------------------------------------------------

HILBERT = [[1 / (i + j + 1) for j in range(4)] for i in range(4)]
COUNT = np.arange(12.0).reshape(4, 3)
RANKS = {  # matrix: (entropy, exp), decay sheet 1.7
    "identity 2": (np.eye(2), 0.6931471806, 2),
    "identity 4": (np.eye(4), 1.3862943611, 4),
    "identity 8": (np.eye(8), 2.0794415417, 8),
    "identity 192": (np.eye(192), 5.2574953720, 192),
    "rank one": (np.outer([1.0, 2, 3], [4.0, -5]), 0, 1),
    "diag(1, .5, .25)": (np.diag([1, 0.5, 0.25]), 0.9556998911, 2.6004900060),
    "diag(4, 3, 2, 1)": (np.diag([4.0, 3, 2, 1]), 1.2798542258, 3.5961154666),
    "diag(3, 4)": (np.diag([3.0, 4]), 0.6829081047, 1.9796263301),
    "diag(10, 1, 1, 1)": (np.diag([10.0, 1, 1, 1]), 0.7937300552, 2.2116305638),
    "powers of a half": (np.diag(0.5 ** np.arange(8)), 1.3606346679, 3.8986668755),
    "Hilbert": (np.array(HILBERT), 0.3534476999, 1.4239685113),
    "counting": (COUNT, 0.2303385573, 1.2590261903),
}


@pytest.mark.parametrize("name", RANKS)
def test_D07_rank_table(name):
    matrix, entropy, rank = RANKS[name]
    x = torch.from_numpy(matrix)
    assert rank_entropy(x) == near(entropy)
    assert effective_rank(x) == near(rank, 1e-8)


def test_D07_centred_counting_matrix_has_rank_one():
    assert rank_entropy(torch.from_numpy(COUNT), centre=True) == near(0.0)
    assert effective_rank(torch.from_numpy(COUNT), centre=True) == near(1.0)


def test_D07_wrong_variants_are_other_numbers():
    x = torch.diag(torch.tensor([1, 0.5, 0.25], dtype=torch.float64))
    assert abs(rank_entropy(x) - 0.6680178187) > 0.1  # squared singular values
    assert abs(effective_rank(x) - 1.9503675045) > 0.1
    assert participation_ratio(x) == near(1.6153846154)


@pytest.mark.parametrize("centre", [False, True])
def test_R14_effective_rank(centre):
    assert effective_rank(P4, centre=centre) == near(2.0, 1e-12)
    assert participation_ratio(P4, centre=centre) == near(2.0, 1e-12)
    stretched = P4 @ torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert effective_rank(stretched, centre=centre) == near(1.7547653506)
    assert participation_ratio(stretched, centre=centre) == near(1.2195121951)


@given(n=st.integers(2, 12), d=st.integers(1, 8), seed=seeds, centre=st.booleans())
@FEW
def test_rank_equals_scipy_entropy_of_numpy_svd(n, d, seed, centre):
    x = normal(n, d, seed=seed)
    s = np.linalg.svd(x - x.mean(0) if centre else x, compute_uv=False)
    assert rank_entropy(x, centre=centre) == near(scipy.stats.entropy(s / s.sum()), 1e-9)
    assert effective_rank(x, centre=centre) == near(math.exp(rank_entropy(x, centre=centre)), 1e-12)
    expected = (s**2).sum() ** 2 / (s**4).sum()
    assert participation_ratio(x, centre=centre) == near(expected, 1e-9)


@given(n=st.integers(2, 12), d=st.integers(1, 8), seed=seeds, scale=st.floats(1e-3, 1e3))
@FEW
def test_rank_bounds_and_invariances(n, d, seed, scale):
    x = normal(n, d, seed=seed)
    for rank in (effective_rank, participation_ratio):
        value = rank(x)
        assert 1 - 1e-9 <= value <= min(n, d) + 1e-9
        assert rank(scale * x) == near(value, 1e-8)
        assert rank(orthogonal(n, seed) @ x @ orthogonal(d, seed + 1)) == near(value, 1e-8)
        assert rank(x.T) == near(value, 1e-8)
        assert rank(torch.cat([x, x])) == near(value, 1e-8)
    assert participation_ratio(x) <= effective_rank(x) + 1e-9


def test_removing_the_top_component_leaves_the_others():
    x = normal(40, 6) @ torch.diag(torch.tensor([9.0, 3, 2, 1, 1, 0.5], dtype=torch.float64)) + 4
    before = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)
    left = remove_top_component(x).numpy()
    after = np.linalg.svd(left - left.mean(0), compute_uv=False)
    assert after[:5] == pytest.approx(before[1:], abs=1e-9)
    assert after[5] == near(0.0)


def test_a_shared_direction_dominates_cka_until_it_is_removed():
    shared = 50 * normal(400, 1, seed=9) * torch.ones(1, 32, dtype=torch.float64) / math.sqrt(32)
    x, y = (normal(400, 32, seed=seed) + shared for seed in (1, 2))
    assert linear_cka(x, y) > 0.999
    assert linear_cka(remove_top_component(x), remove_top_component(y)) < 0.1


# --- probes ------------------------------------------------------------------------------------


def test_R15_no_line_reads_xor_but_the_product_does():
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    y = (x.prod(1) > 0).long()
    with_product = torch.cat([x, x.prod(1, keepdim=True)], 1)
    assert probe_accuracy(with_product, y, with_product, y) == 1.0
    assert probe_weights(x, y).abs().max() < 1e-12
    expected = [[0.0, 0], [0, 0], [-1, 1], [0, 0]]  # two columns: class 0, class 1
    found = probe_weights(with_product, y)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    assert found[[0, 1, 3]].abs().max() < 1e-12
    assert probe_accuracy(x, y, x, y) <= 0.5 + 1e-12  # one answer for all


def test_R15_a_zero_score_counts_as_class_one():
    x = torch.zeros(4, 1, dtype=torch.float64)
    x[:2, 0] = torch.tensor([1.0, -1.0])
    y = torch.tensor([0, 1, 0, 1])  # balanced: weight and offset vanish up to the slope
    points = torch.zeros(3, 1, dtype=torch.float64)
    assert probe_accuracy(x, y, points, torch.ones(3, dtype=torch.int64)) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_probe_equals_sklearn(seed):
    x, test_x = normal(80, 5, seed=seed), normal(2000, 5, seed=seed + 50)
    direction = normal(5, seed=seed + 100)

    def label(z):
        return (z @ direction + 0.8 * torch.sin(3 * z[:, 0]) > 0.3).long()

    ridge = Ridge(alpha=float(1e-6 * x.square().sum() / 5)).fit(x, 2 * label(x) - 1)
    expected = ((ridge.predict(test_x) >= 0) == label(test_x).numpy()).mean()
    found = probe_accuracy(x, label(x), test_x, label(test_x))
    assert found == near(expected, 1.5 / 2000)  # the offset is or is not in the ridge


def test_probe_of_the_spiral_itself_is_the_linear_baseline():
    (x, y), (test_x, test_y) = spiral(), spiral(2000, seed=12345)
    assert probe_accuracy(x, y, x, y) == near(0.760, 1e-9)
    assert probe_accuracy(x, y, test_x, test_y) == near(0.7355, 1e-9)


def test_probe_of_many_classes():
    x = normal(300, 6, seed=3)
    y = torch.arange(300) % 3
    x[torch.arange(300), y] += 6
    assert probe_accuracy(x, y, x, y) > 0.97


def test_logit_lens_ends_at_the_nets_own_accuracy():
    torch.manual_seed(0)
    model, (x, y) = ResidualMLP(6, 6, "tanh"), spiral()
    features = layer_features(model, x)
    lens = logit_lens(model.head, features, y)
    assert len(lens) == 7
    assert float(lens[-1]) == near(accuracy(model, x, y), 1e-12)
    first = (model.head(model.stem(x)).argmax(1) == y).double().mean().item()
    assert float(lens[0]) == near(first, 1e-12)


# --- features of a net -------------------------------------------------------------------------


def mlp(depth: int = 4, seed: int = 0) -> ResidualMLP:
    torch.manual_seed(seed)
    return ResidualMLP(depth, 6, "tanh")


def states(model: ResidualMLP, x: torch.Tensor) -> list[torch.Tensor]:
    found = [model.stem(x)]
    for block in model.blocks:
        found.append(block(found[-1]))
    return found


def test_features_are_stem_then_every_block():
    model, (x, _) = mlp(), spiral(30)
    found = layer_features(model, x)
    assert [tuple(f.shape) for f in found] == [(30, 6)] * 5
    for f, expected in zip(found, states(model, x), strict=True):
        assert torch.allclose(f.double(), expected.double(), atol=1e-6)
        assert not f.requires_grad


@pytest.mark.parametrize("batch", [1, 7, 29, 30, 512])
def test_small_batches_give_the_same_features(batch):
    model, (x, _) = mlp(), spiral(30)
    whole = layer_features(model, x)
    for a, b in zip(whole, layer_features(model, x, batch=batch), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.drop = nn.Linear(2, 6), nn.Dropout(0.5)
        self.blocks = nn.ModuleList([Residual(nn.Linear(6, 6)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.stem(x))
        for block in self.blocks:
            h = block(h)
        return h


def test_training_flag_and_random_state_stay_as_they_were():
    model, (x, _) = WithDropout(), spiral(30)
    model.train()
    model.blocks[1].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    first, second = layer_features(model, x), layer_features(model, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # dropout is off
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_afterwards_also_after_an_error():
    model, (x, _) = mlp(), spiral(30)
    layer_features(model, x)
    assert hooks(model) == 0
    model.train()
    with pytest.raises(RuntimeError):
        layer_features(model, torch.zeros(3, 5))  # the stem takes two numbers
    assert hooks(model) == 0
    assert all(m.training for m in model.modules())


def test_features_do_not_change_with_a_later_step():
    model, (x, _) = mlp(), spiral(30)
    found = layer_features(model, x)
    keep = [f.clone() for f in found]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    layer_features(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, keep, strict=True))


def test_features_follow_a_path_mask():
    model, (x, _) = mlp(), spiral(30)
    with path_mask(model, torch.tensor([0.0, 1, 1, 1])):
        found = layer_features(model, x)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_modules_by_name_of_our_own_net():
    model, (x, _) = mlp(), spiral(30)
    found = layer_features(model, x, modules=["blocks.2", "head"])
    assert torch.allclose(found[0], states(model, x)[3], atol=1e-6)
    assert torch.allclose(found[1], model(x), atol=1e-6)


def test_unknown_module_is_an_error_that_suggests():
    model, (x, _) = mlp(), spiral(30)
    with pytest.raises(ValueError, match=r'modules .*"block\.2".*did you mean "blocks\.2"'):
        layer_features(model, x, modules=["block.2"])


def test_foreign_net_without_names_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="modules"):
        layer_features(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), spiral(8)[0])


@pytest.mark.parametrize("shortcut", ["plain", "post-norm"])
def test_features_of_the_cnn(shortcut):
    torch.manual_seed(0)
    model = ResidualCNN(3, 10, widths=(8, 16), blocks=2, shortcut=shortcut)
    x = normal(5, 3, 8, 8).float()
    found = layer_features(model, x)
    shapes = [(5, 8, 8, 8)] * 3 + [(5, 4, 4, 16)] * 2  # channels last
    assert [tuple(f.shape) for f in found] == shapes
    assert torch.allclose(found[0], model.stem(x).movedim(1, 3), atol=1e-6)
    first = model.blocks[0](model.stem(x))
    assert torch.allclose(found[1], first.movedim(1, 3), atol=1e-5)
    pooled = layer_features(model, x, pool="mean")
    for f, p in zip(found, pooled, strict=True):
        assert torch.allclose(p, f.mean((1, 2)), atol=1e-6)


class Twice(nn.Module):
    """Runs one layer twice, gives a tuple from another."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.pair = nn.Linear(2, 2), Pair()

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.pair(self.shared(self.shared(x)) + shift)[0]


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return 2 * x, "attention"


def test_several_inputs_and_outputs_that_are_tuples():
    model, (x, _), shift = Twice(), spiral(10), torch.randn(10, 2)
    (found,) = layer_features(model, x, shift, modules=["pair"], batch=3)
    assert torch.allclose(found, model(x, shift), atol=1e-6)


def test_a_layer_that_runs_twice_is_an_error():
    with pytest.raises(ValueError, match=r'modules .*"shared", which ran 2 times'):
        layer_features(Twice(), spiral(10)[0], torch.zeros(10, 2), modules=["shared"])


# --- nets that are not ours --------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def test_hugging_face_vit(vit):
    x = normal(5, 3, 16, 16).float()
    with torch.no_grad():
        hidden = vit(x, output_hidden_states=True).hidden_states
    names = [name for name, m in vit.named_modules() if type(m).__name__ == "ViTLayer"]
    assert len(names) == 3
    found = layer_features(vit, x, modules=["embeddings", *names], batch=2)
    assert [tuple(f.shape) for f in found] == [(5, 5, 16)] * 4  # one class token, four patches
    for f, h in zip(found, hidden, strict=True):
        assert torch.allclose(f, h, atol=1e-5)
    pooled = layer_features(vit, x, modules=names, pool="mean")
    tokens = layer_features(vit, x, modules=names, pool="cls")
    for f, mean, cls in zip(found[1:], pooled, tokens, strict=True):
        assert torch.allclose(cls, f[:, 0], atol=1e-6)
        assert mean.shape == (5, 16)
        means = (f.mean(1), f[:, 1:].mean(1))  # with or without the class token
        assert any(torch.allclose(mean, m, atol=1e-6) for m in means)


def test_hugging_face_vit_by_keyword_name_error(vit):
    with pytest.raises(ValueError, match="did you mean"):
        layer_features(vit, normal(2, 3, 16, 16).float(), modules=["embedding"])


def test_hugging_face_resnet():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    model = transformers.ResNetModel(config).eval()
    x = normal(5, 3, 16, 16).float()
    with torch.no_grad():
        hidden = model(x, output_hidden_states=True).hidden_states
    names = ["embedder", "encoder.stages.0", "encoder.stages.1"]
    found = layer_features(model, x, modules=names, batch=2)
    for f, h in zip(found, hidden, strict=True):
        assert torch.allclose(f, h.movedim(1, 3), atol=1e-5)
    pooled = layer_features(model, x, modules=names, pool="mean")
    assert [tuple(p.shape) for p in pooled] == [(5, 8), (5, 8), (5, 16)]
    assert torch.allclose(pooled[2], found[2].mean((1, 2)), atol=1e-6)


def test_unknown_pool_is_an_error():
    with pytest.raises(ValueError, match=r'pool .*"men"'):
        layer_features(mlp(), spiral(8)[0], pool="men")


def test_one_name_instead_of_a_list_is_told_from_an_unknown_name():
    with pytest.raises(ValueError, match='^modules must be a list of names, got "head"$'):
        layer_features(mlp(), spiral(8)[0], modules="head")


def test_what_is_no_tensor_is_named_before_the_net_runs():
    with pytest.raises(ValueError, match=r"^inputs must be tensors, got \['ndarray'\]$"):
        layer_features(mlp(), spiral(8)[0].numpy())
    with pytest.raises(ValueError, match=r"^inputs must be tensors, got \[\]$"):
        layer_features(mlp())


def test_features_that_are_no_tensors_are_an_error_in_every_measure():
    x = normal(60, 3).numpy()
    for measure in (*MEASURES.values(), lambda x, y: similarity_map([x, y])):
        with pytest.raises(ValueError, match="^features must be tensors, got ndarray$"):
            measure(x, x)
    for measure in (rank_entropy, effective_rank, participation_ratio, remove_top_component):
        with pytest.raises(ValueError, match="^features must be tensors, got list$"):
            measure([x])


def test_a_batch_below_one_is_an_error():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        layer_features(mlp(), spiral(8)[0], batch=0)


# --- skipping blocks ---------------------------------------------------------------------------


class Scalar(nn.Module):
    """x (1 + a_1)(1 + a_2) ... with scalar linear branches."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(nn.Linear(1, 1, bias=False)) for _ in weights))
        for block, a in zip(self.blocks, weights, strict=True):
            nn.init.constant_(block.branch.weight, a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def test_R16_skipping_a_scalar_block():
    model, x = Scalar(0.5, 0.25).double(), torch.ones(1, 1, dtype=torch.float64)
    full = model(x).item()
    drops = skip_one(model, lambda: model(x).item())
    assert full == near(1.875, 1e-12)
    assert (full - drops[0]).item() == near(full * 2 / 3, 1e-12)
    assert drops.tolist() == pytest.approx([1.875 - 1.25, 1.875 - 1.5], abs=1e-12)
    assert model(x).item() == full


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_R16_a_block_of_zeros_is_not_missed(activation):
    torch.manual_seed(0)
    model, (x, _) = ResidualMLP(4, 6, activation), spiral(50)
    for parameter in model.blocks[2].parameters():
        nn.init.zeros_(parameter)
    full = model(x)
    with path_mask(model, torch.tensor([1.0, 1, 0, 1])):
        assert torch.equal(model(x), full)
    drops = skip_one(model, lambda: model(x).square().sum().item())
    assert drops[2] == 0 and (drops[[0, 1, 3]] != 0).all()


def test_skip_one_is_in_eval_mode_or_leaves_the_mode_alone():
    model, (x, y) = mlp(), spiral(50)
    model.train()

    def score():
        assert not any(m.training for m in model.modules())
        return accuracy(model, x, y)

    skip_one(model, score)
    keep_random(model, score, draws=2)
    assert all(m.training for m in model.modules())


def test_keep_random_keeps_that_share_and_leaves_the_net_whole():
    """Powers of two as branch weights: the score tells how many paths were kept."""
    model, x = Scalar(*[1.0] * 30), torch.ones(1, 1)
    state = torch.get_rng_state()
    scores = keep_random(model, lambda: math.log2(model(x).item()), keep=0.8, draws=200)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores.shape == (200,)
    assert scores.mean().item() == near(24, 0.6)  # standard error 0.155
    assert scores.std().item() == near(math.sqrt(30 * 0.8 * 0.2), 0.5)
    assert model(x).item() == 2**30


def test_keep_random_repeats_by_seed():
    model = Scalar(1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125).double()
    x = torch.ones(1, 1, dtype=torch.float64)

    def draw(seed: int) -> list[float]:
        return keep_random(model, lambda: model(x).item(), 0.5, 20, seed).tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len(set(draw(0))) > 5


def test_keep_random_limits():
    model, (x, y) = mlp(), spiral(50)
    full = accuracy(model, x, y)
    none = (model.head(model.stem(x)).argmax(1) == y).double().mean().item()
    score = partial(accuracy, model, x, y)
    assert keep_random(model, score, keep=1, draws=3).tolist() == [full] * 3
    assert keep_random(model, score, keep=0, draws=3).tolist() == [none] * 3
    for keep in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"keep must .*\[0, 1\].*got {keep}"):
            keep_random(model, score, keep=keep)


def test_R16_paths():
    assert path_share(54, 19, 35) == near(0.98016567, 1e-8)
    assert path_share(12, 0, 12) == 1
    assert mean_path_length(32, 0.2) == near(5.3333333, 1e-7)
    assert mean_path_length(32, 1) == 16


def test_score_that_fails_leaves_the_net_whole():
    model, (x, _) = mlp(), spiral(50)
    bare, calls = model(x), []

    def score() -> float:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no score")
        return 0.0

    with pytest.raises(RuntimeError, match="no score"):
        skip_one(model, score)
    assert torch.equal(model(x), bare)


def test_skipping_needs_paths():
    with pytest.raises(ValueError, match="Residual"):
        skip_one(nn.Linear(2, 2), lambda: 0.0)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_nan_features_are_an_error(name):
    x, y = normal(2, 10, 3)
    y[4, 1] = math.nan
    for a, b in ((x, y), (y, x)):
        with pytest.raises(ValueError, match="(?i)nan|finite"):
            MEASURES[name](a, b)
    with pytest.raises(ValueError, match="(?i)nan|finite"):
        similarity_map([x, y], MEASURES[name])


@pytest.mark.parametrize("name", MEASURES)
def test_infinite_features_are_an_error(name):
    x, y = normal(2, 10, 3)
    x[0, 0] = math.inf
    with pytest.raises(ValueError, match="(?i)inf|finite"):
        MEASURES[name](x, y)


@pytest.mark.parametrize("name", MEASURES)
def test_unlike_numbers_of_points_are_an_error(name):
    with pytest.raises(ValueError, match=r"10.*9|9.*10"):
        MEASURES[name](normal(10, 3), normal(9, 3))
    with pytest.raises(ValueError, match=r"10.*9|9.*10"):
        similarity_map([normal(10, 3), normal(9, 3)], MEASURES[name])


@pytest.mark.parametrize("centre", [False, True])
def test_cosine_of_unlike_widths_is_an_error(centre):
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        cosine(normal(10, 3), normal(10, 4), centre=centre)


@pytest.mark.parametrize("measure", [cosine, centred_cosine])
def test_map_has_no_number_where_widths_differ(measure):
    features = [normal(10, d, seed=i) for i, d in enumerate((3, 4, 3))]
    found = similarity_map(features, measure)
    expected = [[False, True, False], [True, False, True], [False, True, False]]
    assert found.isnan().tolist() == expected
    assert found[0, 2].item() == near(measure(features[0], features[2]), 1e-12)


@pytest.mark.parametrize("measure", [linear_cka, debiased_cka])
def test_map_has_no_number_where_a_layer_is_constant(measure):
    features = [normal(60, 3), torch.ones(60, 3), normal(60, 3, seed=1)]
    found = similarity_map(features, measure)
    assert found[1].isnan().all() and found[:, 1].isnan().all()
    assert not found[0, [0, 2]].isnan().any()


@pytest.mark.parametrize("measure", [linear_cka, debiased_cka])
@pytest.mark.parametrize("value", [1.0, 0.1, 1e12 / 3])
def test_constant_features_have_no_cka(measure, value):
    """Zero variance: the quotient is 0 / 0, rounding of the mean must not make it a number."""
    x, constant = normal(60, 3), torch.full((60, 3), value, dtype=torch.float64)
    for a, b in ((x, constant), (constant, x)):
        with pytest.raises(ValueError, match="constant"):
            measure(a, b)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
@pytest.mark.parametrize("name", MEASURES)
def test_small_and_large_features_are_measured_like_others(name, scale):
    """Decay leaves states of size 1e-5 and less, ReLU nets blow them up: both are features."""
    x, y = normal(2, 60, 4)
    assert MEASURES[name](scale * x, scale * y) == near(MEASURES[name](x, y), 1e-9)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_cosine_of_zero_rows_only_is_an_error():
    zeros = torch.zeros(10, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="constant or zero"):
        cosine(zeros, zeros)


@pytest.mark.parametrize("rank", [effective_rank, rank_entropy, participation_ratio])
def test_rank_of_nothing(rank):
    x = normal(10, 3)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="(?i)nan|finite"):
        rank(x)
    with pytest.raises(ValueError, match="not 0"):
        rank(torch.zeros(10, 3))
    with pytest.raises(ValueError, match="not 0"):  # constant: the mean is not exact
        rank(torch.full((30, 3), 0.1, dtype=torch.float64), centre=True)


def test_an_empty_list_of_layers_is_an_error():
    with pytest.raises(ValueError, match="features"):
        similarity_map([], linear_cka)


def test_empty_profile_is_an_error():
    with pytest.raises(ValueError, match="profile"):
        rebound([])


def test_nan_profile_is_an_error():
    with pytest.raises(ValueError, match="profile"):
        rebound([1.0, math.nan, 0.5])


def test_one_dimensional_features_are_an_error():
    with pytest.raises(ValueError, match=r"\[n, d\]|\(10,\)"):
        linear_cka(normal(10), normal(10))


def test_debiased_warns_below_fifty_points():
    with pytest.warns(UserWarning, match="50"):
        debiased_cka(normal(20, 3), normal(20, 3, seed=1))


def test_paths_of_the_toy_are_what_skip_one_scores():
    model, (x, y) = mlp(), spiral(50)
    drops = skip_one(model, lambda: accuracy(model, x, y))
    assert len(drops) == len(paths(model)) == 4
