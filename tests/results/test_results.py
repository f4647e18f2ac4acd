"""What a run left, opened in a notebook."""

import json

import pandas as pd
import paper_run
import pytest

import ioi_mamba as im
from ioi_mamba.analyses import layer_removal
from ioi_mamba.errors import InputError
from ioi_mamba.report import pages


@pytest.fixture
def out(tmp_path):
    paper_run.write(
        tmp_path / "out", {"layer-removal": paper_run.layer_removal(), "layer-ablation": paper_run.layer_ablation()}
    )
    return tmp_path / "out"


def test_a_result_has_the_table_the_chart_and_the_findings_of_the_report(out):
    result = im.open_result(out, "layer-removal")
    table = pd.read_parquet(out / "layer-removal.parquet")
    pd.testing.assert_frame_equal(result.to_frame(), table)
    assert pages.chart_spec(result.chart()) == pages.chart_spec(layer_removal.chart(table))
    assert result.findings() == list(layer_removal.findings(table))
    assert result.manifest == json.loads((out / "layer-removal.json").read_text())
    assert repr(result) == "Result(name='layer-removal')"


def test_a_changed_frame_leaves_the_result_as_it_was(out):
    result = im.open_result(out, "layer-removal")
    before = result.findings()
    frame = result.to_frame()
    frame["probability"] = 0.0
    assert result.findings() == before


def test_all_results_of_a_run_stand_in_the_papers_order(out):
    results = im.open_results(str(out))
    assert list(results) == ["layer-ablation", "layer-removal"]
    assert results["layer-removal"].manifest["analysis"] == "layer-removal"


def test_what_cannot_be_opened_is_refused_in_a_sentence(out, tmp_path):
    with pytest.raises(InputError, match="did you mean 'layer-removal'"):
        im.open_result(out, "layer-remval")
    with pytest.raises(InputError, match="no finished table of cross-talk, only of layer-ablation, layer-removal"):
        im.open_result(out, "cross-talk")
    with pytest.raises(InputError, match="is not a directory"):
        im.open_result(tmp_path / "none", "cross-talk")
    paper_run.layer_removal().head(3).to_parquet(out / "layer-removal.parquet")
    for opened in (lambda: im.open_result(out, "layer-removal"), lambda: im.open_results(out)):
        with pytest.raises(InputError, match=r"is not the table that layer-removal\.json is of"):
            opened()
    assert im.open_result(out, "layer-ablation").findings()
