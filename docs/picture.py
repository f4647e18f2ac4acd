"""Draws the README's picture, the figure at the top of a report of `mini`: `python docs/picture.py` (a few minutes)."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import ioi_mamba as im
from ioi_mamba.report.pages import hero_svg
from ioi_mamba.study.runs import run_study

EXPERIMENTS = ("layer-ablation", "conv-shift", "state-ablation", "output-ablation", "positional-attribution")


def draw(n_pairs: int, path: Path, experiments: Sequence[str] = EXPERIMENTS) -> None:
    """Run the experiments that tell something of the figure, on so many pairs each, and write it as SVG, black on white."""
    with TemporaryDirectory() as out:
        run_study(im.open_model("mini", device="cpu"), experiments, out, n_pairs=n_pairs)
        figure = hero_svg(out)
    assert figure is not None
    path.write_text(figure, encoding="utf-8")


if __name__ == "__main__":
    draw(20, Path(__file__).parent / "story-of-mini.svg")
