"""Pins a run's hub models to commits, which are resolved once at the start and saved in its run.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache

from visper.config import Distillation, Run, Student, Target, VlmStudent
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
        changes["student"] = _student(run.student, saved.student if saved else None)
    if run.start_from is not None:
        before = saved.start_from_revision if saved and saved.start_from == run.start_from else None
        wanted = run.start_from_revision or before
        changes["start_from_revision"] = commit_of(run.start_from, wanted) or wanted
    if run.distillation is not None:
        changes["distillation"] = _distillation(run.distillation, saved.distillation if saved else None)
    return run.model_copy(update=changes)


def _student(student: Student | VlmStudent, saved: Student | VlmStudent | None) -> Student | VlmStudent:
    changes = {}
    for part in ("vlm",) if isinstance(student, VlmStudent) else ("llm", "encoder"):
        model, revision = getattr(student, part), getattr(student, f"{part}_revision")
        if revision is None and saved is not None and getattr(saved, part, None) == model:
            revision = getattr(saved, f"{part}_revision")
        changes[f"{part}_revision"] = commit_of(model, revision) or revision
    return student.model_copy(update=changes)


def _distillation(distillation: Distillation, saved: Distillation | None) -> Distillation:
    tasks = {}
    for name, task in distillation.tasks.items():
        before = saved.tasks[name].target if saved and name in saved.tasks else None
        tasks[name] = task.model_copy(update={"target": _target(task.target, before)})
    return distillation.model_copy(update={"tasks": tasks})


def _target(target: Target, saved: Target | None) -> Target:
    if target.model is None or target.kind not in TEACHERS or "revision" not in TEACHERS[target.kind].options:
        return target  # it loads no hub model, or does not support revisions
    revision = target.revision
    if revision is None and saved is not None and saved.model == target.model:
        revision = saved.revision
    return target.model_copy(update={"revision": commit_of(target.model, revision) or revision})
