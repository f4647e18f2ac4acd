"""Every experiment in every dtype that is offered: it runs, and says what it says in float32 to the dtype's rounding.

`python -m pytest tests/study/test_dtypes.py --write-docs` writes what was found into docs/dtypes.md.
"""

from functools import cache
from pathlib import Path

import golden
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.circuits.graph import Item, masks_of, universe_of
from ioi_mamba.circuits.patching import corrupted_run, patched_run
from ioi_mamba.passes.sweep import resample_sweep
from ioi_mamba.study.runs import run_study

PAGE = Path(__file__).parents[2] / "docs/dtypes.md"
BEGIN, END = "<!-- begin: written by tests/study/test_dtypes.py -->", "<!-- end -->"

ROUNDING = {"float64": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}
"""Of a number between 1 and 2 in the dtype; of float64, that of the float32 numbers it is held against."""
# Logits of `mini` go up to some 30 and their differences to some 20: a difference rounds by a few times this, and an
# effect, which is a ratio of two, by as much again.
TOLERANCE = {dtype: 16 * rounding for dtype, rounding in ROUNDING.items()} | {"float64": 1e-3}

COLUMN = {
    "layer-ablation": "effect",
    "layer-removal": "probability",
    "cross-talk": "probability",
    "state-similarity": "similarity",
    "conv-shift": "effect",
    "name-steering": "success",
    "state-ablation": "effect",
    "output-ablation": "effect",
    "edge-attribution": "score",
    "circuit-search": "score",
    "positional-attribution": "score",
    "ablation-kinds": "effect",
    "circuit-stability": "score",
    "token-flow": "score",
    "decoding": "contribution",
    "features": "value",
}
# Of these, what is in a table depends on what the model chose: only what both have is compared.
KEYS = {
    "layer-removal": (["mode", "layer"], "mode == 'single'"),
    "cross-talk": (["template", "corruption", "layer"], "step == 1"),
    "edge-attribution": (["source", "target", "part", "position"], "what == 'item'"),
    "circuit-search": (["source", "target", "part"], "what == 'item'"),
    "positional-attribution": (["source", "target", "position"], "what == 'item'"),
    "circuit-stability": (["source", "target", "part", "label", "size"], "what != 'circuit'"),
    "token-flow": (["layer", "source", "target", "path"], "n > 0"),
    # The least squares of a tuned lens go through what streams hardly have, which rounding fills.
    "decoding": (["what", "layer", "position", "part", "way"], "what not in ('carried', 'tuned lens')"),
    # A dictionary that is trained on rounded values is another one, and orders of near equals differ.
    "features": (["site", "way"], "what == 'left' and size == 0 and way != 'features, error clean'"),
}


@cache
def few_layers(directory):
    """`mini` without most of its layers, as a checkpoint: the first and the last two still do the task."""
    whole = im.open_model("mini", device="cpu")
    kept = [0, *range(whole.config.num_hidden_layers - 2, whole.config.num_hidden_layers)]
    weights = AutoModelForCausalLM.from_config(MambaConfig(**whole.config.to_diff_dict() | {"num_hidden_layers": 3}))
    weights.load_state_dict(whole._module.state_dict(), strict=False)
    for layer, old in enumerate(kept):
        weights.backbone.layers[layer].load_state_dict(whole._module.backbone.layers[old].state_dict())
    weights.save_pretrained(directory)
    whole.tokenizer.save_pretrained(directory)
    return str(directory)


@cache
def tables(dtype, directory):
    """The tables of all experiments on a few pairs in a dtype, by name."""
    model = im.open_model(few_layers(directory.parent), device="cpu", dtype=dtype)
    pairs = im.ioi.generate(
        model.tokenizer, 4, 27, templates=im.ioi.TEMPLATES[:1], corruptions=im.ioi.CORRUPTIONS[:1], symmetric=False
    ).symmetric()
    options = {"layer": 1, "offset": 0, "per_cell": 4, "compare_prompts": 0, "exact_prompts": 2, "part_prompts": 2}
    options |= {"size": 16, "active": 4, "training_steps": 10}
    options["leave_out"] = False  # of so few prompts most would have no averages left
    run_study(model, analyses.ORDER, directory, pairs=pairs, options=options, progress=False)
    return {name: pd.read_parquet(directory / f"{name}.parquet") for name in analyses.ORDER}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("dtypes")


