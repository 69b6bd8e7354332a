"""Asking a scripted teacher in few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import AnswerStore, Form, Message, Reply, Task
from hcot_lmeval.prepare.teacher.runner import Teacher, ask
from tests.scripted_teacher import ScriptedTeacher

CANARY = "canary-4be1c0ffee-key"
MODELS = {
    "openai": "openai:gpt-5-mini",
    "claude": "claude:claude-sonnet-5",
    "gemini": "gemini:gemini-2.5-flash",
    "local": "local:qwen",
}
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "TEACHER_API_KEY")
GOOD = '{"a": 1}'


class Number(Form):
    """A number, or none."""

    a: int | None


def options_for(server: ScriptedTeacher, provider: str = "openai", **more: Any) -> TeacherOptions:
    quick = {"first_wait": 0.01, "timeout": 60.0, "attempts": 3, "concurrency": 4}
    return TeacherOptions(teacher=MODELS[provider], base_url=server.url(provider), **{**quick, **more})


def make_task(options: TeacherOptions, said: str = "u", **more: Any) -> Task:
    messages = (Message("system", "sys"), Message("user", said))
    return Task("test", messages, Number, options.identity, **more)


def ask_all(options: TeacherOptions, tasks: list[Task], path: Path) -> dict[str, Reply]:
    """Replies by key."""
    with AnswerStore(path / "answers.jsonl") as store:
        return {reply.key: reply for reply in ask(tasks, Teacher.reply, options=options, store=store)}


def ask_one(server: ScriptedTeacher, path: Path, provider: str = "openai", **more: Any) -> Reply:
    options = options_for(server, provider, **more)
    return next(iter(ask_all(options, [make_task(options)], path).values()))
