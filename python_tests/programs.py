"""Short programs, each in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@contextmanager
def joined() -> Iterator[int]:
    """For the programs of `together`: the number of this process, in a process group of all.

    The process ends after it, without the interpreter's exit: threads of gloo abort there now and then.
    """
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
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
            workers.append(
                subprocess.Popen(command, env=env, stdout=files[-1], stderr=subprocess.STDOUT)
            )
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers) or time.monotonic() > end:
                time.sleep(1)  # the others may say why, too
                break
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
        file.close()
    codes = [worker.returncode for worker in workers]
    assert codes == [0] * count, "\n".join([f"exit codes {codes}", *(t[-4000:] for t in texts)])
    return texts
