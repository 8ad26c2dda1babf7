"""A checkpoint is whole or does not count; none is lost before a newer whole one is there."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Checkpoints, changed_settings, read_result, write_result
from engine.config import Config, UserError

ROOT = Path(__file__).parents[1]
STATE: dict[str, Any] = {
    "sampler": {"position": 3, "generator": 2**127 + 1},
    "mean": 0.1 + 0.2,
    "text": "vier €",
    "before": {"accuracy": 0.5},
    "none": None,
}


def write(checkpoints: Checkpoints, step: int, *, size: int = 1000) -> Path:
    """A checkpoint as two ranks would write it; returns its folder."""
    content = random.Random(step).randbytes(size)
    with checkpoints.writing(step, {**STATE, "step": step}) as folder:
        for rank in (0, 1):
            (folder / f"rank_{rank}").mkdir()
            (folder / f"rank_{rank}" / "model.bin").write_bytes(content + bytes([rank]))
        (folder / "empty").touch()
    return checkpoints.folder / f"step_{step:08d}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writes beyond this many bytes of a file fail with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_written_comes_back_with_the_state_it_had_at_the_call(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path / "run" / "checkpoints", keep=2), {**STATE, "seen": [1, 2]}
    with checkpoints.writing(12, state) as folder:
        assert folder.parent == tmp_path / "run" / "checkpoints"
        assert folder.name.endswith(".partial")
        assert checkpoints.newest() is None
        (folder / "model.bin").write_bytes(b"weights")
        state["seen"].append(3)
    newest = Checkpoints(tmp_path / "run" / "checkpoints", keep=2).newest()
    assert newest is not None
    assert (newest.step, newest.folder.name) == (12, "step_00000012")
    assert newest.state == {**STATE, "seen": [1, 2]}
    assert contents(newest.folder).keys() == {"manifest.json", "model.bin"}
    assert (newest.folder / "model.bin").read_bytes() == b"weights"


def test_a_missing_or_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert checkpoints.newest() is None
    assert checkpoints.passed_over == []
    assert not (tmp_path / "none").exists()


def test_the_newest_ones_stay_by_step_not_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (99_999_998, 99_999_999, 100_000_000):
        write(checkpoints, step)
    assert names(tmp_path) == ["step_100000000", "step_99999999"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 100_000_000


def test_only_its_own_folders_are_ever_touched(tmp_path: Path) -> None:
    (tmp_path / "step_best").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        write(checkpoints, step)
    assert names(tmp_path) == ["notes.txt", "step_00000002", "step_best"]


def test_any_truncation_or_flipped_bit_is_found_and_the_one_before_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 4)
    newest = write(checkpoints, 8)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    assert [path.name for path in files] == ["manifest.json", "model.bin", "model.bin"]
    chance = random.Random(0)
    for case in range(100):
        path = files[case % 3]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        if case % 2:
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(whole)) :]
        path.write_bytes(damaged)
        found = checkpoints.newest()
        assert found is not None
        assert found.step == 4, f"damage at {path} was not seen"
        [reason] = checkpoints.passed_over
        assert reason.startswith(f"step_00000008: {path.relative_to(newest).as_posix()}: ")
        path.write_bytes(whole)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 8
    assert checkpoints.passed_over == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "step_00000008: manifest.json: is missing"),
        (lambda folder: (folder / "empty").unlink(), "step_00000008: empty: is missing"),
        (
            lambda folder: (folder / "rank_1" / "model.bin").write_bytes(b""),
            "step_00000008: rank_1/model.bin: has 0 bytes instead of 1001",
        ),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: is torn, or was changed"),
        (
            lambda folder: (folder / "manifest.json").write_text(
                (folder / "manifest.json").read_text().replace('"position": 3', '"position": 4')
            ),
            "manifest.json: is torn, or was changed",
        ),
        (
            lambda folder: shutil.copy(folder.with_name("step_00000004") / "manifest.json", folder),
            "manifest.json: is that of step 4",
        ),
    ],
)
def test_what_is_missing_torn_or_changed_is_named(tmp_path: Path, damage: Any, reason: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 4)
    damage(write(checkpoints, 8))
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 4
    assert len(checkpoints.passed_over) == 1
    assert checkpoints.passed_over[0].endswith(reason)


def test_a_damaged_one_does_not_count_among_those_kept_and_is_written_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 4)
    model = write(checkpoints, 8) / "rank_0" / "model.bin"
    model.write_bytes(bytes(1001))  # the size is right
    write(checkpoints, 12)
    assert names(tmp_path) == ["step_00000008", "step_00000012"]  # nobody has looked into 8 since
    shutil.rmtree(tmp_path / "step_00000012")

    assert checkpoints.newest() is None
    write(checkpoints, 4)
    assert names(tmp_path) == ["step_00000004"]
    write(checkpoints, 8)
    write(checkpoints, 12)
    assert names(tmp_path) == ["step_00000008", "step_00000012"]


def test_a_later_one_with_flipped_bits_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    before = Checkpoints(tmp_path, keep=1)
    model = write(before, 16) / "rank_0" / "model.bin"
    model.write_bytes(bytes(1001))
    after = Checkpoints(tmp_path, keep=1)
    write(after, 4)
    newest = after.newest()
    assert newest is not None
    assert newest.step == 4
    write(after, 16)
    assert names(tmp_path) == ["step_00000016"]
    newest = after.newest()
    assert newest is not None
    assert newest.step == 16


def test_a_whole_one_is_never_written_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    before = contents(write(checkpoints, 4))
    with pytest.raises(ValueError, match="step_00000004 is a whole checkpoint"):
        write(checkpoints, 4)
    assert contents(tmp_path / "step_00000004") == before
    assert names(tmp_path) == ["step_00000004"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_inside_the_block_leaves_only_the_older_ones(tmp_path: Path, error: type[BaseException]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    before = contents(write(checkpoints, 4))

    def fail_half_way() -> None:
        with checkpoints.writing(8, STATE) as folder:
            (folder / "model.bin").write_bytes(b"half")
            raise error("a rank died")

    with pytest.raises(error):
        fail_half_way()
    assert names(tmp_path) == ["step_00000004"]
    assert contents(tmp_path / "step_00000004") == before


def test_on_a_full_disk_the_error_is_raised_and_the_older_one_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 4)
    with pytest.raises(OSError, match="File too large"), files_limited_to(4096):
        write(checkpoints, 8, size=5000)  # a rank's file does not fit
    with (
        pytest.raises(OSError, match="File too large"),
        files_limited_to(4096),
        checkpoints.writing(8, {"long": "x" * 5000}),  # the manifest does not fit
    ):
        pass
    assert names(tmp_path) == ["step_00000004"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 4


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {3: 1}}, "state.a has the key 3"),
        ({"a": [0, (1, 2)]}, r"state.a\[1\] is a tuple"),
        ({"a": Path("b")}, "state.a is a PosixPath"),
    ],
)
def test_a_state_that_json_would_change_is_refused_before_anything_is_written(
    tmp_path: Path, state: dict[str, Any], where: str
) -> None:
    with pytest.raises(ValueError, match=where), Checkpoints(tmp_path / "c", keep=1).writing(1, state):
        raise AssertionError("the block was entered")
    assert not (tmp_path / "c").exists()


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="cannot be negative"), Checkpoints(tmp_path, keep=1).writing(-1, {}):
        pass
    with (
        pytest.raises(ValueError, match="no rank may write it"),
        Checkpoints(tmp_path, keep=1).writing(1, {}) as folder,
    ):
        (folder / "manifest.json").write_text("{}")
    assert names(tmp_path) == []


def test_numbers_that_are_none_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with checkpoints.writing(1, {"mean": float("nan"), "best": float("-inf")}):
        pass
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.state["mean"] != newest.state["mean"]
    assert newest.state["best"] == float("-inf")


def test_every_file_and_folder_is_on_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def spy_rename(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(f"renamed {Path(new).name}")

    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    with checkpoints.writing(4, STATE) as folder:
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "model.bin").write_bytes(b"weights")
        (folder / "index").write_bytes(b"1")
    inside = ["a/b/model.bin", "index", "a/b", "a"]
    wanted = [str(tmp_path), *(f"{folder}/{name}" for name in inside), f"{folder}/manifest.json", str(folder)]
    assert done == [*wanted, "renamed step_00000004", str(tmp_path / "c")]


def test_one_that_is_deleted_has_lost_its_name_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, deleted, rmtree = Checkpoints(tmp_path, keep=1), [], shutil.rmtree

    def spy(path: Path, **options: Any) -> None:
        deleted.append(Path(path).name)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", spy)
    write(checkpoints, 4)
    write(checkpoints, 8)
    [name] = deleted
    assert name.startswith("step_00000004.")
    assert name.endswith(".partial")


WRITER = """
import sys, time
from pathlib import Path
from engine.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
newest = checkpoints.newest()
step = newest.step if newest else 0
assert step >= int(sys.argv[2]), f"step {sys.argv[2]} is lost: {checkpoints.passed_over}"
assert not checkpoints.passed_over, checkpoints.passed_over
assert not newest or newest.state == {"step": step}
print("ready", step, flush=True)
while True:
    step += 1
    with checkpoints.writing(step, {"step": step}) as folder:
        for rank in range(4):
            (folder / f"model_{rank}.bin").write_bytes(bytes([step % 256]) * 2**16)
        if sys.argv[3] == "inside":
            print("inside", flush=True)
            time.sleep(60)
    print(step, flush=True)
