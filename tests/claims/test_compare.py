"""Comparing with the paper: published values hold, each spoilt one breaks its own claim, mini is never mamba-370m."""

import json
import random
import re

import pandas as pd
import paper_run
import pass_rates
import pytest
import torch

from ioi_mamba import analyses, claims, paper
from ioi_mamba.analyses import layer_ablation
from ioi_mamba.analyses.positional_attribution import LAST_ONLY, LOST
from ioi_mamba.claims import compare
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import resolved
from ioi_mamba.report import pages
from ioi_mamba.study import runs
from ioi_mamba.tasks import ioi

UNMEASURED = {"gpt2_small_removal", "steer_counts"}
TOO_FEW = {"model_accuracy", "cos_lines"}
"""Undecided on the published samples: 19 of 20 prompts are right, and one prompt has 3 lines of 5 after names."""
CIRCUIT = ["template", "corruption"]
EARLY, LATE = range(1, 4), range(4, 6)


@pytest.fixture(scope="module")
def published():
    return paper_run.tables()


def judge(tables, **entries):
    table = compare.evaluate(tables, {name: paper_run.manifest(name, **entries) for name in tables})
    return table.set_index("claim")


def where(table, name, value, **conditions):
    """The table with the column `name` set to a value, or a function of the old, in the rows that meet all conditions."""
    rows = pd.Series(True, index=table.index)
    for key, wanted in conditions.items():
        rows &= table[key].isin(list(wanted) if isinstance(wanted, range | list) else [wanted])
    assert rows.any()
    new = table[name].map(value) if callable(value) else value
    return table.assign(**{name: table[name].mask(rows, new)})


def given_back(table, layers, n):
    """The cross-talk circuits with each of the layers added to the first n circuits that lack it."""
    members = table[table["chosen"] & table["in_circuit"]]
    rows = [table]
    for layer in layers:
        having = members[members["layer"] == layer][CIRCUIT].apply(tuple, axis=1).tolist()
        lacking = [key for key in members[CIRCUIT].drop_duplicates().itertuples(index=False) if key not in having]
        for template, corruption in lacking[-n:]:
            rows.append(members.head(1).assign(template=template, corruption=corruption, layer=layer, step=99))
    return pd.concat(rows, ignore_index=True)


def first_swapped(table):
    """Ten circuits, not the notebook's, that begin with their second layer."""
    own = table["template"].isin(["When", "Friends"]) & table["chosen"]
    return table.assign(step=table["step"].mask(own & table["step"].isin([1, 2]), 3 - table["step"]))


def ranks_swapped(first, second):
    return lambda t: t.assign(rank=t["rank"].replace({first: second, second: first}))


def first_kept(first, last):
    """The circuit of the edges that rank from first to last."""
    return lambda t: t.assign(kept=t["rank"].between(first, last).fillna(False).astype(bool))


def scored(circuit, sample, measure, value, half=0.02):
    """Another score of a circuit, with its interval."""

    def change(table):
        for name, number in (("value", value), ("low", value - half), ("high", value + half)):
            table = where(table, name, number, circuit=circuit, sample=sample, measure=measure)
        return table

    return change


def without(table, layer, n):
    """Taken out of n circuits."""
    rows = table.index[table["chosen"] & (table["layer"] == layer)][-n:]
    return table.assign(in_circuit=table["in_circuit"] & ~table.index.isin(rows))


