"""Limits of requests, tokens and money: a request is sent only if no limit can be crossed by it.

What a request may cost at most is set aside before it is sent: its size, and as many output tokens as it may use. Once
it is known what it did cost, the rest is free again; who does not fit waits for that, and is refused where even then
it cannot fit.

This module imports the standard library alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import NOTHING, Task, Usage

BYTES_PER_TOKEN = 3.0
"""Of English text with mathematics in JSON, at the low end. Corrected by what the server counts."""
FRAME = 64
"""Tokens around messages and schema that do not stand in them."""


def input_tokens(task: Task, bytes_per_token: float = BYTES_PER_TOKEN) -> int:
    """Returns about how many tokens a question has."""
    return FRAME + int(task.size / bytes_per_token) + 1


@dataclass(frozen=True)
class Amount:
    """Requests with their tokens and cost.

    Attributes:
        requests: how many.
        usage: tokens.
        usd: cost; 0 where no price is known.
    """

    requests: int = 0
    usage: Usage = NOTHING
    usd: float = 0.0

    def plus(self, other: Amount) -> Amount:
        return Amount(self.requests + other.requests, self.usage.plus(other.usage), self.usd + other.usd)

    def minus(self, other: Amount) -> Amount:
        usage = Usage(*(a - b for a, b in zip(self.usage, other.usage, strict=True)))
        return Amount(self.requests - other.requests, usage, self.usd - other.usd)


class Budget:
    """What was spent, what is set aside, and the limits.

    Args:
        options: hold the limits.
        price: tokens -> US dollars; None where no price is known.
        spent: by earlier runs.

    Raises:
        ValueError: there is a limit of money, and no price is known.
    """

    def __init__(self, options: TeacherOptions, price: Callable[[Usage], float | None], spent: Amount) -> None:
        self._options, self._price, self.spent = options, price, spent
        self._open, self._bytes_per_token = Amount(), BYTES_PER_TOKEN
        self._changed = asyncio.Condition()
        if options.max_usd is not None and price(Usage(1, 1)) is None:
            raise ValueError(
                f"max_usd={options.max_usd:g}: no price of {options.teacher} is known; give --price-input and "
                "--price-output (US dollars per million tokens), or limit --max-teacher-tokens"
            )

    def most(self, task: Task) -> Amount:
        """Returns what a request may cost at most."""
        usage = Usage(input_tokens(task, self._bytes_per_token), self._options.output_tokens)
        return Amount(1, usage, self._price(usage) or 0.0)

    async def reserve(self, task: Task) -> Amount | str:
        """Sets aside what a request may cost; waits while others may leave enough.

        Returns:
            The amount, to be given to `settle`; or in words which limit would be crossed.
        """
        async with self._changed:
            while True:
                wanted = self.most(task)
                if told := self._crossed(self.spent.plus(wanted)):
                    return told
                if not self._crossed(self.spent.plus(self._open).plus(wanted)):
                    self._open = self._open.plus(wanted)
                    return wanted
                await self._changed.wait()

    async def settle(self, reserved: Amount, spent: Amount, size: int = 0) -> None:
        """Puts in the place of what was set aside what it did cost.

        Args:
            reserved: what `reserve` returned.
            spent: the real amount.
            size: bytes of the question, where the server has counted its tokens.
        """
        async with self._changed:
            self._open, self.spent = self._open.minus(reserved), self.spent.plus(spent)
            counted = spent.usage.input_tokens - FRAME
            if size and counted > 0:
                self._bytes_per_token = min(self._bytes_per_token, size / counted)
            self._changed.notify_all()

    def _crossed(self, total: Amount) -> str:
        options = self._options
        for name, limit, found in (
            ("max_requests", options.max_requests, total.requests),
            ("max_teacher_tokens", options.max_teacher_tokens, total.usage.tokens),
            ("max_usd", options.max_usd, total.usd),
        ):
            if limit is not None and found > limit * (1 + 1e-12):
                return f"{name}={limit:g} would be crossed: {self._told(name)} spent, one more request may need more"
        return ""

    def _told(self, name: str) -> str:
        spent = self.spent
        tokens = f"{spent.usage.tokens} tokens"
        return {"max_requests": f"{spent.requests} requests", "max_usd": f"${spent.usd:.4f}"}.get(name, tokens)
