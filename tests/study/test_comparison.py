"""A study read as one: numbers over seeds, the core that all circuits share, the page that shows cells side by side."""

import base64
import itertools
import json
import re

import pandas as pd
import paper_run
import pytest
from scipy import stats

import ioi_mamba as im
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.report.comparison import write_comparison
from ioi_mamba.results import study as studies

ACCURACY = {("a", 1): 0.95, ("a", 2): 0.97, ("a", 3): 0.99, ("b", 1): 0.2}
KEPT = {("a", 1): [0, 1, 2], ("a", 2): [1, 2, 3], ("a", 3): [1, 2], ("b", 1): [0]}


def circuits(kept):
    """A table of edge-attribution with four edges; another position's rows are in no circuit."""
    rows = [("item", str(k), "output", None, None, None, -0.1 * k, k + 1, k in kept, len(kept)) for k in range(4)]
    rows += [("circuit", None, None, None, None, None, None, None, False, len(kept))]
    columns = ["what", "source", "target", "part", "position", "label", "score", "rank", "kept", "size"]
    table = pd.DataFrame(rows, columns=columns).astype({"position": "Int64", "rank": "Int64"})
    return table.assign(circuit=None, sample=None, measure=None, value=None, low=None, high=None, n=2, left_out=0)


@pytest.fixture
def directory(tmp_path):
    """Two models, three seeds of one and one of the other; made up, so that every number can be told beforehand."""
    cells = []
    for (model, seed), accuracy in ACCURACY.items():
        removal = paper_run.layer_removal()
        removal["accuracy"] = accuracy
        tables = {"layer-removal": removal, "edge-attribution": circuits(KEPT[model, seed])}
        name = f"{model}-{seed}"
        about = {"id": model, "architecture": "mamba", "config": {}, "weights_sha256": model * 64, "revision": None}
        asked = {"n_pairs": 2, "pairs_sha256": None, "held_out_sha256": None, "options": {}, "found": {}}
        paper_run.write(tmp_path / name, tables, model=about, seed=seed, task="ioi", asked=asked)
        cells.append(
            {"directory": name, "model": model, "seed": seed, "task": "ioi", "n_pairs": 2, "option": {"layer": 3}}
        )
    cells.append(cells[0] | {"directory": "not-run", "seed": 9})
    (tmp_path / studies.FILE).write_text(json.dumps({"study": "made-up", "cells": cells}))
    return tmp_path


def test_numbers_over_seeds_are_means_with_students_interval(directory):
    study = studies.read_study(directory)
    assert (len(study.cells), study.n_cells) == (4, 5)
    found = studies.over_seeds(study, "layer-removal")
    first = found[(found["quantity"] == "accuracy") & (found["mode"] == "none")].set_index("model")
    values = [value for (model, _), value in ACCURACY.items() if model == "a"]
    low, high = stats.t.interval(0.95, 2, loc=0.97, scale=stats.sem(values))
    assert first.loc["a", ["mean", "low", "high"]].astype(float).tolist() == pytest.approx([0.97, low, high])
    assert first.loc["a", "n_seeds"] == 3
    assert first.loc["b", "mean"] == 0.2
    assert first.loc["b", ["low", "high"]].isna().all()
    assert set(found["option.layer"]) == {"3"}
    # Each number of the tables is there once for each setting.
    n_rows = len(paper_run.layer_removal())
    assert (found["quantity"] == "accuracy").sum() == 2 * n_rows


def test_the_stable_core_is_what_every_seed_kept(directory):
    core = studies.stable_core(studies.read_study(directory), "edge-attribution").set_index(["model", "source"])
    of_a = {source: core.loc[("a", source), "share"] for source in "0123"}
    assert of_a == pytest.approx({"0": 1 / 3, "1": 1, "2": 1, "3": 1 / 3})
    assert {source for model, source in core.index[core["core"]] if model == "a"} == {"1", "2"}
    assert core.loc[("b", "0"), "core"]
    sets = [set(kept) for (model, _), kept in KEPT.items() if model == "a"]
    assert {int(source) for model, source in core.index[core["core"]] if model == "a"} == set.intersection(*sets)


def test_the_page_shows_every_cell_a_figure_a_setting_and_the_numbers(directory, capsys):
    page = write_comparison(directory).read_text()
    for model, seed in ACCURACY:
        assert f'href="{model}-{seed}/index.html"' in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 2  # of layer-removal; the made-up edges are too few for a figure, and the page says so
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert page.count("The figure could not be drawn") == 2
    assert "0.97 [0.92, 1.02] (3)" in page
    assert "1 → output, 2 → output" in page
    assert not re.search(r"<script|https?://", page)
    whole = pd.read_parquet(directory / "comparison.parquet")
    assert set(whole["experiment"]) == {"layer-removal", "edge-attribution"}
    (directory / "index.html").unlink()
    assert main(["report", str(directory)]) == 0
    assert (directory / "index.html").read_text() == page
    assert main(["report", str(directory), "--charts", "svg"]) == 2
    assert "is a study's" in capsys.readouterr().err


def test_one_frame_has_all_tables_and_an_option_hides_no_column(directory):
    frame = im.open_study(directory)
    n_rows = len(paper_run.layer_removal())
    assert frame.groupby(["experiment", "model", "seed"]).size().to_dict() == {
        (name, model, seed): n
        for (name, n), (model, seed) in itertools.product(
            [("layer-removal", n_rows), ("edge-attribution", 5)], ACCURACY
        )
    }
    assert set(frame["option.layer"]) == {3}
    removed = frame[(frame["experiment"] == "layer-removal") & (frame["cell"] == "a-1")]
    assert removed["layer"].dropna().tolist() == paper_run.layer_removal()["layer"].dropna().tolist()


def test_a_study_with_nothing_finished_is_refused(tmp_path):
    (tmp_path / studies.FILE).write_text(json.dumps({"study": "x", "cells": [{"directory": "../x", "option": {}}]}))
    with pytest.raises(InputError, match="holds no finished cell"):
        im.open_study(tmp_path)
    (tmp_path / studies.FILE).write_text("{}")
    with pytest.raises(InputError, match="is no study's directory"):
        write_comparison(tmp_path)
