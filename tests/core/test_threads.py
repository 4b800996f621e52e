"""Work that is spread over threads: the same numbers, the caller's state, errors; and torch's own threads as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from oft_core import LayerRotation, Strength, build_all, measure
from oft_core.threads import spread, undivided


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_is_taken_once_and_by_all_threads(threads: int) -> None:
    taken, names, meet = [], set(), threading.Barrier(threads, timeout=20)

    def work(items) -> None:
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        meet.wait()  # passes only if all threads are here
        taken.extend(items)

    for _ in range(3):
        spread(work, range(50))
    assert sorted(taken) == sorted(3 * list(range(50))) and len(names) >= threads
    assert torch.get_num_threads() == threads
    there = []
    spread(lambda items: there.append((threading.current_thread(), list(items))), range(3), "meta")
    assert there == [(threading.current_thread(), [0, 1, 2])]  # other devices have their own threads


def test_a_new_thread_still_gets_torchs_own_number(threads: int) -> None:
    spread(lambda items: list(items), range(9))
    found = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [threads]


def test_spreading_inside_does_not_spread_again(threads: int) -> None:
    seen = []

    def inner(items) -> None:
        seen.extend(items)

    def outer(items) -> None:
        for i in items:
            spread(inner, [(i, k) for k in range(4)])

    spread(outer, range(5))
    assert sorted(seen) == [(i, k) for i in range(5) for k in range(4)] and torch.get_num_threads() == threads


@pytest.mark.parametrize("who", ["caller", "helper", "all"])
def test_errors_reach_the_caller(threads: int, who: str) -> None:
    here, meet = threading.current_thread(), threading.Barrier(threads, timeout=20)

    def work(items) -> None:
        meet.wait()
        if who == "all" or (who == "caller") == (threading.current_thread() is here):
            raise ValueError("broken")

    if who == "helper" and threads == 1:
        spread(work, range(9))
    else:
        with pytest.raises(ValueError, match="broken"):
            spread(work, range(9))
    with pytest.raises(KeyError), undivided():
        raise KeyError
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_weights_of_any_grad_mode(threads: int, mode) -> None:
    with mode():
        weight = torch.randn(512, 700, generator=torch.Generator().manual_seed(0))
        want = weight.clone()
        layer = LayerRotation("out", 32, 16, generator=torch.randn(1, 16, 496, generator=torch.Generator().manual_seed(1)) * 0.02)
        layer.apply_(weight, Strength())
        assert weight.is_inference() == (mode is torch.inference_mode)
        want = (torch.block_diag(*layer.build(Strength()).matrices[0].double()) @ want.double()).float()
        assert torch.allclose(weight, want, atol=1e-5)


def test_numbers_do_not_depend_on_the_threads() -> None:
    """Bit for bit: a file gives the same picture on any machine of one kind."""
    g = torch.Generator().manual_seed(2)
    layers = [LayerRotation("out", b, n, generator=torch.randn(1, n, b * (b - 1) // 2, generator=g) * 0.03) for b, n in ((32, 40), (8, 300), (16, 9), (32, 40))]
    layers.append(LayerRotation("in", 4, 256, generator=torch.randn(5, 256, 6, generator=g) * 0.1, butterfly="peft"))
    layers.append(LayerRotation("in", 64, 20, "neumann", generator=torch.randn(1, 20, 2016, generator=g) * 0.01))
    weights = [torch.randn((op.axis, 300) if op.side == "out" else (300, op.axis), generator=g).half() for op in layers]
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for op in layers:
                op._cache.clear()
            found = []
            for strength in (Strength(), Strength(-0.5), Strength(0.7, "geodesic")):
                work = [w.clone() for w in weights]
                for op, built, w in zip(layers, build_all(layers, strength), work, strict=True):
                    op.apply_(w, strength, rotation=built)
                found += work
            results.append((found, measure.measure(layers, Strength(1.5))))
    finally:
        torch.set_num_threads(before)
    for found, measures in results[1:]:
        assert measures == results[0][1]
        assert all(torch.equal(a, b) for a, b in zip(found, results[0][0], strict=True))
