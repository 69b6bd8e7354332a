"""Which packed row is trained on when: a function of the seed alone, so that a resumed run goes on as it would have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils.data import Dataset

from hcot_lmeval.trace import Policy


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum.

    Attributes:
        policy: what its rows were compiled for.
        rows: packed rows, read by index.
        steps: optimiser steps.
    """

    policy: Policy
    rows: Sequence[Mapping[str, list[int]]]
    steps: int


def steps_of(epochs: float, rows: int, rows_per_step: int) -> int:
    """Returns the optimiser steps that go `epochs` times through `rows`, rounded up, at least 1."""
    return max(1, math.ceil(epochs * rows / rows_per_step))


class Schedule(Dataset):
    """All rows of a run in the order of training: phases one behind the other, each in ever new shuffles of its rows.

    Args:
        phases: the curriculum.
        rows_per_step: rows of an optimiser step over all processes.
        seed: of the shuffles.

    Raises:
        ValueError: a phase has no rows.
    """

    def __init__(self, phases: Sequence[Phase], rows_per_step: int, seed: int = 0) -> None:
        for number, phase in enumerate(phases):
            if not len(phase.rows):
                raise ValueError(
                    f"phases.{number} ({phase.policy}) has no rows to train on; see the report of its data"
                )
        self.phases = list(phases)
        self.rows_per_step = rows_per_step
        self.seed = seed
        self._shuffled: tuple[tuple[int, int], np.ndarray] | None = None

    @cached_property
    def starts(self) -> list[int]:
        """The optimiser step at which each phase starts, and the number of all steps."""
        return [0, *np.cumsum([phase.steps for phase in self.phases]).tolist()]

    def __len__(self) -> int:
        return int(self.starts[-1]) * self.rows_per_step

    def __getitem__(self, index: int) -> Mapping[str, list[int]]:
        """Returns the row number `index` of the run."""
        number = int(np.searchsorted(self.starts, index // self.rows_per_step, side="right")) - 1
        phase = self.phases[number]
        epoch, place = divmod(index - self.starts[number] * self.rows_per_step, len(phase.rows))
        return phase.rows[int(self._order(number, epoch)[place])]

    def _order(self, number: int, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != (number, epoch):
            generator = np.random.default_rng([self.seed, number, epoch])
            self._shuffled = (number, epoch), generator.permutation(len(self.phases[number].rows))
        return self._shuffled[1]
