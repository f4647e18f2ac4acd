"""The paper's numbers in the package: all there, described, and in agreement with each other."""

import re

import pytest

from ioi_mamba import claims, paper
from ioi_mamba.errors import InputError


def test_every_table_is_there_and_says_where_from_and_what_is_wrong_with_it():
    assert len(paper.names()) == len(set(paper.names())) == 17
    for name in paper.names():
        table, about = paper.table(name), paper.about(name)
        assert len(table) > 0
        assert not table.duplicated().any()
        assert all(about)
        assert about.kind in ("exact", "digitised", "mixed", "transcribed")
        assert table.attrs["faults"] == about.faults
        if name != "claims":
            assert set(table.columns) <= set(re.findall(r"\w+", about.columns))


def test_a_table_is_read_anew_and_an_unknown_name_refused():
    table = paper.table("edges")
    table.loc[0, "rank"] = 99
    assert paper.table("edges").loc[0, "rank"] == 1
    for read in (paper.table, paper.about):
        with pytest.raises(InputError, match="the names are claims, prompts, layer-removal"):
            read("fig05")


def test_the_published_anchors_are_as_printed():
    removal = paper.table("layer-removal").set_index("layer")
    assert removal.loc[39, ["probability", "probability_figure", "accuracy"]].tolist() == pytest.approx(
        [0.4505, 0.411, 0.55], abs=5e-4
    )
    patching = paper.table("anchor-patching").set_index(["layer", "position"])["effect"]
    assert patching[39, 15] == pytest.approx(0.92487, abs=1e-4)
    logits = paper.table("anchor-logits")
    assert logits["logit"].iloc[0] == pytest.approx(16.24173, abs=1e-5)
    path = paper.table("anchor-path").groupby("alpha")["normalized_logit_diff"].mean()
    assert path.tolist() == pytest.approx([1.0, 0.3814, 0.0836, 0.0106, 0.0], abs=5e-5)


def test_the_tables_agree_with_each_other():
    steps, cross_talk = paper.table("cross-talk-steps"), paper.table("cross-talk").set_index("layer")
    counts = steps["layer"].value_counts().reindex(cross_talk.index, fill_value=0)
    assert (counts == cross_talk["circuits"]).all()
    assert cross_talk.loc[0, "proportion"] == 0.15
    edges, parts = paper.table("edges"), paper.table("circuit-parts")
    assert edges["rank"].tolist() == list(range(1, 189))
    assert edges["on_path"].sum() == 181
    assert edges["kept_by_search"].sum() == 171
    assert edges.loc[edges["kept_by_search"] == 1, "drop"].notna().all()
    kept = parts[parts["kept"] == 1]["part"].value_counts()
    assert kept.to_dict() == {"skip": 40, "ssm": 31, "conv0": 30, "conv-1": 19, "conv-2": 2}
    items = paper.table("positional-edges")
    assert len(items) == 700
    assert set(items.query("source == '39' and position == 19")["target"]) == {"43", "45", "46", "47", "output"}
    counts = paper.table("edge-counts").set_index("size")["accuracy"]
    assert counts[188] > 0.85 > counts[187]


def test_a_published_number_is_within_its_own_tolerance():
    table = paper.table("claims")
    assert table["id"].is_unique
    for claim in table.dropna(subset="published").itertuples():
        assert claims.within(claim.published, claim.at_least, claim.at_most), claim.id
    measured = table[table["analysis"] != ""]
    assert (measured["at_least"].notna() | measured["at_most"].notna()).all()


@pytest.mark.parametrize(
    ("at_least", "at_most", "words"),
    [
        (0.95, float("nan"), "at least 0.95"),
        (float("nan"), 0.02, "at most 0.02"),
        (0, 0.2, "at most 0.2"),
        (0, 0, "0"),
        (0.8, 1.1, "0.8 to 1.1"),
        (float("nan"), float("nan"), ""),
    ],
)
def test_a_tolerance_is_said_in_words(at_least, at_most, words):
    assert claims.tolerance(at_least, at_most) == words