CAB, ACB, ABD = paper_run.CORRUPTIONS[:3]
LATER = ["Afterwards", "When", "Friends"]
OTHER_LAYERS = [str(layer) for layer in range(39)]
SPOILT = {
    "model_accuracy": ("layer-removal", lambda t: where(t, "accuracy", 0.5, mode="none")),
    "ra_effect": ("layer-ablation", lambda t: t.assign(effect=t["effect"] * 0.8)),
    "ra_two_strongest": ("layer-ablation", lambda t: where(t, "effect", -1.0, layer=47, position=19, corruption=CAB)),
    "ra_ratio_cab": ("layer-ablation", lambda t: where(t, "effect", 0.4, layer=0, position=3, corruption=CAB)),
    "ra_ratio_acb": ("layer-ablation", lambda t: where(t, "effect", 0.4, layer=0, position=5, corruption=ACB)),
    "ra_ratio_abd": ("layer-ablation", lambda t: where(t, "effect", 0.4, layer=0, position=7, corruption=ABD)),
    "zero_ablation_baseline": ("layer-removal", lambda t: where(t, "probability", 0.5, mode="none")),
    "zero_ablation_notebook": (
        "layer-removal",
        lambda t: where(t, "probability", lambda p: p + 0.01, mode="single", layer=20),
    ),
    "zero_ablation_accuracy": ("layer-removal", lambda t: where(t, "accuracy", 0.9, mode="single", layer=20)),
    "half_layers_removable": ("layer-removal", lambda t: where(t, "accuracy", 0.5, mode="greedy", step=range(6, 48))),
    "ct_15_always": ("cross-talk", lambda t: without(t, 15, 9)),
    "ct_39_first": ("cross-talk", first_swapped),
    "ct_39_gain": ("cross-talk", lambda t: where(t, "accuracy", 0.9, layer=39, step=1, template=LATER)),
    "ct_proportions": ("cross-talk", lambda t: given_back(t, [2], 10)),
    "ct_spearman": ("cross-talk", lambda t: given_back(t, [2, 3, 4, 5, 6, 7, 8, 9, 10], 6)),
    "ct_stop": ("cross-talk", lambda t: where(t, "reached", False, template=["When", "Friends"])),
    "ct_notebook": (
        "cross-talk",
        lambda t: where(t, "accuracy", 0.1, template="Then", corruption=CAB, step=1, layer=10),
    ),
    "cos_lines": ("state-similarity", lambda t: t.assign(after_name=t["row"].isin([1, 2, 5, 7, 10]))),
    "cos_cells": ("state-similarity", lambda t: where(t, "similarity", lambda x: x - 0.1, row=0, column=19)),
    "conv_effect": ("conv-shift", lambda t: t.assign(effect=t["effect"] * 1.3)),
    "conv_others": ("conv-shift", lambda t: where(t, "effect", 0.3, corruption=CAB, slice=0, position=4)),
    "conv_minus3_zero": ("conv-shift", lambda t: where(t, "effect", 0.01, corruption=CAB, slice=-3, position=4)),
    "h_before": ("state-ablation", lambda t: where(t, "effect", 0.1, corruption=CAB, layer=39, position=2)),
    "h_after": ("state-ablation", lambda t: where(t, "effect", 0.1, corruption=CAB, layer=39, position=10)),
    "outproj_last_only": ("output-ablation", lambda t: where(t, "effect", -0.1, corruption=CAB, layer=39, position=3)),
    "eap_size": ("edge-attribution", first_kept(1, 261)),
    "eap_jaccard": ("edge-attribution", first_kept(60, 247)),
    "eap_train_accuracy": ("edge-attribution", scored("kept", "train", "accuracy", 0.97)),
    "eap_accuracy": ("edge-attribution", scored("kept", "held out", "accuracy", 0.7)),
    "eap_nld": ("edge-attribution", scored("kept", "held out", "normalized_logit_diff", 0.95)),
    "eap_top": ("edge-attribution", ranks_swapped(2, 3)),
    "eap_spearman": (
        "edge-attribution",
        lambda t: t.assign(rank=t["rank"].mask(t["rank"].between(8, 188), 196 - t["rank"])),
    ),
    "acdc_edges": (
        "circuit-search",
        lambda t: t.assign(kept=t["kept"] & (t["part"].notna() | (t["drop"].rank(ascending=False) <= 100))),
    ),
    "acdc_conv": ("circuit-search", lambda t: where(t, "kept", False, part="conv0")),
    "acdc_ssm": ("circuit-search", lambda t: where(t, "kept", False, part="ssm")),
    "acdc_skip": ("circuit-search", lambda t: where(t, "kept", False, part="skip")),
    "acdc_39_now": (
        "circuit-search",
        lambda t: where(where(t, "drop", 0.03, part="conv0", source="39"), "kept", True, part="conv0", source="39"),
    ),
    "acdc_minus3": ("circuit-search", lambda t: where(t, "kept", True, part="conv-3", source="39")),
    "acdc_drops": ("circuit-search", lambda t: where(t, "drop", 0.4, part="skip", source="0")),
    "acdc_accuracy": ("circuit-search", scored("kept", "held out", "accuracy", 0.7)),
    "acdc_nld": ("circuit-search", scored("kept", "held out", "normalized_logit_diff", 0.95)),
    "pos_jaccard": ("positional-attribution", lambda t: where(t, "kept", False, source=OTHER_LAYERS)),
    "pos_embed": ("positional-attribution", lambda t: where(t, "kept", True, source="embed", target="45", position=3)),
    "pos_39_out": (
        "positional-attribution",
        lambda t: where(t, "kept", True, source="39", target=["40", "41"], position=19),
    ),
    "prune_39_nonlast": ("positional-attribution", scored(LOST, "train", "accuracy", 0.06)),
    "prune_39_nonlast_nld": ("positional-attribution", scored(LOST, "train", "normalized_logit_diff", 0.05)),
}
"""One claim each, broken in the table of its experiment."""

