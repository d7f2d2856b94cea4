"""Resolves a download's description to files: at a URL, on the hub, or on the local disk."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, build_hf_headers

from visper.data.sets.catalog import Download, Origin
from visper.data.sets.fetch import Remote, SourceError, without_queries

HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, RuntimeError)
"""Exceptions of hub requests. The bases are the HTTP client's error (httpx or httpx2, by version) and OSError."""


def remotes(download: Download, origin: Origin, folder: Path) -> list[Remote]:
    """The files that one origin has for a download, with the sizes and hashes published there or in the catalog.

    Raises:
        SourceError: the origin has no such file or cannot be reached.
    """
    published = Remote("", "", bytes=download.exact_bytes, sha256=download.sha256 or origin.sha256, md5=download.md5)
    if origin.url is not None:
        return [
            replace(published, name=download.name_of(origin.url), source=without_queries(origin.url), url=origin.url)
        ]
    if origin.hub is not None:
        return _on_hub(download, origin, published)
    local = folder / str(origin.path)
    if not local.exists():
        raise SourceError(f"'{local}' does not exist")
    return [replace(published, name=download.name_of(local.name), source=str(origin.path), local=local)]


def _on_hub(download: Download, origin: Origin, published: Remote) -> list[Remote]:
    api, repository = HfApi(), str(origin.hub)
    try:
        listing = api.dataset_info(repository, revision=origin.revision, files_metadata=True)
        headers = build_hf_headers()
    except HUB_ERRORS as error:
        raise SourceError(f"the hub cannot list it: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    found = []
    for file in sorted(listing.siblings or [], key=lambda file: file.rfilename):
        if fnmatch.fnmatchcase(file.rfilename, str(origin.path)):
            place = {"repo_type": "dataset", "revision": origin.revision, "endpoint": api.endpoint}
            remote = replace(
                published,
                name=download.name_of(file.rfilename),
                source=f"hub:{origin.repository}/{file.rfilename}",
                url=hf_hub_url(repository, file.rfilename, **place),
                headers=headers,
                bytes=published.bytes or file.size,
                sha256=published.sha256 or (file.lfs.sha256 if file.lfs is not None else None),
            )
            found.append(remote)
    if not found:
        raise SourceError(f"no file of '{repository}' on the hub matches '{origin.path}'")
    if len({remote.name for remote in found}) != len(found):
        raise SourceError(f"{len(found)} files match '{origin.path}' but would get the same name: '{found[0].name}'")
    return found
