"""The summary on tables made by hand, whose numbers are known."""

import math

import pandas as pd
import pytest

from ioi_mamba.claims import changed_slot
from ioi_mamba.claims import names_summary as summary
from ioi_mamba.passes.metrics import wilson_interval

CORRUPTIONS = {"CAB AB C -> DAB AB D": "n1", "ABC AB C -> ABD AB D": "n3", "ABC AB C -> ABC AC B": "n5"}
LABELS = ("BOS", "n1", "n1+1", "n2", "n3", "n3+1", "n4", "n5", "n5+1", "out")
BOTTLENECK = 2


def effects(value, layers=(0, 1, 2, 3)):
    """A table of effects: value(slot's place, layer, position) in every cell."""
    return pd.DataFrame(
        [
            (corruption, layer, position, label, value(LABELS.index(slot), layer, position), 80)
            for corruption, slot in CORRUPTIONS.items()
            for layer in layers
            for position, label in enumerate(LABELS)
        ],
        columns=["corruption", "layer", "position", "label", "effect", "n"],
    )


def tables():
    """Of a model that is as the paper says mamba-370m is, its layer 39 being 2."""
    last = len(LABELS) - 1
    slices = []
    for s in (-3, -2, -1, 0):
        one = effects(lambda name, layer, at, s=s: 0.9 if (s, at) == (-1, name + 1) else -0.09, layers=(BOTTLENECK,))
        one.insert(2, "slice", s)
        slices.append(one)
    steering = pd.DataFrame(
        [
            (method, slot, source, 1.0 if source <= 3 else 0.5, 100, 0.0, 1.0, BOTTLENECK)
            for method in ("replace", "subtract-add")
            for slot in range(1, 6)
            for source in range(1, 6)
        ],
        columns=["method", "slot", "source_slot", "success", "n", "low", "high", "layer"],
    )
    circuits = pd.DataFrame(
        [
            (template, "c", step, layer, True, True)
            for template in range(20)
            for step, layer in ((1, BOTTLENECK), (2, 3))
        ],
        columns=["template", "corruption", "step", "layer", "chosen", "in_circuit"],
    ).assign(n=400)
    similar = pd.DataFrame(
        [
            (p, "contribution in state", i, j, 0.8 if i in (2, 4) else 0.1, str(i), str(j), i in (2, 4), BOTTLENECK)
            for p in ("p", "q", "r")
            for i in range(9)
            for j in range(9)
        ],
        columns=[
            "prompt",
            "measure",
            "row",
            "column",
            "similarity",
            "row_label",
            "column_label",
            "after_name",
            "layer",
        ],
    )
    inputs = effects(lambda name, layer, at: {0: 0.7, BOTTLENECK: 0.9}.get(layer, 0.1) if at == name else 0.0)
    states = effects(lambda name, layer, at: 0.02 if at <= name else 0.8 if at < last else 0.4)
    outputs = effects(lambda name, layer, at: 0.5 if at == last else -0.02)
    return {
        "layer-ablation": inputs,
        "conv-shift": pd.concat(slices, ignore_index=True),
        "state-ablation": states,
        "output-ablation": outputs,
        "name-steering": steering,
        "cross-talk": circuits,
        "state-similarity": similar,
    }


def value_of(table, text):
    row = table[table["measure"] == text]
    assert len(row) == 1
    return row.iloc[0]


def test_a_model_like_the_papers_keeps_every_line():
    table = summary.summarize(tables())
    assert tuple(table.columns[: len(summary.COLUMNS)]) == summary.COLUMNS
    assert set(table["holds"]) == {"yes"}
    assert set(table["evidence"]) == {"bottleneck layer", "shift by one", "linear names", "last position only"}
    assert (table["layer"] == BOTTLENECK).all()
    expected = {
        "effect of its input at the changed name, mean": 0.9,
        "corruptions in which it and layer 0 are the strongest": 1.0,
        "cross-talk circuits that have it": 1.0,
        "effect of slice -1 at name + 1, mean": 0.9,
        "largest other slice over it, worst corruption": 0.1,
        "state up to the name over the peak, worst": 0.02 / 0.8,
        "state after the name over the peak, worst": 0.5,
        "strongest rows that are one after a name": 1.0,
        "subtract-add, slots 1-3 from 4-5": 0.5,
        "output before the last position over the last": 0.04,
    }
    for text, value in expected.items():
        assert value_of(table, text)["value"] == pytest.approx(value), text
    pooled = value_of(table, "replace, slots 1-3 from 1-3")
    assert (pooled["low"], pooled["high"]) == wilson_interval(900, 900)
    assert (pooled["paper"], pooled["threshold"]) == (0.993, "at least 0.95")


