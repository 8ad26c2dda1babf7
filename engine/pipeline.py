"""Runs the stages of a configuration in order, from preflight to the saved models, and ends in order whatever happens.

    check every stage --> [ prepare --> start workers --> train --> save --> result.json ] x stages

A stage that is finished is left as it is; one that was killed goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from engine.checkpoint import Checkpoint, Checkpoints, changed_settings, read_result, write_result
from engine.config import Config, UserError
from engine.config_file import STAGE_PREFIX, PipelineConfig
from engine.model_folder import resolved
from engine.plan import Plan, prepare
from engine.ray_token import use_private_token
from engine.remote_checkpoints import RemoteCheckpoints, checkpoints_of
from engine.roles import Workers
from engine.stages.distill import DistillStage
from engine.stages.loop import Loop, Result, Stage
from engine.stages.preference import PreferenceStage
from engine.stages.pretrain import PretrainStage
from engine.stages.reward_model import RewardModelStage
from engine.stages.rl import RLStage
from engine.stages.sft import SFTStage
from engine.stop_signals import StopSignals
from engine.tracking.incidents import IncidentLog
from engine.tracking.redact import redact
from engine.tracking.tracker import Tracker
from engine.user_code import importing

_STAGES: dict[str, Callable[[Config, Workers, Tracker, Plan], Stage]] = {
    "pretrain": PretrainStage,
    "sft": SFTStage,
    "reward_model": RewardModelStage,
    "preference": PreferenceStage,
    "distill": DistillStage,
    "rl": RLStage,
}


def run(config: Config | PipelineConfig, *, start_from: str | None = None) -> Result:
    """Check everything, start the workers, train, save. Returns the last stage's model and its held-out results.

    Ctrl-C and SIGTERM end the run as KeyboardInterrupt, with records flushed and every process gone.

    Args:
        config: one stage, or a pipeline of several.
        start_from: the stage of a pipeline from which on everything is trained anew; earlier ones must be finished.
            What the stages had made is moved aside, not deleted.

    Raises:
        UserError: something that the user can mend.
        ActorError: a worker failed, or missed a deadline.
    """
    if importing():
        raise UserError(
            f"run() was called while {importing()} was imported: call it under `if __name__ == '__main__':`"
        )
    stages = dict(config.stages) if isinstance(config, PipelineConfig) else {config.name: config}
    moved = [] if start_from is None else _start_from(config, stages, start_from)
    results = {name: result for name, stage in stages.items() if (result := _finished(stage)) is not None}
    missing = [name for name in stages if name not in results]
    _check_order(stages, missing)
    try:
        plans = _preflight(stages, missing)
    except BaseException:
        for folder, aside in moved:
            aside.rename(folder)
        raise
    with contextlib.ExitStack() as stack:
        signals = StopSignals()
        connect = _once(lambda: stack.enter_context(_cluster([stages[name] for name in missing], signals)))
        for name, stage in stages.items():
            if name in missing:
                models = {earlier: result.model for earlier, result in results.items()}
                results[name] = _run_stage(stage, models, plans.get(name), connect, signals)
            if len(stages) > 1:
                state = "finished" if name in missing else "was finished already"
                print(f"stage {name} {state}: {results[name].summary()}", flush=True)
    return results[list(stages)[-1]]


def _preflight(stages: Mapping[str, Config], missing: list[str]) -> dict[str, Plan]:
    """Check all stages that are to run; returns the plan of the first, the others' are made when their turn comes.

    A model that does not exist yet is stood for by the one it will start from.
    """
    stand_ins: dict[str, Path] = {}
    plans: dict[str, Plan] = {}
    for name, stage in stages.items():
        config = resolved(stage, stand_ins)
        stand_ins[name] = Path(config.model.path)
        if name in missing:
            unmade = [key for key, path in stage.model_paths.items() if path.startswith(STAGE_PREFIX)]
            with _undone_on_error(config.run_dir):
                plan = prepare(config, unmade=unmade)
            if name == missing[0]:
                plans[name] = plan
    return plans


@contextlib.contextmanager
def _undone_on_error(folder: Path) -> Iterator[None]:
    """A folder that the preflight made is removed again when the preflight fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(made[0], ignore_errors=True)
            for path in made[1:]:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise


def _check_order(stages: Mapping[str, Config], missing: list[str]) -> None:
    """A finished stage whose predecessor is to be trained anew would keep a model made from another.

    Raises:
        UserError: there is one.
    """
    for name, stage in stages.items():
        for path in stage.model_paths.values():
            source = path.removeprefix(STAGE_PREFIX)
            if source != path and source in missing and name not in missing:
                raise UserError(
                    f"stage {name} is finished, but {source}, which it starts from, is not; use --from {source} to "
                    "train it and what follows anew"
                )


