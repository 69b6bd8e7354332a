"""The finished model on a hub: weights, tokenizer, card and curves, and nothing of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from hcot_lmeval.training.config import SftConfig


def repository(config: SftConfig) -> str | None:
    """Returns the repository that the finished model goes to, or None if it stays here; asks the hub who uploads.

    Raises:
        ValueError: an option of the upload is set without `push_to_hub`, or the hub does not know the user.
    """
    if not config.trainer.get("push_to_hub"):
        given = [name for name in config.trainer if name.startswith("hub_")]
        if given:
            raise ValueError(f"trainer.{given[0]} does nothing without trainer.push_to_hub=true")
        return None
    name = str(config.trainer.get("hub_model_id") or config.output.name)
    try:
        user = huggingface_hub.HfApi().whoami()["name"]
    except Exception as error:  # whatever the client and the network come up with
        raise ValueError(
            "trainer.push_to_hub=true, but the hub does not say who uploads; log in with `hf auth login`, or set "
            f"HF_TOKEN. {' '.join(str(error).split())}"
        ) from None
    return name if "/" in name else f"{user}/{name}"


def upload(config: SftConfig, name: str, folder: Path) -> None:
    """Uploads a folder.

    Raises:
        ValueError: it failed; the message says how to do it by hand.
    """
    api, options = huggingface_hub.HfApi(), config.trainer
    try:
        api.create_repo(name, private=options.get("hub_private_repo"), exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, revision=options.get("hub_revision"))
    except Exception as error:  # as above
        why = " ".join(str(error).split())
        raise ValueError(f"the upload failed; by hand: hf upload {name} {folder} . ({why})") from None
