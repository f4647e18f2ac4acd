"""The command line for scripts: JSON on stdout, exit codes, quiet, a log file, help without torch, completion."""

import json
import subprocess
import sys

import paper_run
import pytest

from ioi_mamba.claims import compare
from ioi_mamba.cli import listing
from ioi_mamba.cli.main import COMMANDS, main


def test_what_the_help_says_of_experiments_is_what_their_records_say():
    assert listing.read() == listing.described(), "run `python -m ioi_mamba.cli.listing`"


def test_the_help_of_run_lists_every_option_with_what_it_takes_and_examples(capsys):
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for experiment in listing.described():
        assert f"{experiment['name']}: {experiment['title']}" in text
        for option in experiment["options"]:
            assert (
                " ".join(f"{option['name']}={option['default']}: {option['help']} [{option['takes']}]".split()) in text
            )
    assert text.count("ioi-mamba run ") >= 6


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["run", "--help"], ["completion", "bash"], ["run"], ["x"]]
)
def test_help_completion_and_what_is_wrong_at_first_sight_load_no_torch(words):
    code = f"""
import sys
from ioi_mamba.cli.main import main
main({words!r})
assert not {{"torch", "transformers", "pandas", "altair", "nnsight"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_shell_completes_commands_flags_and_experiments(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(command in script for command in COMMANDS)
        assert "n-pairs" in script
    # What the script calls back for: the words that stand on the line.
    main(["__complete", "run", "layer-"])
    offered = capsys.readouterr().out
    assert "layer-ablation" in offered
    assert "layer-removal" in offered


def test_sites_and_doctor_and_compare_say_it_in_json_a_line_each(tmp_path, capsys):
    assert main(["sites", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"blocks.I.hook_B_bar", "hook_logits"} <= {row["name"] for row in rows}
    main(["doctor", "--json"])
    checks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"torch", "mini"} <= {check["subject"] for check in checks}
    assert all(isinstance(check["good"], bool) for check in checks)
    paper_run.write(tmp_path, {"layer-removal": paper_run.layer_removal()})
    assert main(["compare", str(tmp_path), "--json"]) == 0
    claims = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [claim["verdict"] for claim in claims] == compare.compare(tmp_path)["verdict"].tolist()


def test_strict_is_4_where_a_claim_fails_and_0_where_none_does(tmp_path, capsys):
    table = paper_run.layer_removal()
    paper_run.write(tmp_path, {"layer-removal": table})
    holds = set(compare.compare(tmp_path)["verdict"])
    assert compare.HOLDS in holds
    assert compare.FAILS not in holds
    assert main(["compare", str(tmp_path), "--strict"]) == 0
    worse = table.assign(accuracy=1 - table["accuracy"].astype(float))
    paper_run.write(tmp_path, {"layer-removal": worse})
    assert compare.FAILS in set(compare.compare(tmp_path)["verdict"])
    assert main(["compare", str(tmp_path)]) == 0
    assert main(["compare", str(tmp_path), "--strict"]) == 4
    assert main(["compare", str(tmp_path), "--strict", "--json"]) == 4
    capsys.readouterr()


def test_json_is_one_object_a_finished_experiment_and_quiet_says_nothing_else(
    tiny_mamba_dir, pairs_file, tmp_path, capsys
):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    run = ["run", "layer-removal", "--model", str(tiny_mamba_dir), "--pairs", str(pairs_file), "--out", str(out)]
    assert main([*run, "--json", "--quiet", "--log-file", str(log)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out) == json.loads((out / "layer-removal.json").read_text())
    assert main([*run, "--json", "--resume", "--log-file", str(log)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((out / "layer-removal.json").read_text())
    assert "layer-removal: finished before, kept" in printed.err
    (line,) = [line for line in log.read_text().splitlines() if "finished before, kept" in line]
    assert " INFO ioi_mamba.study.runs: " in line
    assert main([*run, "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("ioi-mamba: ")
    assert main([*run, "--resume", "--log-file", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
