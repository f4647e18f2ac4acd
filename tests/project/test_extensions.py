"""What others add from outside the package: a task, an experiment, a method of attribution, answers of two tokens."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch

import ioi_mamba as im
from ioi_mamba import analyses, tasks
from ioi_mamba.circuits.methods import Method
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.passes.forward import run
from ioi_mamba.results.stored import open_results
from ioi_mamba.study.runs import run_study
from ioi_mamba.tasks.readout import Readout

TASK = '''
"""Which of two colours was said last."""
import torch
import ioi_mamba as im

def generate(tokenizer, n_pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    body = torch.randint(10, 38, (n_pairs, 6), generator=generator)
    clean = torch.cat([torch.zeros(n_pairs, 1, dtype=torch.int64), body], 1)
    corrupted = clean.clone()
    corrupted[:, 3] = corrupted[:, 3] + 1
    return im.Pairs.from_tokens(clean, corrupted, clean[:, 3], corrupted[:, 3], labels={"corruption": ["hue"] * n_pairs})

COLOURS = im.Task(
    name="colours",
    title="How the model recalls a colour",
    varies="a colour",
    generate=generate,
    default_pairs=6,
)
'''
EXPERIMENT = '''
"""How large the logit difference is."""
from dataclasses import dataclass

import altair as alt
import pandas as pd
import ioi_mamba as im


@dataclass(frozen=True)
class Options:
    scale: float = im.option(1.0, "what differences are multiplied by", at_least=0)


def run(context):
    pairs = context.pairs
    logits = im.run(context.model, pairs.clean)[range(len(pairs)), pairs.last]
    rows = range(len(pairs))
    found = logits[rows, pairs.answer] - logits[rows, pairs.wrong]
    return pd.DataFrame({"pair": rows, "difference": found.numpy() * context.options.scale})


def chart(table):
    return alt.Chart(table).mark_bar().encode(x="pair:O", y="difference:Q")


def findings(table):
    return [f"The mean difference is {table['difference'].mean():.2f}."]


DIFFERENCES = im.Experiment(
    name="differences",
    title="Differences of logits",
    question="How sure is the model of {varies}?",
    look_for="Bars above 0.",
    method="One pass of the clean prompts.",
    options=Options,
    columns=(
        im.Column("pair", "int", "which pair"),
        im.Column("difference", "float", "logit of the answer less that of the other", "logits"),
    ),
    needs=frozenset({im.Need.SITES}),
    run=run,
    chart=chart,
    findings=findings,
)
'''


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The two files, and registries that forget what a test registers."""
    monkeypatch.setattr(analyses.EXPERIMENTS, "_registered", {})
    monkeypatch.setattr(tasks.TASKS, "_registered", {})
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "my_experiment.py").write_text(EXPERIMENT)
    return tmp_path


def own_texts(page):
    """What the page says, without scripts, styles, tables and code, in lower case."""
    shown = re.sub(r"<(script|style|table|pre)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]*>", "", shown).lower()


def test_an_experiment_and_a_task_from_files_make_a_table_and_a_page_in_their_words(written, tiny_mamba_dir, capsys):
    out = written / "out"
    files = [str(written / "my_experiment.py"), "--task", str(written / "my_task.py")]
    assert main(["run", *files, "--model", str(tiny_mamba_dir), "--out", str(out), "--option", "scale=2"]) == 0
    manifest = json.loads((out / "differences.json").read_text())
    assert (manifest["task"], manifest["options"], manifest["n_pairs"]) == ("colours", {"scale": 2.0}, 6)
    page = own_texts((out / "index.html").read_text())
    for said in (
        "how the model recalls a colour",
        "how sure is the model of a colour?",
        "the mean difference is",
        "bars above 0",
    ):
        assert said in page
    assert "paper" not in page
    assert "name" not in page
    assert list(open_results(out)) == ["differences"]
    assert 'data-chart="differences-chart"' in (out / "index.html").read_text()


def test_an_experiment_from_a_file_travels_to_a_server_and_is_reported_again(written, tiny_mamba_dir, capsys):
    path = written / "traveller.py"
    path.write_text(
        EXPERIMENT.replace(
            "    logits = im.run(context.model, pairs.clean)[range(len(pairs)), pairs.last]\n",
            "    logits = call(context.model, work, pairs.without_text())\n",
        ).replace(
            "@dataclass(frozen=True)",
            "from ioi_mamba.model.jobs import call\nfrom ioi_mamba.passes.forward import forward\n\n\n"
            "def work(model, pairs, *, progress=None):\n"
            '    return forward(model, pairs.clean, logits_at=pairs.read_at)["hook_logits"][:, 0]\n\n\n'
            "@dataclass(frozen=True)",
        )
    )
    task = ["--task", str(written / "my_task.py"), "--model", str(tiny_mamba_dir)]
    for out, backend in (("here", "local"), ("there", "local-serialized")):
        assert main(["run", str(path), *task, "--backend", backend, "--out", str(written / out)]) == 0
    here, there = (pd.read_parquet(written / out / "differences.parquet") for out in ("here", "there"))
    assert here["difference"].tolist() == pytest.approx(there["difference"].tolist(), abs=1e-5)
    analyses.EXPERIMENTS._registered.clear()
    assert main(["report", str(written / "here")]) == 2
    assert "holds tables of differences alone" in capsys.readouterr().err
    assert main(["report", str(written / "here"), "--experiment", str(path)]) == 0