TOGETHER = {
    # What makes the first claim of each fail is, by what they say, more than the other can bear.
    ("zero_ablation_worst", "zero_ablation_39", "zero_ablation_notebook"): (
        "layer-removal",
        lambda t: where(t, "probability", 0.1, mode="single", layer=39),
    ),
    ("zero_ablation_0", "zero_ablation_notebook"): (
        "layer-removal",
        lambda t: where(t, "probability", 0.4, mode="single", layer=0),
    ),
    ("zero_ablation_others", "zero_ablation_notebook"): (
        "layer-removal",
        lambda t: where(t, "probability", 0.6, mode="single", layer=20),
    ),
    ("ct_39_always", "ct_39_first"): ("cross-talk", lambda t: without(t, 39, 9)),
    ("ct_layer0", "ct_proportions"): ("cross-talk", lambda t: given_back(t, [0], 12)),
    ("ct_size", "ct_proportions", "ct_spearman"): ("cross-talk", lambda t: given_back(t, range(2, 12), 19)),
    ("conv_peak_cell", "conv_others"): (
        "conv-shift",
        lambda t: where(t, "effect", 1.0, corruption=CAB, slice=0, position=4),
    ),
    ("eap_first", "eap_top"): ("edge-attribution", ranks_swapped(1, 2)),
    ("acdc_39_shift", "acdc_drops"): ("circuit-search", lambda t: where(t, "drop", 0.5, part="conv-1", source="39")),
} | {
    (f"steer_{name}{suffix}", f"steer_{name}_cells"): (
        "name-steering",
        lambda t, method=method, sources=sources, value=value: where(
            t, "success", value, method=method, slot=EARLY, source_slot=sources
        ),
    )
    for name, method in (("sub_add", "subtract-add"), ("replace", "replace"))
    for suffix, sources, value in (("", EARLY, 0.8), ("_cross", LATE, 1.0))
}
CASES = [((claim,), *case) for claim, case in SPOILT.items()] + [(key, *case) for key, case in TOGETHER.items()]


def test_the_made_up_run_has_the_columns_of_every_experiment(published):
    assert set(published) == set(analyses.PAPERS)
    for name, table in published.items():
        assert set(analyses.load(name).required) <= set(table.columns)


def test_of_the_published_values_every_claim_holds_or_has_too_few_prompts(published):
    table = judge(published)
    assert set(table.index[table["verdict"] != compare.HOLDS]) == UNMEASURED | TOO_FEW
    assert (table.loc[list(TOO_FEW), "verdict"] == compare.UNDECIDED).all()
    assert (table.loc[list(UNMEASURED), "verdict"] == compare.NOT_COMPARABLE).all()
    assert (table["layer"] == 39).all()
    assert table.loc["steer_sub_add", "value"] == pytest.approx(0.991, abs=5e-4)
    assert table.loc["ct_size", "value"] == pytest.approx(8.65, abs=0.06)
    assert table.loc["acdc_edges", "value"] == 171


def test_every_measured_claim_is_spoilt_below():
    everything = paper.table("claims")
    assert {claim for names, _, _ in CASES for claim in names} == set(claims.MEASURES)
    assert set(everything["id"]) - set(claims.MEASURES) == UNMEASURED


@pytest.mark.parametrize(
    ("names", "experiment", "spoil"), CASES, ids=lambda case: "-".join(case) if isinstance(case, tuple) else None
)
def test_a_spoilt_value_breaks_exactly_its_claim(published, names, experiment, spoil):
    table = judge(published | {experiment: spoil(published[experiment])})
    assert set(table.index[table["verdict"] == compare.FAILS]) == set(names)


def test_what_was_not_run_is_said(published):
    table = judge({name: published[name] for name in ("layer-removal", "conv-shift")})
    assert table.loc["zero_ablation_0", "verdict"] == compare.HOLDS
    assert table.loc["eap_size", ["verdict", "why"]].tolist() == [compare.NOT_RUN, "run edge-attribution"]


def test_exact_values_are_compared_only_on_their_own_prompts(published):
    others = {"all": "ab" * 32, "Then: CAB AB C -> DAB AB D": "cd" * 32}
    bound = paper.table("claims").query("prompts != ''")["id"]
    for sha256 in (others, None, {}):
        table = judge(published, seed=27, prompts_sha256=sha256)
        assert (table.loc[bound, "verdict"] == compare.NOT_COMPARABLE).all()
        assert table.loc["zero_ablation_notebook", "why"] == (
            "needs the published prompts: 10 pairs of seed 27 as the paper draws them"
        )
        assert table.loc["zero_ablation_0", "verdict"] == compare.HOLDS
    assert (judge(published, seed=5).loc[bound, "verdict"] == compare.HOLDS).all()
    other = published["state-similarity"].assign(prompt="Ana gave it to")
    assert judge({"state-similarity": other}).loc["cos_cells", "verdict"] == compare.NOT_COMPARABLE


