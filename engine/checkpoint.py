"""Whole states of a run, from which it goes on bit for bit, and the record that it is finished.

    run_dir/checkpoints/step_00000012/          renamed into place only when every byte of it is on disk
        manifest.json                           step, size and xxh3 checksum of every file, the controller's state
        ...                                     whatever the ranks wrote
    run_dir/checkpoints/step_00000016.1f0c.partial/    being written, or left by a kill; the next writing removes it
    run_dir/result.json                         only in a run that is over

A folder counts only if its manifest and every file that the manifest names are as they were written.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from engine.config import UserError

MANIFEST, RESULT = "manifest.json", "result.json"
PARTIAL = ".partial"
"""Ends the names of folders and files that are not whole."""
CHUNK_BYTES = 2**24
NO_INFLUENCE = frozenset({"tracking", "timeouts", "ray", "placement", "checkpoint", "resume", "output_dir", "name"})
"""Settings that may change between the two halves of a run: the result does not depend on them."""
ROUNDING_ONLY = frozenset(
    {"policy.ranks", "policy.threads", "policy.zero_stage", "policy.tokens_per_microbatch", "critic.ranks"}
    | {"reference.ranks", "rollout.engines", "rollout.threads", "rollout.kv_cache_gib", "rollout.concurrent_samples"}
    | {"rewards.workers"}
)
"""Settings that may change too, by which the result differs in the order of sums alone."""

_NAME = re.compile(r"step_(\d{8,})")
_ABSENT = object()


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path | str
    """Path or URL of what the ranks wrote."""
    step: int
    """Last step that it contains."""
    state: dict[str, Any]
    """The controller's state: plain JSON."""


