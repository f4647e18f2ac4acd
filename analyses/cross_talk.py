"""Which layers must let tokens see each other? A greedy minimal circuit for each template and corruption.

Within a layer only the convolution and the recurrence move anything between positions, so resampling the input of
the convolution at all positions leaves nothing of the clean prompt in that layer but its gate: no cross-talk. The
experiment begins with every layer resampled and gives layers back, one by one, until the model is right again.

Where the paper and its code disagree: the text names `hook_in_proj`, the code overwrites `hook_conv`; at all
positions that is the same edit. "About 0.9" is in the code the first accuracy over 0.90, on the very prompts that
chose the layers. The text's 18 % of circuits with layer 0 is 15 % (3 of 20) in the published data. The published
log came from an older list of names, so its order of layers is not to be had from the published prompts.

How it is fast, and exact. What a resampled layer's recurrence gives depends on the corrupted run alone: it is kept
from there and never run again. And above the highest layer that is given back no position sees another, so only the
last one is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import altair as alt
import nnsight
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba import charts, metrics
from ioi_mamba.errors import InputError
from ioi_mamba.interventions import forward
from ioi_mamba.jobs import call, config_of, device_of
from ioi_mamba.mixer import MixerPass
from ioi_mamba.sweep import Roll, block_sites, layer_count
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

NAME = "cross-talk"
TITLE = "Removing token cross-talk"
PAPER = "4.1.3, Fig 6"
QUESTION = "In which layers does the model need information to pass between tokens?"
LOOK_FOR = (
    "Bars at 1 are layers no circuit does without. In the second chart each row is one circuit, its layers from "
    "left to right in the order in which they were given back: a first column of one colour and one number is a "
    "single layer that does most of the work."
)
METHOD = (
    "Start: the conv input (in_proj) of every layer, at all positions, is the corrupted prompt's; gates stay clean.\n"
    "Step: the layer is given back that leaves the highest accuracy among the names (ties: the higher mean "
    "probability of the answer among them, then the lower index).\n"
    "Stop: accuracy above 0.90. If it is never reached, the circuit is the layers up to the best accuracy."
)
NEEDS_MAMBA = True
COLUMNS = (
    "template",
    "corruption",
    "step",
    "layer",
    "accuracy",
    "probability",
    "n",
    "chosen",
    "in_circuit",
    "reached",
)

SCANNED = ("ssm_input", "y")
"""What a layer makes of its conv input, of all positions, on the way to its output: all that resampling changes."""

DEFAULT_PAIRS = 200
UNLABELLED = "(all)"
NO_LAYER = -1
MAX_JOBS = 10

Score = tuple[float, float]
"""(accuracy among the names, mean probability of the answer among them)"""


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """Each of the 20 combinations of template and corruption, drawn anew from `seed`; with the swapped copies.

    n_pairs: pairs of one combination, which give twice as many prompts. None: the paper's 200.
    """
    n_pairs = DEFAULT_PAIRS if n_pairs is None else n_pairs
    return Pairs.concat(
        [
            ioi.generate(tokenizer, n_pairs, seed, templates=[template], corruptions=[corruption])
            for template in ioi.TEMPLATES
            for corruption in ioi.CORRUPTIONS
        ]
    )


def run(
    model,
    pairs: Pairs,
    *,
    threshold: float = 0.90,
    rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row for each candidate of each step of each circuit, and one of step 0: every layer resampled.

    Pairs are grouped by their labels "template" and "corruption"; without labels there is one group. `layer` is
    the layer given back (empty at step 0), on top of those `chosen` at earlier steps; `accuracy` and
    `probability` are means over the n prompts, in 0..1. `in_circuit`: the layer is one of the group's circuit;
    `reached`: the circuit's accuracy is above `threshold`. rows: prompts in one pass, by default what fits.
    Raises InputError for a threshold outside 0..1 and for `rows` below 1.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold is {threshold}; give an accuracy from 0 to 1.")
    if rows is not None and rows < 1:
        raise InputError(f"rows is {rows}; at least one prompt must be in a pass.")
    groups = _groups(pairs)
    per_group = layer_count(model) * (layer_count(model) + 1) // 2
    # Several groups to a job, and few jobs: a server is asked seldom, and an interruption loses little.
    size = -(-len(groups) // MAX_JOBS)
    tables = []
    for first in range(0, len(groups), size):
        batch = groups[first : first + size]

        def report(done: int, _: int, before: int = first * per_group) -> None:
            if progress is not None:
                progress(before + done, len(groups) * per_group)

        parts = [group.without_text() for _, _, group in batch]
        found = call(model, _searches, parts, threshold, rows, progress=report)
        for (template, corruption, group), records in zip(batch, found, strict=True):
            tables.append(_table(records, len(group), threshold).assign(template=template, corruption=corruption))
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)]


def chart(table: pd.DataFrame) -> alt.VConcatChart:
    """In how many circuits each layer is, above the order in which each circuit was built."""
    n_circuits = len(_circuits(table))
    proportion = _proportion(table).rename("proportion").rename_axis("layer").reset_index()
    proportion["circuits"] = [f"{round(p * n_circuits)} of {n_circuits}" for p in proportion["proportion"]]
    shown = list(proportion["layer"])[:: max(1, -(-len(proportion) // 24))]
    bars = (
        alt.Chart(charts.check_size(proportion), title="Circuits with each layer")
        .mark_bar(cornerRadiusEnd=2, color=charts.BLUE)
        .encode(
            x=alt.X("layer:O", axis=alt.Axis(labelAngle=0, values=shown, ticks=False)),
            y=alt.Y("proportion:Q", title="proportion of circuits", scale=alt.Scale(domain=[0, 1])),
            tooltip=["layer:O", alt.Tooltip("proportion:Q", format=".2f"), "circuits:N"],
        )
        .properties(width=charts.PLOT_WIDTH, height=200)
    )
    steps = table[table["chosen"]].copy()
    if steps.empty:
        return alt.vconcat(bars)
    steps["circuit"] = steps["template"] + ": " + steps["corruption"]
    steps["layer"] = steps["layer"].astype(int).astype(str)
    order = list(dict.fromkeys(steps["circuit"]))
    n_steps = int(steps["step"].max())
    base = alt.Chart(charts.check_size(steps), title="The order in which layers are given back").encode(
        x=alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
        y=alt.Y("circuit:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=240)),
        tooltip=[
            "template:N",
            "corruption:N",
            "step:O",
            "layer:N",
            alt.Tooltip("accuracy:Q", format=".3f"),
            "in_circuit:N",
            "n:Q",
        ],
    )
    scale = alt.Scale(domain=[0, 1], range=list(charts.SEQUENTIAL), interpolate="rgb", clamp=True)
    legend = alt.Legend(orient="top", direction="horizontal", gradientLength=220, gradientThickness=12, titleLimit=420)
    squares = base.mark_rect(stroke="currentColor", strokeOpacity=0.06, strokeWidth=0.5).encode(
        color=alt.Color("accuracy:Q", scale=scale, title="accuracy after the step (written: the layer)", legend=legend)
    )
    numbers = base.mark_text(fontSize=11).encode(text="layer:N")
    width = min(charts.PLOT_WIDTH - 220, 34 * n_steps)
    matrix = alt.layer(squares, numbers).properties(width=width, height=max(40, 18 * len(order)))
    return alt.vconcat(bars, matrix, spacing=36).resolve_scale(color="independent")


def findings(table: pd.DataFrame) -> list[str]:
    """What the table says: how the circuits begin, how large they get, and which layers are in them."""
    circuits = _circuits(table)
    n = len(circuits)
    none = table.query("step == 0")["accuracy"]
    first = table.query("step == 1 and chosen")
    sizes = circuits["size"]
    reached = int(circuits["reached"].sum())
    found = [
        f"With every layer resampled the accuracy is {none.mean():.2f} on average ({none.min():.2f} to "
        f"{none.max():.2f} over {n} combinations of template and corruption)."
    ]
    if len(first):
        layer, times = _most_frequent(first["layer"])
        gain = first[first["layer"] == layer]["accuracy"]
        found.append(
            f"Layer {layer} is the first to be given back in {times} of {n} circuits and alone brings the accuracy "
            f"to {gain.mean():.2f} on average ({gain.min():.2f} to {gain.max():.2f})."
        )
    found.append(
        f"{reached} of {n} circuits reach the threshold; they have {sizes.mean():.2f} layers on average "
        f"({sizes.min()} to {sizes.max()})."
    )
    for _, row in circuits[~circuits["reached"]].iterrows():
        found.append(
            f"{row['template']}, {row['corruption']}: not reached; the best accuracy is {row['accuracy']:.3f}, with "
            f"{row['size']} layers."
        )
    proportion = _proportion(table)
    always = [str(layer) for layer, share in proportion.items() if share == 1]
    never = [str(layer) for layer, share in proportion.items() if share == 0]
    found.append(
        f"In every circuit: {'layers ' + ', '.join(always) if always else 'no layer'}; in none: "
        f"{'layers ' + ', '.join(never) if never else 'no layer'}."
    )
    if 0 in proportion:
        share = proportion[0]
        found.append(f"Layer 0 is in {round(share * n)} of {n} circuits ({share:.0%}).")
    return found


def _groups(pairs: Pairs) -> list[tuple[str, str, Pairs]]:
    """(template, corruption, pairs) in first-seen order."""
    groups = []
    for template, part in (pairs.by("template") if "template" in pairs.labels else {UNLABELLED: pairs}).items():
        for corruption, group in (part.by("corruption") if "corruption" in part.labels else {UNLABELLED: part}).items():
            groups.append((template, corruption, group))
    return groups


def _circuits(table: pd.DataFrame) -> pd.DataFrame:
    """One row a circuit: template, corruption, size, accuracy (its own), reached."""
    rows = []
    for (template, corruption), group in table.groupby(["template", "corruption"], sort=False):
        own = group[(group["chosen"] & group["in_circuit"]) | (group["step"] == 0)]
        end = own.sort_values("step").iloc[-1]
        rows.append((template, corruption, len(own) - 1, end["accuracy"], bool(end["reached"])))
    return pd.DataFrame(rows, columns=["template", "corruption", "size", "accuracy", "reached"])


def _proportion(table: pd.DataFrame) -> pd.Series:
    """The share of circuits that have each layer, by layer."""
    layers = sorted({int(layer) for layer in table["layer"].dropna()})
    members = table[table["chosen"] & table["in_circuit"]]["layer"].astype(int)
    counts = members.value_counts().reindex(layers, fill_value=0)
    return counts / len(_circuits(table))


def _most_frequent(layers: pd.Series) -> tuple[int, int]:
    counts = layers.astype(int).value_counts().sort_index().sort_values(ascending=False, kind="stable")
    return int(counts.index[0]), int(counts.iloc[0])


def _rows_per_pass(model, pairs: Pairs) -> int:
    """How many prompts keep what is held of them (`_Rows`) within 1 GiB, or 8 GiB on an accelerator."""
    config = config_of(model)
    held = layer_count(model) * pairs.clean.shape[1] * (2 * config.intermediate_size + config.hidden_size)
    budget = (1 if torch.device(device_of(model)).type == "cpu" else 8) * 2**30
    return max(1, budget // (4 * held))


def _searches(
    model,
    groups: list[Pairs],
    threshold: float,
    rows: int | None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Of each group, Float64[candidate, 5]: step, layer or -1, accuracy, probability, chosen."""
    per_group = layer_count(model) * (layer_count(model) + 1) // 2
    found = []
    with torch.no_grad():
        for number, group in enumerate(groups):

            def report(done: int, before: int = number * per_group) -> None:
                if progress is not None:
                    progress(before + done, len(groups) * per_group)

            found.append(_greedy(model, group, threshold, rows or _rows_per_pass(model, group), report))
            report(per_group)
    return found


