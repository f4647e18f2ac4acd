"""A study: a file of flags whose lists are swept, cells that are runs, a failed one that holds up no other."""

import json
from dataclasses import replace

import pandas as pd
import pytest

import ioi_mamba as im
from ioi_mamba.analyses import layer_removal
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.results.study import FILE, read_study
from ioi_mamba.study import settings


def unrolled(tmp_path, text, **given):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return settings.read_study(path, given)


def test_lists_are_swept_and_every_combination_is_a_cell(tmp_path):
    study = unrolled(
        tmp_path,
        "experiments: [layer-ablation]\nmodel: [mini, a/b]\nseed: [1, 2, 3]\ndtype: [float32, bfloat16]\n"
        "task: [ioi]\noption: {site: [layer_input, conv], resume: true, names: [[Mary, John]]}\nn-pairs: 4\nout: here\n",
    )
    assert study.experiments == ("layer-ablation",)
    assert str(study.out) == "here"
    found = [
        (cell.settings.model, cell.settings.seed, cell.settings.dtype, cell.options["site"]) for cell in study.cells
    ]
    assert len(set(found)) == len(found) == 2 * 3 * 2 * 2
    assert {cell.settings.n_pairs for cell in study.cells} == {4}
    assert all(cell.options["names"] == ["Mary", "John"] and cell.options["resume"] is True for cell in study.cells)
    assert len({cell.name for cell in study.cells}) == 24
    assert all(cell.name.replace("-", "").replace("_", "").isalnum() for cell in study.cells)


def test_a_cell_keeps_its_directory_in_a_study_that_sweeps_more(tmp_path):
    few = {cell.name for cell in unrolled(tmp_path, "experiments: all\nseed: 1\n").cells}
    more = {
        cell.name for cell in unrolled(tmp_path, "experiments: all\nseed: [1, 2]\ntask: [ioi, greater-than]\n").cells
    }
    assert few < more
    assert few == {cell.name for cell in unrolled(tmp_path, "experiments: all\nseed: 1\nthreads: 2\n").cells}
    assert not few & {cell.name for cell in unrolled(tmp_path, "experiments: all\nseed: 1\nn-pairs: 9\n").cells}


def test_flags_stand_in_place_of_what_the_file_says(tmp_path):
    text = "experiments: all\nmodel: [a, b]\nseed: [1, 2]\noption: {layer: [1, 2]}\n"
    study = unrolled(tmp_path, text, seed=7, option={"layer": "3"})
    assert [(cell.settings.model, cell.settings.seed, cell.options["layer"]) for cell in study.cells] == [
        ("a", 7, "3"),
        ("b", 7, "3"),
    ]


