"""While lm-eval builds its requests: which prompts it puts through the chat template, how often, and no cache of them.

lm-eval's cache of requests (``--cache_requests``) is keyed by the name of the task: its entries hold the generation
kwargs, documents and rendered prompts of the run that wrote them, whatever this one asks for. Building takes a moment,
so it is done anew. A request says whether its prompt was rendered, for no text tells that by itself.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from lm_eval.api.task import Task

from hcot_lmeval.scoring.task import BoxedTask, check_task

logger = logging.getLogger(__name__)


def watch_building() -> None:
    """Wraps `Task.build_all_requests` of lm-eval for this process; idempotent."""
    build = Task.build_all_requests
    if hasattr(build, "_hcot_lmeval"):
        return

    @functools.wraps(build)
    def build_all_requests(self: Any, **options: Any) -> None:
        wanted = (self.config.metadata or {}).get("repeats", self.config.repeats)
        if wanted != self.config.repeats:
            raise ValueError(
                f"repeats={wanted} of the metadata does nothing in {self.config.task}, which asks a question "
                f"{self.config.repeats}x; leave it out, or run that task apart from those it is meant for (..._avg)"
            )
        if not isinstance(self, BoxedTask):  # which looks at itself, for every model
            check_task(self)
        if options.get("cache_requests"):
            logger.warning(
                "cache_requests: the requests of %s are built anew, for lm-eval's cache of them keeps the generation "
                "kwargs and prompts of the run that wrote it",
                self.config.task,
            )
        build(self, **{**options, "cache_requests": False})
        for instance in self.instances:
            instance.chat_rendered = bool(options.get("apply_chat_template"))

    build_all_requests._hcot_lmeval = True  # type: ignore[attr-defined]
    Task.build_all_requests = build_all_requests
