"""When a ratio of two times says something: only on a machine whose memory is not starved."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from turns import THREADS

ENOUGH = 3.0  # GB/s; a laptop has 10, and a crowded host has been seen at 0.2


def copied_gb_per_second() -> float:
    """Memory bandwidth of one thread: the best of four copies of 64 MB."""
    source, target = np.ones(2**26, np.uint8), np.ones(2**26, np.uint8)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * 2**26 / best / 1e9


@pytest.fixture
def at_least() -> Callable[[float, float], None]:
    """Call with a measured ratio and its target. Skips where memory is too slow to judge."""

    def judge(ratio: float, target: float) -> None:
        bandwidth = copied_gb_per_second()
        if ratio < target and bandwidth < ENOUGH:
            pytest.skip(f"ratio {ratio:.2f}, but memory gives {bandwidth:.1f} GB/s: no judgement")
        assert ratio >= target

    return judge


def _with_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    yield from _with_threads(1)


@pytest.fixture
def few_threads() -> Iterator[None]:
    """As many as `turns` times: two on a quiet machine."""
    yield from _with_threads(THREADS)
