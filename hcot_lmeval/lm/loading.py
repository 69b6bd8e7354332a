"""What is settled before ``hf`` loads a model: the names of its arguments, its device, its ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from hcot_lmeval.assets import BUNDLED, check_name, resolve
from hcot_lmeval.engine.options import check_device
from hcot_lmeval.errors import did_you_mean, message_for_users
from hcot_lmeval.lm.options import Options, known_names, unknown_argument
from hcot_lmeval.store import check_folder


def check_names(pretrained: Any, arguments: dict[str, Any]) -> None:
    """Raises `ValueError` for an argument that neither we, ``hf``, `from_pretrained` nor the model's config knows."""
    known = known_names()
    unknown = [name for name in arguments if name not in known]
    for name in unknown:
        if not name.isidentifier():  # no field of any config, which may have to be fetched for the next question
            raise unknown_argument(name, known)
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


def settle_arguments(pretrained: Any, arguments: dict[str, Any], options: Options) -> tuple[Any, dict[str, Any]]:
    """Returns the checkpoint and the arguments of ``hf`` as it takes them, if nothing that can be seen now is wrong.

    Raises:
        ValueError: an argument is unknown or of a kind that is not allowed.
        OSError: a directory is not there, lacks what it should hold, or cannot be written to.
    """
    pretrained = os.fspath(pretrained) if isinstance(pretrained, os.PathLike) else pretrained
    paths = (name for name in PLACES if isinstance(arguments.get(name), os.PathLike))
    given = arguments | {name: os.fspath(arguments[name]) for name in paths}
    check_kinds(pretrained, given)
    given |= {name: resolve(given.get(name)) for name in PLACES if name in given or name == "tokenizer"}
    pretrained = resolve(pretrained)
    check_names(pretrained, given)
    check_directories(options)
    check_places(pretrained, given)
    return pretrained, given | {"tokenizer": tokenizer_of_adapter(given)}


def merge_arguments(given: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``--model_args`` with what lm-eval's command line says beside them.

    Raises:
        ValueError: both say the same thing, and not the same of it.
    """
    told = {name: value for name, value in beside.items() if value is not None}
    for name in sorted(told.keys() & given.keys()):
        if str(given[name]) != str(told[name]):
            raise ValueError(
                f"model_args: {name}={given[name]!r} stands against --{name} {told[name]!r} (its default, if it was "
                f"left out); give --{name} {given[name]} alone"
            )
    return {**given, **told}


def check_kinds(pretrained: Any, arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a model, tokenizer or device of a kind that ``hf`` would stumble over or pass over."""
    if not isinstance(pretrained, (str, torch.nn.Module)):
        raise ValueError(
            f"pretrained={pretrained!r} is neither a checkpoint's directory or id, written as text (./{pretrained}), "
            "nor a model in memory"
        )
    tokenizer = arguments.get("tokenizer")
    if not isinstance(tokenizer, (str, PreTrainedTokenizerBase, NoneType)):
        raise ValueError(f"tokenizer={tokenizer!r} is neither a directory or id, written as text, nor a tokenizer")
    if not isinstance(pretrained, str):
        if not tokenizer and not getattr(pretrained, "name_or_path", ""):
            raise ValueError("pretrained is a model in memory that names no checkpoint; give its tokenizer=, too")
        return
    device = arguments.get("device") or "cpu"
    if device != "cuda:0":  # which lm-eval says where nobody asked for a device
        check_device(device)
    if arguments.get("parallelize") and not torch.accelerator.is_available():
        raise ValueError("parallelize=True spreads a model over several devices, and this machine has the CPU alone")


def whole(auto: Any) -> Any:
    """Returns a class of `AutoModel` that refuses a checkpoint which leaves some of the model's weights to chance."""

    class Whole(auto):
        @classmethod
        def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
            try:
                model, info = auto.from_pretrained(name, *args, output_loading_info=True, **kwargs)
            except RuntimeError as error:
                if "ignore_mismatched_sizes" not in str(error):
                    raise
                raise ValueError(
                    f"the weights of {name!r} have other sizes than its configuration; take back what changes that, or "
                    "fetch the checkpoint again"
                ) from error
            if missing := sorted(info["missing_keys"]):
                raise ValueError(
                    f"{name!r} lacks {len(missing)} of the model's weights, such as {missing[0]}, which would be "
                    "random; take back what changes its configuration, or fetch the checkpoint again"
                )
            return model

    return Whole


PLACES = ("tokenizer", "peft", "delta")
"""Arguments that name a directory, or an id on a hub, as `pretrained` does."""
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model vocab.json vocab.txt spiece.model tekken.json "
    "sentencepiece.bpe.model"
).split()
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
ADAPTER = "adapter_config.json"


