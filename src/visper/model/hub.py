"""Loads configurations and vocabulary sizes from the hub, a folder or a shipped table, and explains loading errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from visper.common.cache import hub_cache_remedy
from visper.common.errors import ConfigError, VisperError, first_line
from visper.common.files import read_json_object

ADAPTER = "adapter_config.json"
WHOLE_ONLY = ".gitattributes"
"""A file of all repositories of the hub that no library loads: if it is cached, the whole repository was downloaded."""

UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
    SafetensorError,
    TemplateError,
)
"""What transformers raises, besides OSError, when files are damaged or describe a model that it does not know."""


@contextlib.contextmanager
def loading(part: str, name: str) -> Iterator[None]:
    """Turns other libraries' errors while loading ``name`` into a ConfigError with ``part``, the name and a remedy.

    Refuses an adapter (``refuse_adapter``), also afterwards: only then is a hub model in the cache.
    """
    refuse_adapter(name)
    try:
        yield
        refuse_adapter(name)
    except (VisperError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise ConfigError(f"{part}: cannot load '{name}': {remedy(name, error)}") from error
    except ImportError as error:
        extra = "pip install 'visper-lm[timm]', or a newer timm" if "timm" in str(error) else "install what it names"
        raise ConfigError(f"{part}: cannot load '{name}': {first_line(error)} Remedy: {extra}") from error
    except UNREADABLE as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{part}: '{name}' contains its own code, which is not run without permission: read it, then set "
                "'trust_remote_code: true' beside its name in the recipe"
            ) from error
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        found = kind + " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{part}: cannot load '{name}': {found}\nExpected the complete, undamaged files of one model, of a kind "
            "that this version of transformers knows: download or copy them again"
        ) from error


def refuse_adapter(name: str) -> None:
    """Refuses low-rank updates: transformers adds them to their model as more layers, which no saved student has.

    Raises:
        ConfigError: ``name`` is the folder or the cached hub id of an adapter; the message says where a model is.
    """
    place = Path(name)
    found = place / ADAPTER if place.is_dir() or not _may_be_hub_id(name) else try_to_load_from_cache(name, ADAPTER)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return
    if (place.parent / "model" / "config.json").is_file():  # of a stage
        remedy = f"the whole model, with the adapter, is '{place.parent}'"
    else:
        base = read_json_object(Path(found)).get("base_model_name_or_path")
        remedy = f"merge it into its model, '{base}' (peft's merge_and_unload), save the result, and name that"
    raise ConfigError(f"'{name}' is an adapter (LoRA), not a whole model: {remedy}")


def remedy(name: str, error: OSError) -> str:
    """Why ``name`` cannot be loaded (gated, missing or unreachable), and what to do."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    reason = first_line(error)
    place, here = Path(name), ""
    if place.exists():
        return reason
    if not _may_be_hub_id(name):
        return f"there is no folder '{place.absolute()}'. Use an existing folder, or a hub id such as OWNER/NAME"
    if "/" in name and place.parent.is_dir() and not place.exists():
        here = f"there is no '{place.name}' in the folder '{place.parent}'; as the id of a hub model: "
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated" in reason:
        return (
            f"it is gated, and this machine's token (if any) has no access: accept its license on "
            f"https://huggingface.co/{name}, then run `hf auth login`"
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return f"{here}the hub has no such model, or it is private: check the spelling, or run `hf auth login`"
    unwritable = "".join(hub_cache_remedy(e) for e in chain if isinstance(e, OSError))
    if unwritable:
        return reason.rstrip(".") + unwritable
    return (
        f"{here}{reason} Use an existing folder or a hub id. Without network: run `hf download {name}` on a machine "
        "with network, then use the folder it creates"
    )


def _may_be_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def stored_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder or of a hub model; None if it has no such file.

    Raises:
        ConfigError: unknown, because the hub cannot be reached and the cache may lack files. It must not look as if the
            model had no such file.
    """
    if Path(model).is_dir():
        return Path(model) / name if (Path(model) / name).is_file() else None
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError as error:
        known_absent = not isinstance(try_to_load_from_cache(model, name, revision=revision), str | None)
        complete = isinstance(try_to_load_from_cache(model, WHOLE_ONLY, revision=revision), str)
        if known_absent or complete:
            return None
        raise ConfigError(
            f"unknown whether '{model}' has the file {name}: the hub cannot be reached, and this machine's cache has "
            f"only parts of the model. Try again, or run `hf download {model}` where there is network"
        ) from error
    except EntryNotFoundError:
        return None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's number of entries before a student adds to it, and whether it has a padding token."""

    size: int
    has_pad: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """The vocabulary of a tokenizer."""
        return cls(len(tokenizer), tokenizer.pad_token is not None)


@lru_cache(maxsize=1)
def known_sizes() -> dict[str, dict[str, Any]]:
    """Configurations of the published bases by hub id, so that their sizes need no network access and no license.

    Each has ``config``, the entries of its config.json that determine sizes; LLMs also have ``vocabulary``.
    """
    file = resources.files("visper.model") / "known_sizes.json"
    known: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return known


def sizes_of(
    name: str, part: str, subfolder: str = "", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedConfig:
    """The configuration of ``name``, to be used for sizes only: from its folder, the shipped table, timm, or the hub.

    Raises:
        ConfigError: it is in none of these; the message names ``part`` and the id.
    """
    key = f"{name}/{subfolder}" if subfolder else name
    if not Path(name).is_dir():
        if key in known_sizes():
            return AutoConfig.for_model(**known_sizes()[key]["config"])
        timm_config = _timm_config(name)
        if timm_config is not None:
            return timm_config
    with loading(part, name):
        return AutoConfig.from_pretrained(
            name, subfolder=subfolder, trust_remote_code=trust_remote_code, revision=revision
        )


def vocabulary_of(name: str, part: str, trust_remote_code: bool = False, revision: str | None = None) -> Vocabulary:
    """The size of a tokenizer's vocabulary, from its folder, the shipped table or the hub. Raises as ``sizes_of``."""
    if not Path(name).is_dir() and name in known_sizes():
        return Vocabulary(**known_sizes()[name]["vocabulary"])
    with loading(part, name):
        return Vocabulary.of(
            AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
        )


def _timm_config(name: str) -> PreTrainedConfig | None:
    """The configuration of a ``timm/`` hub id from the timm package; None for other names or without timm."""
    if not name.startswith("timm/"):
        return None
    with contextlib.suppress(ImportError):
        import timm

        found = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        if found is not None:
            from transformers import TimmWrapperConfig  # imports timm, 20 MB

            return TimmWrapperConfig(architecture=found.architecture, pretrained_cfg=found.to_dict())
    return None
