"""Programs that tests start leave no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from programs import end_all, is_running, run_command

# Starts a process in its own group and one in a group apart as torchrun does, writes their numbers, waits.
_PROGRAM = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
started = [subprocess.Popen(sleep, start_new_session=apart) for apart in (False, True)]
with open(sys.argv[1] + ".tmp", "w") as file:
    print(*(process.pid for process in started), file=file)
os.replace(sys.argv[1] + ".tmp", sys.argv[1])
print("started", flush=True)
time.sleep(600)
"""


def _started(file: Path) -> list[int]:
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return [int(word) for word in file.read_text().split()]


def _all_end(pids: list[int]) -> bool:
    end = time.monotonic() + 60
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(is_running, pids))


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("", 1), KeyboardInterrupt()])
def test_processes_of_a_program_that_is_stopped_end(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, wait = tmp_path / "pids", subprocess.Popen.communicate

    def stopped(self: Any, timeout: float | None = None) -> Any:
        if timeout is None:
            return wait(self)
        _started(file)
        raise error

    monkeypatch.setattr(subprocess.Popen, "communicate", stopped)
    with pytest.raises(type(error)) as caught:
        run_command([sys.executable, "-c", _PROGRAM, str(file)])
    pids = _started(file)
    assert len(pids) == 2 and _all_end(pids)
    if isinstance(error, subprocess.TimeoutExpired):
        assert "started" in str(caught.value)


def test_processes_of_a_program_that_has_ended_end(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    code = _PROGRAM.replace("apart in (False, True)", "apart in (False,)").replace(
        "time.sleep(600)\n", "os._exit(3)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], start_new_session=True)
    assert process.wait(60) == 3
    (pid,) = _started(file)
    assert is_running(pid)
    end_all(process)
    assert _all_end([pid])


def test_what_a_program_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print(os.environ['WORD']); sys.exit('no')"
    ended = run_command([sys.executable, "-c", code], env={**os.environ, "WORD": "yes"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "yes\n", "no\n")
