"""Pins a run's hub models to commits, which are resolved once at the start and saved in its run.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache

from visper.config import Distillation, Run, Target, VlmStudent
from visper.config.kinds import TEACHERS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(model: str, revision: str | None = None) -> str | None:
    """The commit of a hub model at ``revision`` (default: its main branch), from the hub or else the local cache.

    Returns:
        40 hex digits; None for a folder or file, or if neither the hub nor the cache has the model.
    """
    if Path(model).exists() or not HUB_ID.fullmatch(model):
        return None
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        sha = HfApi().model_info(model, revision=revision, timeout=10).sha
        return None if sha is None else str(sha)
    except Exception:  # noqa: BLE001 - huggingface_hub's HTTP library, and so its errors, differ between versions
        for name in ("config.json", "model_index.json", "preprocessor_config.json"):
            cached = try_to_load_from_cache(model, name, revision=revision)
            if isinstance(cached, str):
                return re.split(r"[\\/]snapshots[\\/]", cached)[1][:40]
        return None


def with_commits(run: Run, saved: Run | None = None) -> Run:
    """The run with the commit of every hub model instead of its branch or tag.

    Args:
        run: the run as the recipe describes it.
        saved: the same run as saved when it was started. Its commits are kept for models without a revision in the
            recipe, so that a resumed run loads the weights it was started with.
    """
    changes: dict[str, Any] = {}
    if run.student is not None:
        parts = ("vlm",) if isinstance(run.student, VlmStudent) else ("llm", "encoder")
        before = saved.student if saved else None
        found = {f"{part}_revision": _pinned(run.student, before, part, f"{part}_revision") for part in parts}
        changes["student"] = run.student.model_copy(update=found)
    if run.start_from is not None:
        changes["start_from_revision"] = _pinned(run, saved, "start_from", "start_from_revision")
    if run.distillation is not None:
        changes["distillation"] = _distillation(run.distillation, saved.distillation if saved else None)
    return run.model_copy(update=changes)


def _pinned(section: Any, saved: Any, model: str, revision: str) -> str | None:
    """The commit of the model in the field ``model``, at its revision, or else at the saved one of the same model."""
    name, wanted = getattr(section, model), getattr(section, revision)
    if wanted is None and getattr(saved, model, None) == name:
        wanted = getattr(saved, revision)
    return commit_of(name, wanted) or wanted


def _distillation(distillation: Distillation, saved: Distillation | None) -> Distillation:
    tasks = {}
    for name, task in distillation.tasks.items():
        before = saved.tasks[name].target if saved and name in saved.tasks else None
        tasks[name] = task.model_copy(update={"target": _target(task.target, before)})
    return distillation.model_copy(update={"tasks": tasks})


def _target(target: Target, saved: Target | None) -> Target:
    if target.model is None or target.kind not in TEACHERS or "revision" not in TEACHERS[target.kind].options:
        return target  # it loads no hub model, or does not support revisions
    return target.model_copy(update={"revision": _pinned(target, saved, "model", "revision")})
