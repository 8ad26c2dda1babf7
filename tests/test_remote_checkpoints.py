"""At a URL, too, a checkpoint is whole or does not count, and none is lost before a newer whole one is there."""

from __future__ import annotations

import random
import uuid
from typing import Any

import fsspec
import pytest

from engine.config import Config, UserError
from engine.remote_checkpoints import RemoteCheckpoints, checkpoints_of

STATE: dict[str, Any] = {"sampler": {"position": 3}, "mean": 0.1 + 0.2}


@pytest.fixture
def url() -> str:
    """A place in this process's memory, which has no rename and no folders of its own."""
    return f"memory://{uuid.uuid4().hex}/run"


def write(checkpoints: RemoteCheckpoints, step: int) -> str:
    content = random.Random(step).randbytes(1000)
    with checkpoints.writing(step, STATE | {"step": step}) as folder:
        for rank in (0, 1):
            with fsspec.open(f"{folder}/policy/rank_{rank}.bin", "wb") as file:
                file.write(content + bytes([rank]))
    return folder


def files(url: str) -> dict[str, bytes]:
    store, root = fsspec.core.url_to_fs(url)
    return {path: store.cat_file(path) for path in store.find(root)}


def test_what_was_written_comes_back_and_the_newest_ones_stay(url: str) -> None:
    checkpoints = RemoteCheckpoints(url, keep=2)
    assert checkpoints.newest() is None
    folders = [write(checkpoints, step) for step in (4, 8, 12)]
    newest = RemoteCheckpoints(url, keep=2).newest()
    assert newest is not None
    assert (newest.step, newest.folder, newest.state) == (12, folders[2], STATE | {"step": 12})
    assert {path.split("/")[-3] for path in files(url) if path.endswith("rank_0.bin")} == {
        folder.rpartition("/")[2] for folder in folders[1:]
    }


def test_any_truncation_or_flipped_bit_is_found_and_the_one_before_taken(url: str) -> None:
    checkpoints = RemoteCheckpoints(url, keep=2)
    write(checkpoints, 4)
    newest = write(checkpoints, 8)
    store, root = fsspec.core.url_to_fs(newest)
    chance = random.Random(0)
    for case in range(40):
        path = sorted(store.find(root))[case % 3]
        whole = store.cat_file(path)
        damaged = bytearray(whole)
        if case % 2:
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(whole)) :]
        store.pipe_file(path, bytes(damaged))
        found = checkpoints.newest()
        assert found is not None
        assert found.step == 4, f"damage at {path} was not seen"
        assert len(checkpoints.passed_over) == 1
        store.pipe_file(path, whole)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 8


def test_one_without_its_manifest_does_not_count_and_the_next_writing_cleans_up(url: str) -> None:
    checkpoints = RemoteCheckpoints(url, keep=2)
    write(checkpoints, 4)
    fsspec.filesystem("memory").pipe_file(f"{url}/step_00000008-0123abcd/policy/rank_0.bin", b"half")
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, checkpoints.passed_over) == (4, [])
    write(checkpoints, 8)
    assert not [path for path in files(url) if "0123abcd" in path]


def test_a_failure_inside_the_block_leaves_only_the_older_ones(url: str) -> None:
    checkpoints = RemoteCheckpoints(url, keep=1)
    write(checkpoints, 4)
    before = files(url)

    def fail_half_way() -> None:
        with checkpoints.writing(8, STATE) as folder:
            fsspec.filesystem("memory").pipe_file(f"{folder}/policy/rank_0.bin", b"half")
            raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        fail_half_way()
    assert files(url) == before


def test_a_step_that_is_written_again_replaces_what_was_there(url: str) -> None:
    checkpoints = RemoteCheckpoints(url, keep=2)
    write(checkpoints, 4)
    again = write(checkpoints, 4)
    assert {path.split("/")[-3] for path in files(url) if path.endswith(".bin")} == {again.rpartition("/")[2]}


def test_the_configuration_says_where() -> None:
    base = {
        "name": "mine",
        "model": {"path": "m"},
        "data": {"train": "rows.jsonl"},
        "rewards": {"functions": ["r.py:f"]},
        "rl": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4},
    }
    assert str(checkpoints_of(Config.model_validate(base)).folder).endswith("runs/mine/checkpoints")
    elsewhere = Config.model_validate(base | {"checkpoint": {"folder": "/big/disk"}})
    assert str(checkpoints_of(elsewhere).folder) == "/big/disk/mine"
    remote = checkpoints_of(Config.model_validate(base | {"checkpoint": {"folder": "memory://bucket/"}}))
    assert isinstance(remote, RemoteCheckpoints)
    assert remote.url == "memory://bucket/mine"
    with pytest.raises(UserError, match=r"checkpoint\.folder: nonsense://bucket/mine: "):
        checkpoints_of(Config.model_validate(base | {"checkpoint": {"folder": "nonsense://bucket"}}))
