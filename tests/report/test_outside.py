"""What comes from outside stays data: no code is loaded, no text escapes the page, no path its directory."""

import ast
import gzip
import json
import re
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from test_report import HEATMAP, LAYER_REMOVAL, own_part, put

import ioi_mamba
from ioi_mamba import analyses, files
from ioi_mamba.circuits import graph
from ioi_mamba.circuits.graph import Circuit, Universe
from ioi_mamba.cli.commands.run import default_out
from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.remote import client
from ioi_mamba.report import pages
from ioi_mamba.results import stored
from ioi_mamba.tasks import prompts
from ioi_mamba.tasks.base import Pairs

ROOTS = [Path(ioi_mamba.__file__).parent, Path(analyses.__file__).parent]
SOURCES = [path for root in ROOTS for path in sorted(root.rglob("*.py"))]
# client.py: what a server sends in, in a protocol that torch's safe loader does not read, through an unpickler that
# builds nothing but plain values; checkpoints.py names only an error.
MAY_NAME_PICKLE = {"client.py": {"Unpickler", "UnpicklingError"}, "checkpoints.py": {"UnpicklingError"}}
CODE = {"eval", "exec", "compile", "__import__"}
# Our own classes, rebuilt from our own source where a server has no such module; both are sent, and never read here.
MAY_RUN = {"portable.py": {"exec", "compile"}}


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_source_loads_code_from_a_file(path, tried):
    tree = ast.parse(path.read_text())
    pickled = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert pickled <= MAY_NAME_PICKLE.get(path.name, set())
    modules = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not modules & {"dill", "shelve", "marshal"}
    for module, harmless in (("joblib", {"cpu_count"}), ("yaml", {"safe_load", "YAMLError"})):
        assert not any(n.module == module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == module}
        assert used <= harmless
    assert "pickle" not in modules or path.name in MAY_NAME_PICKLE
    for call in calls(tree):
        name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in CODE - MAY_RUN.get(path.name, set())
        assert not {"trust_remote_code", "allow_pickle"} & set(keywords)
        assert name not in ("np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "torch.jit.load")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            assert path.name == "client.py"
            assert keywords.get("pickle_module") == "_ENVELOPE"
    tried("a source file searched for what would run a file's code", 1)


LONG = "x" * 10_000
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "\"'><b>",
    "\u202e\u2067RTL\u200f",
    LONG,
    "]]>",
    "${7*7}{{7*7}}",
    "\x07",
]


def test_hostile_labels_and_prompts_stay_text(tmp_path, tried):
    table = pd.concat([HEATMAP.assign(label=text, corruption=text) for text in HOSTILE])
    table = table.drop_duplicates(["corruption", "layer", "position"])
    put(tmp_path, "layer-ablation", table.assign(low=0.0, high=0.0, left_out=0), model_id="</title><script>x</script>")
    put(tmp_path, "layer-removal", LAYER_REMOVAL, options={text: text for text in HOSTILE})
    page = own_part(pages.write_report(tmp_path).read_text())
    for text in ("<img", "<b>", "<script>x"):
        assert text not in page
    assert page.count("</script>") == page.count("<script")
    for spec in re.findall(r"<script type=\"application/json\"[^>]*>(.*?)</script>", page, re.DOTALL):
        json.loads(spec)
    tried("hostile text on the page", len(HOSTILE))


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "/", "a/../../b", "C:\\x", ".hidden", "\x00", "x" * 300])
def test_a_default_directory_stays_where_reports_are(name, tried):
    out = default_out(name, "ioi")
    assert out.parts[0] == "reports"
    assert len(out.parts) == 2
    assert ".." not in out.parts
    tried("a model's name as a path", 1)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "layer-removal/../../outside"])
def test_a_name_in_a_manifest_or_on_the_command_line_is_no_path(name, tmp_path, capsys, tried):
    inside = tmp_path / "in/out"
    inside.parent.mkdir()
    put(inside, "layer-removal", LAYER_REMOVAL)
    manifest = json.loads((inside / "layer-removal.json").read_text())
    (inside / "layer-removal.json").write_text(json.dumps(manifest | {"analysis": name}))
    before = {path for path in tmp_path.rglob("*")}
    pages.write_report(inside)
    assert {path for path in tmp_path.rglob("*")} - before == {inside / "index.html"}
    assert main(["run", name, "--out", str(inside)]) == 2
    assert {path for path in tmp_path.rglob("*")} - before == {inside / "index.html"}
    tried("a path where a name should be", 2)


def test_a_table_that_would_unpack_to_more_than_memory_is_refused_before(tmp_path, tried):
    path = tmp_path / "layer-removal.parquet"
    n = files.MAX_CELLS + 1
    column = pa.DictionaryArray.from_arrays(np.zeros(n, dtype=np.int8), ["a"])
    parquet.write_table(pa.table({"mode": column}), path)
    assert path.stat().st_size < 1e6
    put(tmp_path / "m", "layer-removal", LAYER_REMOVAL)
    (tmp_path / "layer-removal.json").write_bytes((tmp_path / "m/layer-removal.json").read_bytes())
    with pytest.raises(InputError, match="are too many"):
        stored.read_result(tmp_path, "layer-removal")
    tried("a table larger than memory", 1)


@pytest.mark.parametrize("states_its_size", [True, False])
def test_a_result_that_would_unpack_to_more_than_allowed_is_refused_before(states_its_size, tried):
    compressor = zstandard.ZstdCompressor(write_content_size=states_its_size)
    bomb = compressor.compress(bytes(200 * client.MIB))
    assert len(bomb) < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="more than 2 MiB unpacked"):
        client.unpacked(bomb, 2 * client.MIB)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    whole = bytes(range(256)) * 8192
    assert client.unpacked(compressor.compress(whole), 2 * client.MIB) == whole
    tried("a result larger than memory", 1)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b'{"uncorrupted": "7 9", "corrupted": "8 9", "answer_uncorrupted": " 7", '
        b'"answer_corrupted": " 8", "incorrect_for_uncorrupted": [" 8"], "incorrect_for_corrupted": [" 7"], "corruption": "c"}\n',
    ],
)
def test_a_pairs_file_that_would_unpack_to_more_than_memory_is_refused_before(line, tiny_mamba, tmp_path, tried):
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(11):
            file.write(line * (prompts.MAX_LINES // 10))
    with pytest.raises(InputError, match=f"has more than {prompts.MAX_LINES} lines"):
        Pairs.from_jsonl(path, tiny_mamba.tokenizer)
    tried("a pairs file larger than memory", 1)


@pytest.mark.parametrize(
    "sizes", [{"n_layers": 10**9}, {"n_layers": -1}, {"conv_width": 0}, {"n_positions": 10**9}, {"parts": "yes"}]
)
def test_a_circuit_of_a_size_that_no_model_has_is_refused_before_memory_is_taken(sizes, tmp_path, tried):
    Circuit.full(Universe(2)).save(tmp_path / "c")
    (tmp_path / "c.json").write_text(json.dumps({"universe": Universe(2)._asdict() | sizes}))
    with pytest.raises(InputError, match="is no saved circuit"):
        graph.Circuit.load(tmp_path / "c")
    tried("a circuit of impossible size", 1)
