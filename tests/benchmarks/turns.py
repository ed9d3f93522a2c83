"""Works that take turns, so that the ratio of their times can be trusted on a shared machine.

Two threads on a quiet machine; on a busy one they would mostly wait for each other, so there it is
the processor time of one.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping

QUIET = hasattr(os, "getloadavg") and os.getloadavg()[0] < 0.5
THREADS, clock = (2, time.perf_counter) if QUIET else (1, time.process_time)


def seconds(
    works: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Of one turn, by name and round; the rounds to warm up are not counted."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(-warm_up, rounds):
        for name, work in works.items():
            start = clock()
            work()
            if round_ >= 0:
                found[name].append(clock() - start)
    print(f"\n{THREADS} thread(s)")
    for name, times in found.items():
        print(f"{name}: {1e3 * statistics.median(times):.0f} ms")
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
