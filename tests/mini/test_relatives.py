"""The small trained relatives of `mini`: they do the task, and every experiment that can be done on them is."""

import pytest
import torch
from markupsafe import escape

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.cli.main import main
from ioi_mamba.experiments.needs import limits_of_model
from ioi_mamba.files import EMBEDDED
from ioi_mamba.model.families import attends
from ioi_mamba.passes.metrics import accuracy
from ioi_mamba.study.runs import run_study
from ioi_mamba.tasks import ioi

RELATIVES = [name for name in EMBEDDED if name != "mini"]


@pytest.fixture(scope="module", params=RELATIVES)
def relative(request):
    return request.param, im.open_model(request.param, device="cpu")


def test_it_answers_prompts_that_it_has_not_read(relative):
    _, model = relative
    pairs = ioi.generate(model.tokenizer, 40, 28, symmetric=True)
    logits = im.run(model, pairs.clean, own_scan=True)[torch.arange(len(pairs)), pairs.last]
    assert accuracy(logits, pairs.answer, pairs.candidates).float().mean() >= 0.99


def test_its_card_says_what_it_is(relative):
    name, model = relative
    card = (EMBEDDED[name] / "README.md").read_text()
    assert model.config.model_type in card
    assert "no\nfigure of it is one of a published model" in card
    assert EMBEDDED[name].joinpath("model.safetensors").stat().st_size <= 3_000_000


def test_all_of_the_paper_runs_on_it_but_what_says_that_it_cannot(relative, tmp_path):
    name, model = relative
    experiments = [analyses.load(each) for each in analyses.ORDER]
    left = [experiment for experiment in experiments if experiment.unavailable(model) is None]
    assert len(experiments) - len(left) == (1 if attends(model) else 0)
    for experiment in experiments:
        if experiment not in left:
            with pytest.raises(im.InputError, match="cannot be done on this Bamba"):
                run_study(model, [experiment], tmp_path, n_pairs=2, progress=False)
    options = {"compare_prompts": 2, "part_prompts": 4, "exact_prompts": 2}
    page = run_study(model, left, tmp_path, n_pairs=4, options=options, model_id=name, progress=False)
    text = page.read_text()
    for experiment in left:
        assert f'id="{experiment.name}"' in text
    assert f"These are figures of {name}," in text
    limits = limits_of_model(model)
    assert all(str(escape(each)) in text for limit in limits for each in limit)
    assert bool(limits)
    assert ("cross-talk" in dict(limits)) == attends(model)


def test_an_experiment_that_it_cannot_do_says_so_outside_of_a_run_and_the_doctor_before_one(capsys):
    model = im.open_model("mini-hybrid", device="cpu")
    with pytest.raises(im.InputError, match="cross-talk cannot be done on this Bamba: it gives layers back"):
        analyses.load("cross-talk")(model, ioi.generate(model.tokenizer, 2, 3))
    assert main(["doctor", "--model", "mini-hybrid"]) == 0
    assert "limit              cross-talk: it gives layers back" in capsys.readouterr().out
