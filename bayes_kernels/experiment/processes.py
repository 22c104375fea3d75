"""Calls side by side, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import transformers

from ..progress import progress_bar
from .callbacks import count_steps_in
from .machine import Gpu

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# The part of a GPU's free memory that is shared out: contexts and libraries of the processes need the rest.
_SHARED_OUT = 0.9
# Seconds without a step of any training after which the bar says so: it may stand for long.
_NO_STEP = 10.0


def shares(gpus: Sequence[Gpu], processes: int) -> list[tuple[Gpu, int]]:
    """The GPU of each process, and the bytes that it may take there: an equal share of what is free.

    Args:
        gpus: At least one; processes are dealt out to them in turn.
        processes: How many there are.
    """
    places = [number % len(gpus) for number in range(processes)]
    return [
        (gpus[place], int(_SHARED_OUT * gpus[place].free / places.count(place))) for place in places
    ]


def side_by_side(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    finished: Callable[[int, Any], None],
    *,
    after: Sequence[Collection[int]] | None = None,
    processes: int = 1,
    gpus: Sequence[Gpu] = (),
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
        processes: How many at a time; 1 makes the calls one after the other, in this process unless it
            sees several GPUs.
        gpus: GPUs that the processes are dealt out to in turn. Each sees its own one only, and may take its
            share of the memory: one that needs more fails, and the others go on.
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

    if not arguments:
        return
    processes = min(processes, len(arguments))
    if processes <= 1 and len(gpus) <= 1:  # of several this process would see all
        while (index := next_call()) is not None:
            try:
                result = function(*arguments[index], progress=progress)
            except Exception as error:
                result = error
            over.add(index)
            finished(index, result)
            del result  # the frames of an exception hold its model
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    share = max(1, torch.get_num_threads() // processes)

    places = shares(gpus, processes) if gpus else [None] * processes

    def start_process(number: int) -> ProcessPoolExecutor:
        place = places[number]
        part = None if place is None else place[1] / place[0].total
        pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_start_worker, initargs=(share, counter, part)
        )
        if place is not None:
            with _seeing(place[0]):  # before the process begins: CUDA looks once
                pool.submit(os.getpid)
        return pool

    pools = [start_process(number) for number in range(processes)]
    free = list(range(processes))
    running: dict[Future[bytes], tuple[int, int]] = {}
    desc = f"{len(arguments)} runs, {processes} at a time, training steps"
    bar = progress_bar(progress, total=steps, desc=desc)
    trained = time.monotonic()
    try:
        while left or running:
            while free and (index := next_call()) is not None:
                number = free.pop()
                try:
                    future = pools[number].submit(_call_pickled, function, arguments[index])
                except BrokenProcessPool:  # killed while it waited for a call
                    pools[number].shutdown(wait=False)
                    pools[number] = start_process(number)
                    future = pools[number].submit(_call_pickled, function, arguments[index])
                running[future] = index, number
            if not running:
                raise ValueError(f"side_by_side: calls {left} wait for calls that never come")
            ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            if counter.value > bar.n:
                trained = time.monotonic()
            idle = time.monotonic() - trained
            said = (
                f"no step for {idle:.0f} s (loading, converting, scoring)"
                if idle >= _NO_STEP
                else ""
            )
            bar.set_postfix_str(said, refresh=False)
            bar.update(counter.value - bar.n)
            for future in ended:
                index, number = running.pop(future)
                try:
                    # Pickled by hand: torch would pass tensors in shared memory, which containers
                    # limit.
                    result = pickle.loads(future.result())
                except BrokenProcessPool:
                    result = RuntimeError(
                        "a run was killed from outside, perhaps for lack of memory, or could not begin; "
                        "use fewer --processes, or --threads where there are none"
                    )
                    pools[number].shutdown(wait=False)
                    pools[number] = start_process(number)
                except Exception as error:
                    result = error
                free.append(number)
                over.add(index)
                finished(index, result)
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        bar.close()
        for pool in pools:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _seeing(gpu: Gpu) -> Iterator[None]:
    """Inside, processes that begin see this GPU only."""
    before = os.environ.get(_VISIBLE)
    os.environ[_VISIBLE] = gpu.name
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VISIBLE]
        else:
            os.environ[_VISIBLE] = before


def _start_worker(threads: int, counter: Any, part: float | None) -> None:
    take_share(part)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    count_steps_in(counter)
    torch.set_num_threads(threads)
    quiet_libraries()
    # What a run warns of is among its notes, which the parent has.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"bayes_kernels\.experiment\.")


def take_share(part: float | None) -> None:
    """Let torch take no more than this part of the GPU; None for no limit."""
    if part is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(part)


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
        if (other := portable(error)) is not error:
            raise other from None
        raise


def portable(error: Exception) -> Exception:
    """An exception that another process can read: one that it could not would look like a killed process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def quiet_libraries() -> None:
    """No messages of transformers that mean nothing to users of the command line."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
