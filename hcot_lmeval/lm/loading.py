"""What is settled before ``hf`` loads a model: the names of its arguments, its device, its ranks."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from transformers import AutoConfig

from hcot_lmeval.lm.options import Options, known_names, unknown_argument


def check_names(pretrained: Any, arguments: dict[str, Any]) -> None:
    """Raises `ValueError` for an argument that neither we, ``hf``, `from_pretrained` nor the model's config knows."""
    known = known_names()
    unknown = [name for name in arguments if name not in known]
    if unknown and isinstance(pretrained, str):
        unknown = [name for name in unknown if not _is_config_field(pretrained, name, arguments)]
    if unknown:
        raise unknown_argument(unknown[0], known)


def _is_config_field(pretrained: str, name: str, arguments: dict[str, Any]) -> bool:
    """Whether `from_pretrained` would take `name` as an override of the model's config."""
    loading = ("revision", "trust_remote_code", "subfolder", "gguf_file")
    try:
        config = AutoConfig.from_pretrained(pretrained, **{k: arguments[k] for k in loading if k in arguments})
    except (OSError, ValueError):  # no config, so no field of it; loading the model will say what is wrong
        return False
    return name in config.to_dict()


def check_directories(options: Options) -> None:
    """Tries to write where the journal and the notes will be.

    Raises:
        OSError: one of them cannot be written to.
    """
    for name, path in (("journal", options.journal), ("notes", options.notes)):
        if path is None:
            continue
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"0")
        except OSError as error:
            raise OSError(
                f"{name}={path} cannot be written to ({error.strerror}); name another directory with {name}=DIR, or "
                f"give {name}=off"
            ) from error


def default_device() -> str:
    """An accelerator if there is one, else the CPU; the default of ``hf`` is CUDA, there or not."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def prepare_cpu_ranks(device: Any) -> None:
    """Lets accelerate see the ranks of ``torchrun`` on CPUs, as ``accelerate launch --cpu`` does."""
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
