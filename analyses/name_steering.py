"""Is a name one vector? Average it over many prompts, write the average elsewhere, and see who is answered.

One layer's SSM input is averaged one token after each name, for each name and slot (place of mention). In a test
prompt the average of another name is then written over one of its five slots: taken from the same slot or from
another, which tells which slots the model writes alike.

Where the paper and its code disagree: "more than 95 %" for subtract-and-add holds in its data where source and
written slot are among 1 to 3 (mean .991) and for slots 4 and 5 with sources 1 to 3 (.982), not over all 25 cells
(.910). A (name, slot) has 53 to 237 prompts, not 50 to 100, each counted twice. The averages include the test
prompts themselves; `leave_out` takes these out.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch

from ioi_mamba.errors import InputError
from ioi_mamba.metrics import wilson_interval
from ioi_mamba.steering import (
    METHODS,
    averages,
    find_layer,
    name_slots,
)
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

NAME = "name-steering"
TITLE = "Rewriting names with averages"
PAPER = "4.3, Fig 9"
QUESTION = "Is a name, as the bottleneck layer takes it in, one vector that can be added and subtracted?"
LOOK_FOR = (
    "A block of cells near 1 in rows and columns 1 to 3: the first three mentions are written alike. "
    "Subtract-and-add staying high in rows 4 and 5 where replace falls says that more than the name is there."
)
METHOD = (
    "avg[name, slot]: mean ssm_input one token after the name over all prompts with that name in that slot.\n"
    "Replace: x := avg[new, source]. Subtract-and-add: x := x + avg[new, source] - avg[old, source]. Slots of the "
    "answer: the answer becomes the corrupted prompt's; other slots: the answer is written, so that the slot's old "
    "name is the only one mentioned once.\n"
    "Success: the intended name's last-position logit exceeds the original answer's; 101 random prompts a cell, "
    "Wilson intervals."
)
NEEDS_MAMBA = True
COLUMNS = ("method", "slot", "source_slot", "success", "n", "low", "high", "layer")

DEFAULT_PAIRS = 10_000


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """Four templates, five corruptions and the swapped copies; both what is averaged and what is drawn from.

    n_pairs None: the paper's 10,000. With few pairs a name may never be in a slot, which costs test prompts.
    """
    return ioi.generate(tokenizer, DEFAULT_PAIRS if n_pairs is None else n_pairs, seed)


@torch.no_grad()
def run(
    model,
    pairs: Pairs,
    *,
    layer: int | None = None,
    per_cell: int = 101,
    leave_out: bool = False,
    seed: int = 27,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row for each method, slot written over and slot the average comes from.

    success: the share of `n` prompts in which the intended name beats the original answer, in 0..1; low, high:
    its 95 % Wilson interval. A test prompt whose names were never in the source slot is left out of `n`; a cell
    without test prompts has n = 0 and no success. layer: the bottleneck; None: found (`steering.find_layer`).
    per_cell: test prompts, drawn from `seed` as the published code does. leave_out: average over no test prompt.
    Raises InputError for pairs whose names have no roles, a layer out of range and `per_cell` below 1.
    """
    if per_cell < 1:
        raise InputError(f"per_cell is {per_cell}; test at least one prompt a cell.")
    slots = name_slots(pairs)
    layer = find_layer(model) if layer is None else layer
    cells = sample_cells(pairs, per_cell, seed)
    drawn = torch.cat(list(cells.values()))
    n_tests = len(METHODS) * len(drawn)
    n_prompts = 0

    def report(done: int, total: int) -> None:
        nonlocal n_prompts
        n_prompts = total
        if progress is not None:
            progress(done, total + n_tests)

    names = averages(
        model, pairs, layer, leave_out=pairs.clean[drawn] if leave_out else None, progress=report
    )
    rows = []
    done = 0
    for (slot, source), index in cells.items():
        for method in METHODS:
            wins = _successes(model, pairs, names, method, slots[slot - 1], slots[source - 1], index)
            low, high = wilson_interval(sum(wins), len(wins)) if wins else (float("nan"),) * 2
            success = sum(wins) / len(wins) if wins else float("nan")
            rows.append((method, slot, source, success, len(wins), low, high, layer))
            done += len(index)
            report(n_prompts + done, n_prompts)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["method", "slot", "source_slot"], ignore_index=True)
