"""Whatever comes in from outside is used or refused in one sentence: files, names, edits, command lines.

The cases are the same every time. A few run by default, more than 10,000 in all with `-m slow`.
"""

import json

import pandas as pd
import pytest
import torch
from conftest import VOCAB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ioi_mamba as im
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.model.sites import MODEL_SITES, Hooks
from ioi_mamba.passes import metrics
from ioi_mamba.results import stored
from ioi_mamba.tasks.base import Pairs


def sizes(few, many):
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.slow)])


def cases(n):
    return settings(
        max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def one_sentence(error):
    assert str(error).strip()
    assert "Traceback" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
WORDS = st.sampled_from(["3", "4", "17", "39", "40", "-1", "Mary", "</script>", "\u202e", "'\"", "", "3 3", "x" * 200])
PROMPT = st.lists(WORDS, max_size=6).map(" ".join)
PAIR = st.fixed_dictionaries(
    {
        "uncorrupted": PROMPT | JSON,
        "corrupted": PROMPT | JSON,
        "answer_uncorrupted": WORDS.map(lambda w: f" {w}") | JSON,
        "answer_corrupted": WORDS.map(lambda w: f" {w}") | JSON,
        "incorrect_for_uncorrupted": st.lists(WORDS.map(lambda w: f" {w}"), max_size=3) | JSON,
        "incorrect_for_corrupted": st.lists(WORDS.map(lambda w: f" {w}"), max_size=3) | JSON,
        "corruption": st.text(max_size=8) | JSON,
    }
)
LINE = (
    PAIR.map(json.dumps) | JSON.map(json.dumps) | st.text(max_size=30) | st.binary(max_size=30).map(lambda b: b.hex())
)


TAIL = st.just(b"") | st.binary(max_size=5)


@st.composite
def sound_lines(draw):
    """Lines that are nearly right: token ids, with one word or key changed at most."""
    ids = [str(draw(st.integers(1, VOCAB - 1))) for _ in range(draw(st.integers(2, 5)))]
    answer, wrong = f" {ids[0]}", f" {draw(st.integers(1, VOCAB))}"
    row = {
        "uncorrupted": " ".join(ids),
        "corrupted": " ".join([wrong.strip(), *ids[1:]]),
        "answer_uncorrupted": answer,
        "answer_corrupted": wrong,
        "incorrect_for_uncorrupted": [wrong],
        "incorrect_for_corrupted": [answer],
        "corruption": "A -> B",
    }
    if draw(st.booleans()):
        row[draw(st.sampled_from(sorted(row)))] = draw(JSON)
    return json.dumps(row)


@sizes(40, 3500)
def test_a_pairs_file_is_read_or_refused(n, tiny_mamba, tmp_path, tried):
    path, read = tmp_path / "pairs.jsonl", []

    @cases(n)
    @given(st.lists(LINE | sound_lines(), max_size=3) | st.lists(sound_lines(), min_size=1, max_size=2), TAIL)
    def check(lines, tail):
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + tail)
        try:
            pairs = Pairs.from_jsonl(path, tiny_mamba.tokenizer)
        except InputError as error:
            one_sentence(error)
            return
        assert len(pairs) >= 1
        read.append(1)

    check()
    assert read, "not one file was good: the cases test refusal only"
    tried("a pairs file", n)


UNIVERSE = st.fixed_dictionaries(
    {},
    optional={
        "n_layers": st.integers(-2, 6) | JSON,
        "conv_width": st.integers(-2, 6) | JSON,
        "parts": st.booleans() | JSON,
        "n_positions": st.none() | st.integers(-2, 6) | JSON,
    },
)
NODE = st.sampled_from(["embed", "output", "0", "1", "7", "-1", "x"])


@sizes(40, 2000)
def test_a_circuit_file_is_read_or_refused(n, tmp_path, tried):
    path, read = tmp_path / "circuit", []

    @cases(n)
    @given(
        st.one_of(UNIVERSE, JSON),
        st.lists(st.tuples(NODE, NODE, st.none() | st.integers(-2, 6), st.sampled_from([None, "ssm", "conv-1", "y"]))),
        st.none() | st.binary(max_size=40),
    )
    def check(universe, items, bytes_instead):
        path.with_name("circuit.json").write_text(json.dumps({"universe": universe}))
        if bytes_instead is None:
            table = pd.DataFrame(items, columns=["source", "target", "position", "part"])
            table.astype({"position": "Int64", "part": "str"}).to_parquet(path.with_name("circuit.parquet"))
        else:
            path.with_name("circuit.parquet").write_bytes(bytes_instead)
        try:
            circuit = im.Circuit.load(path)
        except InputError as error:
            one_sentence(error)
            return
        assert len(circuit.patched()) + len(circuit) >= len(circuit.universe.items())
        read.append(1)

    check()
    assert read
    tried("a circuit file", n)


HOOKS = Hooks([MAMBA.sites] * 4, n_positions=5, conv_width=4)
NAME = st.one_of(
    st.text(max_size=25),
    st.builds(
        lambda layer, site, index: f"blocks.{layer}.hook_{site}{index}",
        st.integers(-1, 5) | st.text(max_size=3),
        st.sampled_from(sorted(MAMBA.sites)) | st.text(max_size=5),
        st.just("") | st.integers(-6, 6).map(lambda i: f".{i}"),
    ),
    st.sampled_from([f"hook_{name}" for name in MODEL_SITES]),
)


