"""Edge attribution: every variant against the golden values and the plain reference, and its properties."""

import golden
import numpy as np
import pandas as pd
import pytest
import reference
import torch
from golden import NODES, relative_error

import ioi_mamba as im
from ioi_mamba.circuits.attribution import ranked
from ioi_mamba.circuits.variants import VARIANTS
from ioi_mamba.errors import InputError
from ioi_mamba.passes.forward import forward
from ioi_mamba.passes.metrics import logit_diff, normalized_logit_diff
from ioi_mamba.tasks.base import Pairs

TAGS = {"paper": "layers", "detached": "layers_detach", "clean-difference": "layers_cleandiff"}

PATHS = [name for name, variant in VARIANTS.items() if not variant.rules]
"""Those of gradients; the one of relevance rules has tests of its own."""


def golden_attribution(**options):
    return im.attribute(golden.model(), golden.golden_pairs(), **options).table


def odd_attribution(**options):
    return im.attribute(golden.odd_model(), golden.random_pairs("odd"), **options).table


def edges_of(table, n_pairs=1):
    """[pair, source, target, pos] out of a table with positions."""
    out = torch.zeros(n_pairs, 6, 6, 20)
    for row in table[table["part"].isna()].itertuples():
        out[getattr(row, "pair", 0), NODES.index(row.source), NODES.index(row.target), row.position] += row.score
    return out


def slices_of(table, n_pairs=1):
    """[pair, layer, tap, pos] out of a table with positions and parts."""
    out = torch.zeros(n_pairs, 4, 4, 20)
    for row in table[table["part"].str.startswith("conv", na=False)].itertuples():
        assert row.source == row.target
        out[getattr(row, "pair", 0), int(row.source), 3 + int(row.part[4:]), row.position] += row.score
    return out


def scores(table):
    return torch.tensor(table["score"].to_numpy())


# -- golden values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PATHS)
def test_a_variant_gives_the_scores_of_mambalens_per_position_summed_and_per_pair(variant):
    want = golden.TENSORS[f"eap/{TAGS[variant]}/attr"]
    per_pair = golden_attribution(variant=variant, positions=True, per_pair=True)
    assert relative_error(edges_of(per_pair, 5), want) < 1e-4
    by_position = golden_attribution(variant=variant, positions=True)
    assert relative_error(edges_of(by_position)[0], want.mean(0)) < 1e-4
    summed = golden_attribution(variant=variant)
    assert summed["position"].isna().all()
    got = {(row.source, row.target): row.score for row in summed.itertuples()}
    total = want.mean(0).sum(-1)
    assert (
        relative_error(
            torch.tensor([got[NODES[i], NODES[j]] for j in range(1, 6) for i in range(j)]),
            torch.stack([total[i, j] for j in range(1, 6) for i in range(j)]),
        )
        < 1e-4
    )


def test_with_parts_the_paper_variant_is_the_published_notebook():
    table = golden_attribution(variant="paper", parts=True, positions=True)
    assert relative_error(edges_of(table)[0], golden.TENSORS["eap/notebook/attr"].mean(0)) < 1e-4
    assert relative_error(slices_of(table)[0], golden.TENSORS["eap/notebook/conv"].mean(0)) < 1e-4


def test_the_gradient_at_the_clean_point_is_that_of_mambalens():
    table = golden_attribution(method="eap", parts=True, positions=True)
    assert relative_error(edges_of(table)[0], golden.TENSORS["eap/conv0/attr"].mean(0)) < 1e-4
    assert relative_error(slices_of(table)[0], golden.TENSORS["eap/conv0/conv"].mean(0)) < 1e-4


# -- the plain reference ------------------------------------------------------------------------------------------


def with_another_last_token(pairs):
    """The same pairs, whose prompts differ at their last token too."""
    corrupted = pairs.corrupted.clone()
    corrupted[:, -1] = 1 + (corrupted[:, -1] + 3) % 50
    return Pairs.from_tokens(pairs.clean, corrupted, pairs.answer, pairs.wrong)