BAD = {
    "a key that is none": ("seeds: [1]", "'seeds' is no flag of `ioi-mamba run`: did you mean 'seed'"),
    "a value of another type": ("seed: [1, x]", "seed is x: it should be a valid integer"),
    "a value out of range": ("n-pairs: 0", "n-pairs is 0: it should be greater than or equal to 1"),
    "values that do not go together": ("held-out: a.jsonl", "--held-out goes with --pairs"),
    "no mapping": ("[experiments]", "is no list of `key: value`"),
    "no YAML": ("seed: [", "is not YAML (while parsing a flow sequence)"),
    "a cell twice": ("seed: [1, 1]", "twice: name each value of a list once"),
    "an empty list": ("seed: []", "has 0 cells"),
    "too many": (
        f"seed: {list(range(101))}\nn-pairs: {list(range(1, 102))}",
        "has 10201 cells: it takes from 1 to 10000",
    ),
    "options without names": ("option: [layer]", "write the options by name"),
    "an option's value": ("option: {steps: 0}", "layer-removal takes a whole number of at least 1"),
    "an unknown option": ("option: {stepps: 1}", "Unknown option 'stepps'"),
    "an unknown experiment": ("experiments: [layer-removel]", "did you mean 'layer-removal'"),
    "no experiments": ("experiments: []", "names no experiments"),
    "an out that is none": ("out: [a]", "give the directory of the study"),
    "no such pairs": ("pairs: nowhere.jsonl", "no file 'nowhere.jsonl'"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD.keys())
def test_a_study_that_cannot_be_run_is_one_sentence_and_nothing_is_written(text, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(text + ("" if "experiments" in text else "\nexperiments: [layer-removal]\n"))
    assert main(["run", "s.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (said,) = printed.err.splitlines()
    assert says in said
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


@pytest.fixture
def counted(monkeypatch):
    """(seed, number of layers) of each time that layer-removal ran; with the seed 3 it fails."""
    calls = []

    def run(context):
        calls.append(context.seed)
        if context.seed == 3:
            raise ZeroDivisionError("the seed 3")
        return layer_removal.run(context)

    monkeypatch.setattr(layer_removal, "EXPERIMENT", replace(layer_removal.EXPERIMENT, run=run))
    return calls


def test_cells_are_runs_and_a_failed_one_holds_up_no_other(tiny_mamba_dir, pairs_file, counted, tmp_path, capsys):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    about = {
        "experiments": ["layer-removal", "conv-shift"],
        "model": [str(tiny_mamba_dir), "no/such"],
        "seed": [1, 3, 2],
    }
    about |= {"pairs": str(pairs_file), "option": {"steps": 1, "layer": 1}}
    path.write_text(json.dumps(about))  # JSON is YAML
    assert main(["run", str(path), "--out", str(out), "--json"]) == 1
    printed = capsys.readouterr()
    assert counted == [1, 3, 2]
    done = [json.loads(line) for line in printed.out.splitlines()]
    assert [(each["analysis"], each["seed"]) for each in done] == [
        ("layer-removal", 1),
        ("conv-shift", 1),
        ("conv-shift", 3),
        ("layer-removal", 2),
        ("conv-shift", 2),
    ]
    failed = [line for line in printed.err.splitlines() if line.startswith("Failed: ")]
    assert len(failed) == 4
    assert "layer-removal: ZeroDivisionError: the seed 3" in failed[0] + failed[-1]
    assert sum("Unknown model 'no/such'" in line for line in failed) == 3
    assert "Traceback" not in printed.err
    for manifest in done:
        kept = json.loads((out / manifest["cell"] / f"{manifest['analysis']}.json").read_text())
        assert {"cell": manifest["cell"]} | kept == manifest
        assert (out / manifest["cell"] / "index.html").exists()
    frame = im.open_study(out)
    of_seeds = frame[frame["experiment"] == "layer-removal"].groupby("seed").size()
    assert list(of_seeds.index) == [1, 2]
    table = pd.read_parquet(out / done[0]["cell"] / "layer-removal.parquet")
    own = frame[(frame["experiment"] == "layer-removal") & (frame["seed"] == 1)]
    assert own["accuracy"].tolist() == table["accuracy"].tolist()
    assert set(own["option.steps"]) == {1}
    assert set(own["model"]) == {str(tiny_mamba_dir)}
    # Taken up again, nothing that is done is done again.
    assert main(["run", str(path), "--out", str(out)]) == 1
    assert counted == [1, 3, 2, 3]
    assert capsys.readouterr().out.splitlines() == [f"Report: {out / 'index.html'}"]


def test_a_studys_directory_with_cells_of_something_else_is_refused(tiny_mamba_dir, pairs_file, tmp_path):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    about = {"experiments": "layer-removal", "model": str(tiny_mamba_dir), "pairs": str(pairs_file), "seed": [1, 2]}
    path.write_text(json.dumps(about | {"option": {"steps": 1}}))
    assert main(["run", str(path), "--out", str(out)]) == 0
    cells = [entry["directory"] for entry in json.loads((out / FILE).read_text())["cells"]]
    (out / cells[0]).rename(out / "aside")
    assert len(read_study(out).cells) == 1
    (out / cells[1]).rename(out / cells[0])
    with pytest.raises(InputError, match=r"layer-removal.json with seed 2, and the study says 1 there"):
        im.open_study(out)
    (out / cells[0]).rename(out / cells[1])
    (out / "aside").rename(out / cells[0])
    manifest = json.loads((out / cells[1] / "layer-removal.json").read_text())
    manifest["model"]["weights_sha256"] = "ee" * 32
    (out / cells[1] / "layer-removal.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="holds two models of the name"):
        im.open_study(out)
    with pytest.raises(InputError, match="is no study's directory"):
        im.open_study(out / cells[0])