def check_places(pretrained: Any, arguments: Mapping[str, Any]) -> None:
    """Looks for what is named, before anything is loaded.

    Args:
        pretrained: path or id of the checkpoint, or a model in memory.
        arguments: of ``hf``.

    Raises:
        FileNotFoundError: a directory is named that is not there, or that lacks what makes it what it should be.
        ValueError: a dtype is unknown.
    """
    for name, place in {"pretrained": pretrained, **{name: arguments.get(name) for name in PLACES}}.items():
        if isinstance(place, str) and _is_path(place) and not Path(place).is_dir():
            raise FileNotFoundError(f"{name}={place!r} is no directory; give that of a checkpoint, or an id on a hub")
        check_name(place, f"{name}=")
    named = [place for place in (pretrained, *(arguments.get(name) for name in PLACES)) if isinstance(place, str)]
    revision = arguments.get("revision", "main")  # lm-eval's default
    if revision != "main" and all(Path(place).is_dir() for place in named):
        raise ValueError(
            f"revision={revision!r} is of checkpoints on a hub, and {', '.join(named)} is here; leave it out"
        )
    adapter = arguments.get("peft")
    if adapter and Path(adapter).is_dir() and not (Path(adapter) / ADAPTER).is_file():
        raise FileNotFoundError(f"peft={adapter!r} holds no {ADAPTER}; give the directory of an adapter")
    if not arguments.get("gguf_file"):
        _check_files(pretrained, arguments)
    dtype = arguments.get("dtype", "auto")
    real = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if dtype not in ("auto", None) and not (isinstance(real, torch.dtype) and real.is_floating_point):
        near = did_you_mean(str(dtype).replace("bf", "bfloat").replace("fp", "float"), DTYPES)
        raise ValueError(f"dtype={str(dtype)!r} is not one of {', '.join(DTYPES)}{near}")


def _check_files(pretrained: Any, arguments: Mapping[str, Any]) -> None:
    """Raises `FileNotFoundError` where a directory lacks the config or the tokenizer that it is named for."""
    folder = Path(pretrained, arguments.get("subfolder") or "") if isinstance(pretrained, str) else None
    if folder and folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"pretrained={pretrained!r} holds no config.json; give the directory of a checkpoint")
    name, place = ("tokenizer", arguments["tokenizer"]) if arguments.get("tokenizer") else ("pretrained", folder)
    where = Path(place) if isinstance(place, (str, Path)) else None
    if where and where.is_dir() and not any((where / file).is_file() for file in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{name}={str(where)!r} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); give tokenizer=DIR"
        )


def tokenizer_of_adapter(arguments: Mapping[str, Any]) -> str | None:
    """The directory of an adapter that brings its tokenizer, with the markers it was trained on, if none is named."""
    adapter, named = arguments.get("peft"), arguments.get("tokenizer")
    if named or not isinstance(adapter, str) or not any((Path(adapter) / file).is_file() for file in TOKENIZER_FILES):
        return named
    return adapter


def _is_path(place: str) -> bool:
    """Whether a text can only be a path: an id on a hub has one slash at most, and no dot or tilde before it."""
    return place.startswith(("/", ".", "~")) or place.count("/") > 1 or "\\" in place


@contextmanager
def blamed(pretrained: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Has what fails to load name the argument, and the file, that is at fault.

    Raises:
        OSError: in place of what a library raised.
    """
    try:
        yield
    except (RepositoryNotFoundError, SafetensorError, OSError, ValueError, ImportError) as error:
        if message_for_users(error):
            raise
        places = (pretrained, *(arguments.get(name) for name in PLACES))
        faults = (_damaged_file(Path(place)) for place in places if isinstance(place, str))
        if fault := next(filter(None, faults), None):
            raise OSError(f"{fault}; fetch the checkpoint again") from error
        name, place = _at_fault(pretrained, arguments, error)
        raise OSError(
            f"{name}={place!r} could not be loaded; give a checkpoint directory, a bundled checkpoint "
            f"({', '.join(BUNDLED)}), or an id on a hub within reach: {error}"
        ) from error
    except (IndexError, RuntimeError) as error:
        if not arguments.get("peft"):
            raise
        raise OSError(
            f"peft={arguments['peft']!r} does not fit on pretrained={pretrained!r} with tokenizer="
            f"{arguments.get('tokenizer')!r}; give the model and the tokenizer that it was trained on: {error}"
        ) from error


def _at_fault(pretrained: Any, arguments: Mapping[str, Any], error: Exception) -> tuple[str, Any]:
    """The argument that an error is about: the one whose value its message names, else `pretrained`."""
    named = {name: arguments.get(name) for name in PLACES}
    return next(
        ((n, p) for n, p in named.items() if isinstance(p, str) and p in str(error)), ("pretrained", pretrained)
    )


def _damaged_file(folder: Path) -> str | None:
    """What is wrong with the first file of weights, or of JSON, that cannot be read; None if all can."""
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with path.open("rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
        if pointer:
            return f"{path} is a pointer of Git LFS and no weights; run git lfs pull"
        try:
            with safe_open(path, "pt") as weights:
                weights.keys()
        except Exception as error:
            return f"{path} is damaged ({error})"
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{path} is no JSON ({error})"
    return None


def check_directories(options: Options) -> None:
    """Tries to write where the journal and the notes will be.

    Raises:
        OSError: one of them cannot be written to.
    """
    for name, path in (("journal", options.journal), ("notes", options.notes)):
        if path is not None:
            advice = f"name another directory with {name}=DIR, or give {name}=off"
            check_folder(path, f"{name}={path}", advice)


def default_device() -> str:
    """An accelerator if there is one, else the CPU; the default of ``hf`` is CUDA, there or not."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def prepare_cpu_ranks(device: Any) -> None:
    """Lets accelerate see the ranks of ``torchrun`` on CPUs, as ``accelerate launch --cpu`` does."""
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