def _start_from(config: Config | PipelineConfig, stages: Mapping[str, Config], name: str) -> list[tuple[Path, Path]]:
    """Move aside what this stage and the later ones have made; returns (folder, where it is now), the last first.

    Raises:
        UserError: there is no such stage, or an earlier one is not finished.
    """
    if not isinstance(config, PipelineConfig) or name not in stages:
        known = ", ".join(stages) if isinstance(config, PipelineConfig) else "none: the file has no `stages:`"
        raise UserError(f"--from {name}: no such stage; known: {known}")
    names = list(stages)
    for earlier in names[: names.index(name)]:
        if _finished(stages[earlier]) is None:
            raise UserError(
                f"--from {name}: the earlier stage {earlier} is not finished; start from it, or leave --from out"
            )
    moved = []
    for later in reversed(names[names.index(name) :]):
        folder = stages[later].run_dir
        if folder.exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
                number += 1
            folder.rename(aside)
            moved.append((folder, aside))
    return moved


def _finished(config: Config) -> Result | None:
    """The result of a stage that is finished and was run with these settings.

    Raises:
        UserError: its folder holds a run with other settings, finished or not.
    """
    if config.resume == "never" or not config.run_dir.is_dir():
        return None
    record = config.run_dir / "config.yaml"
    if record.is_file() and _has_measured(config.run_dir):
        old = yaml.safe_load(record.read_text(encoding="utf-8"))
        changed = changed_settings(old, redact(config.model_dump(mode="json")))
        if changed:
            raise UserError(
                f"{config.run_dir} holds a run with other settings ({'; '.join(changed[:5])}); choose another name=, "
                "delete it, or in a pipeline run this stage anew with --from"
            )
    found = read_result(config.run_dir)
    return Result(Path(found["model"]), found["before"], found["after"]) if found else None


@contextlib.contextmanager
def _cluster(stages: list[Config], signals: StopSignals) -> Iterator[None]:
    """A connection to Ray for these stages, ended in order when signals come."""
    if stages[0].ray.address is None:
        use_private_token()
    # Ray and the actors' libraries, only once the preflight has passed
    from engine.cluster import connected

    with signals, connected(stages):
        signals.catch()  # Ray has put its own handler in, which aborts at SIGTERM
        yield


def _once(action: Callable[[], Any]) -> Callable[[], None]:
    """Does it at the first call only."""
    done = False

    def call() -> None:
        nonlocal done
        if not done:
            done = True
            action()

    return call


def _run_stage(
    given: Config,
    models: Mapping[str, Path],
    plan: Plan | None,
    connect: Callable[[], None],
    signals: StopSignals,
) -> Result:
    """One stage, from its records to its result; the cluster is joined once the first stage's records are open."""
    config = resolved(given, models)
    found = plan or prepare(config)
    checkpoints = checkpoints_of(config)
    resumed = checkpoints.newest() if config.resume == "auto" else None
    resume_step = _resume_step(config, resumed)
    tracker = Tracker(given, resume_step=resume_step)
    status = "failed"
    try:
        _note_start(tracker, found, checkpoints, resumed, begun=resume_step is not None)
        connect()
        from engine.cluster import started_workers

        incidents = IncidentLog(tracker, stop_after=config.ray.stop_after_incidents)
        start = partial(started_workers, updates=found.updates, annotators=len(found.annotators))
        with start(config, report=incidents.report, record=tracker.event) as workers:
            stage = partial(_STAGES[config.stage], config, workers, tracker, found)
            result = Loop(config, workers, stage, tracker, checkpoints, incidents, signals).run(resumed)
        write_result(config.run_dir, result.record())
        status = "succeeded"
        return result
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        tracker.event("run_failed", error=type(error).__name__, message=str(error), traceback=trace)
        raise
    finally:
        tracker.close(status)


def _resume_step(config: Config, resumed: Checkpoint | None) -> int | None:
    """Step whose records are kept; -1 starts a killed run's records over, None makes a new folder."""
    if resumed is not None:
        return resumed.step
    begun = config.resume == "auto" and (config.run_dir / "config.yaml").is_file()
    return -1 if begun else None


def _has_measured(folder: Path) -> bool:
    """Whether a run has recorded anything there that could be missed."""
    metrics = folder / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def _note_start(
    tracker: Tracker, plan: Plan, checkpoints: Checkpoints | RemoteCheckpoints, resumed: Checkpoint | None, begun: bool
) -> None:
    for reason in plan.skipped:
        tracker.event("row_skipped", reason=reason)
    if plan.skipped:
        tracker.note(f"{len(plan.skipped)} rows skipped (events.jsonl says why)")
    for reason in checkpoints.passed_over:
        tracker.event("checkpoint_passed_over", reason=reason)
        tracker.note(f"a checkpoint is not whole and was passed over: {reason}")
    if resumed is not None:
        tracker.note(f"goes on from the checkpoint of step {resumed.step}")
    elif begun:
        tracker.note("was begun before and left no checkpoint; starts over")