@pytest.mark.parametrize(
    ("name", "text", "spoil"),
    [
        ("layer-ablation", "effect of its input", lambda t: t.assign(effect=t["effect"] * 0.8)),
        ("layer-ablation", "corruptions in which it and layer 0", lambda t: t.assign(layer=3 - t["layer"])),
        ("cross-talk", "cross-talk circuits that begin", lambda t: t.assign(step=3 - t["step"])),
        ("cross-talk", "cross-talk circuits that have", lambda t: t.assign(in_circuit=t["layer"] == 3)),
        ("conv-shift", "corruptions with their peak", lambda t: t.assign(slice=-3 - t["slice"])),
        ("conv-shift", "largest other slice", lambda t: t.assign(effect=t["effect"].where(t["effect"] > 0, 0.3))),
        ("conv-shift", "effect of slice -1", lambda t: t.assign(effect=t["effect"] * 1.5)),
        ("state-ablation", "state up to the name", lambda t: t.assign(effect=t["effect"] + 0.1)),
        ("state-ablation", "state after the name", lambda t: t.assign(effect=t["effect"] ** 3)),
        ("state-similarity", "strongest rows", lambda t: t.assign(after_name=t["row"].isin([1, 3]))),
        ("name-steering", "subtract-add, slots 1-3 from 1-3", lambda t: t.assign(success=t["success"] - 0.1)),
        ("name-steering", "replace, slots 1-3 from 4-5", lambda t: t.assign(success=1.0)),
        ("output-ablation", "output before", lambda t: t.assign(effect=-t["effect"] + 0.2)),
    ],
)
def test_a_table_that_says_otherwise_breaks_its_line(name, text, spoil):
    spoilt = tables()
    spoilt[name] = spoil(spoilt[name])
    table = summary.summarize(spoilt)
    row = table[table["measure"].str.startswith(text)]
    assert list(row["holds"]) == ["no"]
    assert text.split(",")[0] in " ".join(summary.findings(table))


def test_what_was_not_run_is_said_and_breaks_nothing():
    empty = summary.summarize({})
    assert set(empty["holds"]) == {"not run"}
    assert all(sentence.endswith("not run.") for sentence in summary.findings(empty))
    some = {name: table for name, table in tables().items() if name in ("name-steering", "output-ablation")}
    table = summary.summarize(some)
    assert set(table.loc[table["holds"] != "not run", "source"]) == set(some)
    assert (table["layer"] == BOTTLENECK).all()
    for each in (empty, table):
        summary.chart(each).to_dict()


def test_the_layer_the_experiments_were_given_goes_before_the_bottleneck():
    given = tables()
    given["conv-shift"] = given["conv-shift"].assign(layer=1)
    given["name-steering"] = given["name-steering"].assign(layer=1)
    given["state-similarity"] = given["state-similarity"].assign(layer=1)
    table = summary.summarize(given)
    assert (table["layer"] == 1).all()
    assert value_of(table, "effect of its input at the changed name, mean")["holds"] == "no"
    # Where they disagree, the bottleneck decides.
    given["conv-shift"] = given["conv-shift"].assign(layer=3)
    assert (summary.summarize(given)["layer"] == BOTTLENECK).all()


def test_prompts_without_known_names_give_no_number():
    other = {name: table for name, table in tables().items() if "corruption" in table and name != "cross-talk"}
    table = summary.summarize({name: table.assign(corruption="all") for name, table in other.items()})
    shift = table[table["source"].isin(["conv-shift", "state-ablation"])]
    assert shift["value"].map(math.isnan).all()
    assert (shift["holds"] == "not comparable").all()


def test_the_changed_slot_is_read_off_the_corruption():
    assert [changed_slot(corruption) for corruption in CORRUPTIONS] == list(CORRUPTIONS.values())
    assert changed_slot("ABC AC B -> ABC BC A") == "n4"
    assert changed_slot("all") is None


def test_the_chart_ends_its_axis_where_ratios_do_not():
    far = tables()
    last = len(LABELS) - 1
    far["output-ablation"] = effects(lambda name, layer, at: 0.0 if at == last else 0.3)
    table = summary.summarize(far)
    assert math.isinf(value_of(table, "output before the last position over the last")["value"])
    rows = next(iter(summary.chart(table).to_dict()["datasets"].values()))
    assert max(row["at"] for row in rows) == summary.FARTHEST


def test_an_interval_that_straddles_its_threshold_is_undecided_and_said():
    blurred = tables()
    inputs = blurred["layer-ablation"]
    blurred["layer-ablation"] = inputs.assign(low=inputs["effect"] - 0.3, high=inputs["effect"] + 0.3)
    table = summary.summarize(blurred)
    row = value_of(table, "effect of its input at the changed name, mean")
    assert row["value"] == pytest.approx(0.9)
    assert row["holds"] == "undecided"
    found = summary.findings(table)
    assert any("undecided: effect of its input at the changed name, mean" in sentence for sentence in found)
    assert "undecided" in {row["holds"] for rows in summary.chart(table).to_dict()["datasets"].values() for row in rows}


def test_names_are_not_linear_because_nothing_can_be_steered():
    """Averages from slots 4 and 5 that do not steer count against steering where those from 1 to 3 do not either."""
    dead = tables()
    dead["name-steering"] = dead["name-steering"].assign(success=0.0)
    table = summary.summarize(dead)
    lines = table[table["evidence"] == "linear names"].set_index("measure")["holds"]
    assert lines["replace, slots 1-3 from 1-3"] == "no"
    assert lines["replace, slots 1-3 from 4-5"] == lines["subtract-add, slots 1-3 from 4-5"] == "not comparable"
    sentence = next(found for found in summary.findings(table) if found.startswith("Linear names"))
    assert "0 of 4 lines of evidence hold" in sentence
    assert "not comparable: subtract-add, slots 1-3 from 4-5, replace, slots 1-3 from 4-5" in sentence


def test_each_corruption_is_asked_about_the_layer_that_the_others_choose():
    own = {"n1": 1, "n3": 2, "n5": 3}
    place = {LABELS.index(slot): layer for slot, layer in own.items()}
    chosen = effects(lambda name, layer, at: 0.9 if at == name and layer in (0, place[name]) else 0.0)
    table = summary.summarize({"layer-ablation": chosen})
    row = value_of(table, "effect of its input at the changed name, mean")
    assert row["value"] == pytest.approx(0.0)
    assert row["holds"] == "no"
