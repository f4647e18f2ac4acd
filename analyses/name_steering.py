"""Is a name one vector? Average it over many prompts, write the average elsewhere, and see who is answered.

One layer's SSM input is averaged one token after each name, for each name and slot (place of mention). In a test
prompt the average of another name is then written over one of its five slots: taken from the same slot or from
another, which tells which slots the model writes alike.

Where the paper and its code disagree: "more than 95 %" for subtract-and-add holds in its data where source and
written slot are among 1 to 3 (mean .991) and for slots 4 and 5 with sources 1 to 3 (.982), not over all 25 cells
(.910). A (name, slot) has 53 to 237 prompts, not 50 to 100, each counted twice.

Two things that the published numbers pass over. Test prompts are drawn with replacement: a prompt that is drawn twice
is no second outcome, so a cell's n is that of its distinct prompts, each counted once, and intervals are by cluster
(`Pairs.clusters`). And the averages include the test prompts: where few prompts have a name in a slot, the average of
the new name is the very vector of the test prompt's own corrupted copy, and steering cannot fail. `leave_out` takes a
test prompt's own pair out of the averages it is steered with; it is the default where a name has fewer than ENOUGH
prompts on average (the paper's set has 98).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.charts import drawing
from ioi_mamba.experiments.experiment import Column, Context, Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import option
from ioi_mamba.model.jobs import device_of, each_chunk
from ioi_mamba.model.memory import rows_per_pass
from ioi_mamba.passes.forward import forward
from ioi_mamba.passes.intervals import share_interval
from ioi_mamba.passes.sweep import Roll
from ioi_mamba.steering.bottleneck import find_layer, find_offset
from ioi_mamba.steering.steer import METHODS, Averages, averages, name_slots, read_up_to, writing
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import ABSENT, Pairs

BLOCK = ("block_success", "block_n", "block_low", "block_high")
COLUMNS = (
    Column("method", "text", "replace, or subtract-add"),
    Column("slot", "int", "the slot written over, from 1"),
    Column("source_slot", "int", "the slot that the average comes from, from 1"),
    Column(
        "success", "float", "share of the prompts in which the intended name beats the original answer", nullable=True
    ),
    Column("n", "int", "distinct prompts; 0 where none could be tested"),
    Column("low", "float", "lower end of the 95 % interval, by cluster", nullable=True),
    Column("high", "float", "upper end of the same interval", nullable=True),
    Column("layer", "int", "the layer written in"),
    Column("offset", "int", "how many tokens after a name is averaged and written", "tokens"),
    Column("block_success", "float", "success over the cell's block, a prompt counted once", nullable=True, later=True),
    Column("block_n", "int", "prompts of the block", later=True),
    Column("block_low", "float", "lower end of the block's interval", nullable=True, later=True),
    Column("block_high", "float", "upper end of the same interval", nullable=True, later=True),
    Column("leave_out", "bool", "a test prompt's own pair is taken out of its averages", later=True),
    Column("prompts_a_name", "float", "prompts of a name in a slot, mean over all", "prompts", later=True),
)

DEFAULT_PAIRS = 10_000
ENOUGH = 50  # prompts a name: then a test prompt's own share of an average is 2 % or less
EARLY = 3  # slots of the first clause; cells are pooled by where the slot and where the source is
UNTESTED = -1


@dataclass(frozen=True)
class Options:
    """Options of name-steering."""

    layer: int | None = option(None, "the layer; none: the bottleneck, found as layer-ablation does", at_least=0)
    offset: int | None = option(
        None,
        "tokens after a name to average and to write; none: where resampling ssm_input has the largest effect",
        at_least=0,
    )
    per_cell: int = option(101, "test prompts to draw for a cell, with replacement", at_least=1)
    leave_out: bool | None = option(
        None, f"take a test prompt's own pair out of its averages; none: where names have fewer than {ENOUGH} prompts"
    )


Share = tuple[float, int, float, float]
"""(share, n, low, high)"""


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """Four templates, five corruptions and the swapped copies; both what is averaged and what is drawn from.

    n_pairs None: the paper's 10,000. With few pairs a name may never be in a slot, which costs test prompts.
    """
    return ioi.generate(tokenizer, DEFAULT_PAIRS if n_pairs is None else n_pairs, seed, symmetric=True)


def run(context: Context) -> pd.DataFrame:
    """One row for each method, slot written over and slot the average comes from.

    A test prompt whose names were never in the source slot is left out of `n`; a cell without test prompts has n = 0
    and no success. A cell's block is that of its slot and source, each among the first three or not; over a block a
    prompt counts once, with its mean over the block's cells. Test prompts are drawn from `seed` as the published code
    does. Raises InputError for pairs whose names have no roles and a layer out of range.
    """
    model, pairs, options = context.model, context.pairs, context.options
    slots = name_slots(pairs)
    layer = find_layer(model) if options.layer is None else options.layer
    offset = find_offset(model, layer) if options.offset is None else options.offset
    cells = {cell: _distinct(pairs, rows) for cell, rows in sample_cells(pairs, options.per_cell, context.seed).items()}
    names = averages(model, pairs, layer, offset=offset, progress=context.stage(0, 0.3))
    times = _times(pairs)
    prompts_a_name = len(times) / len(names.names)
    leave_out = prompts_a_name < ENOUGH if options.leave_out is None else options.leave_out
    tested = {cell: index for cell, index in cells.items() if len(index)}
    where = [(slots[slot - 1], slots[source - 1]) for slot, source in tested]
    prompts = [pairs[index].without_text() for index in tested.values()]
    counts = [
        torch.tensor(
            [[times[tuple(side[row].tolist())] for side in (part.clean, part.corrupted)] for row in range(len(part))]
        )
        for part in prompts
    ]
    own = counts if leave_out else [torch.zeros_like(each) for each in counts]
    chunks = [(names, *cell) for cell in zip(prompts, where, own, strict=True)]
    found = each_chunk(model, _outcome, chunks, progress=context.stage(0.3, 1))
    outcomes = dict(zip(tested, found, strict=True))
    clusters = pairs.clusters
    tables = []
    for k, method in enumerate(METHODS):
        rows = []
        for cell, index in cells.items():
            outcome = outcomes[cell][k] if cell in outcomes else torch.empty(0)
            kept = outcome != UNTESTED
            rows.append((cell, index[kept], outcome[kept].double()))
        blocks = {block: _pooled(own, clusters) for block, own in _by_block(rows).items()}
        tables += [(method, *c, *_share(o, clusters[i]), *blocks[_block(c)]) for c, i, o in rows]
    table = pd.DataFrame(tables, columns=["method", "slot", "source_slot", "success", "n", "low", "high", *BLOCK])
    table = table.assign(leave_out=leave_out, prompts_a_name=prompts_a_name, layer=layer, offset=offset)
    return table[[column.name for column in COLUMNS]].sort_values(["method", "slot", "source_slot"], ignore_index=True)


def _distinct(pairs: Pairs, rows: Tensor) -> Tensor:
    """Of drawn rows the first of each clean prompt, in order of first draw."""
    seen: dict[tuple[int, ...], int] = {}
    for row in rows.tolist():
        seen.setdefault(tuple(pairs.clean[row].tolist()), row)
    return torch.tensor(list(seen.values()), dtype=torch.int64)


def _times(pairs: Pairs) -> dict[tuple[int, ...], int]:
    """How often each prompt stands in the pairs, clean or corrupted: its weight in the averages."""
    return Counter(tuple(row) for side in (pairs.clean, pairs.corrupted) for row in side.tolist())


def _block(cell: tuple[int, int]) -> tuple[bool, bool]:
    """Whether the slot, and whether the source, are among the first three."""
    return cell[0] <= EARLY, cell[1] <= EARLY


def _by_block(rows: list[tuple[tuple[int, int], Tensor, Tensor]]) -> dict[tuple[bool, bool], list]:
    blocks: dict[tuple[bool, bool], list] = {}
    for cell, index, outcome in rows:
        blocks.setdefault(_block(cell), []).append((index, outcome))
    return blocks


def _pooled(cells: list[tuple[Tensor, Tensor]], clusters: Tensor) -> Share:
    """Of the cells of a block, [(rows, outcomes)]: the share over prompts, each with its mean outcome."""
    index, outcome = (torch.cat(each) for each in zip(*cells, strict=True))
    rows, place = index.unique(return_inverse=True)
    means = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, place, outcome.double())
    return _share(means / place.bincount(minlength=len(rows)), clusters[rows])


def _share(outcomes: Tensor, clusters: Tensor) -> Share:
    """(success, n, low, high) of outcomes in 0..1 [row]; NaN where there is none."""
    n = len(outcomes)
    if n == 0:
        return float("nan"), 0, float("nan"), float("nan")
    low, high = share_interval(outcomes, clusters.unique(return_inverse=True)[1])
    return float(outcomes.mean()), n, float(low), float(high)


def chart(table: pd.DataFrame) -> alt.FacetChart | alt.LayerChart:
    """One matrix a method, slot written over by slot of the average, on one scale from 0 to 1."""
    return drawing.matrix_heatmap(
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
    """What the table says: slots 1 to 3 among each other, and with 4 and 5, for both methods; whose averages they are."""
    first, whose = table.iloc[0], ""
    if "leave_out" in table:  # a table of an earlier version does not say
        of_a_name = f"{first['prompts_a_name']:.1f} prompts have a name in a slot on average"
        whose = f", without a test prompt's own pair, since only {of_a_name}"
        whose = whose if first["leave_out"] else f", test prompts included ({of_a_name})"
    found = [f"The averages are those of layer {first['layer']}, {_place(int(first['offset']))}{whose}."]
    early = {
        method: table[
            (table["method"] == method) & (table["n"] > 0) & (table["slot"] <= EARLY) & (table["source_slot"] <= EARLY)
        ]
        for method in ("replace", "subtract-add")
    }
    wins = " and ".join(f"in {_block_text(cells)} by {method}" for method, cells in early.items())
    found.insert(0, f"Over slots 1 to 3 the intended name wins {wins}.")
    for method in ("subtract-add", "replace"):
        own = table[(table["method"] == method) & (table["n"] > 0)]
        parts = [
            _block_text(own[((own["slot"] <= EARLY) == early) & ((own["source_slot"] <= EARLY) == near)])
            for early in (True, False)
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


def _block_text(cells: pd.DataFrame) -> str:
    if cells.empty:
        return "no prompt"
    if BLOCK[0] not in cells:
        return f"{cells['success'].mean():.3f} (mean of cells)"
    success, n, low, high = (cells.iloc[0][column] for column in BLOCK)
    return f"{success:.3f} ({low:.3f} to {high:.3f}, {n:.0f} prompts)"


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


def _outcome(model, names: Averages, pairs: Pairs, where: tuple[str, str], times: Tensor, *, progress=None) -> Tensor:
    """For one cell, at its (slot, source slot), Int64[method, pair]: 1 where the intended name wins, 0 or UNTESTED.

    times: Int64[pair, 2], how often a pair's clean and its corrupted prompt are to be taken out of the averages.
    """
    with torch.no_grad():
        return _written(model, names, pairs, *where, times)


def _written(model, names: Averages, pairs: Pairs, slot: str, source: str, times: Tensor) -> Tensor:
    at = pairs.roles[slot]
    current = pairs.clean.gather(1, at[:, None])[:, 0]
    new = target = pairs.wrong
    if names.slots.index(slot) >= answer_slots(names.slots):
        # Once the answer stands in another slot too, the name it replaces is the only one mentioned once.
        new, target = pairs.answer, current
    seen, vector = _without_own(model, pairs, names, source, times, new)
    seen_old, old = _without_own(model, pairs, names, source, times, current)
    usable = {"replace": seen, "subtract-add": seen & seen_old}
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
            write = vector[own] if method == "replace" else vector[own] - old[own]
            logits = forward(
                model,
                part[kept],
                {f"blocks.{names.layer}.hook_ssm_input": writing(write, at[own] + names.offset, method)},
                logits_at=last[kept][:, None],
                start=roll.start(names.layer, stream[kept], kept),
                own_scan=True,
            )["hook_logits"][:, 0].cpu()
            row = torch.arange(len(own))
            outcome[k, own] = (logits[row, target[own]] > logits[row, pairs.answer[own]]).long()
    return outcome


def _without_own(model, pairs: Pairs, names: Averages, slot: str, times: Tensor, name: Tensor) -> tuple[Tensor, Tensor]:
    """The average of each row's name (Int64[row]) in a slot without the row's own prompts, [row, E]; and if there is one.

    times: Int64[row, 2], how often the row's clean and its corrupted prompt stand in the averages.
    """
    found = names.seen(name, slot)
    index = torch.searchsorted(names.names, name).clamp(max=len(names.names) - 1)
    column = names.slots.index(slot)
    count, mean = names.count[index, column] * found, names.mean[index, column]
    at = pairs.roles[slot]
    read_at = at + names.offset
    inside = (at != ABSENT) & (read_at <= pairs.last)
    total = mean.double() * count[:, None]
    for side, n in zip((pairs.clean, pairs.corrupted), times.T, strict=True):
        own = torch.where(inside & (side.gather(1, at.clamp(min=0)[:, None])[:, 0] == name), n, 0)
        rows = own.nonzero()[:, 0]
        for part in rows.split(rows_per_pass(model, side.shape[1])):
            if len(part):
                x = read_up_to(model, side[part], names.layer, "ssm_input").cpu()
                total[part] -= x[torch.arange(len(part)), read_at[part]].double() * own[part][:, None]
        count = count - own
    return count > 0, (total / count.clamp(min=1)[:, None]).float()


EXPERIMENT = Experiment(
    name="name-steering",
    title="Rewriting names",
    paper="4.3, Fig 9",
    question="Is a name one vector?",
    look_for=(
        "A block of cells near 1 in rows and columns 1 to 3: the first three mentions are written alike. "
        "Subtract-and-add staying high in rows 4 and 5 where replace falls says that more than the name is there. "
        "A cell is empty where no prompt could be had."
    ),
    method=(
        "avg[name, slot]: mean ssm_input one token (offset) after the name over all prompts with that name in that slot.\n"
        "Replace: x := avg[new, source]. Subtract-and-add: x := x + avg[new, source] - avg[old, source]. Slots of the "
        "answer: the answer becomes the corrupted prompt's; other slots: the answer is written, so that the slot's old "
        "name is the only one mentioned once.\n"
        "Success: the intended name's last-position logit exceeds the original answer's; 101 draws a cell, of which each "
        "distinct prompt counts once; Wilson intervals by pair."
    ),
    needs=frozenset({Need.SITES, Need.ABLE, Need.NAMES, Need.ONE_TOKEN, Need.LAYER}),
    options=Options,
    columns=COLUMNS,
    draws={ioi.TASK.name: default_pairs},
    most_pairs=DEFAULT_PAIRS,
    run=run,
    chart=chart,
    findings=findings,
)
