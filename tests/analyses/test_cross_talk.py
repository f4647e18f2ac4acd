"""Greedy cross-talk circuits against an exhaustive search with one plain-torch pass for each candidate."""

import pytest
import reference
import torch
from conditioning import logit_rounding
from conftest import VOCAB

import ioi_mamba as im
from ioi_mamba.analyses import cross_talk
from ioi_mamba.errors import InputError
from ioi_mamba.passes import metrics
from ioi_mamba.tasks.base import Pairs


def make_pairs(model, n_pairs=24, n_pos=9, ragged=False, labelled=True, answerable=True, seed=3):
    """Random prompts whose answer is, if `answerable`, the name the model itself prefers."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, VOCAB, (n_pairs, n_pos), generator=generator)
    corrupted = clean.clone()
    for position in (2, 4):
        corrupted[:, position] = torch.randint(1, VOCAB, (n_pairs,), generator=generator)
    lengths = torch.tensor([n_pos - i % 3 for i in range(n_pairs)])
    names = torch.stack([torch.randperm(VOCAB - 1, generator=generator)[:4] + 1 for _ in range(n_pairs)])
    if answerable:
        logits = oracle_logits(model, clean, lengths - 1 if ragged else torch.full((n_pairs,), n_pos - 1), {})
        order = logits.gather(1, names).argsort(1, descending=True)
        names = names.gather(1, order)
    labels = {
        "template": tuple("Then" if i % 2 else "When" for i in range(n_pairs)),
        "corruption": tuple("CAB AB C -> DAB AB D" for _ in range(n_pairs)),
    }
    return Pairs(
        clean=clean,
        corrupted=corrupted,
        answer=names[:, 0],
        wrong=names[:, 1],
        candidates=names,
        lengths=lengths if ragged else None,
        labels=labels if labelled else {},
    )


def oracle_logits(model, tokens, last, edits):
    logits = reference.run(reference.weights_of(model), tokens, edits)["hook_logits"]
    return logits[torch.arange(len(tokens)), last]


def oracle(model, pairs, threshold):
    """Rows (step, layer, accuracy, probability, chosen) and the circuit, from whole passes only."""
    n_layers = model.config.num_hidden_layers
    source = reference.run(reference.weights_of(model), pairs.corrupted)
    left, circuit, rows = list(range(n_layers)), [], []

    def measure(resampled):
        edits = {f"blocks.{i}.hook_in_proj": source[f"blocks.{i}.hook_in_proj"] for i in resampled}
        logits = oracle_logits(model, pairs.clean, pairs.last, edits)
        accuracy = metrics.accuracy(logits, pairs.answer, pairs.candidates).mean()
        return float(accuracy), float(metrics.relative_probability(logits, pairs.answer, pairs.candidates).mean())

    best = measure(left)
    rows.append((0, None, *best, False))
    while left and best[0] <= threshold:
        scores = {layer: measure([i for i in left if i != layer]) for layer in left}
        chosen = max(left, key=lambda layer: (*scores[layer], -layer))
        rows += [(len(circuit) + 1, layer, *scores[layer], layer == chosen) for layer in left]
        circuit.append(chosen)
        left.remove(chosen)
        best = scores[chosen]
    return rows, circuit


def check(table, model, pairs, threshold):
    expected, circuit = oracle(model, pairs, threshold)
    found = table[["step", "layer", "accuracy", "probability", "chosen"]].itertuples(index=False, name=None)
    for row, by_oracle in zip(found, expected, strict=True):
        assert row[0] == by_oracle[0]
        assert (row[1] is None or row[1] != row[1]) if by_oracle[1] is None else row[1] == by_oracle[1]
        assert row[2:4] == pytest.approx(by_oracle[2:4], abs=1e-5)
        assert row[4] == by_oracle[4]
    return circuit


@pytest.mark.parametrize("ragged", [False, True])
def test_every_candidate_of_every_step_is_that_of_the_exhaustive_search(tiny_mamba, ragged):
    pairs = make_pairs(tiny_mamba, ragged=ragged)
    table = cross_talk.EXPERIMENT(tiny_mamba, pairs, threshold=0.95)
    assert tuple(table.columns) == tuple(column.name for column in cross_talk.COLUMNS)
    sizes = []
    for template, part in pairs.by("template").items():
        own = table[table["template"] == template].assign(layer=lambda t: t["layer"].astype(float))
        circuit = check(own, tiny_mamba, part, 0.95)
        assert own["reached"].all()
        assert set(own.loc[own["in_circuit"], "layer"]) == set(circuit)
        assert (own["n"] == len(part)).all()
        sizes.append(len(circuit))
    # The oracle is worth nothing where the first step ends the search.
    assert max(sizes) >= 3


def test_prompts_split_over_passes_give_the_same_table(tiny_mamba):
    pairs = make_pairs(tiny_mamba, ragged=True)
    whole = cross_talk.EXPERIMENT(tiny_mamba, pairs)
    split = cross_talk.EXPERIMENT(tiny_mamba, pairs, rows=5)
    assert whole.drop(columns="probability").equals(split.drop(columns="probability"))
    assert list(whole["probability"]) == pytest.approx(
        list(split["probability"]), abs=logit_rounding(tiny_mamba, pairs.clean)
    )


def test_a_threshold_out_of_reach_leaves_the_circuit_with_the_best_accuracy(tiny_mamba):
    pairs = make_pairs(tiny_mamba, answerable=False, labelled=False)
    table = cross_talk.EXPERIMENT(tiny_mamba, pairs, threshold=1.0)
    assert set(table["template"]) == {cross_talk.UNLABELLED}
    assert not table["reached"].any()
    path = table[table["chosen"] | (table["step"] == 0)].sort_values("step")
    assert len(path) == tiny_mamba.config.num_hidden_layers + 1
    end = int(path.loc[path["accuracy"].idxmax(), "step"])
    assert set(table.loc[table["in_circuit"], "layer"]) == set(path[path["step"].between(1, end)]["layer"])
    assert "not reached" in " ".join(cross_talk.findings(table))


def test_equal_candidates_are_given_back_in_the_order_of_the_layers(tiny_mamba_dir):
    model = im.open_model(str(tiny_mamba_dir), device="cpu")
    for block in model._module.backbone.layers:
        block.mixer.out_proj.weight.data.zero_()
    pairs = make_pairs(model, n_pairs=6, answerable=False, labelled=False)
    # Without layers the logits are those of the last token, which has to differ for the pairs to have a range.
    pairs.corrupted[:, -1] = (pairs.clean[:, -1] + 1) % VOCAB
    table = cross_talk.EXPERIMENT(model, pairs, threshold=1.0)
    assert list(table.loc[table["chosen"], "layer"]) == [0, 1, 2, 3]


def test_a_model_that_needs_no_cross_talk_has_an_empty_circuit(tiny_mamba):
    pairs = make_pairs(tiny_mamba, labelled=False)
    table = cross_talk.EXPERIMENT(tiny_mamba, pairs, threshold=0.0)
    assert len(table) == 1
    assert table["reached"].all()
    assert not table["in_circuit"].any()
    cross_talk.chart(table).to_dict()
    assert cross_talk.findings(table)


def test_equal_prompts_need_no_layer_and_are_no_evidence_that_none_is_needed(tiny_mamba):
    pairs = make_pairs(tiny_mamba, labelled=False)
    same = Pairs(pairs.clean, pairs.clean, pairs.answer, pairs.wrong, candidates=pairs.candidates)
    with pytest.raises(InputError, match="None of the 24 pairs has a range"):
        cross_talk.EXPERIMENT(tiny_mamba, same)
    both = cross_talk.EXPERIMENT(tiny_mamba, Pairs.concat([same[:10], pairs]), threshold=0.95)
    alone = cross_talk.EXPERIMENT(tiny_mamba, pairs, threshold=0.95)
    assert set(both["left_out"]) == {10}
    assert "10 prompts were left out" in " ".join(cross_talk.findings(both))
    assert both["accuracy"].tolist() == pytest.approx(alone["accuracy"].tolist())


def test_the_chart_and_the_findings_count_the_circuits(tiny_mamba):
    table = cross_talk.EXPERIMENT(tiny_mamba, make_pairs(tiny_mamba), threshold=0.95)
    spec = cross_talk.chart(table).to_dict()
    bars = next(iter(spec["datasets"].values()))
    layers = table[table["chosen"] & table["in_circuit"]]["layer"]
    assert {row["layer"]: row["proportion"] for row in bars} == {
        layer: (layers == layer).sum() / 2 for layer in range(4)
    }
    assert any("2 of 2 circuits reach the threshold" in sentence for sentence in cross_talk.findings(table))


def test_progress_ends_at_the_total(tiny_mamba):
    calls = []
    cross_talk.EXPERIMENT(tiny_mamba, make_pairs(tiny_mamba), progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize(("option", "message"), [({"threshold": 1.5}, "threshold is 1.5"), ({"rows": 0}, "rows is 0")])
def test_options_out_of_range_are_refused(tiny_mamba, option, message):
    with pytest.raises(InputError, match=message):
        cross_talk.EXPERIMENT(tiny_mamba, make_pairs(tiny_mamba), **option)


def test_the_default_pairs_are_twenty_combinations_drawn_apart_the_first_from_the_seed_itself(mini):
    pairs = cross_talk.default_pairs(mini.tokenizer, 3, 27)
    groups = {(t, c) for t, c in zip(pairs.labels["template"], pairs.labels["corruption"], strict=True)}
    assert (len(groups), len(pairs)) == (20, 120)
    alone = im.ioi.generate(
        mini.tokenizer, 3, 27, templates=[im.ioi.TEMPLATES[0]], corruptions=[im.ioi.CORRUPTIONS[0]], symmetric=True
    )
    assert torch.equal(pairs[:6].clean, alone.clean)
    # From one seed every combination of a corruption's letters would have the same names.
    names = [pairs[6 * k : 6 * k + 3].candidates.flatten().tolist() for k in range(20)]
    assert len({tuple(each) for each in names}) == 20


def test_an_accuracy_has_an_interval_by_pair(tiny_mamba):
    table = cross_talk.EXPERIMENT(tiny_mamba, make_pairs(tiny_mamba), threshold=0.95)
    assert (table["low"] <= table["accuracy"]).all()
    assert (table["accuracy"] <= table["high"]).all()
    assert (table["high"] > table["low"]).all()
