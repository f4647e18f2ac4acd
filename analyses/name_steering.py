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

import random
from collections.abc import Callable, Sequence

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba import charts
from ioi_mamba.bottleneck import find_layer, find_offset
from ioi_mamba.errors import InputError
from ioi_mamba.interventions import forward
from ioi_mamba.jobs import call, device_of
from ioi_mamba.memory import rows_per_pass
from ioi_mamba.metrics import wilson_interval
from ioi_mamba.steering import (
    METHODS,
    Averages,
    averages,
    name_slots,
    read_up_to,
    steering_edit,
)
from ioi_mamba.sweep import Roll
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import ABSENT, Pairs

NAME = "name-steering"
TITLE = "Rewriting names with averages"
PAPER = "4.3, Fig 9"
QUESTION = "Is a name, as the bottleneck layer takes it in, one vector that can be added and subtracted?"
LOOK_FOR = (
    "A block of cells near 1 in rows and columns 1 to 3: the first three mentions are written alike. "
    "Subtract-and-add staying high in rows 4 and 5 where replace falls says that more than the name is there. "
    "A cell is empty where no prompt could be had."
)
METHOD = (
    "avg[name, slot]: mean ssm_input one token (offset) after the name over all prompts with that name in that slot.\n"
    "Replace: x := avg[new, source]. Subtract-and-add: x := x + avg[new, source] - avg[old, source]. Slots of the "
    "answer: the answer becomes the corrupted prompt's; other slots: the answer is written, so that the slot's old "
    "name is the only one mentioned once.\n"
    "Success: the intended name's last-position logit exceeds the original answer's; 101 random prompts a cell, "
    "Wilson intervals."
)
NEEDS_MAMBA = True
NEEDS_NAMES = True
COLUMNS = ("method", "slot", "source_slot", "success", "n", "low", "high", "layer", "offset")

DEFAULT_PAIRS = 10_000
UNTESTED = -1


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """Four templates, five corruptions and the swapped copies; both what is averaged and what is drawn from.

    n_pairs None: the paper's 10,000. With few pairs a name may never be in a slot, which costs test prompts.
    """
    return ioi.generate(tokenizer, DEFAULT_PAIRS if n_pairs is None else n_pairs, seed)