def test_our_experiments_on_a_task_of_ones_own_speak_of_neither_names_nor_the_paper(written, tiny_mamba_dir):
    out = written / "out"
    names = ["layer-ablation", "state-similarity", "conv-shift", "cross-talk", "edge-attribution", "layer-removal"]
    arguments = ["--task", str(written / "my_task.py"), "--model", str(tiny_mamba_dir), "--out", str(out)]
    assert main(["run", *names, *arguments, "--option", "target=0"]) == 0
    page = own_texts((out / "index.html").read_text())
    for record in (analyses.load(name) for name in names):
        for text in record.texts("a colour").values():
            assert "paper" not in text.lower()
            assert " name" not in text.lower()
    assert "paper" not in page
    assert " name" not in page
    assert "which layer reads a colour, and where" in page


def test_a_record_registered_in_a_notebook_is_found_by_its_name(written, tiny_mamba):
    experiment, task = analyses.load(written / "my_experiment.py"), tasks.load(written / "my_task.py")
    analyses.EXPERIMENTS._registered.clear()
    with pytest.raises(InputError, match="Unknown analysis 'differences': did you mean"):
        analyses.load("differences")
    assert im.register(experiment) is experiment
    assert im.register(task) is task
    assert "differences" in analyses.available()
    page = run_study(tiny_mamba, ["differences"], written / "out", task="colours", progress=False)
    assert page.is_file()
    assert experiment(tiny_mamba, task.generate(None, 3, 1), scale=0.0)["difference"].eq(0).all()
    with pytest.raises(InputError, match="There is a task 'ioi' already"):
        im.register(im.Task("ioi", "x", "y", task.generate))
    with pytest.raises(InputError, match="is no Experiment"):
        im.register("differences")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "holds no Experiment"),
        ("import nowhere_to_be_found\n", r"cannot be imported, line 1 \(ModuleNotFoundError"),
        ("def\n", r"cannot be imported, line 1 \(SyntaxError"),
        (
            EXPERIMENT + "\nimport dataclasses\nOTHER = dataclasses.replace(DIFFERENCES, name='other')\n",
            "holds 2 records",
        ),
        (None, "There is no file"),
    ],
)
def test_a_file_that_holds_no_experiment_is_one_sentence(written, text, says):
    path = written / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=says):
        analyses.load(str(path))


def test_a_table_that_is_not_as_its_columns_say_is_refused(written, tiny_mamba):
    from dataclasses import replace

    experiment, task = analyses.load(written / "my_experiment.py"), tasks.load(written / "my_task.py")
    pairs = task.generate(None, 3, 1)
    for change, says in (
        (lambda t: t.drop(columns="pair"), "column 'pair' is missing"),
        (lambda t: t.assign(pair="a"), "column 'pair' holds"),
        (lambda t: t.assign(difference=float("nan")), "column 'difference' has empty cells"),
        (lambda t: None, "made a NoneType"),
    ):
        wrong = replace(experiment, run=lambda context, change=change: change(experiment.run(context)))
        with pytest.raises(InputError, match=says):
            wrong(tiny_mamba, pairs)
    with pytest.raises(InputError, match="scale is -1: differences takes a number of at least 0"):
        experiment(tiny_mamba, pairs, scale=-1)
    with pytest.raises(InputError, match="differences has no option 'size'"):
        experiment(tiny_mamba, pairs, size=1)


def test_entry_points_of_an_installed_package_are_found(written, tiny_mamba_dir):
    """A distribution as pip leaves it: a module, and metadata that names its records."""
    site = written / "site"
    info = site / "colours-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "colours.py").write_text(TASK + EXPERIMENT)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: colours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ioi_mamba.experiments]\ndifferences = colours:DIFFERENCES\nbroken = colours:NOTHING\n"
        "[ioi_mamba.tasks]\ncolours = colours:COLOURS\n"
    )
    code = textwrap.dedent(
        """
        import sys
        from ioi_mamba.cli.main import main
        sys.exit(main(sys.argv[1:]))
        """
    )
    paths = [str(site), str(Path(im.__file__).parents[1])]

    def ioi_mamba(*arguments):
        command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=written)

    done = ioi_mamba(
        "run", "differences", "--task", "colours", "--model", str(tiny_mamba_dir), "--out", str(written / "out")
    )
    assert done.returncode == 0, done.stderr
    assert (written / "out" / "differences.parquet").is_file()
    assert "how sure is the model of a colour?" in own_texts((written / "out" / "index.html").read_text())
    done = ioi_mamba("run", "broken", "--model", str(tiny_mamba_dir), "--out", str(written / "other"))
    assert done.returncode == 2
    assert "The analysis 'broken' of the package colours cannot be loaded" in done.stderr


