"""How many CPU threads torch gets: the cores of this machine that are ours, unless the user says otherwise.

A thread that waits for the others of its pool sleeps. Where it would spin instead, as OpenMP has it by default, a pool on
a busy machine spends its time waiting for threads that have no core.
"""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait; of use only before torch is imported. The user's own setting stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_threads(count: int | None = None) -> None:
    """Give torch `count` threads; None: what OMP_NUM_THREADS says, which torch has read, else `cores`."""
    import torch

    if count is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores() if count is None else count)


def cores() -> int:
    """The physical cores that this process may use: within its affinity, its cgroup's quota and its Slurm task."""
    import joblib

    found = joblib.cpu_count(only_physical_cores=True)
    task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(found, int(task)) if task.isdigit() and int(task) else found