@pytest.mark.parametrize("variant", PATHS)
@pytest.mark.parametrize(("method", "steps"), [("eap", 1), ("eap-ig", 2), ("eap-ig", 4)])
@pytest.mark.parametrize("same_last", [True, False])
def test_every_edge_conv_slice_ssm_and_skip_has_the_score_of_the_reference(variant, method, steps, same_last):
    model, pairs, weights = golden.odd_model(), golden.random_pairs("odd"), golden.weights("odd")
    pairs = pairs if same_last else with_another_last_token(pairs)
    alphas = [0.0] if method == "eap" else [k / (steps - 1) for k in range(steps)]
    want = reference.attributions(weights, pairs, alphas, variant, variant == "paper", 3)
    table = im.attribute(
        model, pairs, method=method, variant=variant, steps=max(steps, 2), parts=True, positions=True, per_pair=True
    ).table
    got = table.assign(part=table["part"].astype(object).where(table["part"].notna(), None)).groupby(
        ["source", "target", "part"], dropna=False
    )
    kinds = {(s, t, None if pd.isna(p) else p): group for (s, t, p), group in got}
    assert set(kinds) == set(want)
    scale = max(score.abs().max() for score in want.values())
    for kind, group in kinds.items():
        own = torch.tensor(group.pivot(index="pair", columns="position", values="score").to_numpy())
        assert (own - want[kind]).abs().max() < 1e-4 * scale, kind
        assert kind[:2] == ("embed", "output") or want[kind].abs().max() > 1e-6 * scale, kind


@pytest.mark.parametrize("variant", PATHS)
def test_without_parts_the_path_leaves_the_convolutions_alone(variant):
    pairs, weights = golden.random_pairs("odd"), golden.weights("odd")
    want = reference.attributions(weights, pairs, [0.0, 0.5, 1.0], variant, False, 3)
    table = odd_attribution(variant=variant, steps=3)
    assert table["part"].isna().all()
    scale = max(score.abs().max() for score in want.values())
    for row in table.itertuples():
        assert abs(row.score - want[row.source, row.target, None].sum(1).mean().item()) < 1e-4 * scale


# -- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PATHS)
def test_integrated_gradients_converge_as_steps_grow(variant):
    at = {steps: scores(odd_attribution(variant=variant, parts=True, steps=steps)) for steps in (5, 20, 80)}
    coarse, fine = ((at[a] - at[b]).abs().max() for a, b in ((5, 20), (20, 80)))
    assert 0 < fine < coarse / 2


