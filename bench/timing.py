"""Processor time as a multiple of another computation interleaved with it, and the peak of memory.

Processor time of one thread is wall time on an idle machine, and steadier than it on a busy one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
Tick = Callable[..., None]

# Page faults cost a factor of 2-3 at times; with these the allocator keeps what it has, for both sides alike.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


class Measured(NamedTuple):
    """ratio: median over repeats; low, high: the extremes; peak_mib: of the process, weights and libraries included."""

    ratio: float
    low: float
    high: float
    repeats: int
    plain_seconds: float
    peak_mib: float


def prepare() -> None:
    """One thread, and the allocator set as above, which takes a new start of the process."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or not os.environ.items() >= _ALLOCATOR.items():
        os.environ.update(_ALLOCATOR, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", USE_HUB_KERNELS="0")
        spec = sys.modules["__main__"].__spec__
        assert spec is not None, "run as python -m bench.NAME"
        os.execv(sys.executable, [sys.executable, "-m", spec.name, *sys.argv[1:]])
    torch.set_num_threads(1)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(
    plain: Callable[[], object],
    work: Callable[[Tick], float],
    *,
    warm: Callable[[], object] | None = None,
    seconds: float = 20.0,
    most: int = 9,
) -> Measured:
    """Seconds of `work` in units of `plain`, both measured in turn.

    `work(tick)` returns how many plain units its seconds are to be divided by. It may call `tick` (as a progress
    function) at any time outside a pass: then `plain` runs now and again in the middle of it, at no charge. Repeats
    until `seconds` are over, at least once and at most `most` times. warm: run first, by default `work` itself.
    """
    (warm or (lambda: work(lambda *_: None)))()
    plain()
    _reset_peak()
    ratios, plains, began = [], [], time.process_time()
    while not ratios or (time.process_time() - began < seconds and len(ratios) < most):
        here, spent = [seconds_of(plain)], [0.0, time.process_time()]

        def tick(*_, here=here, spent=spent) -> None:
            now = time.process_time()
            if now - spent[1] > 10 * here[-1]:
                here.append(seconds_of(plain))
                spent[0] += time.process_time() - now
                spent[1] = time.process_time()

        started = time.process_time()
        units = work(tick)
        took = time.process_time() - started - spent[0]
        here.append(seconds_of(plain))
        ratios.append(took / (units * statistics.median(here)))
        plains += here
    return Measured(
        statistics.median(ratios), min(ratios), max(ratios), len(ratios), statistics.median(plains), peak_mib()
    )


def _reset_peak() -> None:
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most memory the process has held since the last reset (Linux), or since its start."""
    if sys.platform == "linux":
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """One line: processor, cores, versions."""
    import transformers

    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def load() -> str:
    """What else ran: processes that wanted a core, averaged over the last minute (this one counts as 1)."""
    return f"{os.getloadavg()[0]:.1f}"


def write_section(title: str, text: str) -> None:
    """Replace the section `## title` of RESULTS.md, or add it at the end."""
    old = RESULTS.read_text() if RESULTS.is_file() else "# What things cost\n\nWritten by the commands in `bench/`.\n"
    head, *sections = old.split("\n## ")
    sections = [section.rstrip() for section in sections if section.partition("\n")[0] != title]
    sections.append(f"{title}\n\n{text.rstrip()}")
    RESULTS.write_text("\n\n## ".join([head.rstrip(), *sections]) + "\n")


def with_rows_of(title: str, rows: list[str]) -> list[str]:
    """The rows of the table in section `## title`, those with the same first two cells as a new one replaced by it."""
    old = RESULTS.read_text() if RESULTS.is_file() else ""
    section = next((s for s in old.split("\n## ")[1:] if s.partition("\n")[0] == title), "")
    table = [line for line in section.splitlines() if line.startswith("| ")][1:]
    key = lambda row: tuple(row.split("|")[1:3])
    new = {key(row): row for row in rows}
    return [new.pop(key(row), row) for row in table] + list(new.values())
