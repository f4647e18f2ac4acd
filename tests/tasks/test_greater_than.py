"""Greater-than: its pairs, its measure against a slow one, every experiment on it, and what is said where it fails."""

import inspect
import json

import pandas as pd
import pytest
import torch
from conftest import save_mamba
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ioi_mamba as im
from ioi_mamba import analyses, tasks
from ioi_mamba.analyses import conv_shift
from ioi_mamba.claims import compare
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.needs import Need
from ioi_mamba.report import pages
from ioi_mamba.results import baseline
from ioi_mamba.results.baseline import clean_means
from ioi_mamba.results.stored import read_manifest
from ioi_mamba.study import runs
from ioi_mamba.tasks import greater_than as task


def tokenizer_of(endings):
    """A tokenizer that knows the prompts' words, the centuries and `endings`."""
    words = ["The", " lasted", " from", " the", " year", " to"]
    words += [f" {noun}" for noun in task.NOUNS] + [f" {century}" for century in task.CENTURIES] + list(endings)
    vocabulary = {word: index for index, word in enumerate(["<end>", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<end>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", unk_token="<end>")


@pytest.fixture(scope="module")
def whole_years():
    return tokenizer_of(task.YEARS)


@pytest.fixture(scope="module")
def digits():
    return tokenizer_of("0123456789")


@pytest.fixture(scope="module")
def knows_years(tmp_path_factory, whole_years):
    """A random Mamba whose vocabulary has the prompts' words and the years."""
    path = tmp_path_factory.mktemp("years")
    save_mamba(path, vocab_size=len(whole_years), n_layers=3)
    whole_years.save_pretrained(path)
    return im.open_model(str(path), device="cpu")


def shown_years(pairs):
    return [int(clean.split(" to the year")[0][-2:]) for clean, _ in pairs.texts]


def test_answers_are_above_the_year_and_wrong_answers_between_01_and_it(whole_years):
    pairs = task.generate(whole_years, 300, 27)
    words = whole_years.convert_ids_to_tokens
    for year, answer, wrong in zip(shown_years(pairs), words(pairs.answer), words(pairs.wrong), strict=True):
        assert 1 < int(wrong) < year < int(answer) <= 99
    assert len(set(shown_years(pairs))) > 80
    assert len({clean.split()[1] for clean, _ in pairs.texts}) == len(task.NOUNS)


def test_with_single_digits_the_tens_are_asked(digits):
    pairs = task.generate(digits, 100, 27)
    words = digits.convert_ids_to_tokens
    for year, answer, wrong in zip(shown_years(pairs), words(pairs.answer), words(pairs.wrong), strict=True):
        assert 0 < int(wrong) < year // 10 < int(answer) <= 9
    assert "year+1" in pairs.roles


@pytest.mark.parametrize("which", ["whole_years", "digits"])
def test_the_prompts_of_a_pair_differ_in_the_year_alone(which, request):
    pairs = task.generate(request.getfixturevalue(which), 40, 3)
    width = 1 + ("year+1" in pairs.roles)
    differs = pairs.clean != pairs.corrupted
    begin = int(pairs.roles["year"][0])
    assert differs[:, begin].all() or which == "digits"
    assert not differs[:, :begin].any()
    assert not differs[:, begin + width :].any()
    assert (pairs.last == pairs.roles["out"]).all()
    assert len(pairs.layouts()) == 1


def test_roles_stand_at_their_words(whole_years):
    pairs = task.generate(whole_years, 10, 1)
    for row, (clean, _) in enumerate(pairs.texts):
        at = {role: whole_years.convert_ids_to_tokens(int(pairs.clean[row, i[row]])) for role, i in pairs.roles.items()}
        words = clean.split()
        assert (at["noun"], at["century"], at["year"], at["out"]) == (
            f" {words[1]}",
            f" {words[6][:2]}",
            words[6][2:],
            f" {words[-1]}",
        )


def test_a_seed_gives_the_same_pairs_and_leaves_the_global_generators_alone(whole_years):
    before = torch.random.get_rng_state()
    assert task.generate(whole_years, 20, 5).hash() == task.generate(whole_years, 20, 5).hash()
    assert task.generate(whole_years, 20, 5).hash() != task.generate(whole_years, 20, 6).hash()
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_tokenizer_that_does_not_cut_years_is_refused(tiny_mamba):
    with pytest.raises(InputError, match="does not cut years"):
        task.generate(tokenizer_of([*task.YEARS, *(f" {c}{y}" for c in task.CENTURIES for y in task.YEARS)]), 4, 0)
    with pytest.raises(InputError, match="n_pairs"):
        task.generate(tiny_mamba.tokenizer, 0, 0)


def test_a_year_written_in_another_way_than_most_takes_no_part(whole_years):
    odd = tokenizer_of([year for year in task.YEARS if year not in ("32", "77")] + [*"0123456789"])
    pairs = task.generate(odd, 400, 0)
    tokens = task.year_tokens(odd)
    assert [year for year in range(100) if tokens[year] < 0] == [32, 77]
    assert not {32, 77} & set(shown_years(pairs))
    words = odd.convert_ids_to_tokens([*pairs.answer.tolist(), *pairs.wrong.tolist()])
    assert all(len(word) == 2 for word in words)
    assert not {"32", "77"} & set(words)
    assert task.probability_difference(torch.zeros(400, len(odd)), pairs, tokens).abs().max() < 1


def test_the_probability_difference_is_the_one_counted_year_by_year(whole_years):
    pairs = task.generate(whole_years, 12, 27)
    logits = torch.randn(2, 12, len(whole_years), generator=torch.Generator().manual_seed(0))
    found = task.probability_difference(logits, pairs, task.year_tokens(whole_years))
    probabilities = logits.softmax(-1)
    for k in range(2):
        for row, own in enumerate(shown_years(pairs)):
            expected = 0.0
            for year in range(100):
                token = whole_years.convert_tokens_to_ids(f"{year:02d}")
                expected += float(probabilities[k, row, token]) * (1 if year > own else -1)
            assert found[k, row] == pytest.approx(expected, abs=1e-6)


def test_a_model_that_always_goes_on_with_99_has_probability_difference_1(whole_years):
    pairs = task.generate(whole_years, 12, 27)
    logits = torch.zeros(12, len(whole_years))
    logits[:, whole_years.convert_tokens_to_ids("99")] = 100.0
    assert task.probability_difference(logits, pairs, task.year_tokens(whole_years)).min() > 0.999


def test_measures_agree_with_stock_logits(knows_years):
    pairs = task.generate(knows_years.tokenizer, 10, 27)
    logits = im.run(knows_years, pairs.clean, {})[torch.arange(10), pairs.last]
    expected = task.probability_difference(logits, pairs, task.year_tokens(knows_years.tokenizer)).mean()
    measured = clean_means(knows_years, pairs, task.measures)["probability difference"]
    assert measured == pytest.approx(float(expected), abs=1e-6)


def test_every_experiment_that_needs_no_names_runs_on_it(knows_years, tmp_path):
    names = [name for name in analyses.available() if Need.NAMES not in analyses.load(name).needs]
    options = {"target": 0.0}
    page = runs.run_study(knows_years, names, tmp_path, task="greater-than", n_pairs=6, options=options, progress=False)
    text = page.read_text()
    assert set(names) == set(analyses.available()) - {"name-steering"}
    for name in names:
        manifest = read_manifest(tmp_path / f"{name}.json")
        assert manifest["task"] == "greater-than"
        assert manifest["clean"]["n"] == manifest["n_pairs"]
        assert -1 <= manifest["clean"]["probability difference"] <= 1
        # A random model guesses: its page has the numbers, and charts only of what its answers do not decide.
        assert (f'data-chart="{name}-chart"' in text) == (name == "state-similarity")
        assert f"rows of <code>{name}.parquet</code>" in text
        assert pages.chart_spec(analyses.load(name).chart(pd.read_parquet(tmp_path / f"{name}.parquet")))
    assert "could not be drawn" not in text.split("<main")[1].split("</main>")[0]
    assert task.TASK.title in text
    assert 'id="claims"' not in text
    verdicts = compare.compare(tmp_path)["verdict"]
    assert not set(verdicts) & {compare.HOLDS, compare.FAILS}


def test_names_and_other_tasks_tables_are_refused(knows_years, tmp_path):
    with pytest.raises(InputError, match="about names"):
        runs.run_study(knows_years, ["name-steering"], tmp_path, task="greater-than", n_pairs=4, progress=False)
    assert not list(tmp_path.iterdir())
    runs.run_study(knows_years, ["layer-removal"], tmp_path, task="greater-than", n_pairs=4, progress=False)
    ioi_pairs = task.generate(knows_years.tokenizer, 4, 1)
    with pytest.raises(InputError, match="has the task greater-than, and this run has the task ioi"):
        runs.run_study(knows_years, ["layer-ablation"], tmp_path, pairs=ioi_pairs, progress=False)


def test_the_bottleneck_is_looked_for_on_the_pairs_given(knows_years):
    """The random model has no names, so that looking on IOI prompts would fail."""
    pairs = task.generate(knows_years.tokenizer, 4, 27)
    table = conv_shift.EXPERIMENT(knows_years, pairs)
    assert table["layer"].between(1, 2).all()


def test_the_accuracy_of_the_whole_model_is_that_of_its_stock_logits(knows_years, tiny_gpt2_dir):
    pairs = task.generate(knows_years.tokenizer, 30, 27)
    logits = im.run(knows_years, pairs.clean, {})[torch.arange(30), pairs.last]
    rows = torch.arange(30)
    right = (logits[rows, pairs.answer] >= logits[rows, pairs.wrong]).float().mean()
    (found,) = baseline.clean_accuracies(knows_years, [pairs])
    assert found == {
        "accuracy": pytest.approx(float(right)),
        "n": 30,
        "guessing": 0.5,
        "bound": 0.75,
        "bound_given": False,
    }
    gpt2 = im.open_model(str(tiny_gpt2_dir), device="cpu", any_architecture=True)
    other = im.Pairs.from_tokens([[0, 3, 4], [0, 5, 6]], [[0, 3, 7], [0, 5, 8]], [9, 10], [11, 12])
    assert baseline.clean_accuracies(gpt2, [other])[0]["n"] == 2


def test_of_many_pairs_200_spread_over_all_are_measured(mini):
    pairs = im.ioi.generate(mini.tokenizer, 250, 28, symmetric=True)
    (found,) = baseline.clean_accuracies(mini, [pairs])
    assert found["n"] == 167  # every third of 500
    assert found["accuracy"] == 1.0


def test_a_model_that_cannot_do_the_task_gets_a_loud_note(mini, tmp_path):
    code = main(
        ["run", "layer-removal", "--task", "greater-than", "--n-pairs", "8", "--device", "cpu", "--out", str(tmp_path)]
    )
    manifest = json.loads((tmp_path / "layer-removal.json").read_text())
    assert code == 0
    assert baseline.is_below(manifest)
    page = (tmp_path / "index.html").read_text()
    assert page.count("mini cannot do this task") == 1  # at the top; no chart is drawn below
    runs.run_study(mini, ["layer-removal"], tmp_path / "ioi", n_pairs=4, progress=False)
    assert "cannot do this task" not in (tmp_path / "ioi" / "index.html").read_text()


def test_the_command_line_refuses_what_does_not_go_together(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("{}\n")
    for argv, said in (
        (["run", "layer-removal", "--task", "greater-then"], "did you mean 'greater-than'"),
        (
            ["run", "layer-removal", "--task", "greater-than", "--pairs", str(tmp_path / "p.jsonl")],
            "give one of the two",
        ),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err


def test_compare_without_a_directory_takes_the_newest_run(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare"]) == 2
    assert "no run under reports/" in capsys.readouterr().err
    for name in ("old", "new"):
        runs.run_study(mini, ["layer-removal"], tmp_path / "reports" / name, n_pairs=2, progress=False)
    assert main(["compare"]) == 0
    assert capsys.readouterr().out.startswith("reports/new\n")
    assert (tmp_path / "reports" / "new" / "compare.parquet").is_file()
    assert not (tmp_path / "reports" / "old" / "compare.parquet").exists()


def test_a_task_offers_what_is_asked_of_one():
    for name in tasks.available():
        record = tasks.load(name)
        assert name == record.name
        assert record.title
        assert record.varies
        assert list(inspect.signature(record.generate).parameters)[:3] == ["tokenizer", "n_pairs", "seed"]
        assert record.default_pairs > 0


@pytest.mark.remote
def test_on_a_server_in_a_sandbox_it_gives_what_it_gives_here(sandboxed_ndif_server, mini, tmp_path):
    there = im.open_model("mini", backend="ndif", host=sandboxed_ndif_server.url)
    pairs = task.generate(mini.tokenizer, 6, 27)
    assert baseline.clean_accuracies(there, [pairs]) == baseline.clean_accuracies(mini, [pairs])
    assert task.measures(there, pairs) == pytest.approx(task.measures(mini, pairs), abs=1e-7)
    runs.run_study(there, ["layer-removal"], tmp_path, task="greater-than", n_pairs=6, progress=False)
    assert read_manifest(tmp_path / "layer-removal.json")["requests"]["count"] == 1
