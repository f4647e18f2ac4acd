"""The loop of `scan.selective_scan` as compiled code, for float32 and float64 on a CPU.

`load` compiles `compiled_scan.cpp` with the machine's C++ compiler, once for each processor and compiler, and keeps the
library in the user's cache; from then on `scan.selective_scan` calls it. Without a compiler, or with
IOI_MAMBA_COMPILED_SCAN=0, nothing changes: the loop of torch is used, and the manifest says so. Nothing of this travels to a
server: what does travel asks torch for an operator of this name, which a server does not have.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

SWITCH = "IOI_MAMBA_COMPILED_SCAN"
"""The environment variable that keeps the loop of torch when it is 0."""

LOOP = "the loop of torch"

SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
_NATIVE = ("-march=native", "-mcpu=native")
"""How compilers are told to use all that this processor can; which of them one knows depends on the processor."""


@cache
def load() -> str:
    """Make `scan.selective_scan` use the compiled loop if that can be had; what it uses from now on, in words."""
    if os.environ.get(SWITCH) == "0":
        return f"{LOOP} ({SWITCH}=0)"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return f"{LOOP} (there is no C++ compiler)"
    try:
        functions = _Functions(ctypes.CDLL(str(_library(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{LOOP} ({compiler} did not compile it: {str(error).splitlines()[0]})"
    _register(functions)
    return f"compiled by {Path(compiler).name}"


def unload() -> None:
    """Go back to the loop of torch, until `load` is called again, as opening a model does."""
    if _library_of_operators.cache_info().currsize:
        _library_of_operators()._destroy()
    for kept in (load, _library_of_operators):
        kept.cache_clear()


def _library(compiler: str) -> Path:
    """The compiled library, made if it is not in the cache. Whole or not at all, so that several processes may ask at once."""
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256("\n".join((SOURCE.read_text(), about, _processor(), *_FLAGS)).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ioi_mamba"
    kept = home / f"scan-{key}.so"
    if not kept.is_file():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as beside:
            made = Path(beside) / kept.name
            for native in ([_NATIVE[0]], [_NATIVE[1]], []):
                command = [compiler, *_FLAGS, *native, str(SOURCE), "-o", str(made)]
                if not (done := subprocess.run(command, capture_output=True, text=True, timeout=300)).returncode:
                    break
            else:
                raise OSError(done.stderr.strip() or "no reason given")
            made.replace(kept)
    return kept


def _processor() -> str:
    """What tells processors apart that need code of their own: a cache may be shared by the machines of a cluster."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(("flags", "Features")))][:2])


class _Functions:
    """The functions of the library, on tensors."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def call(
        self,
        name: str,
        tensors: Sequence[Tensor | None],
        by_row: Sequence[bool],
        sizes: Sequence[int],
        in_one: bool = False,
    ) -> None:
        """Call a function on contiguous tensors, of which some have an axis of rows; sizes: L, E and N.

        On several threads each takes some of the rows, unless in_one.
        """
        first = tensors[0]
        assert first is not None
        function = getattr(self._library, f"{name}_{str(first.dtype).removeprefix('torch.')}")

        def part(rows: range) -> None:
            pointers = [
                ctypes.c_void_p(None if v is None else v[rows.start].data_ptr() if rowed else v.data_ptr())
                for v, rowed in zip(tensors, by_row, strict=True)
            ]
            function(*pointers, *map(ctypes.c_int64, (len(rows), *sizes)))

        n_rows, n_threads = len(first), 1 if in_one else min(len(first), torch.get_num_threads())
        cuts = [n_rows * k // max(1, n_threads) for k in range(n_threads + 1)]
        parts = [range(a, b) for a, b in pairwise(cuts)]
        if len(parts) > 1:
            list(_pool(len(parts)).map(part, parts))
        else:
            for rows in parts:
                part(rows)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="scan")


_FORWARD, _BACKWARD = "selective_scan", "selective_scan_gradients"
"""The names of the operators; `scan.py` asks torch for them."""

_TAKES = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor h_start"


def _register(functions: _Functions) -> None:
    """Make the functions operators of torch. Shapes are those of `scan.selective_scan`."""

    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, delta, A, B, C, h_start = (v.contiguous() for v in tensors)
        y, last = torch.empty_like(x), torch.empty_like(h_start)
        by_row = (True, True, False, True, True, True, True, True)
        functions.call("forward", (x, delta, A, B, C, h_start, y, last), by_row, (x.shape[1], *A.shape))
        return y, last

    def backward(*arguments) -> tuple[Tensor, ...]:
        *tensors, of_A = arguments
        x, delta, A, B, C, h_start, grad_y, grad_last = (v.contiguous() for v in tensors)
        grad_A = torch.zeros_like(A) if of_A else None
        found = [torch.empty_like(x), torch.empty_like(x), grad_A, torch.zeros_like(B), torch.zeros_like(C)]
        found.append(torch.empty_like(h_start))
        by_row = [True, True, False, True, True, True, True, True, True, True, False, True, True, True]
        taken = (x, delta, A, B, C, h_start, grad_y, grad_last, *found)
        functions.call("backward", taken, by_row, (x.shape[1], *A.shape), in_one=of_A)
        return tuple(A.new_empty(0) if v is None else v for v in found)

    # Without data, as torch asks for shapes alone.
    def forward_shapes(x, delta, A, B, C, h_start):
        return torch.empty_like(x), torch.empty_like(h_start)

    def backward_shapes(x, delta, A, B, C, h_start, grad_y, grad_last, of_A):
        of = (x, delta, A if of_A else A.new_empty(0), B, C, h_start)
        return tuple(torch.empty_like(v) for v in of)

    library = _library_of_operators()
    library.define(f"{_FORWARD}({_TAKES}) -> (Tensor, Tensor)")
    tensors = ", ".join(["Tensor"] * 6)
    library.define(f"{_BACKWARD}({_TAKES}, Tensor grad_y, Tensor grad_last, bool of_A) -> ({tensors})")
    for name, function, shapes in ((_FORWARD, forward, forward_shapes), (_BACKWARD, backward, backward_shapes)):
        library.impl(name, function, "CPU")
        torch.library.register_fake(f"ioi_mamba::{name}", shapes, lib=library)


@cache
def _library_of_operators() -> torch.library.Library:
    """Kept for as long as the process lives: the operators go when it does."""
    return torch.library.Library("ioi_mamba", "DEF")
