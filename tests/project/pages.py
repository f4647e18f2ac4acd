"""The code of the pages of README.md and docs/: found, and run block by block."""

import contextlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import paper_run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?:    [^\n]*\n|\n(?=    ))+")


class Block(NamedTuple):
    """A block of code of a page. why: it is not run, in words of the page, or None."""

    language: str
    text: str
    why: str | None


def blocks_of(page, language):
    """The blocks of a page that are marked as of a language."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], found["why"])
        for found in FENCED.finditer(text)
        if found["language"] == language
    ]


def commands_of(page):
    """The lines of a page's indented blocks and of those marked as bash, a line a command."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    blocks = [found[0] for found in INDENTED.finditer(text)] + [block.text for block in blocks_of(page, "bash")]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def _run_of_the_published_numbers(folder):
    paper_run.write(folder / "DIR", {"layer-ablation": paper_run.layer_ablation()})


def _pairs_of_the_page(folder):
    (block,) = blocks_of(DOCS / "own-prompts.md", "json")
    (folder / "mine.jsonl").write_text(json.dumps(json.loads(block.text)))


BEFORE = {"cli.md": _run_of_the_published_numbers, "own-prompts.md": _pairs_of_the_page}
"""What must be there before a page's code runs: the files that its text speaks of."""


_LEFT = {}


def left_by(tmp_path_factory, page):
    """The names that each block of a page leaves, a dict a block; a page is run once a session."""
    if page not in _LEFT:
        _LEFT[page] = _run(page, tmp_path_factory.mktemp(page.stem))
    return _LEFT[page]


def _run(page, folder):
    """Run a page's blocks of Python one after the other, in a folder."""
    BEFORE.get(page.name, lambda folder: None)(folder)
    names, left = {"__name__": page.stem}, []
    for number, block in enumerate(blocks_of(page, "python")):
        if block.why is None:
            # nnsight reads the source of a traced block, so it must be in a file.
            path = folder / f"{page.stem.replace('-', '_')}_{number}.py"
            path.write_text(block.text)
            with contextlib.chdir(folder):
                exec(compile(block.text, str(path), "exec"), names)
        left.append(dict(names))
    return left
