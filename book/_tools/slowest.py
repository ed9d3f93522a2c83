"""Print the ten slowest tests of the JUnit reports named on the command line."""

import sys
from xml.etree import ElementTree


def durations(report: str) -> list[tuple[float, str]]:
    """Seconds and name of every test of one report."""
    cases = ElementTree.parse(report).iter("testcase")
    return [(float(c.get("time", 0)), f"{c.get('classname')}::{c.get('name')}") for c in cases]


def main() -> None:
    """Print the table."""
    found = sorted((row for report in sys.argv[1:] for row in durations(report)), reverse=True)
    print(f"The slowest ten of {len(found)} tests, {sum(s for s, _ in found):.0f} s in all:")
    for seconds, name in found[:10]:
        print(f"{seconds:8.1f} s  {name}")


if __name__ == "__main__":
    main()
