"""The faults made on purpose still fit the code; that tests notice them is tried by `python -m tests.mutants`."""

import pytest
from mutants import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.new[:40]}")
def test_a_fault_still_has_a_place_and_tests(fault):
    assert fault.old in (ROOT / fault.file).read_text()
    assert fault.old != fault.new
    for path in fault.tests.split(" -k ")[0].split():
        assert (ROOT / path).exists()


def test_there_are_faults_for_every_room_of_numbers():
    rooms = {fault.file.split("/")[1] for fault in FAULTS if fault.file.startswith("ioi_mamba/")}
    assert {"model", "passes", "tasks", "circuits"} <= rooms
    assert len(FAULTS) >= 40
