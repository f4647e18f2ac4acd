"""The command line: good input does its job; bad input is one sentence, exit code 2, nothing written."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import paper_run
import pytest
from conditioning import assert_same_effects, widest
from conftest import write_pairs
from packaging.requirements import Requirement

from ioi_mamba import analyses, versions
from ioi_mamba.analyses import layer_removal
from ioi_mamba.cli import doctor
from ioi_mamba.cli.commands.run import default_out
from ioi_mamba.cli.main import main
from ioi_mamba.cli.tables import columns
from ioi_mamba.experiments import options
from ioi_mamba.experiments.needs import Need
from ioi_mamba.model import sites
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.tasks.base import Pairs


def test_a_run_leaves_table_manifest_and_report_and_says_where(tiny_mamba_dir, pairs_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_mamba_dir), "--pairs", str(pairs_file), "--out", str(out)]
    assert main(["run", "layer-removal", *arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"Report: {out / 'index.html'}"
    assert "layer-removal" in printed.err
    assert sorted(path.name for path in out.iterdir()) == [
        "index.html",
        "layer-removal.json",
        "layer-removal.parquet",
    ]
    manifest = json.loads((out / "layer-removal.json").read_text())
    assert manifest["model"]["id"] == str(tiny_mamba_dir)
    assert manifest["n_pairs"] == 2  # the second of the three is held out
    assert manifest["seed"] == 27
    page = (out / "index.html").read_bytes()
    assert main(["report", str(out)]) == 0
    assert (out / "index.html").read_bytes() == page


def test_a_model_that_is_no_mamba_runs_what_needs_none(tiny_gpt2_dir, pairs_file, tmp_path):
    arguments = ["--model", str(tiny_gpt2_dir), "--pairs", str(pairs_file), "--out", str(tmp_path / "out")]
    assert main(["run", "layer-removal", *arguments]) == 0
    assert len(pd.read_parquet(tmp_path / "out/layer-removal.parquet")) == 1 + 3 + 2


def test_options_reach_the_experiment_as_what_they_are(tiny_mamba_dir, pairs_file, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_mamba_dir), "--pairs", str(pairs_file), "--out", str(out)]
    assert main(["run", "layer-removal", *arguments, "--option", "steps=1", "--option", "rows=4"]) == 0
    table = pd.read_parquet(out / "layer-removal.parquet")
    assert (table["mode"] == "greedy").sum() == 1
    assert json.loads((out / "layer-removal.json").read_text())["options"] == {"steps": 1, "rows": 4}


def test_without_resume_points_the_same_table_is_made_the_plain_way(tiny_mamba, tiny_mamba_dir, tmp_path):
    path, tokens = tmp_path / "pairs.jsonl", [[7, 9, 11, 5, 6], [3, 9, 12, 4, 6], [5, 10, 11, 3, 6]]
    write_pairs(path, [(row, [row[0] + 1, *row[1:]], row[0], row[0] + 1) for row in tokens])
    pairs = widest(tiny_mamba, Pairs.from_jsonl(path, tiny_mamba.tokenizer))
    answers = zip(tokens, pairs.answer.tolist(), pairs.wrong.tolist(), strict=True)
    write_pairs(path, [(row, [row[0] + 1, *row[1:]], answer, wrong) for row, answer, wrong in answers])
    tables = {}
    for name, flags in (("resumed", []), ("plain", ["--no-resume-points"])):
        arguments = ["--model", str(tiny_mamba_dir), "--pairs", str(path), "--out", str(tmp_path / name)]
        assert main(["run", "layer-ablation", *arguments, *flags]) == 0
        options = json.loads((tmp_path / name / "layer-ablation.json").read_text())["options"]
        assert options == {"site": "layer_input", "ablation": "resample", "resume": not flags}
        tables[name] = pd.read_parquet(tmp_path / name / "layer-ablation.parquet")
    assert_same_effects(tables["resumed"], tables["plain"], tiny_mamba, pairs)


def test_an_experiment_that_has_no_resume_points_is_not_told_to_leave_them_out(tiny_gpt2_dir, pairs_file, capsys):
    arguments = ["--model", str(tiny_gpt2_dir), "--pairs", str(pairs_file), "--no-resume-points"]
    assert main(["run", "layer-removal", *arguments]) == 2
    assert "leave out --no-resume-points" in capsys.readouterr().err


def test_an_interrupt_is_one_sentence_and_130(tiny_mamba_dir, pairs_file, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_removal, "EXPERIMENT", replace(layer_removal.EXPERIMENT, run=interrupted))
    arguments = ["--model", str(tiny_mamba_dir), "--pairs", str(pairs_file), "--out", str(tmp_path / "out")]
    assert main(["run", "layer-removal", *arguments]) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


RUN = ["run", "layer-removal"]
BAD = {
    "an unknown analysis": (["run", "layer-removel"], "did you mean 'layer-removal'?"),
    "an unknown analysis beside a known one": ([*RUN, "x"], "Unknown analysis 'x'"),
    "an unknown command": (["walk"], 'Unknown command "walk"'),
    "an unknown flag": ([*RUN, "--sede", "3"], "Unknown option: --sede. Did you mean --seed?"),
    "no analysis": (["run"], "No experiment is named: give at least one"),
    "a seed that is no number": ([*RUN, "--seed", "x"], "--seed is x: it should be a valid integer"),
    "no pairs": ([*RUN, "--n-pairs", "0"], "--n-pairs is 0"),
    "no threads": ([*RUN, "--threads", "0"], "--threads is 0"),
    "an unknown option": ([*RUN, "--option", "row=3"], "Unknown option 'row'"),
    "an option without value": ([*RUN, "--option", "rows"], "has no value"),
    "an option of another kind": ([*RUN, "--option", "rows=x"], "rows takes a whole number of at least 1"),
    "an option out of range": (
        [*RUN, "--model", "TINY", "--pairs", "PAIRS", "--option", "rows=0"],
        "at least 1",
    ),
    "an option that a study supplies": ([*RUN, "--option", "held_out=3"], "Unknown option"),
    "resume without out": ([*RUN, "--resume"], "--resume needs --out"),
    "held-out prompts without pairs": ([*RUN, "--held-out", "PAIRS"], "--held-out goes with --pairs"),
    "no such held-out file": ([*RUN, "--pairs", "PAIRS", "--held-out", "nowhere.jsonl"], "no file 'nowhere.jsonl'"),
    "no such pairs file": ([*RUN, "--pairs", "nowhere.jsonl"], "no file 'nowhere.jsonl'"),
    "pairs and their number": ([*RUN, "--pairs", "PAIRS", "--n-pairs", "3"], "do not go together"),
    "an unknown model": ([*RUN, "--model", "no/such-model"], "Unknown model 'no/such-model'"),
    "a directory without config": ([*RUN, "--model", "EMPTY"], "has no config.json"),
    "a dtype": ([*RUN, "--model", "TINY", "--dtype", "int3"], "dtype 'int3' is unknown"),
    "a device": ([*RUN, "--model", "TINY", "--device", "abacus"], "device 'abacus'"),
    "a backend": ([*RUN, "--model", "TINY", "--backend", "moon"], "backend 'moon'"),
    "a pairs file that is not JSON": ([*RUN, "--model", "TINY", "--pairs", "BROKEN"], "line 2"),
    "a name that is not one token": ([*RUN, "--pairs", "FOREIGN"], "line 1: ' Zaphod'"),
    "no command": ([], "No command is given"),
    "an abbreviated flag": ([*RUN, "--thr", "1"], "Unknown option: --thr"),
    "a number with a fraction": ([*RUN, "--option", "rows=3.7"], "rows takes a whole number of at least 1"),
    "a study beside an experiment": ([*RUN, "s.yaml"], "names its experiments itself"),
    "no such study": (["run", "s.yaml"], "The study file 's.yaml' cannot be read"),
    "overwrite without out": ([*RUN, "--overwrite"], "--overwrite needs --out"),
    "submit and collect": (
        [*RUN, "--backend", "ndif", "--out", "x", "--submit", "--collect"],
        "--collect do not go together",
    ),
    "a report of no directory": (["report", "nowhere"], "'nowhere' is not a directory"),
    "a report of nothing": (["report", "EMPTY"], "holds no finished table"),
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_and_exit_2(
    arguments, sentence, tiny_mamba_dir, pairs_file, tmp_path, monkeypatch, capsys
):
    line = pairs_file.read_text().splitlines()[0]
    (tmp_path / "broken.jsonl").write_text(f"{line}\n{{not json\n")
    (tmp_path / "foreign.jsonl").write_text(re.sub(r'" (7|8)"', '" Zaphod"', line))
    (tmp_path / "empty").mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    stand_ins = {
        "TINY": tiny_mamba_dir,
        "PAIRS": pairs_file,
        "EMPTY": tmp_path / "empty",
        "BROKEN": tmp_path / "broken.jsonl",
        "FOREIGN": tmp_path / "foreign.jsonl",
    }
    assert main([str(stand_ins.get(argument, argument)) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    said = printed.err.strip().splitlines()[-1]
    assert said.startswith("ioi-mamba: ")
    assert sentence in said
    assert "Traceback" not in printed.err
    assert list(work.iterdir()) == []
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_model_that_is_no_mamba_is_refused_where_one_is_needed(tiny_gpt2_dir, tmp_path, monkeypatch, capsys):
    needs = layer_removal.EXPERIMENT.needs | {Need.SITES}
    monkeypatch.setattr(layer_removal, "EXPERIMENT", replace(layer_removal.EXPERIMENT, needs=needs))
    out = tmp_path / "out"
    assert main(["run", "layer-removal", "--model", str(tiny_gpt2_dir), "--out", str(out)]) == 2
    assert "is a gpt2 model, not a Mamba" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_a_file_in_the_way_of_the_out_directory_is_left_alone(inside, tiny_mamba_dir, tmp_path, capsys):
    blocked = tmp_path / "blocked"
    blocked.write_text("mine")
    arguments = ["--model", str(tiny_mamba_dir), "--out", str(blocked / inside)]
    assert main(["run", "layer-removal", *arguments]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "is a file" in said
    assert blocked.read_text() == "mine"


def test_bad_input_in_a_process_of_its_own_writes_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ioi_mamba", "run", "layer-removal", "--model", "no/such-model"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_default_directory_names_model_and_time():
    assert str(default_out("state-spaces/mamba-370m-hf", "ioi")).startswith("reports/mamba-370m-hf-2")
    assert str(default_out("..", "ioi")).startswith("reports/model-2")


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("none", int | None, None),
        ("true", bool, True),
        ("h, out_proj", list[str], ["h", "out_proj"]),
        ("1,2", tuple[int, ...], [1, 2]),
        ("conv", str, "conv"),
        ("none", str | None, None),
    ],
)
def test_option_texts_become_what_the_experiment_asks_for(text, hint, value):
    wanted = options.Option("key", hint, None, "", None, None, ())
    assert options.read_option(wanted, text) == value


def test_sites_lists_every_hook(capsys):
    assert main(["sites"]) == 0
    printed = capsys.readouterr().out
    for name in MAMBA.sites:
        assert f"blocks.I.hook_{name}" in printed
    for name in ("hook_embed", "hook_norm", "hook_logits", "width of the residual stream"):
        assert name in printed


@pytest.mark.parametrize(
    ("line", "good"),
    [
        ("torch>=1,<99", True),
        ("torch<1", False),
        ("torch>=99", False),
        ("torch>=0.1; extra == 'dev'", None),
        ("torch>=0.1; python_version < '3'", None),
        ("no-such-package>=1", False),
    ],
)
def test_the_doctor_asks_what_the_metadata_asks_of_every_run(line, good, monkeypatch):
    monkeypatch.setattr(versions.importlib.metadata, "requires", lambda _: [line])
    found = [doctor._check_version(wanted) for wanted in versions.requirements()]
    assert [check.good for check in found] == ([] if good is None else [good])
    for check in found:
        assert check.good or "supported: " in check.says


def test_the_doctor_takes_the_ranges_of_the_project_and_has_none_of_its_own():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    supported = {wanted.name: wanted.specifier for wanted in map(Requirement, project["dependencies"])}
    # A checkout that was installed before pyproject.toml changed still has the metadata of then.
    for wanted in versions.requirements():
        assert wanted.name in supported
    assert {"torch", "nnsight", "transformers"} <= {wanted.name for wanted in versions.requirements()}
    for source in (Path(doctor.__file__), Path(versions.__file__), Path(sites.__file__)):
        assert not re.search(r"\b5\.\d\d\b", source.read_text()), source


def test_sources_that_are_not_installed_ask_for_nothing(monkeypatch):
    def missing(package):
        raise versions.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(versions.importlib.metadata, "requires", missing)
    assert versions.requirements() == []


def test_the_doctor_finds_mini_well(capsys):
    assert doctor._check_mini().good, doctor._check_mini().says
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for subject in ("python", "nnsight", "transformers", "torch", "compiled kernels", "device", "mini"):
        assert any(subject in line for line in lines)


def test_the_main_job_on_mini_with_nothing_but_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "layer-removal", "--n-pairs", "2"]) == 0
    (directory,) = (tmp_path / "reports").iterdir()
    assert directory.name.startswith("mini-")
    assert "These are figures of mini," in (directory / "index.html").read_text()
    table = pd.read_parquet(directory / "layer-removal.parquet")
    assert table.loc[table["mode"] == "greedy", "valid_accuracy"].notna().all()


def test_the_registry_knows_only_modules_that_are_there():
    assert "layer-removal" in analyses.available()
    for name in analyses.available():
        module = analyses.load(name)
        assert name == module.name
        assert set(module.required)
        assert len(module.method.strip().splitlines()) >= 3


@pytest.mark.parametrize("command", [["sites"], ["--help"], ["compare", "DIR"]])
def test_a_reader_that_has_seen_enough_ends_the_command_in_silence(command, tmp_path):
    # Buffered as a pipe is, so that what is left is written when Python ends.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if "DIR" in command:
        paper_run.write(tmp_path, {"layer-removal": paper_run.layer_removal()})
        command = [word.replace("DIR", str(tmp_path)) for word in command]
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "ioi_mamba", *command],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment | {"PYTHONPATH": str(Path(doctor.__file__).parents[2])},
    )
    os.close(writing)
    assert process.returncode == 0
    assert process.stderr == b""


def test_a_table_fits_the_terminal_and_is_whole_in_a_file(monkeypatch):
    rows = [("name", "what it means"), ("delta", " ".join(["the step of the recurrence"] * 6))]
    assert columns(rows) == f"name   what it means\ndelta  {rows[1][1]}"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    lines = columns(rows).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 60
    assert " ".join(line[7:] for line in lines[1:]) == rows[1][1]
    monkeypatch.setenv("COLUMNS", "10")  # words are never broken
    assert set(columns(rows).split()) == set(" ".join(map(" ".join, rows)).split())


def test_the_doctor_opens_the_model_it_is_asked_about(tiny_mamba_dir, tmp_path, capsys):
    main(["doctor", "--model", str(tiny_mamba_dir)])
    assert f"{tiny_mamba_dir} opens: a Mamba-1, 4 layers, width 24" in capsys.readouterr().out
    assert main(["doctor", "--model", str(tmp_path)]) == 1
    assert re.search(r"^-- +model .* has no config.json", capsys.readouterr().out, re.MULTILINE)


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path, capsys):
    assert main(["run", "layer-ablation", "--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "There is no directory" in capsys.readouterr().err