def compared(name, dtype, directory):
    """The experiment's main column in float32 and in the dtype, row by row."""
    one, other = (tables(each, directory / each)[name] for each in ("float32", dtype))
    if name in KEYS:
        keys, rows = KEYS[name]
        one, other = (table.query(rows).fillna({"part": "", "position": -1, "label": ""}) for table in (one, other))
        both = one.merge(other, on=[key for key in keys if key in one], suffixes=("", "_other"))
    else:
        assert len(one) == len(other)
        both = one.assign(**{f"{COLUMN[name]}_other": other[COLUMN[name]].to_numpy()})
    return both[[COLUMN[name], f"{COLUMN[name]}_other"]].dropna().astype(float)


FOUND: dict[tuple[str, str], float] = {}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", analyses.ORDER)
def test_every_experiment_runs_in_every_dtype_and_finds_what_it_finds_in_float32(name, dtype, directory):
    both = compared(name, dtype, directory)
    assert len(both) >= 3
    difference = float((both.iloc[:, 0] - both.iloc[:, 1]).abs().max())
    FOUND[name, dtype] = difference
    # A share of few prompts moves by whole prompts; what decoding calls lost is one difference of logits minus another.
    wider = {"name-steering": 1 / 2, "decoding": 2 * TOLERANCE[dtype]}
    assert difference <= wider.get(name, TOLERANCE[dtype])


def test_what_was_found_is_written(request):
    if not request.config.getoption("--write-docs"):
        pytest.skip("with --write-docs")
    lines = ["| experiment | column | float64 | float16 | bfloat16 |", "|---|---|---|---|---|"]
    for name in analyses.ORDER:
        cells = " | ".join(f"{FOUND[name, dtype]:.2g}" for dtype in ROUNDING)
        lines.append(f"| {name} | {COLUMN[name]} | {cells} |")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")


# -- resumed passes are whole passes, in every dtype ----------------------------------------------------------------


def tolerance(dtype, logits):
    """Two passes of one edit differ by a few roundings of the largest logit."""
    return 8 * torch.finfo(getattr(torch, dtype)).eps * float(logits.abs().max()) + 1e-5


@pytest.mark.parametrize("dtype", ["float32", *ROUNDING])
@pytest.mark.parametrize("site", ["layer_input", "ssm_input", "conv_slice.-1", "h", "h_and_conv", "out_proj", "B"])
def test_a_resumed_sweep_is_the_whole_one_in_every_dtype(site, dtype):
    pairs = golden.golden_pairs()[:2]
    model = golden.model(dtype)
    resumed, whole = (resample_sweep(model, pairs, site, resume=resume, layers=[1, 3]) for resume in (True, False))
    assert (resumed - whole).abs().max() <= tolerance(dtype, whole)
    assert resumed.dtype == (torch.float64 if dtype == "float64" else torch.float32)


@pytest.mark.parametrize("dtype", ["float32", *ROUNDING])
def test_an_edge_without_effect_has_none_in_a_resumed_pass_of_any_dtype(dtype):
    """The residual stream a pass goes on from is the model's own, bit for bit: its sum and its dtype."""
    model, pairs = golden.model(dtype), golden.golden_pairs()[:3]
    same = im.Pairs.from_tokens(pairs.clean, pairs.clean, pairs.answer, pairs.wrong)
    universe = universe_of(model, parts=True)
    corrupted = corrupted_run(model, same, parts=True)
    items = [[], [Item("2", "output")], [Item("3", "3", None, "skip")], [Item("0", "3")], [Item("embed", "2")]]
    nothing, *masks = (masks_of([each], universe, pairs.clean.shape[1]) for each in items)
    clean, before = patched_run(model, same, corrupted, nothing)
    stock = im.run(model, same)[torch.arange(3), same.last].float()
    assert (clean[0].float() - stock).abs().max() <= tolerance(dtype, stock)
    for each, mask in zip(items[1:], masks, strict=True):
        logits, _ = patched_run(model, same, corrupted, mask, before)
        assert (logits - clean).abs().max() <= tolerance(dtype, stock), each
