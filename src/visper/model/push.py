"""Uploads a finished folder to the hub: weights, processor and model card, without anything about this machine."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from visper.common.errors import ConfigError, first_line
from visper.common.files import read_json_object, write_text
from visper.common.manifest import MANIFEST, require_undamaged
from visper.data.sets.origins import HUB_ERRORS
from visper.model.card import CARD, is_edited, write_card
from visper.model.student import student_place

logger = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
UPLOAD_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, ValueError)
KEPT_HERE = ("run.yaml", "answers", MANIFEST)
"""Not uploaded: these contain local paths, or digests of files that the upload changes."""


@contextmanager
def prepare_upload(model: Path, license: str = "other", base: str | None = None) -> Iterator[Path]:
    """A temporary folder of links to the files to upload, with a new model card; the model's folder is only read.

    A model's card that was edited is uploaded as it is, with a warning; an adapter's card is always a new one.

    Args:
        model: a stage's output, a model folder, or a folder with a peft adapter.
        license: the license named in the card.
        base: hub id of an adapter's base model; needed if the adapter names a folder of this machine.

    Raises:
        ConfigError: there is no such folder, an adapter's base is not on the hub, or a model has a base.
        DataError: a file is damaged.
    """
    adapter = (model / ADAPTER_CONFIG).is_file()
    if base is not None and not adapter:
        raise ConfigError(f"--base is for adapters, and '{model}' is none: remove --base")
    place = model if adapter else Path(student_place(model))
    if not place.is_dir():
        raise ConfigError(f"'{model}' is not a folder: use a stage's output, a model folder or an adapter's folder")
    require_undamaged(place)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in place.iterdir():
            if entry.name not in (*KEPT_HERE, CARD) and not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry.resolve())
        if adapter:
            _adapter_files(place, folder, license, base)
        elif (place / CARD).is_file() and is_edited(place / CARD):
            logger.warning(
                "'%s' was edited, or written by an older version, so it is uploaded as it is, without --license and "
                "new scores: write them into it, or remove it to get a new card",
                place / CARD,
            )
            (folder / CARD).symlink_to((place / CARD).resolve())
        else:
            write_card(place, license, to=folder)
        yield folder


def _adapter_files(place: Path, folder: Path, license: str, base: str | None) -> None:
    config = read_json_object(place / ADAPTER_CONFIG)
    named = base or str(config["base_model_name_or_path"])
    if Path(named).exists() or Path(named).is_absolute():
        raise ConfigError(
            f"the adapter's base is '{named}', a folder of this machine: push that first, then pass its id as --base"
        )
    (folder / ADAPTER_CONFIG).unlink()
    write_text(folder / ADAPTER_CONFIG, json.dumps({**config, "base_model_name_or_path": named}, indent=2))
    header = f"---\nlibrary_name: peft\nbase_model: {named}\nlicense: {license}\ntags: [visper-lm, lora]\n---\n"
    if (place / CARD).is_file():
        logger.warning("'%s' is not uploaded: it may name folders of this machine; a new card is", place / CARD)
    text = f"# Adapter\n\nLow-rank updates of `{named}`: `PeftModel.from_pretrained(base, this folder)`.\n"
    write_text(folder / CARD, header + text)


def require_repo(repo: str) -> None:
    """Checks the form of a repository's name; without an owner, the hub would take the account that is logged in.

    Raises:
        ConfigError: it is not owner/name.
    """
    owner, slash, name = repo.partition("/")
    if not slash:
        raise ConfigError(
            f"'{repo}' has no owner: write owner/name, such as YOUR_ACCOUNT/{repo or 'my-model'} (`hf auth whoami` "
            "shows your account and organizations)"
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"'{repo}' cannot name a repository: expected owner/name; {first_line(error)}") from error
    if not owner or not name:
        raise ConfigError(f"'{repo}' cannot name a repository: expected owner/name")


def upload(folder: Path, repo: str, private: bool = False) -> str:
    """Creates the repository if needed, uploads the folder in one commit, and returns its URL.

    Raises:
        ConfigError: the hub rejects the upload or cannot be reached.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a VisPer model"))
    except UPLOAD_ERRORS as error:
        why = first_line(error).rstrip(".")
        answered = isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError, ValueError))
        remedy = "log in with `hf auth login`" if answered else "check the network, then repeat the command"
        raise ConfigError(f"cannot upload to '{repo}': {why}; {remedy}") from error
