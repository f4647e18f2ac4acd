"""What the documentation says is so: docstrings run, tables are those of the code, the site builds without a warning."""

import doctest
import importlib
import pkgutil
import re

import pytest
from pages import DOCS, PAGES, ROOT

import ioi_mamba
import ioi_mamba.paper
from ioi_mamba import analyses


def modules():
    for package in (ioi_mamba, analyses):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def test_the_examples_in_docstrings_give_what_they_say():
    results = [doctest.testmod(module) for module in modules()]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        generated = page.parent == DOCS and re.match(r"(tutorial\.md|notebooks/.*|sample-report/index\.html)$", target)
        assert generated or (page.parent / target).exists(), target


def test_the_readme_counts_the_claims_as_they_are():
    text, claims = (ROOT / "README.md").read_text(encoding="utf-8"), ioi_mamba.paper.table("claims")
    assert f"{(claims['analysis'] != '').sum()} of its {len(claims)} claims measured" in text
    command_line = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert f"against the paper: {len(claims)} claims" in command_line
    assert len(text.splitlines()) <= 100
    assert f"all {['ten', 'eleven', 'twelve'][len(analyses.PAPERS) - 10]} experiments" in text


def test_every_command_and_experiment_is_on_the_page_of_the_command_line():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name in analyses.available():
        assert f"| {name} |" in text
    from ioi_mamba.cli.main import COMMANDS

    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text), command


def test_the_picture_is_one_that_the_code_draws_and_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import picture

    picture.draw(2, tmp_path / "drawn.svg", picture.EXPERIMENTS[:1])
    kept, drawn = (
        (folder / name).read_text() for folder, name in ((DOCS, "story-of-mini.svg"), (tmp_path, "drawn.svg"))
    )
    for svg in (kept, drawn):
        assert "mini, not a published model" in svg
        assert 'class="mark reads"' in svg
    assert re.sub(r"[-\d.]+", "", kept)[:400] == re.sub(r"[-\d.]+", "", drawn)[:400]
    assert len(kept) < 200_000


def test_the_picture_of_the_rooms_is_of_the_code_and_no_import_goes_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import architecture

    architecture.draw(tmp_path / "drawn.svg")
    kept, drawn = (
        (folder / name).read_text() for folder, name in ((DOCS, "architecture.svg"), (tmp_path, "drawn.svg"))
    )
    rooms = r'font-weight="600">(\w+)<'
    assert re.findall(rooms, kept) == re.findall(rooms, drawn)
    assert {"model", "passes", "circuits", "analyses"} <= set(re.findall(rooms, drawn))
    assert architecture.upward(architecture.imports()[1]) == 0


def test_links_of_the_pages_for_contributors_lead_somewhere():
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(((?!https?:)[^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
