"""The files for clusters: KubeRay's types accept the job, and the SLURM script runs where a node is this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from actors.process import free_port
from engine.tracking.jsonl import read_rows

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
Text = dict[str, str]


class Strict(BaseModel):
    """Unknown fields are errors, as with `kubectl apply --validate=strict`."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Mount(Strict):
    """core/v1 VolumeMount, of which we use two fields."""

    name: str
    mount_path: Annotated[str, Field(pattern="^/")]


class Variable(Strict):
    """core/v1 EnvVar."""

    name: str
    value: str


class Resources(Strict):
    """core/v1 ResourceRequirements."""

    requests: Text
    limits: Text


class Container(Strict):
    """core/v1 Container."""

    name: str
    image: str
    env: list[Variable] = []
    resources: Resources
    volume_mounts: list[Mount] = []


class Claim(Strict):
    """core/v1 PersistentVolumeClaimVolumeSource."""

    claim_name: str


class Empty(Strict):
    """core/v1 EmptyDirVolumeSource."""

    medium: str
    size_limit: str


class Volume(Strict):
    """core/v1 Volume."""

    name: str
    persistent_volume_claim: Claim | None = None
    empty_dir: Empty | None = None


class PodSpec(Strict):
    """core/v1 PodSpec."""

    containers: list[Container]
    volumes: list[Volume] = []
    termination_grace_period_seconds: int


class PodTemplate(Strict):
    """core/v1 PodTemplateSpec."""

    spec: PodSpec


class HeadGroup(Strict):
    """ray.io/v1 HeadGroupSpec."""

    ray_start_params: Text
    template: PodTemplate


class WorkerGroup(Strict):
    """ray.io/v1 WorkerGroupSpec."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: Text
    template: PodTemplate


class RayCluster(Strict):
    """ray.io/v1 RayClusterSpec."""

    ray_version: str
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayJobSpec(Strict):
    """ray.io/v1 RayJobSpec."""

    entrypoint: str
    backoff_limit: int
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    ray_cluster_spec: RayCluster


class RayJob(Strict):
    """ray.io/v1 RayJob."""

    api_version: Annotated[str, Field(pattern=r"^ray\.io/v1$")]
    kind: Annotated[str, Field(pattern="^RayJob$")]
    metadata: Text
    spec: RayJobSpec


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "rayjob.yaml").read_text())


def test_kuberays_types_accept_the_job(job: dict[str, Any]) -> None:
    found = RayJob.model_validate(job)
    lock = (ROOT / "requirements" / "gpu.txt").read_text()
    assert f"ray=={found.spec.ray_cluster_spec.ray_version}\n" in lock.replace("ray[default]==", "ray==")
    assert found.spec.entrypoint.startswith("python -m engine run ")
    for group in (found.spec.ray_cluster_spec.head_group_spec, *found.spec.ray_cluster_spec.worker_group_specs):
        pod = group.template.spec
        mounted = {mount.name for container in pod.containers for mount in container.volume_mounts}
        assert mounted == {volume.name for volume in pod.volumes}
        assert pod.termination_grace_period_seconds == 60


def test_a_misspelt_field_would_be_refused(job: dict[str, Any]) -> None:
    job["spec"]["backofLimit"] = 3
    with pytest.raises(ValidationError, match="backofLimit"):
        RayJob.model_validate(job)


@pytest.mark.timeout(400)
def test_the_slurm_script_runs_ray_and_the_run_and_queues_the_job_again_at_sigterm(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    raw_config["rl"]["steps"] = 100_000
    raw_config |= {"checkpoint": {"every": 100_000}, "ray": {"cpus_per_rank": 0.5}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw_config))
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_ins = {
        "scontrol": f'if [ "$1" = requeue ]; then touch {tmp_path}/requeued; else echo here; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
    }
    for name, script in stand_ins.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = inherited | {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(home), "PORT": str(free_port())}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "VENV": str(Path(sys.executable).parents[1])}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        script = subprocess.Popen(
            ["bash", str(CLUSTERS / "slurm.sh"), str(tmp_path / "run.yaml")],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    run_dir = Path(raw_config["output_dir"]) / raw_config["name"]
    try:
        end = time.monotonic() + 200
        while len(read_rows(run_dir / "metrics.jsonl")) < 3:
            assert script.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        assert (home / ".gnomon-ray-token-7").stat().st_mode & 0o077 == 0
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 0, log.read_text()
    finally:
        for process in psutil.process_iter():  # as SLURM does when the script has ended
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(home):
                    process.kill()
    assert (tmp_path / "requeued").exists()
    assert "is saved; the same command goes on from there" in log.read_text()
    assert json.loads((run_dir / "events.jsonl").read_text().splitlines()[-1])["status"] == "interrupted"