class Checkpoints:
    """The checkpoints of one run. Only `writing` changes the folder; one process at a time may do so."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """`folder` need not exist; `keep` is the number of whole checkpoints that stay. ValueError if it is below 1."""
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint has to stay")
        self.folder = Path(folder)
        self.keep = keep
        self.passed_over: list[str] = []
        """Torn or tampered ones that `newest` found, newest first: `step_00000012: model.pt: is missing`."""
        self._damaged: set[str] = set()

    @contextmanager
    def writing(self, step: int, state: dict[str, Any]) -> Iterator[Path]:
        """Write the checkpoint of a step: yields a folder that this and other processes fill before the block ends.

        `state` is taken as it is at the call. When the block ends, everything is flushed, checksummed and renamed into
        place; then all but the newest `keep` whole checkpoints and all damaged ones are deleted. If the block or the
        writing fails, what was written is removed, every older checkpoint stays, and the error is raised. Processes on
        other machines flush their own files (`os.fsync`) before the block ends.

        Raises:
            ValueError: a whole checkpoint of this step is there, the step is negative, or the state is not plain JSON.
            OSError: the disk is full, or cannot be written.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it cannot be negative")
        check_plain(state, "state")
        state_text = json.dumps(state)
        target = self.folder / f"step_{step:08d}"
        if target.exists() and _damage(target) is None:
            raise ValueError(f"{target} is a whole checkpoint; it is not written again")
        self.folder.mkdir(parents=True, exist_ok=True)
        _sync(self.folder.parent)
        for left in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        partial = _partial_name(target)
        try:
            partial.mkdir()
            yield partial
            _finish(partial, step, json.loads(state_text))
            if target.exists():
                _discard(target)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._damaged.discard(target.name)
        _sync(self.folder)
        self._delete_old(step)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; every byte is read and compared. None without one, or without a folder."""
        self.passed_over = []
        for folder in sorted(self._folders(), key=_step_of, reverse=True):
            reason = _damage(folder)
            if reason is None:
                return Checkpoint(folder, _step_of(folder), _read_manifest(folder)["state"])
            self.passed_over.append(f"{folder.name}: {reason}")
            self._damaged.add(folder.name)
        return None

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]

    def _delete_old(self, step: int) -> None:
        """Delete all but the newest `keep` up to this step; later ones only if damaged: they do not outweigh this."""
        folders = sorted(self._folders(), key=_step_of)
        whole = [f for f in folders if f.name not in self._damaged and _damage(f, contents=False) is None]
        up_to_step = [f for f in whole if _step_of(f) <= step]
        assert [_step_of(f) for f in up_to_step[-1:]] == [step], f"step {step} is not whole right after its writing"
        stay = {*up_to_step[-self.keep :], *(f for f in whole if _step_of(f) > step)}
        for folder in folders:
            if folder not in stay:
                _discard(folder)


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that differ and change the result: `optimizer.learning_rate: 0.001 -> 0.002`, in alphabetical order.

    Both are configurations as `config.model_dump(mode="json")` gives them, secrets masked, since values are shown.
    Not compared is what has no influence on the result, `NO_INFLUENCE` and `ROUNDING_ONLY`.
    """
    return list(_differences(_influential(old), _influential(new), ""))


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Record in a run's folder, whole or not at all, that the run is over and with what result (plain JSON).

    Raises ValueError for what JSON cannot hold, OSError when the disk is full; an older record then stays.
    """
    check_plain(result, "result")
    partial = folder / (RESULT + PARTIAL)
    try:
        _write(partial, json.dumps(result, indent=1) + "\n")
        os.replace(partial, folder / RESULT)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(folder)


def read_result(folder: Path) -> dict[str, Any] | None:
    """What `write_result` recorded; None if the run is not over. UserError if the file is not such a record."""
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to go on from the newest checkpoint") from None
    if not isinstance(result, dict):
        raise UserError(f"{path}: is not a run's result; delete it to go on from the newest checkpoint")
    return result


def _finish(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Flush every file and folder to disk, the manifest last."""
    if (folder / MANIFEST).exists():
        raise ValueError(f"{MANIFEST} is the name of the checkpoint's own record; no rank may write it")
    files, folders = {}, [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
        else:
            size, checksum = _checksum(path, sync=True)
            files[path.relative_to(folder).as_posix()] = {"bytes": size, "xxh3_128": checksum}
    for path in reversed(folders[1:]):
        _sync(path)
    _write(folder / MANIFEST, manifest_text({"step": step, "files": files, "state": state}))
    _sync(folder)


def _damage(folder: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint is not whole, or None; without `contents` only the manifest and the files' sizes are read."""
    try:
        manifest = _read_manifest(folder)
        if manifest["step"] != _step_of(folder):
            return f"{MANIFEST}: is that of step {manifest['step']}"
        for name, written in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name}: is missing"
            if path.stat().st_size != written["bytes"]:
                return f"{name}: has {path.stat().st_size} bytes instead of {written['bytes']}"
            if contents and _checksum(path) != (written["bytes"], written["xxh3_128"]):
                return f"{name}: its checksum differs"
    except FileNotFoundError:
        return f"{MANIFEST}: is missing"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest. Raises as `parse_manifest`, OSError without one."""
    return parse_manifest((folder / MANIFEST).read_bytes())


def parse_manifest(raw: bytes) -> dict[str, Any]:
    """A manifest that is, byte for byte, as it was written. Raises ValueError for any other."""
    try:
        manifest = json.loads(raw)
    except ValueError:
        manifest = None
    if isinstance(manifest, dict):
        manifest.pop("xxh3_128", None)
        if manifest_text(manifest).encode() == raw:
            return manifest
    raise ValueError(f"{MANIFEST}: is torn, or was changed")


def manifest_text(manifest: dict[str, Any]) -> str:
    """The one way to write a manifest: its checksum, then its content."""
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(manifest).encode())
    return json.dumps({"xxh3_128": checksum, **manifest}, indent=1) + "\n"


def _checksum(path: Path, *, sync: bool = False) -> tuple[int, str]:
    """Bytes and checksum of a file, which is flushed to disk if asked."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
            size += len(chunk)
        if sync:
            os.fsync(file.fileno())
    return size, hasher.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush a folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(folder: Path) -> None:
    """Delete a checkpoint at once: one that is half deleted no longer has a checkpoint's name."""
    partial = _partial_name(folder)
    os.rename(folder, partial)
    shutil.rmtree(partial, ignore_errors=True)


def _partial_name(folder: Path) -> Path:
    """A name of its own each time, so that a rank that outlived a kill cannot write into the next attempt."""
    return folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match, f"{folder} is not a checkpoint's name"
    return int(match[1])


def check_plain(value: Any, where: str) -> None:
    """Raise ValueError unless json.loads(json.dumps(value)) gives the same: no tuples, arrays or keys but strings.

    NaN and infinities pass: Python's json writes and reads them.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys in JSON are strings")
            check_plain(item, f"{where}.{key}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            check_plain(item, f"{where}[{position}]")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold as it is")


def _influential(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {key: item for key, item in value.items() if f"{section}.{key}" not in ROUNDING_ONLY}
        if isinstance(value, dict)
        else value
        for section, value in settings.items()
        if section not in NO_INFLUENCE
    }


def _differences(old: Any, new: Any, where: str) -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    """A value as the YAML would have it."""
    if value is _ABSENT:
        return "(not there)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
