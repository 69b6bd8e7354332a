"""Processes of a run end without a thread of Gloo that could abort them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hcot_lmeval.processes import leave_group, leave_group_at_exit

TASKS = Path("/proc/self/task")


def gloo_threads() -> int:
    return sum((task / "comm").read_text().startswith("pt_gloo") for task in TASKS.iterdir())


class Wrapper:
    """Part of a cycle that holds the group, as DDP's wrapper of a model is."""

    def __init__(self) -> None:
        self.group, self.itself = dist.group.WORLD, self
        dist.all_reduce(torch.ones(2))


def worker(rank: int, store: str, counts) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    Wrapper()
    before = gloo_threads()
    leave_group()
    counts.put((before, gloo_threads(), dist.is_initialized()))


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_threads_of_gloo_end_with_the_group(tmp_path):
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    ranks = [context.Process(target=worker, args=(rank, str(tmp_path / "store"), counts)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for before, after, grouped in [counts.get(timeout=900) for _ in ranks]:
        assert before > 0 and after == 0 and not grouped
    for rank in ranks:
        rank.join(timeout=900)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_it_happens_before_python_shuts_down(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    leave_group_at_exit()
    assert registered == [leave_group]


def test_a_single_process_has_no_group_to_leave():
    leave_group()
    assert not dist.is_initialized()
