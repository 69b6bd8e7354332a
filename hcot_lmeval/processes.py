"""How the processes of a run end."""

from __future__ import annotations

import atexit
import gc

import torch.distributed as dist


def leave_group_at_exit() -> None:
    """Lets this process leave its process group, if it has one by then, before Python shuts down.

    PyTorch asks for it. Threads of Gloo that still hold tensors while Python shuts down abort the process ("terminate
    called without an active exception", pytorch issue 190489), whereupon torchrun kills the other ranks, which may be
    writing the results.
    """
    atexit.register(leave_group)


def leave_group() -> None:
    """Leaves a group of Gloo, so that its threads end. NCCL has none of them, and may hang here after an error."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        gc.collect()  # the wrapper of DDP is part of a cycle; the threads end with the last reference to the group
