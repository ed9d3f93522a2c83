"""Similarity maps of 33 layers x 400 points x 32 nodes against a loop over pairs (one thread)."""

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mini_resdecay.reuse import centred_cosine, cosine, debiased_cka, linear_cka, similarity_map


def plain_cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x, y, dim=1).mean()


def plain_centred_cosine(x: Tensor, y: Tensor) -> Tensor:
    return plain_cosine(x - x.mean(0), y - y.mean(0))


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    """The textbook lines: centre, three products of features, a quotient."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def plain_debiased_cka(x: Tensor, y: Tensor) -> Tensor:
    """The formula of Song et al. as it stands: Gram matrices without their diagonals."""
    n, grams = len(x), (x @ x.T, y @ y.T)
    k, m = (gram - torch.diag(gram.diagonal()) for gram in grams)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        first = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))
        return first - 2 / (n - 2) * (a.sum(0) @ b.sum(0))

    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


PEERS = {
    "raw cosine": (cosine, plain_cosine),
    "centred cosine": (centred_cosine, plain_centred_cosine),
    "linear CKA": (linear_cka, plain_cka),
    "debiased CKA": (debiased_cka, plain_debiased_cka),
}


def loop(features: list[Tensor], measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.tensor([[float(measure(x, y)) for y in features] for x in features])


def timed(call: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, result


@pytest.mark.benchmark
def test_maps_are_twenty_times_faster_than_a_loop_over_pairs(capsys, at_least):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(33, 400, 32, generator=generator)  # float32, as a net gives them
    features = list(steps.cumsum(0))
    slow, fast = {}, {}
    try:
        for name, (measure, plain) in PEERS.items():
            wide = [x.double() for x in features]
            slow[name], expected = timed(partial(loop, wide, plain), 1)
            fast[name], found = timed(partial(similarity_map, features, measure), 5)
            assert (found - expected).abs().max() < 1e-6, name  # `loop` keeps float32
    finally:
        torch.set_num_threads(threads)
    ratios = {name: slow[name] / fast[name] for name in PEERS}
    total = sum(slow.values()) / sum(fast.values())
    with capsys.disabled():
        print(f"\nfour maps of 33 layers: {total:.0f} times faster than a loop over pairs")
        print({name: f"{ratio:.0f}" for name, ratio in ratios.items()})
    at_least(total, 20)
