"""Tables of several runs in one directory: never one page, never replaced by the way, always said in words."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, save_mamba

import ioi_mamba as im
from ioi_mamba.analyses import layer_removal
from ioi_mamba.claims import compare
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.model.opening import _token_ids_tokenizer
from ioi_mamba.report import pages
from ioi_mamba.results.origin import difference
from ioi_mamba.study import runs
from ioi_mamba.tasks.base import Pairs

NAMES = ("layer-removal", "conv-shift")


def pairs(first=1, n_pairs=4):
    tokens = torch.arange(first, first + 5 * n_pairs).reshape(n_pairs, 5) % VOCAB
    answer = torch.arange(n_pairs)
    return Pairs(clean=tokens, corrupted=tokens.flip(1), answer=answer, wrong=answer + 7)


@pytest.fixture(scope="module")
def other_mamba(tmp_path_factory):
    path = tmp_path_factory.mktemp("other-mamba")
    save_mamba(path, vocab_size=VOCAB, n_layers=3)
    _token_ids_tokenizer(VOCAB).save_pretrained(path)
    return im.open_model(str(path), device="cpu")


def run(model, out, names=("layer-removal",), **changes):
    arguments = {"pairs": pairs(), "held_out": pairs(7), "options": {"steps": 1}} | changes
    arguments["options"] = {key: value for key, value in arguments["options"].items() if key != "steps"} | (
        {"steps": 1} if "layer-removal" in names else {}
    )
    return runs.run_study(model, names, out, progress=False, **arguments)


WAYS = {
    "weights": (lambda other, tiny_dir: other, {}, "weights"),
    "a dtype": (lambda other, tiny_dir: im.open_model(tiny_dir, device="cpu", dtype="bfloat16"), {}, "weights"),
    "a seed": (None, {"seed": 5}, "the seed 27"),
    "prompts": (None, {"pairs": pairs(3)}, "given prompts"),
    "held-out prompts": (None, {"held_out": pairs(9)}, "held-out: given prompts"),
    "drawn prompts": (None, {"pairs": None, "held_out": None, "n_pairs": 4}, "drawn prompts"),
    "an option": (None, {"names": ("state-similarity",), "options": {"layer": 1}}, "layer="),
    "a task": (None, {"task": "other"}, "the task ioi"),
}


@pytest.fixture
def draws(monkeypatch):
    """conv-shift with prompts that this model's tokenizer knows, and a task of its own."""
    from ioi_mamba.analyses import conv_shift

    drawn = lambda tokenizer, n_pairs, seed: pairs(seed, n_pairs)
    monkeypatch.setattr(conv_shift, "EXPERIMENT", replace(conv_shift.EXPERIMENT, draws={"ioi": drawn, "other": drawn}))
    im.register(im.Task("other", "Another", "what differs", drawn, default_pairs=4))


@pytest.mark.parametrize(("model", "changes", "says"), WAYS.values(), ids=WAYS.keys())
def test_two_directories_put_together_are_refused_by_everything_that_would_read_them_as_one(
    model, changes, says, tiny_mamba, tiny_mamba_dir, other_mamba, draws, tmp_path, capsys
):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    named = {"names": ("conv-shift",), "options": {"layer": 0}} | changes
    run(tiny_mamba, ours, ("conv-shift",), options={"layer": 2}) if "names" in changes else run(tiny_mamba, ours)
    run(tiny_mamba if model is None else model(other_mamba, str(tiny_mamba_dir)), theirs, **named)
    held = {path.name: path.read_bytes() for path in ours.iterdir()}
    for path in theirs.iterdir():
        if path.name != "index.html":
            shutil.copy(path, ours)
    mixed = {path.name: path.read_bytes() for path in ours.iterdir()}
    assert len(mixed) == len(held) + 2
    for read in (pages.write_report, compare.compare, im.open_results, lambda out: pages.save_charts(out, "svg")):
        with pytest.raises(InputError, match=rf"holds tables of several runs: .*{says}"):
            read(ours)
    assert main(["report", str(ours)]) == 2
    assert "holds tables of several runs" in capsys.readouterr().err
    with pytest.raises(InputError, match=rf"(of another|of several) runs?: .*{says}"):
        run(tiny_mamba, ours, resume=True)
    # A table alone is still read: it says itself where it comes from.
    for name in ("layer-removal", *named["names"]):
        if (ours / f"{name}.json").exists():
            assert im.open_result(ours, name).manifest["analysis"] == name
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == mixed


