"""The public surface as a new user tries it: what was an error or silently useless before."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

import ioi_mamba as im
from ioi_mamba.circuits.graph import Universe, universe_of

CLEAN = "Then, Kelly, Ivan and Leah went to the office. Kelly and Ivan gave a bone to"
CORRUPTED = "Then, Kelly, Ivan and Mary went to the office. Kelly and Ivan gave a bone to"


@pytest.fixture(scope="module")
def pairs(mini):
    return im.ioi.generate(mini.tokenizer, 4, templates=im.ioi.ALIGNED_TEMPLATES)


@pytest.fixture(scope="module")
def attribution(mini, pairs):
    return im.attribute(mini, pairs, steps=2, parts=True)


@pytest.fixture(scope="module")
def search(mini, pairs):
    return im.acdc(mini, pairs, threshold=0.1, parts=False)


def test_attribution_gives_a_table_circuits_and_a_chart(mini, pairs, attribution):
    assert list(attribution.table.columns) == ["source", "target", "position", "part", "score"]
    lowest = attribution.table.sort_values("score", kind="stable").head(3)
    circuit = attribution.circuit(3)
    assert {(item.source, item.target) for item in circuit.items} == set(
        zip(lowest["source"], lowest["target"], strict=True)
    )
    assert im.evaluate(mini, pairs, circuit)["size"] == 3
    assert len(attribution.ranking("absolute")) == len(attribution.table)
    assert attribution.chart().to_dict()["vconcat"]
    with pytest.raises(im.InputError, match="a circuit has 0 to"):
        attribution.circuit(10_000)


def test_one_row_a_pair_is_ranked_by_its_mean(mini, pairs):
    each = im.attribute(mini, pairs, steps=2, per_pair=True)
    whole = im.attribute(mini, pairs, steps=2)
    assert each.ranking().items[:5] == whole.ranking().items[:5]


def test_a_search_gives_a_table_its_circuit_and_a_chart(mini, pairs, search):
    assert {"kept", "drop"} <= set(search.table)
    assert len(search.circuit()) == int(search.table["kept"].sum())
    scores = [im.evaluate(mini, pairs, each) for each in (search, search.circuit(), search.table)]
    assert scores[0] == scores[1] == scores[2]
    assert search.chart().to_dict()["vconcat"]
    assert im.Circuit.from_frame(search.table, mini) == search.circuit()


@pytest.mark.parametrize(
    "name", ["pairs", "circuit", "attribution", "search", "effect", "mixer", "experiment", "ranking"]
)
def test_what_a_notebook_shows_of_a_thing_is_short_and_says_what_it_is(mini, pairs, attribution, search, name):
    effect = im.effect(mini, pairs, "layer_input", layers=[0, 6], positions=["n1", "out"])
    things = {
        "pairs": pairs,
        "circuit": search.circuit(),
        "attribution": attribution,
        "search": search,
        "effect": effect,
        "mixer": im.mixer(mini, 3),
        "experiment": __import__("ioi_mamba.analyses", fromlist=["x"]).load("layer-ablation"),
        "ranking": attribution.ranking(),
    }
    said = repr(things[name])
    assert len(said.splitlines()) <= 8
    assert len(said) < 900
    assert name in said.lower() or name == "pairs"
    if hasattr(things[name], "_repr_html_"):
        shown = things[name]._repr_html_()
        assert "<table" in shown
        assert "<script" not in shown
    if name in ("attribution", "search", "circuit", "effect"):
        assert "<svg" in shown


def test_pairs_show_their_prompts_with_the_difference_marked_and_escape_them(mini):
    pairs = im.Pairs.from_texts(CLEAN, CORRUPTED, "Leah", "Mary", mini.tokenizer)
    shown = pairs._repr_html_()
    assert shown.count("<mark>") == 2
    assert "<mark> Leah</mark>" in shown
    hostile = pairs.__class__(pairs.clean, pairs.corrupted, pairs.answer, pairs.wrong, texts=(("<b>x", "<b>y"),))
    assert "<b>" not in hostile._repr_html_()


def test_pairs_come_from_texts(mini):
    one = im.Pairs.from_texts(CLEAN, CORRUPTED, " Leah", "Mary", mini.tokenizer)
    assert len(one) == 1
    assert mini.tokenizer.decode([int(one.answer)]).strip() == "Leah"
    assert mini.tokenizer.decode([int(one.clean[0, int(one.roles["n1"])])]).strip() == "Leah"
    two = im.Pairs.from_texts(
        [CLEAN, CORRUPTED],
        [CORRUPTED, CLEAN],
        ["Leah", "Mary"],
        ["Mary", "Leah"],
        mini.tokenizer,
        candidates=[["Kelly", "Ivan"], ["Kelly", "Ivan"]],
        labels={"corruption": ["third", "third"], "kind": ["a", "b"]},
    )
    assert two.choices.shape == (2, 4)
    assert two.labels["kind"] == ("a", "b")
    assert torch.equal(two.clean[0], one.clean[0])
    for wrong, says in (
        ({"answer": ["Leah", "Mary"]}, "answer has 2 texts and clean 1"),
        ({"answer": "Leah Mary"}, "pair 0: ' Leah Mary' is not one token"),
        ({"corrupted": "Then"}, "must be equally long"),
        ({"clean": ""}, "clean is ''; give a text"),
        ({"clean": 3}, "clean is '3'; give a text"),
    ):
        given = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": "Leah", "wrong": "Mary"} | wrong
        with pytest.raises(im.InputError, match=says):
            im.Pairs.from_texts(*given.values(), mini.tokenizer)


def test_a_file_may_have_the_names_of_the_fields(mini, tmp_path):
    row = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": "Leah", "wrong": "Mary"}
    old = {
        "uncorrupted": CLEAN,
        "corrupted": CORRUPTED,
        "answer_uncorrupted": "Leah",
        "answer_corrupted": "Mary",
        "incorrect_for_uncorrupted": ["Kelly"],
        "incorrect_for_corrupted": ["Kelly"],
        "corruption": "given",
    }
    files = {"new": row | {"candidates": ["Kelly"]}, "old": old}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(content))
    new, before = (im.Pairs.from_jsonl(tmp_path / f"{name}.jsonl", mini.tokenizer) for name in files)
    assert new.hash() == before.hash()
    assert new.labels == before.labels
    for content, says in (
        (row | {"uncorrupted": CLEAN}, "mixes two forms: leave out 'uncorrupted'"),
        (row | {"answer_corrupted": "Mary"}, "mixes two forms: leave out 'answer_corrupted'"),
        (row | {"corruption": 3}, "'corruption' is not text"),
        ({key: row[key] for key in ("clean", "answer", "wrong")}, "has no 'corrupted'"),
        (row | {"candidates": "Kelly"}, "'candidates' is not a list"),
        (row | {"answer": 3}, "is not text: 'answer'"),
    ):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(content))
        with pytest.raises(im.InputError, match=f"line 1.*{says}"):
            im.Pairs.from_jsonl(tmp_path / "wrong.jsonl", mini.tokenizer)


def test_twenty_pairs_are_twenty_rows_unless_copies_are_asked_for(mini):
    assert len(im.ioi.generate(mini.tokenizer, 20)) == 20
    assert len(im.ioi.generate(mini.tokenizer, 20, symmetric=True)) == 40


def test_an_effect_is_that_of_a_pass_with_the_value_overwritten(mini, pairs):
    found = im.effect(mini, pairs, "h", layers=-2, positions="n3+1")
    (row,) = found.table.itertuples()
    position = int(pairs.roles["n3+1"][0])
    assert (row.layer, row.position, row.label) == (6, position, "n3+1")
    name = f"blocks.6.hook_h.{position}"
    value = im.read(mini, pairs.corrupted, name)[name]
    rows = torch.arange(len(pairs))
    difference = lambda logits: (lambda last: last[rows, pairs.answer] - last[rows, pairs.wrong])(
        logits[rows, pairs.last]
    )
    clean, corrupted = (difference(im.run(mini, side)) for side in (pairs.clean, pairs.corrupted))
    want = 1 - (difference(im.run(mini, pairs.clean, {name: value})) - corrupted) / (clean - corrupted)
    assert found.per_pair[0, 0].tolist() == pytest.approx(want.tolist(), abs=1e-4)
    assert row.effect == pytest.approx(float(want.mean()), abs=1e-4)
    assert row.low < row.effect < row.high
    for wrong, says in (
        ({"layers": 8}, "layer is 8: give a whole number from 0 to 7"),
        ({"positions": "n9"}, "have no role 'n9'"),
        ({"positions": []}, "No layer or position is given"),
        ({"layers": "all"}, "layer is 'all'"),
        ({"layers": 1.0}, "layer is 1.0"),
        ({"positions": torch.tensor(99)}, "position is 99"),
    ):
        with pytest.raises(im.InputError, match=says):
            im.effect(mini, pairs, "h", **wrong)
    with pytest.raises(im.InputError, match="Unknown hook name"):
        im.effect(mini, pairs, "hidden")


def test_a_name_is_steered_by_name(mini):
    assert im.steer(mini, CLEAN, {"Leah": "Mary"}, max_new_tokens=1) == im.steer(
        mini, CLEAN, {"n3": "Mary"}, max_new_tokens=1
    )
    # A name that is mentioned twice has two slots.
    both = im.steer(mini, CLEAN, {"Kelly": "Leah"}, max_new_tokens=2)
    assert both == im.steer(mini, CLEAN, {"n1": "Leah", "n4": "Leah"}, max_new_tokens=2)
    for names, says in (
        ({"Zed": "Mary"}, "has no name 'Zed'"),
        ({"Leah": "Mary", "n3": "Ivan"}, "n3 is changed twice"),
        ({"Kelly": "Mary", "n4": "Ivan"}, "n4 is changed twice"),
        ({"Leah": 3}, "is no change of a name"),
    ):
        with pytest.raises(im.InputError, match=says):
            im.steer(mini, CLEAN, names)


def test_a_slip_in_a_models_name_is_answered_without_asking_a_hub(monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedConfig, "get_config_dict", lambda *_, **__: asked.append(1))
        with pytest.raises(im.InputError, match="did you mean 'mini'"):
            im.open_model("minni")
    assert not asked
    with pytest.raises(im.InputError, match="did you mean 'state-spaces/mamba-370m-hf'"):
        im.open_model("state-spaces/mamba-370m")


def shape_of_slices(model, tokens):
    with model.trace(tokens, use_cache=False):  # noqa: SIM117
        with im.mixer(model, 3) as m:
            print(m.conv_slice.shape)


def test_the_states_of_a_mixer_are_used_like_a_tensor(mini, tmp_path):
    tokens, name = torch.tensor([[0, 5, 7, 9]]), "blocks.3.hook_h"
    states = im.read(mini, tokens, name)[name]
    with mini.trace(tokens, use_cache=False):  # noqa: SIM117
        with im.mixer(mini, 3) as m:
            kept = m.h.save()
            twice, less, negative = (m.h * 2).save(), (1 - m.h).save(), (-m.h).save()
            more, summed = (m.h + m.h.mean()).save(), m.h.sum(-1).save()
            assert m.h.shape == states.shape
            assert len(m.h) == 1
    want = [states * 2, 1 - states, -states, states + states.mean(), states.sum(-1)]
    for got, wanted in zip([kept, twice, less, negative, more, summed], [states, *want], strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
    with mini.trace(tokens, use_cache=False):
        with im.mixer(mini, 3) as m:
            m.h += 1
        edited = mini.output.logits.save()
    assert torch.allclose(edited, im.run(mini, tokens, {name: states + 1}), atol=1e-4)
    assert {"B_bar", "h", "conv_slice"} <= set(dir(im.mixer(mini, 3)))
    with pytest.raises(im.InputError, match=r"take one slice by its index, such as m.conv_slice\[-1\].shape"):
        shape_of_slices(mini, tokens)


def test_an_error_in_a_trace_is_shown_without_the_models_frames(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import ioi_mamba as im
            model = im.open_model("mini", device="cpu")
            with model.trace([[0, 5, 7]]):
                with im.mixer(model, 3) as m:
                    m.B_bar = m.delta
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    traceback = done.stderr[done.stderr.index("Traceback") :].splitlines()
    assert len(traceback) <= 15
    assert any("m.B_bar = m.delta" in line for line in traceback)
    assert traceback[-1].endswith("the edit has shape (1, 3, 256), the site (1, 3, 256, 8).")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model, pairs: im.attribute(model, pairs.clean), "is no Pairs"),
        (lambda model, pairs: im.attribute(model, CLEAN), "is no Pairs"),
        (lambda model, pairs: im.attribute(model, pairs, method="foo"), "method 'foo' is unknown: did you mean"),
        (lambda model, pairs: im.evaluate(model, pairs, im.Circuit.full(Universe(4))), "graph has 4 layers"),
        (lambda model, pairs: im.evaluate(model, pairs, {}), "is no circuit"),
        (lambda model, pairs: im.Circuit([("embed", "0")], universe_of(model)), "is no Item"),
        (lambda model, pairs: im.read(model, pairs, "blocks.99.hook_h"), "layers 0 to 7"),
        (lambda model, pairs: im.register(3), "is no Experiment"),
    ],
)
def test_wrong_arguments_are_one_sentence(mini, pairs, call, says):
    with pytest.raises(im.InputError, match=says) as caught:
        call(mini, pairs)
    assert "\n" not in str(caught.value)


def test_read_takes_a_text_pairs_an_encoding_and_patterns(mini, pairs):
    encoding = mini.tokenizer(CLEAN, add_special_tokens=False, return_tensors="pt")
    for prompts in (CLEAN, [CLEAN, CORRUPTED], pairs, encoding, pairs.clean):
        values = im.read(mini, prompts, "blocks.*.hook_h.-1")
        assert len(values) == 8
    assert {int(name.rsplit(".", 1)[1]) for name in im.read(mini, pairs, "blocks.*.hook_h.-1")} == {
        pairs.clean.shape[1] - 1
    }
    assert im.run(mini, pairs).shape[0] == len(pairs)
    assert torch.equal(
        im.run(mini, pairs, {"blocks.3.hook_y": 0}), im.run(mini, pairs, {"blocks.3.hook_y": lambda y: y * 0})
    )


@pytest.mark.parametrize("code", ["import ioi_mamba", "import ioi_mamba; ioi_mamba.InputError; dir(ioi_mamba)"])
def test_importing_the_package_does_not_import_torch(code):
    child = f"{code}\nimport sys, time; assert 'torch' not in sys.modules; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_help_and_the_version_do_not_import_torch(flag):
    child = f"""
