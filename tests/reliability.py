"""Runs the tests of faults and inputs and writes docs/reliability.md from what they recorded: `python -m tests.reliability`.

A test records what it went through with the fixture `tried`; what a test that failed went through counts as lost or
wrong. `--quick` leaves out the slow ones.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- begin: written by tests/reliability.py -->", "<!-- end -->"
FILES = ["interruptions", "wrongness", "determinism", "processors", "outside", "secrets", "fuzz", "numerics", "load"]


class Recorder:
    """rows: (what, test) -> [tried, lost or wrong]; seen: what tests measured."""

    def __init__(self):
        self.rows, self.seen, self.untold = {}, [], []

    def pytest_runtest_logreport(self, report):
        if report.skipped or (report.when != "call" and report.passed):
            return
        test = report.nodeid.split("[")[0]
        told = [value for name, value in report.user_properties if name == "tried"]
        self.seen += [value for name, value in report.user_properties if name == "seen"]
        # A test tells what it tried at its end: one that failed before has told nothing, and is counted as one.
        if report.failed and not told:
            told = [["(see the test)", 1]]
        for what, number in told:
            row = self.rows.setdefault((what, test), [0, 0])
            row[0] += number
            row[1] += number if report.failed else 0


def table(rows):
    lines = ["| what | tried | lost or wrong | command |", "|---|---:|---:|---|"]
    for (what, test), (tried, wrong) in rows.items():
        lines.append(f"| {what} | {tried:,} | {wrong:,} | `python -m pytest -m 'slow or not slow' {test}` |")
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines.append(f"| together | {total[0]:,} | {total[1]:,} | `python -m tests.reliability` |")
    return lines


def main(arguments):
    recorder = Recorder()
    marks = "not slow" if "--quick" in arguments else "slow or not slow"
    files = [str(path) for name in FILES for path in ROOT.glob(f"tests/*/test_{name}.py")]
    code = pytest.main(["-q", "-m", marks, "--rootdir", str(ROOT), *files], plugins=[recorder])
    if not recorder.rows:
        return int(code)
    before, rest = PAGE.read_text().split(BEGIN)
    lines = [*table(recorder.rows), *(f"\nMeasured: {each}." for each in recorder.seen)]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
