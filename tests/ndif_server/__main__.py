"""`python -m tests.ndif_server up DIR [--sandboxed] [--execution-timeout S]` and `... down DIR`, for people."""

import argparse
import sys
from pathlib import Path

from .install import Unavailable
from .processes import StillRunning, found, stop_all
from .server import Server, ServerFailed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ndif_server", description="A real NDIF server on loopback.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a server, print its URL and leave it running")
    up.add_argument("directory", type=Path)
    up.add_argument("--sandboxed", action="store_true", help="run each request in a process of its own: no gradients")
    up.add_argument("--execution-timeout", type=float, default=300.0, metavar="SECONDS", help="of a job, default 300")
    down = commands.add_parser("down", help="stop every process of that directory's server, and nothing else")
    down.add_argument("directory", type=Path)
    given = parser.parse_args()
    try:
        if given.command == "up":
            server = Server(given.directory, sandboxed=given.sandboxed, execution_timeout=given.execution_timeout)
            server.start(guarded=False)
            print(f"{server.url}\nlogs in {server.logs}")
        else:
            count = len(found(given.directory))
            stop_all(given.directory)
            print(f"stopped {count} processes, left: {len(found(given.directory))}")
    except (Unavailable, ServerFailed, StillRunning) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