import sys
from ioi_mamba.cli.main import main
try:
    main([{flag!r}])
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "transformers", "pandas", "altair"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ioi-mamba" in done.stdout


def test_every_public_name_is_where_the_package_says(monkeypatch):
    source = Path(im.__file__).read_text()
    for name in im.__all__:
        assert getattr(im, name) is not None
        assert name in dir(im)
        # What type checkers read is what Python does.
        home = "ioi_mamba." + im._HOMES[name]
        assert any(
            line.startswith(f"    from {home} import") and name in line.replace(",", " ").split()
            for line in source.splitlines()
        )
    assert set(im._HOMES) == set(im.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        im.nothing  # noqa: B018


USER = """
import ioi_mamba as im
import pandas as pd

model = im.open_model("mini")
pairs = im.ioi.generate(model.tokenizer, 20)
with model.trace(pairs.clean):
    with im.mixer(model, 3) as m:
        m.B_bar[:, 4] = 0
        m.h[:, 7] *= 0.5
        m.h += 1
        kept = m.y.save()
found = im.attribute(model, pairs, method="eap")
table: pd.DataFrame = found.table
circuit: im.Circuit = found.circuit(10)
size: int = len(im.acdc(model, pairs).circuit())
effect = im.effect(model, pairs, "h", layers=3, positions=["n3"])
scores: dict[str, float] = im.evaluate(model, pairs, circuit)
text: str = im.steer(model, "a", {"Leah": "Mary"})
"""
WRONG = {
    'im.attribute(model, pairs, method="foo")': "method",
    "im.attribute(model, pairs, variant='foo')": "variant",
    "number: int = found.circuit(3)": "Circuit",
    "found.nothing": "nothing",
    "im.nothing": "nothing",
}


@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_a_users_file_is_judged_right_by_type_checkers(tmp_path, checker):
    pytest.importorskip(checker)
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(USER)
    bad.write_text(USER + "\n".join(WRONG))
    command = [sys.executable, "-m", checker]
    options = {
        "mypy": ["--ignore-missing-imports", "--follow-imports=silent", "--no-error-summary"],
        "pyright": ["--pythonpath", sys.executable],
    }[checker]
    fine, wrong = (
        subprocess.run([*command, *options, str(path)], capture_output=True, text=True, cwd=tmp_path)
        for path in (good, bad)
    )
    assert fine.returncode == 0, fine.stdout
    first = len(USER.splitlines()) + 1
    for k, word in enumerate(WRONG.values()):
        told = [line for line in wrong.stdout.splitlines() if f"bad.py:{first + k}:" in line]
        assert told, (first + k, word, wrong.stdout)
