"""Many small operations on several threads.

Torch divides every operation among its threads, which then wait for each other after each: on a machine where another process has
one of the cores, thousands of small operations take ten times as long as on one thread. Here a thread takes whole pieces of the work,
with torch's division switched off, and nobody waits but at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

#: Thread -> how many threads it may use while torch's own are off.
_allowed = threading.local()
_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


@contextmanager
def undivided() -> Iterator[int]:
    """Torch runs every operation of this thread on this thread alone; yields how many threads ``spread`` may use meanwhile."""
    known = getattr(_allowed, "count", None)
    if known is not None:
        yield known
        return
    count = torch.get_num_threads()
    _allowed.count = count
    # Torch keeps this number by thread; only a thread that starts meanwhile would take it over.
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        _allowed.count = None
        torch.set_num_threads(count)


def spread(work: Callable[[Iterator], None], items: Sequence, device: torch.device | str = "cpu") -> None:
    """Call ``work`` with an iterator over ``items``: on a CPU once in each of torch's threads, which share the items among them.

    The result must not depend on who gets which item, or in which order. Errors of any thread are raised.
    """
    if torch.device(device).type != "cpu":
        work(iter(items))
        return
    with undivided() as count:
        left = iter(list(items))  # one step of a list's iterator is never divided between threads
        helpers = min(count, len(items)) - 1
        if helpers <= 0:
            work(left)
            return
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def help_out() -> None:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                work(left)

        running = [_pool(count).submit(help_out) for _ in range(helpers)]
        try:
            work(left)
        finally:
            for future in running:
                if not future.cancel():  # a helper that has not begun by now has nothing left to do
                    future.result()


def _pool(count: int) -> ThreadPoolExecutor:
    with _lock:
        if count not in _pools:
            _pools[count] = ThreadPoolExecutor(count - 1, "oft", initializer=_start)
        return _pools[count]


def _start() -> None:
    _allowed.count = 1
    torch.set_num_threads(1)
