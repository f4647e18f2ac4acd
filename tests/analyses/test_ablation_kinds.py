"""ablation-kinds against passes in which a layer's value is written by hand; and what a page says of the kind of a run."""

import json

import conftest  # noqa: F401  sets the environment before transformers is imported
import golden
import pytest
import torch
from conditioning import effect_rounding
from families.tiny import model_of, pairs_of

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.cli import main
from ioi_mamba.passes.metrics import logit_diff
from ioi_mamba.tasks import ioi


@pytest.fixture(scope="module")
def mini():
    return im.open_model("mini", device="cpu")


def test_a_cell_is_the_effect_of_writing_a_layers_value_everywhere():
    model, pairs = golden.model(), golden.golden_pairs()
    table = analyses.load("ablation-kinds")(model, pairs).set_index(["ablation", "side", "node"])["effect"]
    assert "mean-by-role" not in table.index.get_level_values("ablation")  # these prompts have no roles
    ends = [
        logit_diff(im.run(model, side, {})[torch.arange(5), pairs.last], pairs.answer, pairs.wrong)
        for side in (pairs.clean, pairs.corrupted)
    ]
    for side, site in (("output", "out_proj"), ("input", "layer_input")):
        name = f"blocks.2.hook_{site}"
        values = {
            kind: im.read(model, tokens, name)[name]
            for kind, tokens in (("mean", pairs.clean), ("resample", pairs.corrupted))
        }
        values["mean"] = values["mean"].mean(0, keepdim=True).expand_as(values["mean"])
        values["zero"] = torch.zeros_like(values["mean"])
        for kind, value in values.items():
            logits = im.run(model, pairs.clean, {name: value})[torch.arange(5), pairs.last]
            moved = (ends[0] - logit_diff(logits, pairs.answer, pairs.wrong)) / (ends[0] - ends[1])
            assert table[kind, side, "2"] == pytest.approx(float(moved.mean()), abs=effect_rounding(model, pairs))


def test_it_runs_and_is_drawn_for_every_layout_of_blocks_and_all_templates(mini):
    experiment = analyses.load("ablation-kinds")
    for model, given in ((model_of("zamba"), pairs_of()), (mini, ioi.generate(mini.tokenizer, 4, 3))):
        table = experiment(model, given)
        assert experiment.findings(table)
        experiment.chart(table).to_dict()
    assert set(table["ablation"]) == {"resample", "mean", "mean-by-role", "zero", "noise"}


def test_the_page_and_the_manifest_say_what_was_written_and_a_kind_that_flows_lack_ends_with_2(tmp_path, capsys):
    arguments = ["--n-pairs", "1", "--out", str(tmp_path)]
    assert main.main(["run", "output-ablation", *arguments, "--option", "ablation=zero"]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "at one position is replaced by zeros." in page
    assert "Effect of zero ablation of out_proj" in page
    assert json.loads((tmp_path / "output-ablation.json").read_text())["options"] == {"ablation": "zero"}
    capsys.readouterr()
    assert main.main(["run", "token-flow", *arguments, "--option", "ablation=mean"]) == 2
    assert "ablation takes one of resample, zero." in capsys.readouterr().err
    assert not (tmp_path / "token-flow.parquet").exists()