def _greedy(model, pairs: Pairs, threshold: float, rows: int, report: Callable[[int], None]) -> Tensor:
    """The search in one group; see `_searches` for what is returned."""
    parts = [pairs[index] for index in torch.arange(len(pairs)).split(rows)]
    left, circuit, records = list(range(layer_count(model))), [], []
    held, done = None, 0
    for step in range(len(left) + 1):
        seen: dict[int, list[Tensor]] = {}
        for part in parts:
            # A group of one part is held from step to step; several are made anew, so that one fits at a time.
            if held is None or len(parts) > 1:
                held = _Rows(model, part)
            held.give_back(circuit)
            for layer in [NO_LAYER] if step == 0 else left:
                seen.setdefault(layer, []).append(held.scores(None if layer == NO_LAYER else layer))
                done += layer != NO_LAYER and part is parts[-1]
                report(done)
        means = {layer: _mean(torch.cat(scores, 1)) for layer, scores in seen.items()}
        # max keeps the first of equals, which is the lowest layer.
        best = max(means, key=means.__getitem__)
        records += [(step, layer, *score, layer == best and layer != NO_LAYER) for layer, score in means.items()]
        if best != NO_LAYER:
            circuit.append(best)
            left.remove(best)
        if means[best][0] > threshold:
            break
    return torch.tensor(records, dtype=torch.float64)


