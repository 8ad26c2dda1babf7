"""The cluster file at the root is one that Ray's own launcher accepts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_rays_launcher_prepares_and_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    [node_type] = prepared["available_node_types"].values()
    assert node_type["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_rays_schema_would_refuse_a_misspelt_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="worker_start_ray_comands"):
        validate_config(prepare_config({**cluster, "worker_start_ray_comands": []}))


def test_the_repositorys_files_that_it_mounts_exist_and_are_used(cluster: dict[str, Any]) -> None:
    mounted = {to: source for to, source in cluster["file_mounts"].items() if not source.startswith("~")}
    assert mounted
    for target, source in mounted.items():
        assert (ROOT / source).exists(), source
        assert any(target in command for command in cluster["setup_commands"]), f"{target} is mounted and not used"


def test_nobody_joins_or_sends_jobs_without_the_token(cluster: dict[str, Any]) -> None:
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    assert "--port=6379" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for command in (head, worker):
        assert "export RAY_AUTH_MODE=token" in command
