"""Parquet files of a data set on the Hugging Face hub.

The list of files is asked for with a time limit, so that a machine without a network says so within seconds; what an
earlier run has fetched is found in the hub's own cache. Only Parquet is fetched: no loading script is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from nestling.data.tables import SPLITS, split_name
from nestling.errors import NestlingError, StorageError, UsageError, listed, missing_extra

TIMEOUT = 5.0
"""Seconds to wait for the list of files."""
CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps every data set as Parquet."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE = re.compile(r"(?:(?P<folder>.*)/)?(?P<split>[A-Za-z]+)(?:-(?P<shard>\d+)-of-(?P<shards>\d+)(?:-\w+)?)?\.parquet")
_PART = re.compile(r"(?:(?P<folder>.*)/)?(?P<split>[A-Za-z]+)/\d+\.parquet")
_T = TypeVar("_T")


def hub_files(
    repository: str, remedy: str, folder: str | None = None, splits: Sequence[str] = SPLITS
) -> dict[str, list[Path]]:
    """The Parquet files of every split of ``owner/name``, fetched into the hub's cache.

    ``folder``: the configuration, where there are several; ``splits``: those that are wanted.
    Raises ``StorageError``, ending in ``remedy``, where hub, data set or Parquet files are not to be had.
    """
    if not _NAME.fullmatch(repository):
        raise UsageError(f"a source on the hub is written hf:owner/name; got hf:{repository:.100}")
    try:
        import huggingface_hub
    except ImportError:
        raise missing_extra("huggingface-hub", "hub", f"reading hf:{repository}") from None
    hub = huggingface_hub.HfApi()
    reasons: list[str] = []
    for revision in (None, CONVERTED):
        try:
            ask = partial(hub.dataset_info, repository, revision=revision, timeout=TIMEOUT - 1)
            listing = _within(TIMEOUT, ask)
            names = [file.rfilename for file in listing.siblings or []]
        except Exception as error:
            reasons.append(_reason(error))
            cached = _cached(repository, revision, folder, splits)
            if cached:
                return cached
            # The second branch of a hub that does not answer would only cost the same time again.
            break
        chosen = choose_files(repository, names, folder)
        if chosen:
            try:
                return {
                    split: [
                        Path(hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision))
                        for name in files
                    ]
                    for split, files in chosen.items()
                    if split in splits
                }
            except Exception as error:
                raise StorageError(f"cannot fetch hf:{repository}: {_reason(error)}; {remedy}") from error
        reasons.append("it has no Parquet files named after splits")
    raise StorageError(f"cannot read hf:{repository}: {reasons[0]}; {remedy}")


def choose_files(repository: str, names: Sequence[str], folder: str | None = None) -> dict[str, list[str]]:
    """The files of every split among the names in a repository, empty without any; ``folder``: of that configuration.

    Raises ``UsageError`` where several configurations stand side by side, ``StorageError`` where a shard is missing.
    """
    found: dict[str, dict[str, list[str]]] = {}
    shards: dict[tuple[str, str], int] = {}
    for name in sorted(names):
        match = _PART.fullmatch(name) or _FILE.fullmatch(name)
        split = match and split_name(match["split"])
        if match and split:
            place = match["folder"] or ""
            found.setdefault(place, {}).setdefault(split, []).append(name)
            if "shards" in match.groupdict() and match["shards"]:
                shards[place, split] = int(match["shards"])
    if not found or (folder is not None and folder not in found):
        return {}
    own = repository.partition("/")[2]
    if folder is None:
        folder = next((place for place in ("", "data", "default", "plain_text", own) if place in found), None)
    if folder is None and len(found) == 1:
        folder = next(iter(found))
    if folder is None:
        raise UsageError(
            f"hf:{repository} has several configurations ({listed(found)}): fetch one and give its folder as the source"
        )
    for split, files in found[folder].items():
        expected = shards.get((folder, split), len(files))
        if len(files) != expected:
            raise StorageError(f"hf:{repository} holds {len(files)} of the {expected} files of {split!r}")
    return found[folder]


def _cached(repository: str, revision: str | None, folder: str | None, splits: Sequence[str]) -> dict[str, list[Path]]:
    import huggingface_hub

    try:
        root = Path(
            huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
        )
        names = [path.relative_to(root).as_posix() for path in root.rglob("*.parquet")]
        chosen = choose_files(repository, names, folder)
    except NestlingError:
        raise
    except Exception:
        return {}
    return {split: [root / name for name in files] for split, files in chosen.items() if split in splits}


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    # A name server that does not answer blocks below every timeout of the client. The thread is a daemon so that it
    # does not hold up the exit either.
    answers: SimpleQueue[tuple[bool, object]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((True, call()))
        except Exception as error:
            answers.put((False, error))

    Thread(target=run, daemon=True, name="nestling-hub").start()
    try:
        succeeded, answer = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if not succeeded:
        raise answer  # type: ignore[misc]
    return answer  # type: ignore[return-value]


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__