def test_at_the_clean_point_the_slices_sum_to_the_attribution_of_the_whole_convolution():
    model, pairs = golden.model(), golden.golden_pairs()
    names = [f"blocks.{i}.hook_conv" for i in range(4)]
    difference = lambda logits: logit_diff(logits[:, 0], pairs.answer, pairs.wrong)
    runs = [
        forward(model, tokens, reads=names, logits_at=pairs.last[:, None]) for tokens in (pairs.clean, pairs.corrupted)
    ]
    at_clean, at_corrupted = (difference(run["hook_logits"]) for run in runs)
    leaves, grads = {}, {}

    def leaf(name):
        def edit(x):
            leaves[name] = x if x.requires_grad else x.requires_grad_()
            return leaves[name]

        return edit

    def differentiate(saved):
        metric = normalized_logit_diff(difference(saved["hook_logits"]), at_clean, at_corrupted).sum()
        grads.update(zip(names, torch.autograd.grad(metric, [leaves[name] for name in names]), strict=True))
        return {}

    with torch.enable_grad():
        forward(
            model,
            pairs.clean,
            {name: leaf(name) for name in names},
            logits_at=pairs.last[:, None],
            reduce=differentiate,
        )
    whole = torch.stack([(grads[n] * (runs[1][n] - runs[0][n])).sum(-1) for n in names], 1)
    table = golden_attribution(method="eap", parts=True, positions=True, per_pair=True)
    assert relative_error(slices_of(table, 5).sum(2), whole) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_depend_neither_on_the_pairs_of_a_pass_nor_on_their_order(variant):
    options = {"variant": variant, "parts": True, "steps": 3, "positions": True}
    whole = scores(golden_attribution(**options))
    for pairs_per_pass in (1, 2, 3):
        assert relative_error(scores(golden_attribution(**options, pairs_per_pass=pairs_per_pass)), whole) < 1e-5
    order = [3, 0, 4, 1, 2]
    permuted = im.attribute(golden.model(), golden.golden_pairs()[order], **options, per_pair=True).table
    assert relative_error(scores(permuted.groupby(permuted.index // 5, as_index=False)["score"].mean()), whole) < 1e-5
    own = golden_attribution(**options, per_pair=True)
    by_pair = lambda table: torch.stack([scores(table[table["pair"] == pair]) for pair in range(5)])
    assert relative_error(by_pair(permuted), by_pair(own)[order]) < 1e-5


def test_twice_the_pairs_have_the_same_scores():
    pairs = golden.golden_pairs()
    twice = im.attribute(golden.model(), pairs[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]).table
    assert relative_error(scores(twice), scores(golden_attribution())) < 1e-5


def test_the_default_is_the_mean_over_pairs_and_the_sum_over_positions():
    keys = ["source", "target", "part"]
    table = odd_attribution(parts=True)
    fine = odd_attribution(parts=True, positions=True, per_pair=True)
    assert list(table.columns) == ["source", "target", "position", "part", "score"]
    assert list(fine.columns) == [*table.columns, "pair"]
    assert len(table) == 10 + 3 * 5
    assert len(fine) == len(table) * 9 * 4
    coarse = fine.groupby([*keys, "pair"], dropna=False, sort=False)["score"].sum()
    coarse = coarse.groupby(keys, dropna=False, sort=False).mean().reset_index()
    assert coarse[keys].astype(str).equals(table[keys].astype(str))
    np.testing.assert_allclose(coarse["score"], table["score"], atol=1e-6 * table["score"].abs().max())


def test_ragged_pairs_have_the_scores_that_each_pair_alone_has():
    model, pairs = golden.model(), golden.random_pairs("golden", lengths=[9, 6, 8, 5])
    table = im.attribute(model, pairs, steps=3, parts=True, per_pair=True).table
    for row, length in enumerate(pairs.lengths.tolist()):
        one = pairs[[row]]
        alone = Pairs.from_tokens(one.clean[:, :length], one.corrupted[:, :length], one.answer, one.wrong)
        want = scores(im.attribute(model, alone, steps=3, parts=True).table)
        assert relative_error(scores(table[table["pair"] == row]), want) < 1e-4


def test_a_pair_of_equal_prompts_has_no_score():
    pairs = golden.random_pairs("odd")
    same = Pairs.from_tokens(pairs.clean, pairs.clean, pairs.answer, pairs.wrong)
    with pytest.raises(InputError, match="None of the 4 pairs has a range"):
        im.attribute(golden.odd_model(), same, parts=True)
    both = im.attribute(golden.odd_model(), Pairs.concat([same, pairs]), parts=True, per_pair=True).table
    alone = im.attribute(golden.odd_model(), pairs, parts=True, per_pair=True).table
    assert set(both["pair"]) == {4, 5, 6, 7}
    assert both.attrs["left_out"] == 4
    assert both["score"].tolist() == pytest.approx(alone["score"].tolist(), abs=1e-6)


def test_an_edge_that_matters_has_a_negative_score_when_patching_it_lowers_the_metric():
    model, pairs = golden.model(), golden.golden_pairs()
    table, exact = golden_attribution(), []
    difference = lambda logits: logit_diff(golden.at_last(logits, pairs), pairs.answer, pairs.wrong)
    clean, corrupted = (difference(im.run(model, t, {})) for t in (pairs.clean, pairs.corrupted))
    for row in table.itertuples():
        logits = im.patch_edges(model, pairs, [(row.source, row.target)])
        exact.append((normalized_logit_diff(difference(logits) - clean + corrupted, clean, corrupted)).mean().item())
    assert np.corrcoef(table["score"], exact)[0, 1] > 0.9  # 0.944 is known of this model


def test_attribution_leaves_no_gradient_behind():
    odd_attribution(parts=True)
    module = golden.odd_model()._module
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        assert len(odd_attribution()) == 10


def test_progress_counts_the_pairs():
    calls = []
    odd_attribution(pairs_per_pass=3, progress=lambda *call: calls.append(call))
    assert calls == [(3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "ig"}, "method 'ig' is unknown: did you mean 'eap-ig'\\? There are eap, eap-ig, exact"),
        ({"variant": "exact"}, "variant 'exact' is unknown"),
        ({"steps": 1}, "at least 2 steps, not 1"),
        ({"pairs_per_pass": 0}, "pairs_per_pass"),
    ],
)
def test_an_option_that_is_not_there_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        odd_attribution(**options)


# -- ranking ------------------------------------------------------------------------------------------------------

TABLE = pd.DataFrame({"source": list("abcde"), "score": [0.5, -0.2, -0.9, 0.5, 0.0]})


@pytest.mark.parametrize(("ranking", "order"), [("signed", "cbead"), ("absolute", "cadbe")])
def test_a_ranking_orders_by_importance_and_keeps_ties_in_the_order_of_the_table(ranking, order):
    table = ranked(TABLE, ranking)
    assert "".join(table["source"]) == order
    assert list(table["rank"]) == [1, 2, 3, 4, 5]
    assert list(TABLE.columns) == ["source", "score"]


def test_another_ranking_is_refused():
    with pytest.raises(InputError, match="'random' is unknown"):
        ranked(TABLE, "random")
