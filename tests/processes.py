"""The command line in processes of its own, which can be killed, and which need not import torch anew each time."""

import multiprocessing
import os
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing import forkserver

import torch

from ioi_mamba import analyses, files
from ioi_mamba.cli import main
from ioi_mamba.model import memory
from ioi_mamba.remote import store
from ioi_mamba.report import pages
from ioi_mamba.study import runs

for _name in analyses.ORDER:
    analyses.load(_name)
import nnsight  # noqa: E402, F401
import transformers.models.mamba.modeling_mamba  # noqa: E402, F401

pages.bundle()  # kept, so that no forked process makes the chart library's script anew

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def start_server():
    """Start the process that all others are forked from, once; it has to find this module to import it beforehand."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class Command:
    """A run of the command line.

    dies: the number of the file at whose renaming it is killed, "before" or "after" it, and how the names of those files
    that are counted end ("": all but chunks).

    largest_file: bytes, a file that would grow larger cannot be written. `printed` is there once it has ended.
    """

    def __init__(self, *arguments, dies=None, largest_file=None, set_up=None):
        start_server()
        self._reader, writer = CONTEXT.Pipe(duplex=False)
        what = [list(map(str, arguments)), dies, largest_file, set_up]
        self.process = CONTEXT.Process(target=_run, args=(writer, *what))
        self.process.start()
        writer.close()

    def end(self, within=120):
        """The exit code, negative for a signal."""
        said = []
        while chunk := os.read(self._reader.fileno(), 1 << 16):
            said.append(chunk)
        self.process.join(within)
        self.printed = b"".join(said).decode()
        return self.process.exitcode

    def signal(self, number):
        """Send a signal; nothing happens if the run has ended by then."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def _run(writer, arguments, dies, largest_file, set_up):
    # Whoever started the tests may have had them ignore it, as a shell does with what it runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    writer.close()
    torch.set_num_threads(1)
    if dies is not None:
        _die_at(*dies)
    if set_up is not None:
        set_up()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    code = main.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_at(number, when, ending=""):
    replace, seen = os.replace, []

    def dying(source, target):
        name = str(target)
        if not (name.endswith(ending) if ending else not name.endswith(store.SUFFIX)):
            return replace(source, target)
        seen.append(target)
        if len(seen) == number and when == "before":
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = dying


def small_chunks():
    """However small the model: every pass over pairs is cut into five chunks."""
    memory.BUSY, memory.TOKENS, memory.CHUNKS = 0, 0, 5


def clock_runs_backwards():
    """Every look at the clock is a day before the last one."""
    import time
    from datetime import datetime, timedelta

    looks, genuine = [], time.time

    class Backwards(datetime):
        @classmethod
        def now(cls, tz=None):
            looks.append(1)
            return datetime.now(tz) - timedelta(days=len(looks))

    runs.datetime = Backwards
    time.time = lambda: genuine() - 86400 * len(looks)