def _table(records: Tensor, n: int, threshold: float) -> pd.DataFrame:
    """The table of one group, without its labels. The circuit ends at the first step with the highest accuracy."""
    table = pd.DataFrame(records.numpy(), columns=["step", "layer", "accuracy", "probability", "chosen"])
    table = table.astype({"step": int, "layer": int, "chosen": bool})
    path = table[table["chosen"] | (table["step"] == 0)].sort_values("step")
    last = int(path.loc[path["accuracy"].idxmax(), "step"])
    members = set(path[(path["step"] > 0) & (path["step"] <= last)]["layer"])
    return table.assign(
        n=n,
        in_circuit=[layer in members for layer in table["layer"]],
        reached=bool(path["accuracy"].max() > threshold),
        layer=table["layer"].astype("Int64").mask(table["layer"] == NO_LAYER),
    )


def _mean(scores: Tensor) -> Score:
    accuracy, probability = scores.double().mean(1).tolist()
    return accuracy, probability


class _Rows:
    """Some prompts with all but a few layers resampled, and what a candidate's pass begins with.

    values: SCANNED of the corrupted prompts, per layer [row, pos, E]; at_last: the same at the last position,
    [row, 1, E]. streams: per layer [row, pos, D], the residual stream that enters it when the layers of `circuit` are
    given back.
    """

    def __init__(self, model, pairs: Pairs):
        self.model, self.pairs = model, pairs
        self.tokens, self.last = pairs.clean.to(device_of(model)), pairs.last.to(device_of(model))
        layers = range(layer_count(model))
        names = {site: block_sites(site, layers) for site in SCANNED}
        reads = [name for each in names.values() for name in each]
        corrupted = forward(model, pairs.corrupted, reads=reads, logits_at=self.last, own_scan=True)
        self.values = {site: [corrupted[name] for name in names[site]] for site in names}
        index = torch.arange(len(pairs), device=self.tokens.device)
        self.at_last = {site: [v[index, self.last][:, None] for v in values] for site, values in self.values.items()}
        self.circuit: frozenset[int] = frozenset()
        self._run_from(0, None)

    def give_back(self, layers: Iterable[int]) -> None:
        """Make `layers` the ones that are not resampled."""
        changed = self.circuit ^ frozenset(layers)
        if changed:
            self.circuit = frozenset(layers)
            first = min(changed)
            self._run_from(first, self.streams[first])

    def _run_from(self, first: int, stream: Tensor | None) -> None:
        """The streams from layer `first` on, and the logits, of all positions."""
        layers = range(first, layer_count(self.model))
        edits = {
            f"blocks.{i}.hook_{site}": self.values[site][i]
            for site in self.values
            for i in layers
            if i not in self.circuit
        }
        start = None if stream is None else Roll.begin(self.model, self.tokens).start(first, stream)
        names = block_sites("resid_pre", layers)
        run = forward(self.model, self.tokens, edits, names, logits_at=self.last, start=start, own_scan=True)
        self.logits = run["hook_logits"][:, 0]
        self.streams = [*(self.streams[:first] if first else []), *(run[name] for name in names)]

    def scores(self, layer: int | None) -> Tensor:
        """[accuracy or probability, row] with `layer` given back too; None: as it is."""
        logits = (self.logits if layer is None else self._candidate(layer)).float().cpu()
        answer, names = self.pairs.answer, self.pairs.candidates
        if names is None:
            names = torch.stack([answer, self.pairs.wrong], 1)
        probability = metrics.relative_probability(logits, answer, names)
        self.pairs.check_finite("probabilities", probability)
        return torch.stack([metrics.accuracy(logits, answer, names), probability])

    def _candidate(self, layer: int) -> Tensor:
        """Logits [row, vocab] at the last position with `layer` given back too."""
        blocks, stream, n_layers = self.model.backbone.layers, self.streams[layer], layer_count(self.model)
        clean = self.circuit | {layer}
        highest = max(clean)
        index = torch.arange(len(stream), device=stream.device)
        # nnsight's own mask is as wide as the prompt; this one also fits the single position it narrows to.
        mask = self.tokens.new_ones(len(self.tokens), 1)
        with self.model.trace(self.tokens, use_cache=False, attention_mask=mask):
            for i in range(layer):
                blocks[i].skip(stream)
            for i in range(layer, highest + 1):
                self._walk(i, None if i in clean else self.values)
            for i in range(highest + 1, n_layers):
                # No position above sees another: from here on only the last one is carried.
                if i == highest + 1:
                    blocks[i].input = blocks[i].input[index, self.last][:, None]
                self._walk(i, self.at_last)
            if highest + 1 == n_layers:
                self.model.lm_head.input = self.model.lm_head.input[index, self.last][:, None]
            logits = nnsight.save(self.model.lm_head.output)
        return logits[:, 0]

    def _walk(self, layer: int, values: dict[str, list[Tensor]] | None) -> None:
        """Run one layer as it is, or with `values` in place of its own."""
        mixer = MixerPass(self.model, layer)
        if values is None:
            mixer.own_scan()
        else:
            for site in SCANNED:
                mixer.set(site, values[site][layer])
        mixer.finish()