def test_a_method_of_attribution_of_ones_own_is_one_record(mini):
    """By the size of the change alone, without gradients: the slow obvious form is written out beside it."""

    def by_size(model, pairs, universe, options, progress):
        names = ["hook_embed", *(f"blocks.{i}.hook_out_proj" for i in range(universe.n_layers))]
        clean, corrupted = (im.read(model, side, names) for side in (pairs.clean, pairs.corrupted))
        change = {n: (corrupted[n] - clean[n]).norm(dim=-1).sum(1) for n in names}
        source = dict(zip(universe.nodes, names, strict=False))
        return torch.stack([-change[source[s]] for s, _, _ in universe.kinds()])[:, None]

    method = Method("size", "size of the change", "how far the source's output moves", False, False, by_size)
    pairs = im.ioi.generate(mini.tokenizer, 3, templates=im.ioi.ALIGNED_TEMPLATES)
    found = im.attribute(mini, pairs, method=method, per_pair=True)
    assert "size of the change" in repr(found)
    first = found.circuit(1).listed()[0]
    moved = {}
    for node, name in [("embed", "hook_embed"), *((str(i), f"blocks.{i}.hook_out_proj") for i in range(8))]:
        one, other = (im.read(mini, side, name)[name] for side in (pairs.clean, pairs.corrupted))
        moved[node] = float((one - other).norm(dim=-1).sum(1).mean())
    assert first.source == max(moved, key=lambda node: moved[node])


def test_answers_of_two_tokens_are_one_record(tiny_mamba):
    """Every score with a readout equals what the plain logits give, summed by hand."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(1, 40, (4, 9), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 3] = (corrupted[:, 3] + 7) % 40
    tokens = torch.randint(1, 40, (4, 3, 2), generator=generator)  # three choices of two tokens
    readout = Readout(torch.tensor([[7, 8]] * 4), tokens)
    answer, wrong = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    pairs = im.Pairs.from_tokens(clean, corrupted, answer, wrong, readout=readout)

    def difference(logits):
        rows = torch.arange(4)
        at = lambda choice: sum(logits[rows, 7 + k, tokens[rows, choice, k]] for k in (0, 1))
        return at(answer) - at(wrong)

    ends = [difference(run(tiny_mamba, side)) for side in (clean, corrupted)]
    found = im.effect(tiny_mamba, pairs, "layer_input", layers=[1, 3], positions=[3, 7, 8])
    rows = torch.arange(4)
    source = im.read(tiny_mamba, corrupted, ["blocks.1.hook_layer_input", "blocks.3.hook_layer_input"])
    for i, layer in enumerate((1, 3)):
        for j, position in enumerate((3, 7, 8)):
            name = f"blocks.{layer}.hook_layer_input"

            def write(x, name=name, position=position):
                x[:, position] = source[name][:, position]
                return x

            patched = difference(run(tiny_mamba, clean, {name: write}))
            want = 1 - (patched - ends[1]) / (ends[0] - ends[1])
            assert torch.allclose(found.per_pair[i, j], want, atol=1e-3)
    edges = im.attribute(tiny_mamba, pairs, method="exact", per_pair=True)
    patched = im.patch_edges(tiny_mamba, pairs, [("embed", "0")])
    got = edges.table.query("source == 'embed' and target == '0'")["score"].to_numpy()
    want = (difference(patched) - ends[0]) / (ends[0] - ends[1]).abs()
    assert torch.allclose(torch.tensor(got), want.float(), atol=1e-3)
    assert pairs[[2, 0]].scores(torch.arange(2 * 2 * 99.0).view(2, 2, 99)).shape == (2, 3)
    assert torch.equal(pairs[rows[:2]].readout.at, readout.at[:2])
    assert im.Pairs.concat([pairs[:1], pairs[1:]]).hash() == pairs.hash()
    with pytest.raises(InputError, match="cross-talk reads one token"):
        analyses.load("cross-talk")(tiny_mamba, pairs)
    with pytest.raises(InputError, match="positions within the prompt"):
        im.Pairs.from_tokens(clean, corrupted, answer, wrong, readout=readout, lengths=[9, 9, 8, 9])
    for at, chosen in ((readout.at, tokens - 40), (readout.at[:, :0], tokens[:, :, :0])):
        with pytest.raises(InputError, match="whole numbers from 0 on"):
            Readout(at, chosen)
    with pytest.raises(InputError, match="must be numbers of the readout's choices"):
        im.Pairs.from_tokens(clean, corrupted, answer + 5, wrong, readout=readout)
