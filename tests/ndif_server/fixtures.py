"""The two servers that the remote tests share, each started when the first test asks for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from .install import Unavailable
from .server import Server


@contextmanager
def started(request: pytest.FixtureRequest, **settings) -> Iterator[Server]:
    """A server for a fixture to hand out; skips, with the reason, where none can run here.

    Its directory is a new one in the system's temporary directory and stays there with the logs. (pytest's own would
    be removed by the third run after this one, even while its server is up.)
    """
    server = Server(tempfile.mkdtemp(prefix="ndif-test-"), **settings)
    try:
        server.start()
    except Unavailable as reason:
        pytest.skip(str(reason))
    kind, capture = (
        "sandboxed" if server.sandboxed else "trusted",
        request.config.pluginmanager.getplugin("capturemanager"),
    )
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print(f"\nNDIF server ({kind}) on {server.url}, logs in {server.logs}")
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def ndif_server(request) -> Iterator[Server]:
    """A server that runs requests in the model's own process: everything works, gradients included."""
    with started(request) as server:
        yield server


@pytest.fixture(scope="session")
def sandboxed_ndif_server(request) -> Iterator[Server]:
    """A server that runs each request in a process of its own, as a hosted service may: no gradients."""
    with started(request, sandboxed=True) as server:
        yield server
