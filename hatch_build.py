"""Build hook: what an editable install copies into site-packages, which is the start-up files and nothing else.

Without it the forced files of the wheel, `tasks/` among them, would be copied in editable mode too: a stale second set
of task files beside the one being edited.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StartupFilesHook(BuildHookInterface):
    """Replaces the wheel's `force-include` table by the start-up files when the build is an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        forced = self.build_config.target_config["force-include"]
        build_data["force_include_editable"] = {src: dst for src, dst in forced.items() if src.startswith("startup/")}