def test_an_experiment_that_asked_something_else_is_not_judged(published):
    table = judge({"layer-ablation": published["layer-ablation"]}, options={"site": "out_proj"})
    assert table.loc["ra_effect", "verdict"] == compare.NOT_COMPARABLE
    assert table.loc["ra_effect", "why"] == "layer-ablation was run with site=out_proj"
    same = judge({"layer-ablation": published["layer-ablation"]}, options={"site": "layer_input"})
    assert same.loc["ra_effect", "verdict"] == compare.HOLDS


def test_the_papers_options_are_the_defaults_of_the_experiments():
    for name, options in compare.QUESTION.items():
        defaults = resolved(analyses.load(name).options())
        assert {key: defaults[key] for key in options} == options


def test_a_search_cut_off_before_accuracy_falls_decides_nothing(published):
    removal = published["layer-removal"]
    cut = removal[(removal["mode"] != "greedy") | (removal["step"] <= 5)]
    assert judge({"layer-removal": cut}).loc["half_layers_removable", "verdict"] == compare.NOT_COMPARABLE
    enough = removal[(removal["mode"] != "greedy") | (removal["step"] <= 24)]
    assert judge({"layer-removal": enough}).loc["half_layers_removable", "verdict"] == compare.HOLDS


def test_a_circuit_without_early_output_of_the_layer_tells_nothing_about_it(published):
    pruned = ["prune_39_nonlast", "prune_39_nonlast_nld"]
    table = published["positional-attribution"]
    nothing_removed = where(table, "size", 700, circuit=LAST_ONLY)
    for changed in (nothing_removed, table.assign(bottleneck=20.0)):
        judged = judge({"positional-attribution": changed}).loc[pruned]
        assert judged["verdict"].tolist() == [compare.NOT_COMPARABLE] * 2
        assert judged["why"].str.endswith("other prompts, layers, steps or circuit").all()


def test_scores_of_circuits_come_with_the_intervals_of_their_tables(published):
    table = judge(published)
    assert table.loc["eap_accuracy", ["value", "low", "high"]].tolist() == pytest.approx([0.8786, 0.8586, 0.8986])
    assert table.loc["acdc_nld", ["value", "low", "high"]].tolist() == pytest.approx([0.8399, 0.8199, 0.8599])
    assert table.loc["prune_39_nonlast", ["value", "low", "high"]].tolist() == pytest.approx([0.014, 0.004, 0.024])


def test_an_attribution_of_another_method_is_not_judged(published):
    names = ("edge-attribution", "circuit-search", "positional-attribution")
    table = judge({name: published[name] for name in names}, options={"method": "exact"})
    own = paper.table("claims").query("analysis in @names")["id"]
    assert (table.loc[own, "verdict"] == compare.NOT_COMPARABLE).all()
    assert (table.loc[own, "why"].str.endswith("was run with method=exact")).all()


def test_another_model_is_asked_only_what_makes_sense_of_its_own_layer(published):
    """The published tables, but of a smaller model whose layer 5 does what 39 does."""
    moved = published["layer-ablation"].replace({"layer": {39: 5, 5: 39}})
    sizes = {"id": "other", "architecture": "mamba", "config": {"num_hidden_layers": 48, "hidden_size": 768}}
    table = judge({"layer-ablation": moved, "layer-removal": published["layer-removal"]}, model=sizes)
    assert (table["layer"] == 5).all()
    assert table.loc["ra_effect", ["verdict", "asked"]].tolist() == [
        compare.HOLDS,
        "Resampling layer 5's input at the changed name: mean effect",
    ]
    relative = paper.table("claims").set_index("id")["relative"]
    absolute = table[~relative & ~table.index.isin(UNMEASURED)]
    assert set(absolute["verdict"]) == {compare.NOT_COMPARABLE}
    assert absolute["value"].isna().all()
    assert "other is not mamba-370m" in " ".join(compare.about(table.reset_index()))
    assert judge({"layer-removal": published["layer-removal"]}, model=sizes).loc["zero_ablation_worst", "verdict"] == (
        compare.NOT_RUN
    )