def test_a_table_under_the_manifest_of_another_is_not_on_the_page(tiny_mamba, tmp_path):
    page = run(tiny_mamba, tmp_path / "one")
    run(tiny_mamba, tmp_path / "two", pairs=pairs(3))
    shutil.copy(tmp_path / "two/layer-removal.parquet", tmp_path / "one")
    assert "is not the table that layer-removal.json is of" in pages.write_report(page.parent).read_text()


CHANGES = {
    "other prompts": {"pairs": pairs(2)},
    "other seed": {"seed": 5},
    "other held-out prompts": {"held_out": pairs(8)},
    "rows=128": {"options": {"rows": 4}},
}


@pytest.mark.parametrize(("says", "changes"), CHANGES.items())
def test_a_finished_table_of_another_question_is_replaced_only_when_told(says, changes, tiny_mamba, tmp_path):
    run(tiny_mamba, tmp_path)
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        InputError, match=f"layer-removal that is of another question .*{says}.*--overwrite replaces it"
    ):
        run(tiny_mamba, tmp_path, resume=True, **changes)
    with pytest.raises(InputError, match="holds a finished table of layer-removal: --resume keeps it"):
        run(tiny_mamba, tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    run(tiny_mamba, tmp_path, resume=True, overwrite=True, **changes)
    assert (tmp_path / "layer-removal.json").read_bytes() != held["layer-removal.json"]


def test_what_overwriting_leaves_when_it_fails_is_of_one_run(tiny_mamba, tmp_path, monkeypatch):
    run(tiny_mamba, tmp_path, NAMES)

    def fails(context):
        raise ZeroDivisionError

    monkeypatch.setattr(layer_removal, "EXPERIMENT", replace(layer_removal.EXPERIMENT, run=fails))
    with pytest.raises(ZeroDivisionError):
        run(tiny_mamba, tmp_path, NAMES, seed=5, overwrite=True)
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(ZeroDivisionError):
        run(tiny_mamba, tmp_path, ("conv-shift", "layer-removal"), seed=5)
    assert not (tmp_path / "conv-shift.json").exists()


def test_one_run_in_several_goes_is_one_run(tiny_mamba, tmp_path):
    for names in (("layer-removal",), ("layer-ablation",), ("conv-shift",)):
        run(tiny_mamba, tmp_path, names, resume=True)
    assert set(im.open_results(tmp_path)) == {"layer-removal", "layer-ablation", "conv-shift"}
    # Its layer was found by layer-ablation: another layer would be another run.
    manifest = json.loads((tmp_path / "conv-shift.json").read_text())
    assert manifest["asked"]["found"] == {"layer": manifest["options"]["layer"]}
    with pytest.raises(InputError, match="of another question"):
        run(tiny_mamba, tmp_path, ("conv-shift",), resume=True, options={"layer": manifest["options"]["layer"] + 1})


def test_options_are_compared_where_both_experiments_have_them():
    of = lambda names, **asked: {"options": dict.fromkeys(names), "asked": {"options": {}, "found": {}} | asked}
    assert difference(of(["site"], options={"site": "conv"}), of(["layer"])) is None
    assert difference(of(["layer"], options={"layer": 1}), of(["layer"])) == ("layer=1", "layer as it is by default")
    assert difference(of(["layer"], found={"layer": 1}), of(["layer"])) is None
    assert difference(of(["layer"], found={"layer": 1}), of(["layer"], found={"layer": 2})) == ("layer=1", "layer=2")
