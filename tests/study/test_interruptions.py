"""Runs that are killed, interrupted, starved of disk or begun twice: nothing is lost, nothing done twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import processes
import pytest
from conftest import save_mamba
from transformers import AutoTokenizer

from ioi_mamba import analyses
from ioi_mamba.cli import main
from ioi_mamba.errors import InputError
from ioi_mamba.files import MINI
from ioi_mamba.results import lock
from ioi_mamba.results.stored import read_manifest

NAMES = ("layer-ablation", "layer-removal", "conv-shift")
FEW = {"target": 0, "threshold": 0.9, "compare_prompts": 0, "exact_prompts": 2, "part_prompts": 2, "steps": 2}
FEW |= {"per_cell": 2}


def files_of(names):
    return sorted([f"{name}{suffix}" for name in names for suffix in (".parquet", ".json")] + ["index.html"])


FILES = files_of(NAMES)


@pytest.fixture(scope="module")
def arguments(tiny_mamba_dir, pairs_file):
    return ["run", *NAMES, "--model", str(tiny_mamba_dir), "--pairs", str(pairs_file), "--device", "cpu"]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    return tables_and_seconds(arguments, NAMES, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def all_arguments(tmp_path_factory):
    """`run all`, with few pairs, on a random Mamba of two layers that reads names."""
    path = tmp_path_factory.mktemp("reads-names")
    tokenizer = AutoTokenizer.from_pretrained(str(MINI))
    save_mamba(path, vocab_size=len(tokenizer), n_layers=2)
    tokenizer.save_pretrained(path)
    options = [word for key, value in FEW.items() for word in ("--option", f"{key}={value}")]
    return ["run", "all", "--model", str(path), "--n-pairs", "1", "--device", "cpu", *options]


@pytest.fixture(scope="module")
def all_undisturbed(all_arguments, tmp_path_factory):
    return tables_and_seconds(all_arguments, analyses.ORDER, tmp_path_factory.mktemp("undisturbed"))


def tables_and_seconds(arguments, names, out):
    """Table bytes by name of a run that nothing disturbed, and how long it took."""
    processes.Command(*arguments, "--out", out).end()  # the first one starts the server that the others fork from
    began = time.monotonic()
    command = processes.Command(*arguments, "--out", out, "--overwrite")
    assert command.end() == 0, command.printed
    seconds = time.monotonic() - began
    assert sorted(path.name for path in out.iterdir()) == files_of(names)
    return {name: (out / f"{name}.parquet").read_bytes() for name in names}, seconds


def finished(out, tables):
    """Manifests by name of what a later run may keep; a manifest vouches for a table that is whole and right."""
    found = {name: manifest for name in tables if (manifest := read_manifest(out / f"{name}.json")) is not None}
    for name in found:
        assert (out / f"{name}.parquet").read_bytes() == tables[name]
    if (out / "index.html").exists():
        assert (out / "index.html").read_text().rstrip().endswith("</html>")
    return found


def resumed(arguments, out, tables, kept):
    """Take the run up again, and see that it is the undisturbed one and that what was kept was not computed anew."""
    command = processes.Command(*arguments, "--out", out, "--resume")
    assert command.end() == 0, command.printed
    now = finished(out, tables)
    assert set(now) == set(tables)
    assert all(now[name] == kept[name] for name in kept)
    assert sorted(path.name for path in out.iterdir()) == files_of(tables)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_killed_at_any_moment_end_as_if_they_had_not_been(kills, arguments, undisturbed, tmp_path, tried):
    killed(kills, arguments, *undisturbed, tmp_path)
    tried("kill -9 of three experiments at a random moment", kills)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_run_all_killed_at_any_moment_ends_as_if_it_had_not_been(
    kills, all_arguments, all_undisturbed, tmp_path, tried
):
    killed(kills, all_arguments, *all_undisturbed, tmp_path)
    tried("kill -9 of `run all` at a random moment", kills)


def killed(kills, arguments, tables, seconds, tmp_path):
    """Kill runs so often, each taken up again until it is done, and see that nothing was lost or done twice."""
    rng, number, left = random.Random(kills), 0, kills
    kept = {}
    while left:
        out = tmp_path / str(number)
        command = processes.Command(*arguments, "--out", out, "--resume")
        time.sleep(rng.uniform(0, seconds))
        command.signal(signal.SIGKILL)
        if command.end() == -signal.SIGKILL:
            left -= 1
        now = finished(out, tables) if out.exists() else {}
        assert all(now[name] == kept[name] for name in kept)
        kept = now
        if len(kept) == len(tables) or not left:
            resumed(arguments, out, tables, kept)
            number, kept = number + 1, {}


AT = [(k, when) for k in range(1, len(FILES) + 1) for when in ("before", "after")]


@pytest.mark.parametrize("dies", [AT[1], AT[2], *(pytest.param(a, marks=pytest.mark.slow) for a in [AT[0], *AT[3:]])])
def test_a_run_killed_as_it_names_a_file_reads_no_half_file_as_whole(dies, arguments, undisturbed, tmp_path, tried):
    tables, _ = undisturbed
    assert processes.Command(*arguments, "--out", tmp_path, dies=dies).end() == -signal.SIGKILL
    kept = finished(tmp_path, tables)
    assert len(kept) == (dies[0] - (dies[1] == "before")) // 2
    resumed(arguments, tmp_path, tables, kept)
    tried("kill -9 before or after the renaming of a file, the file cut in half before", 1)


def until(found, seconds=60):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_is_130_and_the_run_can_be_taken_up(arguments, undisturbed, tmp_path, tried):
    out = tmp_path / "out"
    command = processes.Command(*arguments, "--out", out)
    until(lambda: (out / "layer-ablation.json").exists())
    command.signal(signal.SIGINT)
    assert command.end() == 130
    assert "interrupted; finished tables are kept" in command.printed.splitlines()[-1]
    assert not [path for path in out.iterdir() if path.name not in (*FILES, "chunks")]
    resumed(arguments, out, undisturbed[0], finished(out, undisturbed[0]))
    tried("Ctrl-C", 1)


def test_a_second_run_into_the_same_directory_is_refused_by_its_owner_and_age(
    arguments, undisturbed, tmp_path, capsys, tried
):
    out = tmp_path / "out"
    first = processes.Command(*arguments, "--out", out)
    until(lambda: (out / lock.NAME).exists() and (out / lock.NAME).read_bytes())
    first.signal(signal.SIGSTOP)
    try:
        held = {path.name: path.read_bytes() for path in out.iterdir()}
        assert main.main([*arguments, "--out", str(out)]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"in use by process {first.process.pid} on {lock.platform.node()}, for" in said
        assert {path.name: path.read_bytes() for path in out.iterdir()} == held
    finally:
        first.signal(signal.SIGCONT)
    assert first.end() == 0, first.printed
    assert finished(out, undisturbed[0]).keys() == set(NAMES)
    tried("a second run into the same directory", 1)


def test_the_lock_of_a_process_that_is_gone_is_taken_over(arguments, undisturbed, tmp_path, tried):
    (tmp_path / lock.NAME).write_text(json.dumps({"pid": os.getpid(), "host": "here", "since": "2020-01-01T00:00:00"}))
    (tmp_path / ".layer-removal.parquet.abc.part").write_text("half a tab")
    resumed(arguments, tmp_path, undisturbed[0], {})
    tried("a lock and half a file left by a killed run", 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps({"pid": 5, "host": "there", "since": "2999-01-01T00:00:00+00:00"}), "process 5 on there, for 0 s"),
        (json.dumps({"pid": 5, "host": "there", "since": "1999-01-01T00:00:00+00:00"}), "process 5 on there, for 8"),
        ("", "a run that has just begun"),
        ("[]", "a run that has just begun"),
        ('{"pid": 5, "host": "there", "since": "2020-01-01"}', "a run that has just begun"),
    ],
    ids=["the clock was set back", "set forward", "nothing written yet", "foreign", "no time zone"],
)
def test_whatever_the_lock_file_tells_the_lock_holds(text, says, tmp_path):
    with lock.only_run(tmp_path):
        (tmp_path / lock.NAME).write_text(text)
        with pytest.raises(InputError, match=f"is in use by {says}"), lock.only_run(tmp_path):
            pass
    with lock.only_run(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_made_for_nothing_is_removed_again(tmp_path):
    with lock.only_run(tmp_path / "a/b"):
        assert (tmp_path / "a/b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="keeps no locks"), lock.only_run(tmp_path):
        pass


class Msvcrt:
    """Windows' locks as its documentation has them: a byte range of a file, which no other handle may then lock."""

    LK_NBLCK = 2

    def __init__(self):
        self.held = []

    def locking(self, handle, mode, n):
        where = (os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR), n)
        if mode != self.LK_NBLCK or where in self.held:
            raise PermissionError(13, "Permission denied")
        self.held.append(where)