"""


def writer(folder: Path, at_least: int, where: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(folder), str(at_least), where]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_kill_inside_the_block_leaves_the_older_one_and_the_next_writing_cleans_up(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    with checkpoints.writing(4, {"step": 4}):
        pass
    with writer(tmp_path, 4, "inside") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready 4\n"
        assert process.stdout.readline() == "inside\n"
        process.send_signal(signal.SIGKILL)
    [partial] = [name for name in names(tmp_path) if name.endswith(".partial")]
    assert partial.startswith("step_00000005.")
    newest = Checkpoints(tmp_path, keep=2).newest()
    assert newest is not None
    assert newest.step == 4
    assert partial in names(tmp_path)  # reading changes nothing: the writer may be alive
    write(checkpoints, 5)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_kills_at_any_moment_lose_no_checkpoint_that_was_reported(tmp_path: Path) -> None:
    chance, reported = random.Random(0), 0
    for _ in range(8):
        with writer(tmp_path, reported, "any") as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
            time.sleep(chance.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            steps = process.stdout.read().split()
        reported = int(steps[-1]) if steps else reported
    checkpoints = Checkpoints(tmp_path, keep=2)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step >= reported > 0
    assert checkpoints.passed_over == []


def dumped(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"path": "models/tiny"},
        "data": {"train": {"path": "data.py:rows", "arguments": {"size": 3}}},
        "rewards": {"functions": ["rewards.py:correct"]},
        "rl": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4},
    }
    return Config.model_validate({**base, **changes}).model_dump(mode="json")


def test_equal_configurations_have_no_changed_settings() -> None:
    assert changed_settings(dumped(), dumped()) == []


def test_changed_settings_are_named_with_both_values() -> None:
    new = dumped(
        optimizer={"learning_rate": 0.002, "schedule": "linear", "betas": [0.9, 0.99]},
        data={"train": {"path": "data.py:rows", "arguments": {"count": 4}}},
        model={"path": "models/tiny", "trust_remote_code": True},
        seed=7,
    )
    assert changed_settings(dumped(), new) == [
        "data.train.arguments.count: (not there) -> 4",
        "data.train.arguments.size: 3 -> (not there)",
        "model.trust_remote_code: false -> true",
        "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "optimizer.learning_rate: 1e-06 -> 0.002",
        "optimizer.schedule: constant -> linear",
        "seed: 0 -> 7",
    ]


def test_a_section_in_the_place_of_nothing_is_shown_whole() -> None:
    assert changed_settings({"data": {"evaluation": None}}, {"data": {"evaluation": {"path": "x"}}}) == [
        'data.evaluation: null -> {"path": "x"}'
    ]


def test_settings_without_influence_on_the_result_may_change() -> None:
    new = dumped(
        tracking={"wandb": "offline"},
        timeouts={"start": 5.0},
        ray={"cpus_per_rank": 0.5},
        checkpoint={"every": 3},
        resume="never",
        output_dir="elsewhere",
        name="other",
        policy={"ranks": 2, "zero_stage": 3},
        rollout={"engines": 4, "kv_cache_gib": 2.0},
    )
    assert changed_settings(dumped(), new) == []


def test_a_result_comes_back_and_is_none_before(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    assert read_result(tmp_path / "missing") is None
    write_result(tmp_path, {"model": "runs/a/model", "before": None, "after": {"accuracy": 0.1 + 0.2}})
    write_result(tmp_path, {"model": "runs/a/model", "before": {}, "after": {"accuracy": 0.1 + 0.2}})
    assert read_result(tmp_path) == {"model": "runs/a/model", "before": {}, "after": {"accuracy": 0.1 + 0.2}}
    assert names(tmp_path) == ["result.json"]


def test_a_result_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    write_result(tmp_path, {"model": "a"})
    with pytest.raises(ValueError, match=r"result.model is a PosixPath"):
        write_result(tmp_path, {"model": Path("b")})
    with pytest.raises(OSError, match="File too large"), files_limited_to(100):
        write_result(tmp_path, {"model": "b" * 200})
    assert read_result(tmp_path) == {"model": "a"}
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("text", ['{"model": "a', "[]", "\x00\x00"])
def test_a_file_that_is_no_result_is_told_with_its_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"result.json: .*delete it to go on from the newest checkpoint"):
        read_result(tmp_path)
