"""Short programs, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command([sys.executable, "-c", code], env={**os.environ, **environment})


def run_command(
    command: list[str], *, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a command, which leaves no process behind.

    Raises:
        TimeoutExpired: it did not end in time; the message has what it said last.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes, **options) as process:
        try:
            found = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end_all(process)
            said = "\n".join(text[-4000:] for text in process.communicate())
            raise subprocess.TimeoutExpired([*command, said], timeout) from None
        finally:
            end_all(process)
    return subprocess.CompletedProcess(command, process.returncode, *found)


def end_all(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started with `start_new_session`, and all that it has started.

    Those in its group, even if it has ended; while it runs those below it, too, as torchrun gives its
    workers groups of their own.
    """
    below = [] if process.poll() is not None else _all_below(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def _all_below(process: int) -> list[int]:
    found = children(process)
    return found + [one for child in found for one in _all_below(child)]


def children(process: int) -> list[int]:
    """Numbers of the processes that a process has started and that are there; on Linux."""
    found = [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [int(name) for name in found if _status(name).get("PPid") == str(process)]


def is_running(process: int) -> bool:
    """Whether a process is there and has not ended; on Linux."""
    return not _status(str(process)).get("State", "Z").startswith("Z")


def _status(process: str) -> dict[str, str]:
    try:
        lines = Path("/proc", process, "status").read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@contextmanager
def joined() -> Iterator[int]:
    """For the programs of `together`: the number of this process, in a process group of all.

    The process ends after it, without the interpreter's exit: threads of gloo abort there now and then.
    """
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=180))
    yield torch.distributed.get_rank()
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def together(
    module: str, *arguments: object, count: int = 2, timeout: float = 120, **environment: str
) -> list[str]:
    """What `count` processes of `python -m module` print, which find each other as under a launcher.

    They run without a GPU. All must end well; those that do not end in time are killed, and so are the
    others of one that fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    same |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    same |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    files, workers = [], []
    end = time.monotonic() + timeout
    try:
        for rank in map(str, range(count)):
            files.append(tempfile.TemporaryFile("w+"))
            env = {**os.environ, **same, **environment, "RANK": rank, "LOCAL_RANK": rank}
            streams = {"stdout": files[-1], "stderr": subprocess.STDOUT}
            workers.append(subprocess.Popen(command, env=env, start_new_session=True, **streams))
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers) or time.monotonic() > end:
                time.sleep(1)  # the others may say why, too
                break
            time.sleep(0.05)
    finally:
        for worker in workers:
            end_all(worker)
            worker.wait()
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
        file.close()
    codes = [worker.returncode for worker in workers]
    assert codes == [0] * count, "\n".join([f"exit codes {codes}", *(t[-4000:] for t in texts)])
    return texts