def test_on_windows_its_own_locks_keep_a_second_run_out_and_the_file_tells_whose_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", Msvcrt(), raising=False)
    with lock.only_run(tmp_path):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "), lock.only_run(tmp_path):
            pass
        assert lock.msvcrt.held[0][1] > 1000  # beyond what is read of the owner
    assert list(tmp_path.iterdir()) == []


def test_where_no_open_file_can_be_removed_the_lock_file_goes_after_it_is_closed(tmp_path, monkeypatch):
    opened, unlink, acquire, close = [], Path.unlink, lock._acquire, os.close

    def as_on_windows(path, **options):
        if opened:
            raise PermissionError(13, "The file is in use")
        unlink(path, **options)

    monkeypatch.setattr(lock, "_acquire", lambda directory: opened.append(acquire(directory)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: close(handle) or (handle in opened and opened.remove(handle)))
    monkeypatch.setattr(Path, "unlink", as_on_windows)
    with lock.only_run(tmp_path):
        assert (tmp_path / lock.NAME).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_any_locks_gets_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", None, raising=False)
    with pytest.warns(UserWarning, match="keeps no locks"), lock.only_run(tmp_path):
        pass


def test_a_clock_that_runs_backwards_changes_no_table(arguments, undisturbed, tmp_path, tried):
    command = processes.Command(*arguments, "--out", tmp_path, set_up=processes.clock_runs_backwards)
    assert command.end() == 0, command.printed
    kept = finished(tmp_path, undisturbed[0])
    created = [kept[name]["created"] for name in NAMES]
    assert created == sorted(created, reverse=True)
    resumed(arguments, tmp_path, undisturbed[0], kept)
    tried("a clock that goes back a day at each look", 1)


@pytest.mark.parametrize("years", [-50, 50])
def test_times_of_files_decide_nothing(years, arguments, undisturbed, tmp_path, tried):
    begun = ["run", NAMES[0], *arguments[1 + len(NAMES) :]]
    command = processes.Command(*begun, "--out", tmp_path)
    assert command.end() == 0, command.printed
    (tmp_path / f".{NAMES[1]}.parquet.abc.part").write_text("half a tab")
    (tmp_path / lock.NAME).write_text(json.dumps({"pid": 5, "host": "there", "since": "2999-01-01T00:00:00+00:00"}))
    then = time.time() + years * 365 * 86400
    for path in tmp_path.iterdir():
        os.utime(path, (then, then))
    kept = finished(tmp_path, undisturbed[0])
    assert set(kept) == {NAMES[0]}
    resumed(arguments, tmp_path, undisturbed[0], kept)
    tried("files and a lock of another time, past or to come", 1)


@pytest.mark.parametrize(
    "bytes_left", [0, 3000, 60000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 100, 1000, 300_000))]
)
def test_a_full_disk_is_one_sentence_and_leaves_whole_files_only(bytes_left, arguments, undisturbed, tmp_path, tried):
    out = tmp_path / "out"
    command = processes.Command(*arguments, "--out", out, largest_file=bytes_left)
    assert command.end() == 2
    said = command.printed.strip().splitlines()[-1]
    assert said.startswith("ioi-mamba: ")
    assert "cannot be written (File too large): make room" in said
    assert "Traceback" not in command.printed
    kept = {}
    if out.exists():
        kept = finished(out, undisturbed[0])
        assert not [path for path in out.iterdir() if path.name not in (*FILES, "chunks")]
        for path in out.glob("*.parquet"):
            pd.read_parquet(path)
    resumed(arguments, out, undisturbed[0], kept)
    tried("a disk that is full (no file may grow beyond a limit)", 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 KiB in memory, and a function that gives it more room."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = lambda options: subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
    if shutil.which("mount") is None or mount("size=24k").returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield place, lambda size: mount(f"remount,size={size}").check_returncode()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_small_disk_that_fills_up_is_one_sentence_each_time_until_there_is_room(
    small_disk, arguments, undisturbed, tried
):
    disk, give_room = small_disk
    # One page of memory (the lock alone), some tables, all tables but no report, and room for all.
    for size in ("4k", "24k", "64k", "400k"):
        give_room(size)
        command = processes.Command(*arguments, "--out", disk, "--resume")
        assert command.end() == 2, command.printed
        said = command.printed.strip().splitlines()[-1]
        assert said.startswith("ioi-mamba: ")
        assert "cannot be written (No space left on device): make room" in said
        kept = finished(disk, undisturbed[0])
        assert not [path for path in disk.iterdir() if path.name not in (*FILES, "chunks")]
    assert set(kept) == set(NAMES)
    give_room("64m")
    resumed(arguments, disk, undisturbed[0], kept)
    tried("a small disk that fills up", 4)
