"""Which rows run, in which slots, and which of their tokens are forwarded in a step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import ne

from hcot_lmeval.engine.rows import OnToken, Request, Row
from hcot_lmeval.engine.slots import Chunk, KVPool
from hcot_lmeval.trace import Step

MakeRow = Callable[[Request, int, int], Row]


@dataclass
class _Resident:
    """The prompt whose keys and values lie at the start of a slot, also after its row has ended."""

    prompt_ids: tuple[int, ...] = ()
    row: Row | None = None

    @property
    def tokens(self) -> int:
        """How many tokens of the prompt are in the slot. No prune reaches into a prompt whose markers are inert."""
        if self.row is None:
            return 0
        return min(len(self.row.positions), len(self.prompt_ids))

    @property
    def will_grow(self) -> bool:
        """Whether more of the prompt can be copied later. Of the whole prompt, all but the last token is copied."""
        row = self.row
        return row is not None and not row.finished and row.reads_prompt and self.tokens < len(self.prompt_ids) - 1


class Scheduler:
    """First come, first served; a row is admitted as soon as a slot is free.

    Args:
        samples: (request, sample) pairs in order.
        pool: the slots.
        make_row: builds the row of a request and sample in a slot.
        step_tokens: most prompt and solution tokens forwarded in a step besides one token for every row.
        share: copy common prompt prefixes between slots instead of forwarding them again.

    Attributes:
        rows: the running rows.
    """

    def __init__(
        self,
        samples: Iterable[tuple[Request, int]],
        pool: KVPool,
        make_row: MakeRow,
        *,
        step_tokens: int,
        share: bool = True,
    ) -> None:
        self.rows: list[Row] = []
        self._waiting = deque(samples)
        self._parked: dict[tuple[int, ...], deque[tuple[Request, int]]] = {}  # by the prompt that is being read
        self.pool, self._make_row = pool, make_row
        self._step_tokens, self._share = step_tokens, share
        self._free = deque(range(pool.slots))
        self._residents = [_Resident() for _ in range(pool.slots)]

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._parked or self.rows)

    def admit(self) -> None:
        """Gives free slots to waiting requests.

        A request whose prompt another row is reading right now waits until it can copy it.
        """
        if not (self._free and (self._waiting or self._parked)):
            return
        reading = {held.prompt_ids for held in self._residents if held.will_grow} if self._share else set()
        for prompt_ids in [prompt_ids for prompt_ids in self._parked if prompt_ids not in reading]:
            self._waiting.extendleft(reversed(self._parked.pop(prompt_ids)))
        while self._waiting and self._free:
            request, sample = self._waiting.popleft()
            if request.prompt_ids in reading:
                self._parked.setdefault(request.prompt_ids, deque()).append((request, sample))
            elif self._start(request, sample).will_grow and self._share:
                reading.add(request.prompt_ids)

    def plan(self) -> list[tuple[Row, Chunk]]:
        """Returns the chunks of the next step: one token for every row that decodes, then prompts and solutions.

        Rows whose tokens are all forwarded have none.
        """
        waiting = [row for row in self.rows if not row.needs_token]
        budget = self._step_tokens + len(waiting)
        planned = []
        for row in sorted(waiting, key=lambda row: row.waiting_tokens):
            if budget <= 0:
                break
            chunk = row.next_chunk(budget)
            budget -= len(chunk.ids)
            planned.append((row, chunk))
        return planned

    def retire(self) -> list[Row]:
        """Removes the finished rows, frees their slots and returns them."""
        finished = [row for row in self.rows if row.finished]
        self.rows = [row for row in self.rows if not row.finished]
        self._free.extend(row.slot for row in finished)
        return finished

    def _start(self, request: Request, sample: int) -> _Resident:
        donor, shared = self._best_donor(request.prompt_ids) if self._share else (0, 0)
        slot = donor if shared and donor in self._free else self._free[0]
        self._free.remove(slot)
        row = self._make_row(request, sample, slot)
        if shared:
            if slot != donor:
                self.pool.copy(donor, slot, shared)
            row.skip_prompt(shared)
        self._residents[slot] = resident = _Resident(request.prompt_ids, row)
        self.rows.append(row)
        return resident

    def _best_donor(self, prompt_ids: tuple[int, ...]) -> tuple[int, int]:
        """Returns the slot that holds most of the prompt, and how much; the last token is always forwarded anew."""
        best = (0, 0)
        for slot, resident in enumerate(self._residents):
            limit = min(resident.tokens, len(prompt_ids) - 1)
            if limit > best[1]:
                differ = map(ne, resident.prompt_ids[:limit], prompt_ids)
                shared = next((place for place, differs in enumerate(differ) if differs), limit)
                best = max(best, (slot, shared), key=lambda pair: pair[1])
        return best


class Remaining:
    """The samples that are still to be generated; their rows may start again.

    Args:
        requests: all of them.
        on_token: is told each token of a sample once.

    Attributes:
        left: (request, sample) pairs in order.
    """

    def __init__(self, requests: Iterable[Request], on_token: OnToken | None) -> None:
        self.left = [(request, k) for request in requests for k in range(request.params.n)]
        self._count = Counter((id(request), k) for request, k in self.left)
        self._on_token = on_token
        self._told: Counter[tuple[int, int]] = Counter()
        self._now: Counter[tuple[int, int]] = Counter()

    def finish(self, row: Row) -> None:
        """A sample is generated."""
        self._count[id(row.request), row.sample] -= 1

    def restart(self) -> bool:
        """Leaves what is not finished, whose rows start again; returns whether that is anything."""
        count = Counter(self._count)
        pairs, self.left = self.left, []
        for request, k in pairs:
            if count[id(request), k] > 0:
                count[id(request), k] -= 1
                self.left.append((request, k))
        self._now.clear()
        return bool(self.left)

    def tell(self, request: Request, sample: int, token: int, step: Step, live: Sequence[int]) -> None:
        """Tells of a token, unless it was told before the row started again."""
        key = id(request), sample
        self._now[key] += 1
        if self._on_token is not None and self._now[key] > self._told[key]:
            self._told[key] += 1
            self._on_token(request, sample, token, step, live)
