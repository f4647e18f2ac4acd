"""State similarities against plain Python loops over the values of a plain-torch pass."""

import math

import pytest
import reference
import torch
from conftest import VOCAB

from ioi_mamba.analyses import state_similarity as ss
from ioi_mamba.errors import InputError
from ioi_mamba.tasks.base import Pairs


def cosine(a, b):
    dot, norms = 0.0, [0.0, 0.0]
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        dot += x * y
        norms[0] += x * x
        norms[1] += y * y
    return dot / math.prod(math.sqrt(norm) or 1.0 for norm in norms)


def oracle(model, tokens, layer):
    """{measure: {(i, j): similarity}} of one prompt, straight from the definition."""
    values = reference.run(reference.weights_of(model), tokens[None])
    n, at = len(tokens), lambda site: values[f"blocks.{layer}.hook_{site}"][0]
    h = [values[f"blocks.{layer}.hook_h.{t}"][0] for t in range(n)]
    added = [at("B_bar")[t] * at("ssm_input")[t][:, None] for t in range(n)]
    result = {measure: {} for measure in ss.MEASURES}
    for i in range(n):
        for j in range(n):
            kept = added[i]
            for t in range(i + 1, j + 1):
                kept = kept * at("A_bar")[t]
            result[ss.CONTRIBUTION_STATE][i, j] = cosine(added[i], h[j])
            result[ss.DECAYED_STATE][i, j] = cosine(kept, h[j])
            result[ss.CONTRIBUTIONS][i, j] = cosine(added[i], added[j])
            result[ss.STATES][i, j] = cosine(h[i], h[j])
    return result


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(1, VOCAB, (2, 7), generator=generator)
    return Pairs(
        clean=clean,
        corrupted=clean,
        answer=clean[:, 1],
        wrong=clean[:, 2],
        lengths=torch.tensor([7, 5]),
        roles={"n1": torch.tensor([1, 1]), "n2": torch.tensor([3, -1]), "out": torch.tensor([6, 4])},
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_all_measures_are_those_of_the_definition(tiny_mamba, pairs, layer):
    table = ss.EXPERIMENT(tiny_mamba, pairs, layer=layer)
    assert tuple(table.columns) == tuple(column.name for column in ss.COLUMNS)
    assert len(table) == 4 * (7 * 7 + 5 * 5)
    for row, (_, own) in enumerate(table.groupby("prompt", sort=False)):
        expected = oracle(tiny_mamba, pairs.clean[row, : int(pairs.last[row]) + 1], layer)
        for cell in own.itertuples():
            assert cell.similarity == pytest.approx(expected[cell.measure][cell.row, cell.column], abs=2e-5)


def test_a_vector_of_zeros_is_similar_to_nothing():
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert torch.equal(ss.cosines(a, a), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_rows_after_names_are_marked_from_the_roles(tiny_mamba, pairs):
    table = ss.EXPERIMENT(tiny_mamba, pairs, layer=1)
    marked = table[table["after_name"]].groupby("prompt", sort=False)["row"].unique()
    assert [sorted(rows) for rows in marked] == [[2, 4], [2]]
    labels = table.drop_duplicates(["prompt", "row"])["row_label"]
    assert list(labels[:7]) == [str(token) for token in pairs.clean[0].tolist()]


def test_a_name_of_several_tokens_is_marked_after_its_first(tiny_mamba, pairs):
    table = ss.EXPERIMENT(tiny_mamba, pairs, layer=1, prompt="5 17 18 9 3 17 18 7", names=["17 18"])
    # BOS is 0, so the name begins at tokens 2 and 6.
    assert sorted(table.loc[table["after_name"], "row"].unique()) == [3, 7]
    assert set(table["prompt"]) == {"5 17 18 9 3 17 18 7"}


def test_lines_are_means_over_later_states_and_the_findings_name_the_strongest(tiny_mamba, pairs):
    table = ss.EXPERIMENT(tiny_mamba, pairs, layer=1)
    expected = oracle(tiny_mamba, pairs.clean[0], 1)[ss.CONTRIBUTION_STATE]
    first = ss.lines(table)
    first = first[first["prompt"] == table["prompt"].iloc[0]].set_index("row")["mean"]
    assert sorted(first.index) == [0, 1, 2, 3]
    for i in first.index:
        assert first[i] == pytest.approx(sum(expected[i, j] for j in range(i + 1, 7)) / (6 - i), abs=2e-5)
    assert first.is_monotonic_decreasing
    (named,) = [sentence for sentence in ss.findings(table) if "the strongest rows are " in sentence]
    assert named.split("strongest rows are ")[1].startswith(f"{first.index[0]} ")


def test_the_chart_names_both_axes_and_stays_within_its_size(mini):
    pairs = ss.default_pairs(mini.tokenizer, None, 27)
    assert pairs.texts is not None
    assert pairs.texts[0][0].startswith("Friends Donovan, Isabel and Leah went to the office.")
    calls = []
    table = ss.EXPERIMENT(mini, pairs, layer=0, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    spec = ss.chart(table).to_dict()
    assert sum(len(rows) for rows in spec["datasets"].values()) <= 5000
    axes = spec["concat"][0]["layer"][0]["encoding"]
    assert axes["y"]["title"] == "contribution of token"
    assert axes["x"]["title"] == "state after token"


def test_a_layer_or_a_prompt_that_is_not_there_is_refused(tiny_mamba, pairs):
    with pytest.raises(InputError, match="layers 0 to 3"):
        ss.EXPERIMENT(tiny_mamba, pairs, layer=4)
    with pytest.raises(InputError, match="empty"):
        ss.EXPERIMENT(tiny_mamba, pairs, layer=0, prompt="")
