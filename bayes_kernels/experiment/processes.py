"""Calls side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import transformers

from ..progress import progress_bar
from .callbacks import count_steps_in


def side_by_side(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    finished: Callable[[int, Any], None],
    *,
    after: Sequence[Collection[int]] | None = None,
    processes: int = 1,
    steps: int = 0,
    progress: bool = True,
) -> None:
    """Call a function with each of several arguments, some at a time, each in its own process.

    Small models use two cores far better as two processes than as two threads. Each process has its
    share of this process' threads; scores do not depend on what runs beside, only times do. A call
    that fails, or whose process is killed, does not touch the others.

    Args:
        function: Of a module, so that another process finds it; called as
            ``function(*arguments[i], progress=...)``. What it returns is pickled.
        arguments: Of every call; the first in the list that can begin does.
        finished: Called with the number of the call and its result, or its exception, as they come.
            Where it raises, all that runs is stopped.
        after: For every call the numbers of those that must have finished before.
        processes: How many at a time; 1 makes the calls one after the other in this process.
        steps: Optimiser steps of all calls together, for the bar.
        progress: Whether to show bars.
    """
    needs = [set(numbers) for numbers in after] if after else [set() for _ in arguments]
    left = list(range(len(arguments)))
    over: set[int] = set()

    def next_call() -> int | None:
        found = next((i for i in left if needs[i] <= over), None)
        if found is not None:
            left.remove(found)
        return found

    processes = min(processes, len(arguments))
    if processes <= 1:
        while (index := next_call()) is not None:
            try:
                result = function(*arguments[index], progress=progress)
            except Exception as error:
                result = error
            over.add(index)
            finished(index, result)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    share = max(1, torch.get_num_threads() // processes)

    def start_process() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, mp_context=context, initializer=_start_worker, initargs=(share, counter)
        )

    free = [start_process() for _ in range(processes)]
    running: dict[Future[bytes], tuple[int, ProcessPoolExecutor]] = {}
    bar = progress_bar(progress, total=steps, desc=f"{len(arguments)} runs, {processes} at a time")
    try:
        while left or running:
            while free and (index := next_call()) is not None:
                process = free.pop()
                try:
                    future = process.submit(_call_pickled, function, arguments[index])
                except BrokenProcessPool:  # killed while it waited for a call
                    process.shutdown(wait=False)
                    process = start_process()
                    future = process.submit(_call_pickled, function, arguments[index])
                running[future] = index, process
            if not running:
                raise ValueError(f"side_by_side: calls {left} wait for calls that never come")
            ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(counter.value - bar.n)
            for future in ended:
                index, process = running.pop(future)
                try:
                    # Pickled by hand: torch would pass tensors in shared memory, which containers
                    # limit.
                    result = pickle.loads(future.result())
                except BrokenProcessPool:
                    result = RuntimeError(
                        "a run was killed from outside, perhaps for lack of memory; use fewer "
                        "threads, so that fewer processes run side by side"
                    )
                    process.shutdown(wait=False)
                    process = start_process()
                except Exception as error:
                    result = error
                free.append(process)
                over.add(index)
                finished(index, result)
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        bar.close()
        for process in [*free, *(process for _, process in running.values())]:
            process.shutdown(cancel_futures=True)


def _start_worker(threads: int, counter: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    count_steps_in(counter)
    torch.set_num_threads(threads)
    quiet_libraries()


def _end_with_parent() -> None:
    """End this process when its parent is gone, in whatever way: nobody waits for its result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call_pickled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(function(*arguments, progress=False))
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # would arrive as a process that was killed
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def quiet_libraries() -> None:
    """No messages of transformers that mean nothing to users of the command line."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