def test_the_command_prints_the_table_and_writes_it_whole(published, tmp_path, capsys):
    directory = tmp_path / "out"
    spoilt = SPOILT["eap_size"][1](published["edge-attribution"])
    paper_run.write(directory, published | {"edge-attribution": spoilt})
    before = set(directory.iterdir())
    assert main(["compare", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["verdict", "claim"]
    row = next(line for line in lines if " eap_size " in line)
    assert row.startswith("does not hold")
    assert "Of 62 claims that could be judged 59 hold on made-up/mamba-370m, 1 do not and 2 are undecided" in lines[-1]
    assert next(line for line in lines if " cos_lines " in line).startswith("undecided")
    assert set(directory.iterdir()) - before == {directory / "compare.parquet"}
    table = pd.read_parquet(directory / "compare.parquet")
    assert tuple(table.columns) == compare.COLUMNS
    assert set(table["verdict"]) <= set(compare.VERDICTS)


def test_mini_is_asked_relative_claims_and_never_passed_off(mini, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["run", "layer-ablation", "--n-pairs", "2", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    assert main(["compare", str(out)]) == 0
    printed = capsys.readouterr().out
    table = pd.read_parquet(out / "compare.parquet").set_index("claim")
    judged = table[table["verdict"].isin(compare.JUDGED)]
    assert set(judged.index) == {"ra_effect", "ra_two_strongest"}
    assert (judged["verdict"] == compare.UNDECIDED).all()
    assert (judged["why"] == "4 prompts are too few: 20 are needed").all()
    assert "measured, for each corruption, at the layer that the prompts of the other corruptions choose" in printed
    layer = layer_ablation.bottleneck(pd.read_parquet(out / "layer-ablation.parquet"))
    assert (judged["layer"] == layer).all()
    assert (judged["model"] == "mini").all()
    assert "mini is not mamba-370m" in printed
    assert "ra_ratio_cab" not in printed
    page = (out / "index.html").read_text()
    assert '<section id="claims"' in page
    assert "mini is not mamba-370m" in page


def test_the_report_has_the_claims_last_after_what_carries_the_names(published, tmp_path):
    directory = tmp_path / "out"
    paper_run.write(directory, published)
    page = pages.write_report(directory).read_text()
    order = [page.index(f'<section id="{name}"') for name in (*analyses.PAPERS, "names-summary", "claims")]
    assert order == sorted(order)
    section = page[order[-1] :]
    assert section.count('<td class="holds">holds</td>') == 60
    assert section.count('<td class="undecided">undecided</td>') == 2
    assert "the interval reaches past the tolerance" in section
    assert section.count('<th scope="row">') == 64
    assert "<caption>" in section
    assert 'data-chart="names-summary-chart"' in page
    few = tmp_path / "few"
    paper_run.write(few, {"layer-removal": published["layer-removal"]})
    assert 'id="names-summary"' not in pages.write_report(few).read_text()


def _empty(directory, tables):
    directory.mkdir()


def _altered(directory, tables):
    paper_run.write(directory, tables)
    tables["conv-shift"].assign(effect=0.9).to_parquet(directory / "conv-shift.parquet")


def _broken(directory, tables):
    paper_run.write(directory, tables)
    (directory / "conv-shift.parquet").write_text("no table")


def _two_models(directory, tables):
    paper_run.write(directory, tables)
    path = directory / "conv-shift.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"model": manifest["model"] | {"weights_sha256": "ee" * 32}}))


def _no_column(directory, tables):
    paper_run.write(directory, tables | {"conv-shift": tables["conv-shift"].drop(columns="slice")})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda directory, tables: None, "is not a directory"),
        (_empty, "holds no finished table"),
        (_altered, r"is not the table that conv-shift\.json is of: run conv-shift again"),
        (_broken, r"conv-shift\.parquet cannot be read"),
        (_two_models, "holds tables of several runs"),
        (_no_column, r"conv-shift\.parquet has no 'slice'"),
    ],
)
def test_a_bad_directory_is_refused_in_a_sentence(published, tmp_path, capsys, make, says):
    directory = tmp_path / "out"
    make(directory, {name: published[name] for name in ("conv-shift", "layer-ablation")})
    with pytest.raises(InputError, match=says):
        compare.compare(directory)
    assert main(["compare", str(directory)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert not (directory / "compare.parquet").exists()


def test_a_directory_that_cannot_be_written_is_refused_and_left_as_it_is(published, tmp_path):
    paper_run.write(tmp_path / "out", {"conv-shift": published["conv-shift"]})
    (tmp_path / "out" / "compare.parquet").mkdir()
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(InputError, match=r"compare\.parquet. cannot be written"):
        compare.compare(tmp_path / "out")
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_model_that_guesses_is_asked_only_what_its_answers_do_not_decide(published):
    guesses = {"accuracy": 0.5, "n": 8, "bound": 0.75}
    rows = judge(published, clean=guesses)
    judged = rows[rows["verdict"].isin(compare.JUDGED)]
    sure = judge(published, clean=guesses | {"accuracy": 0.9})
    of_states = paper.table("claims").set_index("id")["analysis"] == "state-similarity"
    assert set(judged.index) == set(of_states[of_states].index) & set(sure.index[sure["verdict"].isin(compare.JUDGED)])
    assert len(judged) > 0
    lost = rows.loc[rows["why"] == "the model cannot do the task", "verdict"]
    assert len(lost) > 30
    assert set(lost) == {compare.NOT_COMPARABLE}


def test_an_interval_that_straddles_the_tolerance_decides_nothing(published):
    attribution = published["edge-attribution"]
    for value, half, verdict in (
        (0.879, 0.02, compare.HOLDS),
        (0.879, 0.09, compare.UNDECIDED),
        (0.95, 0.02, compare.UNDECIDED),
        (0.98, 0.03, compare.UNDECIDED),
        (0.98, 0.02, compare.FAILS),
    ):
        table = judge({"edge-attribution": scored("kept", "held out", "accuracy", value, half)(attribution)})
        assert table.loc["eap_accuracy", "verdict"] == verdict
        assert bool(table.loc["eap_accuracy", "why"]) == (verdict == compare.UNDECIDED)


@pytest.mark.parametrize("name", ["layer-ablation", "name-steering", "conv-shift", "layer-removal", "cross-talk"])
def test_too_few_prompts_decide_nothing(published, name):
    table = judge({name: published[name].assign(n=7)})
    judged = table[table["verdict"].isin(compare.JUDGED)]
    few = judged[judged["n"] == 7]
    assert len(few) > 0
    assert set(few["verdict"]) == {compare.UNDECIDED}
    assert few["why"].str.startswith("7 prompts are too few").all()


def test_one_circuit_does_not_say_how_large_circuits_are(published):
    one = published["cross-talk"].query("template == 'Then' and corruption == @CAB")
    table = judge({"cross-talk": one})
    assert set(table.loc[["ct_size", "ct_39_gain", "ct_39_always", "ct_layer0"], "verdict"]) == {compare.UNDECIDED}


NAN = float("nan")
DEAD = {
    "layer-ablation": [lambda t, x=x: t.assign(effect=x, low=x, high=x) for x in (0.0, NAN, 0.9, -1.0)]
    + [lambda t: t.assign(effect=t["effect"] * 1e-6, low=t["low"] * 1e-6, high=t["high"] * 1e-6)],
    "layer-removal": [
        lambda t: t.assign(probability=0.5, accuracy=0.5),
        lambda t: t.assign(probability=0.0, accuracy=0.0),
        lambda t: t.assign(accuracy=NAN, probability=NAN),
    ],
    "cross-talk": [
        lambda t: t.assign(in_circuit=False, reached=False, accuracy=0.0),
        lambda t: t[t["step"] == 0].assign(reached=True, accuracy=0.95),
        lambda t: t.assign(in_circuit=False, reached=False, accuracy=NAN),
    ],
    "state-similarity": [lambda t, x=x: t.assign(similarity=x, after_name=t["row"] < 5) for x in (0.0, 1.0, NAN)],
    "name-steering": [lambda t: t.assign(success=0.0), lambda t: t.assign(success=NAN, n=0)],
    "edge-attribution": [lambda t, x=x: scored_nothing(t).assign(score=x, kept=False) for x in (0.0, NAN, 1.0)],
    "circuit-search": [lambda t: scored_nothing(t).assign(drop=NAN, kept=False)],
    "positional-attribution": [lambda t: scored_nothing(t).assign(kept=False)],
}
DEAD |= {name: DEAD["layer-ablation"] for name in ("conv-shift", "state-ablation", "output-ablation")}
"""What experiments leave that did nothing: zeros, no numbers, one and the same number, rounding errors."""


def scored_nothing(table):
    """Circuits that keep nothing of what the model does, and have nothing to lose."""
    return table.assign(
        **{name: table[name].mask(table["what"] == "circuit", 0.0) for name in ("value", "low", "high")}
    )


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, cases in DEAD.items() for number in range(len(cases))]
)
def test_an_experiment_that_did_nothing_passes_no_claim(published, name, number):
    table = judge({name: DEAD[name][number](published[name])})
    own = table[paper.table("claims").set_index("id")["analysis"] == name]
    assert compare.HOLDS not in set(own["verdict"])


def test_steering_with_averages_of_other_slots_is_judged_only_where_steering_works(published):
    steering = published["name-steering"]
    never = judge({"name-steering": where(steering, "success", 0.1, method="replace", slot=EARLY)})
    assert never.loc["steer_replace", "verdict"] == compare.FAILS
    assert never.loc["steer_replace_cross", ["verdict", "why"]].tolist() == [
        compare.NOT_COMPARABLE,
        "it means something only where steer_replace holds",
    ]
    assert never.loc["steer_sub_add_cross", "verdict"] == compare.HOLDS
    perhaps = judge(
        {"name-steering": where(steering, "success", 0.95, method="replace", slot=EARLY, source_slot=EARLY)}
    )
    assert (perhaps.loc[["steer_replace", "steer_replace_cross"], "verdict"] == compare.UNDECIDED).all()


def test_a_part_that_was_removed_has_no_drop(published):
    search = published["circuit-search"]

    def removed(part):
        gone = where(search, "kept", False, source="39", part=part)
        return judge({"circuit-search": where(gone, "drop", NAN, source="39", part=part)})

    table = removed("conv-1")
    assert table.loc["acdc_39_shift", "verdict"] == compare.NOT_COMPARABLE
    assert table.loc["acdc_39_shift", "why"] == "conv-1 of layer 39 was removed: what it would cost is not known"
    assert table.loc["acdc_drops", "verdict"] == compare.NOT_COMPARABLE
    # Slice 0 was removed, and slice -1 kept: the layer is in the circuit and does without slice 0.
    assert judge({"circuit-search": search}).loc["acdc_39_now", ["value", "verdict"]].tolist() == [0, compare.HOLDS]
    # With no slice left nothing is known of the layer.
    table = removed(["conv-1", "conv-2", "conv-3"])
    assert table.loc["acdc_39_now", "verdict"] == compare.NOT_COMPARABLE


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("layer-ablation", "ra_effect"),
        ("conv-shift", "conv_others"),
        ("state-ablation", "h_before"),
        ("state-ablation", "h_after"),
        ("output-ablation", "outproj_last_only"),
    ],
)
def test_missing_effects_make_the_same_of_a_claim_in_any_order(published, name, claim, seed):
    spoilt = where(published[name], "effect", NAN, corruption=ACB)
    order = list(paper_run.CORRUPTIONS)
    random.Random(seed).shuffle(order)
    table = pd.concat([spoilt[spoilt["corruption"] == corruption] for corruption in order], ignore_index=True)
    row = judge({name: table}).loc[claim]
    assert [row["verdict"], row["why"]] == [compare.NOT_COMPARABLE, f"effects of {ACB} are missing"]


