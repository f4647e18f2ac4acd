"""Draws the README's picture, two panels of the layer-ablation chart of `mini`: `python docs/picture.py`."""

from pathlib import Path

import ioi_mamba as im
from ioi_mamba.analyses import layer_ablation

CORRUPTIONS = (im.ioi.CORRUPTIONS[0], im.ioi.CORRUPTIONS[3])


def draw(n_pairs: int, path: Path) -> None:
    """Run the experiment on `n_pairs` pairs a corruption and write its chart as SVG, black on white."""
    model = im.open_model("mini", device="cpu")
    sets = [
        im.ioi.generate(
            model.tokenizer, n_pairs, 27, templates=im.ioi.ALIGNED_TEMPLATES, corruptions=[corruption], symmetric=True
        )
        for corruption in CORRUPTIONS
    ]
    table = layer_ablation.EXPERIMENT(model, im.Pairs.concat(sets))
    chart = layer_ablation.chart(table).properties(
        title="mini (not mamba-370m): effect of resampling one layer's input at one position"
    )
    chart.configure(background="white").save(path)


if __name__ == "__main__":
    draw(20, Path(__file__).parent / "layer-ablation-of-mini.svg")