@sizes(100, 3000)
def test_a_hook_name_is_an_address_or_refused(n, tried):
    @cases(n)
    @given(NAME)
    def check(name):
        try:
            layer, site, index = HOOKS.address(name)
        except InputError as error:
            one_sentence(error)
            return
        again = f"hook_{site}" if layer is None else f"blocks.{layer}.hook_{site}"
        assert HOOKS.address(again + ("" if index is None else f".{index}")) == (layer, site, index)

    check()
    tried("a hook name", n)


SHAPE = st.lists(st.integers(0, 3), max_size=4)
VALUE = st.one_of(
    st.builds(lambda shape, fill: torch.full(shape, fill), SHAPE, st.floats(width=32)),
    st.builds(lambda shape: torch.zeros(shape, dtype=torch.int64), SHAPE),
    JSON,
)
EDIT = st.one_of(
    VALUE,
    VALUE.map(lambda value: lambda x: value),
    st.sampled_from(
        [lambda x: x * 0.5, lambda x: x.flip(0), lambda x: x[:0], lambda x: None, lambda x: x * float("inf")]
    ),
)
GOOD_NAME = st.sampled_from(
    [f"blocks.{i}.hook_{site}" for i in range(4) for site in MAMBA.sites if site != "conv_slice"]
)


@sizes(15, 400)
def test_an_edit_is_carried_out_or_refused(n, tiny_mamba, tried):
    done, tokens = [], torch.tensor([[0, 3, 5], [0, 7, 9]])

    @cases(n)
    @given(st.dictionaries(GOOD_NAME | NAME, EDIT, max_size=2))
    def check(edits):
        try:
            logits = im.run(tiny_mamba, tokens, edits)
        except InputError as error:
            one_sentence(error)
            return
        assert torch.isfinite(logits).all()
        done.append(1)

    stock = im.run(tiny_mamba, tokens, {})
    check()
    assert done
    assert torch.equal(im.run(tiny_mamba, tokens, {}), stock)
    tried("an edit", n)


FLAGS = [
    "--pairs",
    "--n-pairs",
    "--seed",
    "--device",
    "--dtype",
    "--out",
    "--resume",
    "--option",
    "--backend",
    "--host",
]
FLAGS += ["--submit", "--collect", "--max-upload", "--max-download", "--retries", "--no-such", "--threads", "--task"]
FLAGS += ["--charts", "--no-resume-points", "--overwrite", "--json", "--strict", "--quiet", "--log-file"]
WORD = st.sampled_from(
    [
        "run",
        "report",
        "compare",
        "sites",
        "all",
        "layer-removal",
        "edge-attribution",
        "mini",
        "x",
        "0",
        "-1",
        "1",
        "1e400",
        "steps=1",
        "steps=x",
        "=",
        "rows=1,2",
    ]
) | st.sampled_from(["layer=none", "greater-than", "png", "\u202e", "\x00", "local", "float32", str(10**30), ""])


@sizes(40, 1500)
def test_a_command_line_is_done_or_refused(n, tmp_path, monkeypatch, capsys, tried):
    (tmp_path / "no-model").mkdir()
    monkeypatch.chdir(tmp_path)

    @cases(n)
    @given(
        st.sampled_from(["run", "run", "run", "report", "compare", "sites", "walk"]),
        st.lists(st.sampled_from(FLAGS) | WORD | st.text(max_size=6).map(lambda t: "." + t), max_size=5),
    )
    def check(command, words):
        # The last word: a directory that holds no model, so that nothing long begins.
        last = ["--model", "no-model"] if command == "run" else []
        try:
            code = main([command, *words, *last])
        except SystemExit as stop:  # --help
            code = stop.code
        said = capsys.readouterr()
        assert code in (0, 2, 3)
        assert code == 0 or said.err.strip().splitlines()[-1].startswith("ioi-mamba: ")

    threads = torch.get_num_threads()
    try:
        check()
    finally:
        torch.set_num_threads(threads)
    assert [path.name for path in tmp_path.iterdir()] == ["no-model"]
    tried("a command line", n)


@sizes(40, 800)
def test_a_manifest_and_a_table_are_read_or_refused(n, tmp_path, tried):
    @cases(n)
    @given(
        JSON | st.fixed_dictionaries({"analysis": JSON, "model": JSON, "table_sha256": JSON}), st.binary(max_size=40)
    )
    def check(manifest, table):
        (tmp_path / "x.json").write_text(json.dumps(manifest))
        (tmp_path / "x.parquet").write_bytes(table)
        try:
            assert stored.read_result(tmp_path, "x") is None or len(table)
        except InputError as error:
            one_sentence(error)

    check()
    tried("a manifest with a table", n)


@sizes(30, 500)
def test_metrics_keep_their_bounds_and_symmetries(n, tried):
    number = st.floats(-50, 50, width=32)

    @cases(n)
    @given(st.lists(st.lists(number, min_size=5, max_size=5), min_size=1, max_size=4), number)
    def check(rows, shift):
        logits = torch.tensor(rows)
        answer, wrong = torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows), dtype=torch.int64)
        names = torch.tensor([[0, 1, -1]] * len(rows))
        difference = metrics.logit_diff(logits, answer, wrong)
        assert torch.equal(difference, -metrics.logit_diff(logits, wrong, answer))
        assert (metrics.kl_divergence(logits, logits + shift).abs() < 1e-3).all()
        assert (metrics.kl_divergence(logits.flip(1), logits) > -1e-4).all()
        share = metrics.relative_probability(logits, answer, names)
        torch.testing.assert_close(share, difference.sigmoid(), atol=1e-5, rtol=1e-4)
        assert (metrics.accuracy(logits, answer, names) >= metrics.full_vocabulary_accuracy(logits, answer)).all()

    check()
    tried("logits for the metrics", n)
