"""A process that is killed while it writes a line to a journal."""

import os
import signal

from hcot_lmeval.store import JsonLines, line_of


def die_within_record(number: int, *, parent: bool = False) -> None:
    """Has this process, and its parent too, be killed by SIGKILL within the `number`-th record that has a key."""
    append, written = JsonLines.append, [0]

    def torn(self: JsonLines, record: dict) -> int:
        written[0] += "key" in record
        if written[0] < number:
            return append(self, record)
        with self.path.open("ab") as file:
            file.write(line_of(record)[:25])
        if parent:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    JsonLines.append = torn
