"""Prices, and limits of requests, tokens and money: a request is sent only if no limit can be crossed by it.

What a request may cost at most is set aside before it is sent: its size, and as many output tokens as it may use. Once
it is known what it did cost, the rest is free again. A request that does not fit waits for that, and is refused where
even then it cannot fit.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import Spent, Task

BYTES_PER_TOKEN = 3.0
"""Of English text with mathematics in JSON, at the low end. Corrected by what the server counts."""
FRAME = 64
"""Tokens around messages and schema that do not stand in them."""


def input_tokens(task: Task, bytes_per_token: float = BYTES_PER_TOKEN) -> int:
    """Returns about how many tokens a question has."""
    return FRAME + int(task.size / bytes_per_token) + 1


class Prices:
    """What tokens cost in US dollars: as given, else as `genai_prices` knows."""

    def __init__(self, options: TeacherOptions) -> None:
        self._given = None if options.price_input is None else (options.price_input, options.price_output or 0.0)
        self._provider, self._model = options.provider.prices, options.model

    def at(self, input_tokens: int = 1, output_tokens: int = 1) -> float | None:
        """Returns the price of so many tokens; None where none is known."""
        from genai_prices import Usage

        return self.of(Usage(input_tokens=input_tokens, output_tokens=output_tokens))

    def of(self, usage: Any) -> float | None:
        """Returns the price of a usage of `pydantic_ai` or `genai_prices`, which know cached tokens too."""
        from genai_prices import calc_price

        if self._given is not None:
            return ((usage.input_tokens or 0) * self._given[0] + (usage.output_tokens or 0) * self._given[1]) / 1e6
        if self._provider is None:
            return None
        try:
            return float(calc_price(usage, self._model, provider_id=self._provider).total_price)
        except (LookupError, ValueError):
            return None


class Budget:
    """What was spent, what is set aside, and the limits.

    Args:
        options: hold the limits and the prices.
        spent: by earlier runs.

    Raises:
        ValueError: there is a limit of money, and no price is known.
    """

    def __init__(self, options: TeacherOptions, spent: Spent) -> None:
        self.spent, self.prices = spent, Prices(options)
        self._options, self._reserved, self._bytes_per_token = options, Spent(), BYTES_PER_TOKEN
        self._changed = asyncio.Condition()
        if options.max_usd is not None and self.prices.at() is None:
            raise ValueError(
                f"max_usd={options.max_usd:g}: no price of {options.teacher} is known; give --price-input and "
                "--price-output (US dollars per million tokens), or limit --max-teacher-tokens"
            )

    def most(self, task: Task) -> Spent:
        """Returns what a request may cost at most."""
        size, room = input_tokens(task, self._bytes_per_token), self._options.output_tokens
        return Spent(1, size, room, self.prices.at(size, room) or 0.0)

    async def reserve(self, task: Task) -> Spent | str:
        """Sets aside what a request may cost; waits while others may leave enough.

        Returns:
            The amount, to be given to `settle`; or in words which limit would be crossed.
        """
        async with self._changed:
            while True:
                needed = self.most(task)
                if crossed := self._crossed(self.spent.plus(needed)):
                    return crossed
                if not self._crossed(self.spent.plus(self._reserved).plus(needed)):
                    self._reserved = self._reserved.plus(needed)
                    return needed
                await self._changed.wait()

    async def settle(self, reserved: Spent, spent: Spent, size: int = 0) -> None:
        """Puts in the place of what was set aside what it did cost.

        Args:
            reserved: what `reserve` returned.
            spent: the real amount.
            size: bytes of the question, where the server has counted its tokens.
        """
        async with self._changed:
            self._reserved = self._reserved.minus(reserved)
            self.spent = self.spent.plus(spent._replace(usd=spent.usd or 0.0))
            counted = spent.input_tokens - FRAME
            if size and counted > 0:
                self._bytes_per_token = min(self._bytes_per_token, size / counted)
            self._changed.notify_all()

    def _crossed(self, total: Spent) -> str:
        options, spent = self._options, self.spent
        for name, limit, found, so_far in (
            ("max_requests", options.max_requests, total.requests, f"{spent.requests} requests"),
            ("max_teacher_tokens", options.max_teacher_tokens, total.tokens, f"{spent.tokens} tokens"),
            ("max_usd", options.max_usd, total.usd or 0.0, f"${spent.usd:.4f}"),
        ):
            if limit is not None and found > limit * (1 + 1e-12):
                return f"{name}={limit:g} would be crossed: {so_far} spent, one more request may need more"
        return ""
