"""Every block of code in README.md and docs/ runs, and gives what its page says of it."""

import importlib.util
import json
import re
import shlex
import tomllib
from functools import partial

import pytest
import torch
from pages import DOCS, PAGES, ROOT, blocks_of, commands_of, left_by

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.cli.main import app
from ioi_mamba.study.settings import read_study
from ioi_mamba.tasks.prompts import NAME_LIST_KEYS, PLAIN_KEYS, TEXT_KEYS

LANGUAGES = {"python", "json", "yaml", "toml", "bash"}
WITH_CODE = [page for page in PAGES if blocks_of(page, "python")]
OTHERS = {"pip", "ray", "for", "done"}
"""Commands that are not ours, and words of the shell."""


@pytest.fixture
def left(tmp_path_factory):
    """What the blocks of a page leave."""
    return partial(left_by, tmp_path_factory)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, left):
    assert len(left(page)) == len(blocks_of(page, "python"))


def test_few_blocks_are_not_run_and_each_says_why():
    why = [block.why for page in PAGES for block in blocks_of(page, "python") if block.why is not None]
    assert len(why) == 5
    assert all(re.search("server|Ray|outline", each) for each in why)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_is_not_run_is_python_and_names_what_there_is(page):
    for block in blocks_of(page, "python"):
        compile(block.text.replace("...ndif_server.url...", "ndif_server.url"), str(page), "exec")
        for name in re.findall(r"\bim\.([a-z_]+)", block.text):
            assert hasattr(im, name), name


def test_every_block_has_a_language_that_is_tested():
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= LANGUAGES, page.name
        assert set(fences[1::2]) <= {""}, page.name


def test_data_in_pages_is_read(tmp_path):
    for page in PAGES:
        for block in blocks_of(page, "json"):
            json.loads(block.text)
        for block in blocks_of(page, "toml"):
            points = tomllib.loads(block.text)["project"]["entry-points"]
            assert set(points) <= {"ioi_mamba.tasks", "ioi_mamba.experiments"}
        for block in blocks_of(page, "yaml"):
            (tmp_path / "study.yaml").write_text(block.text)
            assert read_study(tmp_path / "study.yaml", {}).cells


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_commands_of_a_page_are_ones_that_there_are(page):
    for line in commands_of(page):
        if re.search(r"\[\S|\|", line):  # the outline of a command: what may be left out in brackets, choices by a bar
            continue
        for command in line.split("&&"):
            _check(shlex.split(command, comments=True))


def _check(words):
    own = [k for k, word in enumerate(words) if word.rsplit("/", 1)[-1] == "ioi-mamba"]
    if own:
        _, bound, _ = app.parse_args(words[own[0] + 1 :], exit_on_error=False, print_error=False)
        for name in bound.arguments.get("experiments", ()):
            assert name == "all" or name in analyses.available() or "." in name, name
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "pytest":
        assert (ROOT / words[1]).exists(), words
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), words
    else:
        assert words[0] in OTHERS, words


def test_the_ten_lines_of_the_readme(left):
    (names,) = left(ROOT / "README.md")
    stock = im.run(names["model"], names["pairs"].clean, {})
    assert names["edited"].shape == names["logits"].shape == stock.shape
    assert not torch.allclose(names["logits"], stock)
    assert not torch.allclose(names["edited"], stock)
    assert torch.allclose(names["edited"][:, :4], stock[:, :4], atol=1e-4)
    assert {"source", "target", "part", "score"} <= set(names["scores"].table)
    assert len(names["circuit"]) == 10


def test_the_lines_on_a_finished_run(left):
    (names,) = left(DOCS / "cli.md")
    assert names["result"].findings()
    assert len(names["result"].to_frame()) == names["result"].table.shape[0] > 0


def test_an_invoke_without_an_edit_is_plain(left):
    names = left(DOCS / "traces.md")[-1]
    assert (names["edited"] - names["plain"][:1]).abs().max() > 1e-3


def test_the_prompts_of_the_page_are_read(left, tmp_path):
    (names,) = left(DOCS / "own-prompts.md")
    assert len(names["pairs"]) == 1
    (tmp_path / "mine.jsonl").write_text(json.dumps(json.loads(blocks_of(DOCS / "own-prompts.md", "json")[0].text)))
    pairs = im.Pairs.from_jsonl(tmp_path / "mine.jsonl", names["model"].tokenizer)
    assert pairs.position_labels().count("n3") == 1
    page = (DOCS / "own-prompts.md").read_text(encoding="utf-8")
    for key in (*PLAIN_KEYS, "candidates", *TEXT_KEYS, *NAME_LIST_KEYS):
        assert f"`{key}`" in page


def test_patching_by_flow_changes_the_answer_and_the_matrix_has_every_position(left):
    first, names = left(DOCS / "families.md")
    n_positions = names["pairs"].clean.shape[1]
    assert first["M"].shape[2:] == (n_positions, n_positions)
    assert not torch.allclose(names["logits"], im.run(names["model"], names["pairs"].clean))
    assert set(names["table"]["layer"]) == {3}


def test_an_edit_of_those_who_come_from_transformerlens_is_seen_behind_it_alone(left):
    names = left(DOCS / "from-transformerlens.md")[-1]
    stock = im.run(names["model"], names["pairs"].clean)
    difference = (names["logits"] - stock).abs().amax((0, 2))
    assert difference[7:].min() > 1e-4 > difference[:7].max()
    assert len(names["patched"].table) == 2 * names["model"].config.num_hidden_layers


def test_a_trace_of_those_who_come_from_nnsight_changes_what_follows(left):
    names = left(DOCS / "from-nnsight.md")[-1]
    difference = (names["logits"] - im.run(names["model"], names["tokens"])).abs().amax((0, 2))
    assert difference[3:].min() > 1e-4 > difference[:3].max()
    assert names["written"].shape[-1] == names["model"].config.state_size
    assert not names["written"].any()


def test_those_who_come_from_mambalens_read_and_write_by_its_names(left):
    names = left(DOCS / "from-mambalens.md")[-1]
    stock = im.run(names["model"], names["tokens"])
    assert torch.equal(names["values"]["blocks.3.hook_h"][:, 7], names["values"]["blocks.3.hook_h.7"])
    assert torch.allclose(names["logits"][:, :7], stock[:, :7], atol=1e-4)
    assert not torch.allclose(names["logits"], stock)
    assert len(names["circuit"]) == 10
    assert 0 <= float(names["scores"]["accuracy"]) <= 1
