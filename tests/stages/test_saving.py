"""Checkpoints are written beside the training; one that fails is told and does not end the run."""

from __future__ import annotations

import threading
from pathlib import Path

from engine.checkpoint import Checkpoints
from engine.schedule.incidents import Incident
from engine.stages.saving import Saver


class Model:
    """A trained model whose state is a number; its writing may be held up, or fail."""

    changes = 0

    def __init__(self) -> None:
        self.value = 0
        self.may_write = threading.Event()
        self.error: Exception | None = None
        self.may_write.set()

    def capture_state(self) -> None:
        self.captured = self.value

    def write_state(self, folder: str) -> None:
        assert self.may_write.wait(30)
        if self.error is not None:
            raise self.error
        Path(folder).mkdir()
        (Path(folder) / "value").write_text(str(self.captured))


def saver(folder: Path, timeout_s: float = 30.0) -> tuple[Saver, Model, list[Incident]]:
    incidents: list[Incident] = []
    return Saver(Checkpoints(folder, keep=2), incidents.append, timeout_s=timeout_s), Model(), incidents


def written(folder: Path) -> dict[int, str]:
    return {int(path.parent.parent.name[5:]): path.read_text() for path in folder.glob("step_*[0-9]/policy/value")}


def test_what_is_written_is_the_state_at_the_call_whatever_the_training_does_meanwhile(tmp_path):
    save, model, incidents = saver(tmp_path)
    model.may_write.clear()
    model.value = 7
    save.save(2, {"a": 1}, {"policy": model})
    model.value = 8
    assert written(tmp_path) == {}
    assert save.saved is None
    model.may_write.set()
    save.settle()
    assert (written(tmp_path), save.saved, incidents) == ({2: "7"}, 2, [])


def test_the_next_waits_for_the_one_before(tmp_path):
    save, model, _ = saver(tmp_path)
    for step in (2, 4, 6):
        model.value = step
        save.save(step, {}, {"policy": model})
    save.settle()
    assert written(tmp_path) == {4: "4", 6: "6"}


def test_a_failure_is_an_incident_and_the_next_is_tried(tmp_path):
    save, model, incidents = saver(tmp_path)
    save.save(2, {}, {"policy": model})
    save.settle()
    model.error = OSError(28, "No space left on device")
    save.save(4, {}, {"policy": model})
    save.settle()
    save.poll()
    assert [(i.kind, i.message) for i in incidents] == [
        ("checkpoint_failed", "OSError: [Errno 28] No space left on device")
    ]
    assert written(tmp_path) == {2: "0"}
    model.error = None
    save.save(6, {}, {"policy": model})
    save.settle()
    assert (sorted(written(tmp_path)), save.saved) == ([2, 6], 6)


def test_storage_that_hangs_does_not_hold_up_the_training(tmp_path):
    save, model, incidents = saver(tmp_path, timeout_s=0.05)
    model.may_write.clear()
    save.save(2, {}, {"policy": model})
    save.save(4, {}, {"policy": model})  # waits a moment, is told, and leaves this one out
    assert [i.kind for i in incidents] == ["checkpoint_failed"]
    model.may_write.set()
    save.settle(30)
    assert sorted(written(tmp_path)) == [2]
