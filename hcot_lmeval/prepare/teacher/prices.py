"""What a teacher costs. `genai_prices` knows the prices; it is imported when one is asked for.

This module imports the standard library alone.
"""

from __future__ import annotations

from typing import Any

from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import Usage


class Prices:
    """What tokens cost: as given, else as `genai_prices` knows."""

    def __init__(self, options: TeacherOptions) -> None:
        self._given = None if options.price_input is None else (options.price_input, options.price_output or 0.0)
        self._provider, self._model = options.provider.prices, options.model

    @property
    def known(self) -> bool:
        return self.at(Usage(1, 1)) is not None

    def at(self, usage: Usage) -> float | None:
        """Returns the US dollars of so many tokens; None where no price is known."""
        from genai_prices import Usage as Priced

        return self.of(Priced(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens))

    def of(self, usage: Any) -> float | None:
        """Returns the US dollars of a usage of `pydantic_ai` or `genai_prices`, which know cached tokens too."""
        from genai_prices import calc_price

        if self._given is not None:
            return ((usage.input_tokens or 0) * self._given[0] + (usage.output_tokens or 0) * self._given[1]) / 1e6
        if self._provider is None:
            return None
        try:
            return float(calc_price(usage, self._model, provider_id=self._provider).total_price)
        except (LookupError, ValueError):
            return None