def test_a_difference_from_the_paper_needs_every_number(published):
    removal = where(published["layer-removal"], "probability", NAN, mode="single", layer=20)
    assert judge({"layer-removal": removal}).loc["zero_ablation_notebook", "verdict"] == compare.NOT_COMPARABLE


def test_a_ratio_to_a_peak_of_noise_is_not_comparable(published):
    for factor, verdict in ((1.0, compare.HOLDS), (0.2, compare.HOLDS), (0.01, compare.NOT_COMPARABLE)):
        states = published["state-ablation"]
        small = states.assign(**{name: states[name] * factor for name in ("effect", "low", "high")})
        assert judge({"state-ablation": small}).loc["h_before", "verdict"] == verdict
    inputs = where(published["layer-ablation"], "effect", 1e-9, layer=39, position=3, corruption=CAB)
    row = judge({"layer-ablation": inputs}).loc["ra_ratio_cab"]
    assert [row["verdict"], row["why"]] == [
        compare.NOT_COMPARABLE,
        "the effect of layer 39 is below 0.1: a ratio to it says nothing",
    ]


def test_a_loss_of_exactly_three_hundredths_is_spare(published):
    """.97 - .03 is .94, and .94 is not less than that, whatever binary fractions make of it."""
    for whole in (0.95, 0.96, 0.97, 0.98, 1.0):
        table = where(published["layer-removal"], "accuracy", whole, mode="none")
        table = where(
            table, "accuracy", lambda old, whole=whole: round(whole - 0.03, 2) if old == 0.95 else old, mode="greedy"
        )
        assert judge({"layer-removal": table}).loc["half_layers_removable", "value"] == 0.5
    assert claims.within(0.1 + 0.2, NAN, 0.3)
    assert claims.within(1 - 0.97, NAN, 0.03)
    assert not claims.within(NAN, NAN, 0.03)


