"""The two servers that the remote tests share, each started when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .install import Unavailable
from .server import Server


@contextmanager
def started(request: pytest.FixtureRequest, directory: Path, **settings) -> Iterator[Server]:
    """A server in `directory`, for a fixture to hand out; skips, with the reason, where it cannot run here."""
    server = Server(directory, **settings)
    try:
        server.start()
    except Unavailable as reason:
        pytest.skip(str(reason))
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        kind = "sandboxed" if server.sandboxed else "trusted"
        terminal.write_line(f"\nNDIF server ({kind}) on {server.url}, logs in {server.logs}")
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def ndif_server(request, tmp_path_factory) -> Iterator[Server]:
    """A server that runs requests in the model's own process: everything works, gradients included."""
    with started(request, tmp_path_factory.mktemp("ndif-trusted")) as server:
        yield server


@pytest.fixture(scope="session")
def sandboxed_ndif_server(request, tmp_path_factory) -> Iterator[Server]:
    """A server that runs each request in a process of its own, as a hosted service may: no gradients."""
    with started(request, tmp_path_factory.mktemp("ndif-sandboxed"), sandboxed=True) as server:
        yield server
