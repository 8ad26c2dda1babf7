"""Checkpoints at a URL of any kind that fsspec knows (`s3://...`, `gs://...`, `file://...`).

    URL/step_00000012-1f0c9a2b/manifest.json    written last: without it the folder does not count
                               ...              whatever the ranks wrote

Such places have no rename, so each writing has a folder of its own, and the manifest makes it a checkpoint. Its
checksums are those of what is read back from there.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import xxhash

from engine.checkpoint import CHUNK_BYTES, MANIFEST, Checkpoint, Checkpoints, check_plain, manifest_text, parse_manifest
from engine.config import Config, UserError

_NAME = re.compile(r"step_(\d{8,})-[0-9a-f]{8}")


class RemoteCheckpoints:
    """The checkpoints of one run. Only `writing` changes anything; one process at a time may do so."""

    def __init__(self, url: str, *, keep: int) -> None:
        """`keep` is the number of whole checkpoints that stay.

        Raises:
            UserError: fsspec does not know such URLs, or lacks the package for them.
        """
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"checkpoint.folder: {url}: {error}") from None
        self.url = url.rstrip("/")
        self.keep = keep
        self.passed_over: list[str] = []
        """Torn or tampered ones that `newest` found, newest first."""
        self._damaged: set[str] = set()

    @contextmanager
    def writing(self, step: int, state: dict[str, Any]) -> Iterator[str]:
        """Write the checkpoint of a step: yields the URL of a folder that processes fill before the block ends.

        If the block or the writing fails, what was written is removed, every older checkpoint stays, and the error is
        raised.

        Raises:
            ValueError: the state is not plain JSON.
            OSError: the place cannot be written.
        """
        check_plain(state, "state")
        text = json.dumps(state)
        name = f"step_{step:08d}-{secrets.token_hex(4)}"
        try:
            yield f"{self.url}/{name}"
            found = sorted(self._files.find(f"{self._root}/{name}"))
            contents = {path.partition(f"{name}/")[2]: self._checksum(path) for path in found}
            files = {path: {"bytes": size, "xxh3_128": checksum} for path, (size, checksum) in contents.items()}
            manifest = manifest_text({"step": step, "files": files, "state": json.loads(text)})
            self._files.pipe_file(f"{self._root}/{name}/{MANIFEST}", manifest.encode())
        except BaseException:
            self._discard(name)
            raise
        self._delete_old(step, name)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; every byte is read and compared. None without one."""
        self.passed_over = []
        for name in reversed(self._names()):
            reason = self._damage(name)
            if reason is None:
                state = self._manifest(name)["state"]
                return Checkpoint(f"{self.url}/{name}", _step_of(name), state)
            if reason != f"{MANIFEST}: is missing":  # being written, or left by a kill
                self.passed_over.append(f"{name}: {reason}")
            self._damaged.add(name)
        return None

    def _names(self) -> list[str]:
        """Of the folders, the oldest first."""
        self._files.invalidate_cache()
        try:
            entries = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = [entry.rstrip("/").rpartition("/")[2] for entry in entries]
        return sorted((name for name in names if _NAME.fullmatch(name)), key=_step_of)

    def _delete_old(self, step: int, written: str) -> None:
        """Delete all but the newest `keep` up to this step, what is damaged, and what was never finished."""
        names = self._names()
        whole = [n for n in names if n not in self._damaged and self._files.exists(f"{self._root}/{n}/{MANIFEST}")]
        same_step = [n for n in whole if _step_of(n) == step and n != written]
        up_to_step = [n for n in whole if _step_of(n) <= step and n not in same_step]
        stay = {*up_to_step[-self.keep :], *(n for n in whole if _step_of(n) > step)}
        for name in names:
            if name not in stay:
                self._discard(name)

    def _damage(self, name: str) -> str | None:
        """Why a checkpoint is not whole, or None."""
        try:
            manifest = self._manifest(name)
            if manifest["step"] != _step_of(name):
                return f"{MANIFEST}: is that of step {manifest['step']}"
            for file, written in manifest["files"].items():
                path = f"{self._root}/{name}/{file}"
                if not self._files.exists(path):
                    return f"{file}: is missing"
                size, checksum = self._checksum(path)
                if size != written["bytes"]:
                    return f"{file}: has {size} bytes instead of {written['bytes']}"
                if checksum != written["xxh3_128"]:
                    return f"{file}: its checksum differs"
        except FileNotFoundError:
            return f"{MANIFEST}: is missing"
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def _manifest(self, name: str) -> dict[str, Any]:
        return parse_manifest(self._files.cat_file(f"{self._root}/{name}/{MANIFEST}"))

    def _checksum(self, path: str) -> tuple[int, str]:
        hasher, size = xxhash.xxh3_128(), 0
        with self._files.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
                size += len(chunk)
        return size, hasher.hexdigest()

    def _discard(self, name: str) -> None:
        """Delete a folder, first what makes it count."""
        for path in (f"{self._root}/{name}/{MANIFEST}", f"{self._root}/{name}"):
            with contextlib.suppress(OSError):
                self._files.rm(path, recursive=True)


def _step_of(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match, f"{name} is not a checkpoint's name"
    return int(match[1])


def checkpoints_of(config: Config) -> Checkpoints | RemoteCheckpoints:
    """Those of a run, in the place that its configuration names."""
    folder, keep = config.checkpoint.folder, config.checkpoint.keep
    if "://" in folder:
        return RemoteCheckpoints(f"{folder.rstrip('/')}/{config.name}", keep=keep)
    return Checkpoints(
        Path(folder).absolute() / config.name if folder else config.run_dir.absolute() / "checkpoints", keep=keep
    )