def test_the_published_prompts_are_told_by_their_texts_and_not_by_seed_and_number(mini, tmp_path):
    sha256 = paper.table("prompts").set_index("name")["sha256"]
    drawn = analyses.load("layer-removal").draw(mini.tokenizer, 10, 27, ioi.TASK)
    found = paper.prompts_sha256(drawn)
    assert found["all"] == sha256["layer removal, notebook"]
    assert paper.prompts_sha256(drawn[torch.randperm(len(drawn))])["all"] == found["all"]
    assert paper.prompts_sha256(drawn[:-1])["all"] != found["all"]
    search = analyses.load("cross-talk").draw(mini.tokenizer, None, 27, ioi.TASK)
    assert paper.prompts_sha256(search)["Then: CAB AB C -> DAB AB D"] == sha256["cross-talk, notebook"]
    edges = analyses.load("edge-attribution").draw(mini.tokenizer, None, 27, ioi.TASK)
    assert paper.prompts_sha256(edges)["all"] == sha256["edges, training"]
    assert paper.prompts_sha256(edges.without_text()) is None


def test_a_run_on_a_file_of_prompts_does_not_pass_as_the_published_one(mini, tmp_path):
    """20 prompts, and a seed of 27 that nothing was drawn from."""
    own = analyses.load("layer-removal").draw(mini.tokenizer, 10, 5, ioi.TASK)
    runs.run_study(mini, ["layer-removal"], tmp_path, pairs=own, held_out=own, seed=27, options={"steps": 1})
    made = json.loads((tmp_path / "layer-removal.json").read_text())
    assert (made["seed"], made["n_pairs"]) == (27, 20)
    removal = paper_run.layer_removal()
    row = (
        compare.evaluate(
            {"layer-removal": removal},
            {"layer-removal": paper_run.manifest("layer-removal", prompts_sha256=made["prompts_sha256"])},
        )
        .set_index("claim")
        .loc["zero_ablation_notebook"]
    )
    assert row["verdict"] == compare.NOT_COMPARABLE


