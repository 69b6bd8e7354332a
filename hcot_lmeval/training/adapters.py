"""Low-rank adapters: a new one whose new tokens have rows of their own, or one that is trained further.

An adapter holds its low-rank updates and the rows of the tokens that were added for it, nothing else of its base: the
embedding as a whole may then have any number of rows wherever the adapter is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hcot_lmeval.assets import resolve
from hcot_lmeval.training.config import LoraConfig, SftConfig

CONFIG_FILE = "adapter_config.json"


def check_adapter(config: SftConfig) -> None:
    """Looks at what `config` says of adapters; no weights are read.

    Raises:
        ValueError: peft is not installed, `lora` and `adapter` are both set, or the adapter is none, is for another
            base, or works by virtual tokens.
    """
    if config.adapter is None and config.lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora and adapter need peft, which is not installed: pip install 'hcot_lmeval[peft]'")
    if config.adapter is None:
        return
    if config.lora is not None:
        raise ValueError("lora makes a new adapter and adapter goes on with one that has its shape; set one of them")
    settings = _settings(Path(config.adapter))
    base = settings.get("base_model_name_or_path")
    if not base or not _same(base, config.model):
        raise ValueError(
            f"adapter={config.adapter!r} was trained on the base {base!r}, not on model={config.model!r}; its updates "
            "would mean nothing there. Set model to that base, or leave adapter out and set lora for a new one."
        )
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"adapter={config.adapter!r} is of type {settings.get('peft_type')}; LORA adapters alone are trained here"
        )


def _settings(adapter: Path) -> dict[str, Any]:
    file = adapter / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"adapter={str(adapter)!r} is no adapter directory: it has no {CONFIG_FILE}")
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def _same(one: str, other: str) -> bool:
    """Whether two names mean the same base: the same id on a hub, or the same directory."""
    return one == other or Path(resolve(one)).resolve() == Path(resolve(other)).resolve()


def with_adapter(config: SftConfig, model: Any, new_ids: Collection[int]) -> Any:
    """Returns the model wrapped for LoRA if `config` asks for that, else the model itself.

    Args:
        config: the settings.
        model: with its attention set and with rows for all tokens.
        new_ids: of tokens that were added; a new adapter trains their rows in full.

    Raises:
        ValueError: the model has no modules of the names in `lora.target_modules`, or the adapter does not fit.
    """
    if config.adapter is None and config.lora is None:
        return model
    import peft

    if config.adapter is not None:
        try:
            wrapped = peft.PeftModel.from_pretrained(model, config.adapter, is_trainable=True)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise ValueError(f"adapter={config.adapter!r} does not fit model={config.model!r}: {why}") from error
    else:
        wrapped = peft.get_peft_model(model, _lora(config.lora or LoraConfig(), model, new_ids))
    # By itself PEFT saves all rows of an embedding that has grown, beside those that it has trained.
    wrapped.save_pretrained = functools.partial(wrapped.save_pretrained, save_embedding_layers=False)
    return wrapped


def _lora(config: LoraConfig, model: Any, new_ids: Collection[int]) -> Any:
    """PEFT's configuration; rows of new tokens are trained in full, in the input and, if untied, the output."""
    import peft

    names = {id(module): name for name, module in model.named_modules()}
    embeddings = [model.get_input_embeddings()]
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", True):
        embeddings.append(model.get_output_embeddings())
    rows = {names[id(module)].rpartition(".")[2]: sorted(new_ids) for module in embeddings}
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        trainable_token_indices=rows if new_ids else None,
        task_type="CAUSAL_LM",
    )