def run(
    model,
    pairs: Pairs,
    *,
    layer: int | None = None,
    offset: int | None = None,
    per_cell: int = 101,
    leave_out: bool = False,
    seed: int = 27,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row for each method, slot written over and slot the average comes from.

    success: the share of `n` prompts in which the intended name beats the original answer, in 0..1; low, high:
    its 95 % Wilson interval. A test prompt whose names were never in the source slot is left out of `n`; a cell
    without test prompts has n = 0 and no success. layer: the bottleneck; None: found, as layer-ablation does.
    offset: how many tokens after a name to average and to write; None: found, as the distance at which resampling
    the layer's ssm_input has the largest effect; 1 in the paper, whose layer's convolution shifts names so far. per_cell: test prompts, drawn from `seed` as the published code does. leave_out: average over no test prompt.
    Raises InputError for pairs whose names have no roles, a layer out of range and `per_cell` below 1.
    """
    if per_cell < 1:
        raise InputError(f"per_cell is {per_cell}; test at least one prompt a cell.")
    slots = name_slots(pairs)
    layer = find_layer(model) if layer is None else layer
    offset = find_offset(model, layer) if offset is None else offset
    cells = sample_cells(pairs, per_cell, seed)
    drawn = torch.cat(list(cells.values()))
    n_tests = len(METHODS) * len(drawn)
    n_prompts = 0

    def report(done: int, total: int) -> None:
        nonlocal n_prompts
        n_prompts = total
        if progress is not None:
            progress(done, total + n_tests)

    left_out = pairs.clean[drawn] if leave_out else None
    names = averages(model, pairs, layer, offset=offset, leave_out=left_out, progress=report)
    tested = {cell: index for cell, index in cells.items() if len(index)}
    where = [(slots[slot - 1], slots[source - 1]) for slot, source in tested]
    prompts = [pairs[index].without_text() for index in tested.values()]

    def report_test(done: int, total: int) -> None:
        report(n_prompts + done, n_prompts)

    outcomes = dict(zip(tested, call(model, _outcomes, prompts, where, names, progress=report_test), strict=True))
    rows = []
    for (slot, source), outcome in ((cell, outcomes.get(cell)) for cell in cells):
        for k, method in enumerate(METHODS):
            own = [] if outcome is None else outcome[k][outcome[k] != UNTESTED].tolist()
            low, high = wilson_interval(sum(own), len(own)) if own else (float("nan"),) * 2
            success = sum(own) / len(own) if own else float("nan")
            rows.append((method, slot, source, success, len(own), low, high, layer, offset))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["method", "slot", "source_slot"], ignore_index=True)


def chart(table: pd.DataFrame) -> alt.FacetChart | alt.LayerChart:
    """One matrix a method, slot written over by slot of the average, on one scale from 0 to 1."""
    return charts.matrix_heatmap(
        table,
        x="source_slot",
        y="slot",
        color="success",
        facet="method",
        x_order=sorted(set(table["source_slot"])),
        y_order=sorted(set(table["slot"])),
        x_title="slot the average is from",
        y_title="slot written over",
        color_title="proportion that name the intended person",
        text=True,
        text_format=".2f",
        tooltip=("low", "high"),
    )


def findings(table: pd.DataFrame) -> list[str]:
    """What the table says: slots 1 to 3 among each other, and with 4 and 5, for both methods."""
    found = [f"The averages are those of layer {table['layer'].iloc[0]}, {_place(int(table['offset'].iloc[0]))}."]
    for method in ("subtract-add", "replace"):
        own = table[(table["method"] == method) & (table["n"] > 0)]
        early, late = own[own["slot"] <= 3], own[own["slot"] > 3]
        parts = [
            _share(part[part["source_slot"] <= 3 if near else part["source_slot"] > 3])
            for part in (early, late)
            for near in (True, False)
        ]
        found.append(
            f"{method}: written over slots 1 to 3 the intended name wins in {parts[0]} with averages from slots 1 to "
            f"3 and in {parts[1]} with those from 4 and 5; over slots 4 and 5 in {parts[2]} and {parts[3]}."
        )
        if len(own):
            worst = own.loc[own["success"].idxmin()]
            found.append(
                f"{method}: the lowest of {len(own)} cells is slot {worst['slot']} from slot {worst['source_slot']}, "
                f"{worst['success']:.2f} ({worst['low']:.2f} to {worst['high']:.2f}, {worst['n']} prompts)."
            )
    return found


def _place(offset: int) -> str:
    return "at the name" if offset == 0 else f"{offset} token{'s' if offset > 1 else ''} after the name"


def _share(cells: pd.DataFrame) -> str:
    n = int(cells["n"].sum())
    if n == 0:
        return "no prompt"
    wins = round(float((cells["success"] * cells["n"]).sum()))
    low, high = wilson_interval(wins, n)
    return f"{wins / n:.3f} ({low:.3f} to {high:.3f})"


def answer_slots(slots: Sequence[str]) -> int:
    """How many slots, the first ones, can hold the answer: all who are introduced, of whom all but one come again."""
    return (len(slots) + 1) // 2


def sample_cells(pairs: Pairs, per_cell: int, seed: int) -> dict[tuple[int, int], Tensor]:
    """The test prompts of each cell (slot, source slot), both counted from 1: Int64[row], which pairs.

    Drawn as in the published code: from one generator, cell after cell, a row of the list clean, corrupted, clean,
    corrupted, ..., of which the clean one is taken. A slot that can hold the answer (the paper's 1 to 3) must hold
    it. A slot that does so in no prompt has no rows.
    """
    slots = name_slots(pairs)
    rng, cells = random.Random(seed), {}
    for number, slot in enumerate(slots):
        at = pairs.roles[slot]
        usable = at != ABSENT
        if number < answer_slots(slots):
            usable &= pairs.clean.gather(1, at.clamp(min=0)[:, None])[:, 0] == pairs.answer
        accepted, per_slot = usable.tolist(), per_cell if usable.any() else 0
        for source in range(len(slots)):
            rows: list[int] = []
            while len(rows) < per_slot:
                row = rng.choice(range(2 * len(pairs))) // 2
                if accepted[row]:
                    rows.append(row)
            cells[number + 1, source + 1] = torch.tensor(rows, dtype=torch.int64)
    return cells


def _outcomes(
    model, cells: list[Pairs], where: list[tuple[str, str]], names: Averages, *, progress=None
) -> list[Tensor]:
    """For each cell, at its (slot, source slot), Int64[method, pair]: 1 where the intended name wins, 0 or UNTESTED."""
    found, done = [], 0
    with torch.no_grad():
        for pairs, (slot, source) in zip(cells, where, strict=True):
            found.append(_outcome(model, pairs, names, slot, source))
            done += len(METHODS) * len(pairs)
            if progress is not None:
                progress(done, len(METHODS) * sum(len(cell) for cell in cells))
    return found


def _outcome(model, pairs: Pairs, names: Averages, slot: str, source: str) -> Tensor:
    at = pairs.roles[slot]
    current = pairs.clean.gather(1, at[:, None])[:, 0]
    new = target = pairs.wrong
    if names.slots.index(slot) >= answer_slots(names.slots):
        # Once the answer stands in another slot too, the name it replaces is the only one mentioned once.
        new, target = pairs.answer, current
    seen = names.seen(new, source)
    usable = {"replace": seen, "subtract-add": seen & names.seen(current, source)}
    outcome = torch.full((len(METHODS), len(pairs)), UNTESTED)
    for rows in torch.arange(len(pairs)).split(rows_per_pass(model, pairs.clean.shape[1])):
        part, last = pairs.clean[rows], pairs.last[rows]
        stream = read_up_to(model, part, names.layer, "resid_pre")
        roll = Roll.begin(model, part.to(device_of(model)))
        for k, method in enumerate(METHODS):
            kept = usable[method][rows]
            own = rows[kept]
            if len(own) == 0:
                continue
            edit = steering_edit(names, method, at[own], new[own], current[own], source)
            logits = forward(
                model,
                part[kept],
                {f"blocks.{names.layer}.hook_ssm_input": edit},
                logits_at=last[kept],
                start=roll.start(names.layer, stream[kept], kept),
                own_scan=True,
            )["hook_logits"][:, 0].cpu()
            row = torch.arange(len(own))
            outcome[k, own] = (logits[row, target[own]] > logits[row, pairs.answer[own]]).long()
    return outcome