def test_a_layer_chosen_on_a_table_is_tested_on_prompts_that_did_not_choose_it(published):
    """Each corruption has a layer of its own with a large effect: chosen on all of them, one seems a bottleneck."""
    other = {"id": "other", "architecture": "mamba", "config": {"num_hidden_layers": 48, "hidden_size": 768}}
    own = dict(zip(paper_run.CORRUPTIONS, (5, 6, 7, 8, 9), strict=True))

    def value(corruption, name, layer, position):
        return 0.9 if position == name and layer in (0, own[corruption]) else 0.0

    table = paper_run.effects(value)
    layers = claims.held_out_layers(table)
    assert all(layers[corruption] != layer for corruption, layer in own.items())
    row = judge({"layer-ablation": table}, model=other).loc["ra_effect"]
    assert row["value"] == pytest.approx(0.0)
    assert row["verdict"] == compare.FAILS
    shared = judge({"layer-ablation": published["layer-ablation"]}, model=other).loc["ra_effect"]
    assert [shared["layer"], shared["verdict"]] == [39, compare.HOLDS]
    single = published["layer-ablation"].query("corruption == @CAB")
    assert judge({"layer-ablation": single}, model=other).loc["ra_effect", "verdict"] == compare.NOT_COMPARABLE
    assert judge({"layer-ablation": single}).loc["ra_effect", "verdict"] == compare.HOLDS


@pytest.mark.parametrize("effect", [0.0, NAN, 0.9])
def test_a_table_of_nothing_has_no_bottleneck_that_is_judged(published, effect):
    other = {"id": "other", "architecture": "mamba", "config": {"num_hidden_layers": 48, "hidden_size": 768}}
    dead = published["layer-ablation"].assign(effect=effect, low=effect, high=effect)
    table = judge({"layer-ablation": dead}, model=other)
    assert not set(table["verdict"]) & set(compare.JUDGED)
    assert table["layer"].isna().all() == (effect != effect)


def test_a_layer_that_was_given_is_asked_about_as_it_is(published):
    """The experiments on one layer were given layer 12, which the table of layer-ablation did not choose."""
    tables = {"conv-shift": published["conv-shift"].assign(layer=12)}
    assert claims.common_layer(tables) == 12
    other = {"id": "other", "architecture": "mamba", "config": {"num_hidden_layers": 48, "hidden_size": 768}}
    assert judge(tables, model=other).loc["conv_effect", ["layer", "verdict"]].tolist() == [12, compare.HOLDS]


def test_layers_are_the_strongest_only_as_far_as_intervals_say(published):
    inputs = published["layer-ablation"]
    near = where(inputs, "effect", 0.64, layer=20, position=3, corruption=CAB)
    clear = judge({"layer-ablation": near}).loc["ra_two_strongest"]
    assert [clear["value"], clear["verdict"]] == [1.0, compare.HOLDS]
    blurred = near.assign(low=near["effect"] - 0.2, high=near["effect"] + 0.2)
    row = judge({"layer-ablation": blurred}).loc["ra_two_strongest"]
    assert [row["value"], row["verdict"]] == [1.0, compare.UNDECIDED]
    assert row["low"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("claim", sorted(pass_rates.SIMULATIONS))
def test_a_perfect_rerun_passes_and_a_wrong_model_does_not(claim):
    """On few draws; docs/statistics.md has the rates of more. A rate of .95 gives fewer than 34 of 40 once in 300."""
    rates = pass_rates.rates(claim, draws=40, seed=1)
    assert rates["passes"] >= 34 / 40
    assert rates["wrong fails"] >= 0.75


def test_every_claim_is_simulated_or_it_is_said_why_not():
    measured = set(claims.MEASURES)
    assert set(pass_rates.SIMULATIONS) | set(pass_rates.not_simulated()) == measured
    assert not set(pass_rates.SIMULATIONS) & set(pass_rates.not_simulated())
    page = pass_rates.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \| ([\d.]+) \|.*\| ([\d.]+) \|$", page, re.MULTILINE)
    assert {claim for claim, *_ in rows} == set(pass_rates.SIMULATIONS)
    assert all(float(passes) >= 0.95 for _, _, passes, _ in rows)
    assert all(float(fails) >= 0.85 for *_, fails in rows)
