"""The process that compares: one JSON request a line on stdin, one JSON reply a line on stdout.

It ends with its parent in every case: idle, it sees stdin close or its parent change; busy, the kernel's alarm ends it,
for the alarm keeps its default action and needs no help from Python, which may be inside one long multiplication.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys

_GRACE_SECONDS = 1.0  # the parent kills at the limit; the alarm is for when there is no parent any more
_POLL_SECONDS = 5.0


def main(memory_bytes: int) -> None:
    """Serves requests until stdin closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parent = os.getppid()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    try:
        compare = _load(memory_bytes)
    except BaseException as error:
        _send(replies, {"status": "import_error", "detail": f"{type(error).__name__}: {error}"})
        return
    _send(replies, {"status": "ready"})
    while line := _read_line(parent):
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _GRACE_SECONDS)
        reply = _check(compare, request["gold"], request["answer"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)
        if reply["status"] == "memory":
            return  # what is left of the heap is not to be trusted


def _load(memory_bytes: int):  # type: ignore[no-untyped-def]
    import logging
    import resource

    logging.disable(logging.WARNING)  # math-verify warns that its own timeouts are off: ours replace them
    from hcot_lmeval.answers.compare import answers_equal

    if not answers_equal(r"\frac{x}{2}", "0.5x") or answers_equal("x+1", "x+2"):
        raise RuntimeError("math-verify and sympy disagree with two comparisons that are known")
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return answers_equal


def _read_line(parent: int) -> bytes:
    """One line of stdin, unbuffered so that `select` is reliable; empty at the end of input or of the parent."""
    data = b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([0], [], [], _POLL_SECONDS)
        if not ready:
            if os.getppid() != parent:
                return b""
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return b""
        data += chunk
    return data


def _check(compare, gold: str, answer: str) -> dict[str, object]:  # type: ignore[no-untyped-def]
    from hcot_lmeval.answers.algebra import TooLarge, Unparsed, read

    try:
        return {"status": "ok", "equal": bool(compare(gold, answer))}
    except MemoryError:
        return {"status": "memory"}
    except RecursionError:
        return {"status": "too_deep"}
    except (TooLarge, OverflowError):
        return {"status": "too_large"}
    except Unparsed as error:
        return {"status": f"unparsed_{error.side}", "detail": str(error)}
    except Exception as error:  # a defect of ours or of sympy's: reported as "not checked", never as "wrong"
        read.cache_clear()
        return {"status": "error", "detail": f"{type(error).__name__}: {error}"}


def _send(stream, message: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
