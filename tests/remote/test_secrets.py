"""A key is sent to the server that it is for, and written nowhere: not in a file, not in what is printed."""

import http.server
import os
import subprocess
import sys
import threading

import pandas as pd
import pytest
from pyarrow import parquet

KEY = "Zk3key-0123456789abcdef-must-stay-unwritten"
CHILD = """
import os, sys
import nnsight
from ioi_mamba.cli import main as cli
from ioi_mamba.remote.store import Store

model, pairs, url, address, key = sys.argv[1:]
if key:
    nnsight.CONFIG.set_default_api_key(key)
assert nnsight.CONFIG.API.APIKEY
run = ["run", "layer-removal", "--model", model, "--pairs", pairs, "--option", "steps=1", "--out"]
there = ["--backend", "ndif", "--retries", "0"]
assert cli.main([*run, "local"]) == 0
Store.forget = lambda store: None  # so that what is kept of requests can be looked at
assert cli.main([*run, "serialized", "--backend", "local-serialized"]) == 0
assert cli.main([*run, "there", *there, "--host", url]) == 3
assert cli.main([*run, "there", *there, "--host", url, "--submit"]) == 3
assert cli.main([*run, "there", *there, "--host", address]) == 3
assert cli.main([*run, "there", *there, "--host", address.replace("http", "ftp")]) == 2
assert cli.main(["doctor", "--model", model, "--backend", "ndif", "--host", address]) == 1
"""


@pytest.fixture
def talkative():
    """A server on loopback that refuses everything, and says back what it was sent; (its address, the keys it saw)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("ndif-api-key"))
            said = f"I do not like your {self.headers}\n and your {' '.join(self.headers.values())}".encode()
            self.send_response(500)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def texts(folder):
    """Everything written below a folder, as (path, bytes); tables also as text, for parquet packs its columns."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield path, path.read_bytes()
        if path.suffix == ".parquet":
            yield path, (pd.read_parquet(path).to_csv() + str(parquet.read_metadata(path).metadata)).encode()


@pytest.mark.parametrize("way", ["environment", "file", "code"])
def test_a_key_is_in_nothing_that_is_written_or_said(way, tiny_mamba_dir, pairs_file, talkative, tmp_path, tried):
    url, seen = talkative
    work, config = tmp_path / "work", tmp_path / "config.yaml"
    for folder in ("work", "home", "tmp"):
        (tmp_path / folder).mkdir()
    (tmp_path / "child.py").write_text(CHILD)
    where = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "NNSIGHT_CONFIG": str(config)}
    environment = {name: value for name, value in os.environ.items() if name != "NDIF_API_KEY"} | where
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_TOKEN": KEY, "HF_HUB_OFFLINE": "1"}
    if way == "environment":
        environment["NDIF_API_KEY"] = KEY
    if way == "file":
        config.write_text(f"API:\n  APIKEY: {KEY}\n")
    arguments = [tiny_mamba_dir, pairs_file, url, url.replace("//", f"//me:{KEY}@"), KEY if way == "code" else ""]
    done = subprocess.run(
        [sys.executable, tmp_path / "child.py", *map(str, arguments)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert KEY in seen, "the key was not sent: the test shows nothing"
    assert KEY not in done.stdout + done.stderr
    assert done.stderr.count("No answer from the server at http://") == 3
    config.unlink(missing_ok=True)  # there the user has put it
    written = list(texts(tmp_path))
    assert {path.name for path, _ in written} >= {"layer-removal.parquet", "layer-removal.json", "index.html"}
    assert any(path.suffix == ".chunk" for path, _ in written)
    assert not [path for path, text in written if KEY.encode() in text]
    tried("an API key, by every way to set it, searched for in all that is written and said", len(written) + 1)
