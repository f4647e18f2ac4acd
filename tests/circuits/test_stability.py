"""How often draws of the pairs include an item, against draws that can be listed by hand."""

import conftest  # noqa: F401  sets the environment before transformers is imported
import pytest
import torch

from ioi_mamba.circuits.stability import drawn_means, inclusion


def test_frequencies_are_those_of_all_draws_of_two_clusters():
    """Two clusters give four equally likely draws; the first item leads in three of them, the other in one."""
    per_pair = torch.tensor([[-3.0, -3.0, 0.5], [-1.0, -1.0, -1.2], [9.0, 9.0, 9.0]])
    clusters = torch.tensor([0, 0, 1])
    means = drawn_means(per_pair, clusters, n_draws=8000)
    # A draw of both clusters has their three pairs, the first item's mean being (-3 - 3 + .5) / 3.
    found = {tuple(row) for row in means.round(decimals=4).tolist()}
    assert found == {(-3.0, -1.0, 9.0), (0.5, -1.2, 9.0), (round(-5.5 / 3, 4), round(-3.2 / 3, 4), 9.0)}
    often = inclusion(means, [1, 2, 3])
    assert often[0].tolist() == pytest.approx([0.75, 0.25, 0.0], abs=0.03)
    assert often[1].tolist() == [1, 1, 0]
    assert often[2].tolist() == [1, 1, 1]
    assert inclusion(means, [1], "absolute")[0].tolist() == [0, 0, 1]


def test_pairs_without_a_score_are_in_no_mean():
    per_pair = torch.tensor([[torch.nan, -2.0, -4.0], [-1.0, -1.0, -1.0]])
    means = drawn_means(per_pair, torch.arange(3), n_draws=500, seed=4)
    assert set(means[:, 0].round(decimals=4).tolist()) <= {-2.0, -4.0, -3.0, round(-10 / 3, 4), round(-8 / 3, 4), 0.0}
    assert (means[:, 0] == 0).float().mean() == pytest.approx(1 / 27, abs=0.03)
    assert torch.allclose(means[:, 1], torch.tensor(-1.0, dtype=torch.float64))
    assert torch.equal(means, drawn_means(per_pair, torch.arange(3), n_draws=500, seed=4))
