"""A real NDIF server on loopback, without a GPU, for tests; see docs/ndif-test-server.md."""

from .install import Unavailable
from .server import Server, ServerFailed

__all__ = ["Server", "ServerFailed", "Unavailable"]
