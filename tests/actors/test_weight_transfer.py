"""Which way weights take, and that what passes on it is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError

from actors import weight_transfer
from actors.rollout import engine_arguments
from actors.weight_transfer import Engines, Tally, TransferError
from engine.config import Config

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}


def route(**changes: Any) -> str:
    return Config.model_validate(BASE | {"device": "cuda"} | changes).weight_route


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "nccl"),
        ({"device": "cpu"}, "memory"),
        ({"placement": {"mode": "packed"}}, "ipc"),
        ({"placement": {"mode": "packed"}, "rollout": {"engines": 2}}, "memory"),
        ({"placement": {"mode": "packed"}, "rollout": {"engines": 2}, "policy": {"ranks": 2}}, "ipc"),
        ({"placement": {"mode": "packed", "groups": [["policy", "reference"]]}}, "nccl"),
        ({"placement": {"mode": "packed", "groups": [["policy", "rollout"]]}}, "ipc"),
        ({"placement": {"mode": "turns", "groups": [["policy", "critic"]]}, "policy": {"zero_stage": 1}}, "memory"),
        ({"placement": {"mode": "turns"}, "policy": {"zero_stage": 1}}, "memory"),
        ({"model": {"path": "m", "adapter": {"kind": "lora"}}}, "memory"),
        ({"model": {"path": "m", "adapter": {"kind": "lora", "dora": True}}}, "nccl"),
    ],
)
def test_the_way_follows_from_who_sits_where(changes, expected):
    assert route(**changes) == expected


def test_engines_are_told_of_vllms_transfer_engine():
    config = Config.model_validate(BASE | {"device": "cuda"})
    assert engine_arguments(config, "nccl")["weight_transfer_config"] == {"backend": "nccl"}
    assert "weight_transfer_config" not in engine_arguments(config, "memory")


def counted(*weights: tuple[str, torch.Tensor]) -> str:
    tally = Tally()
    assert [name for name, _ in tally.count(iter(weights))] == [name for name, _ in weights]
    return tally.checksum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_checksum_is_of_names_shapes_types_order_and_each_word(dtype):
    torch.manual_seed(0)
    a, b = torch.randint(-9, 9, (3, 4)).to(dtype), torch.randint(-9, 9, (5,)).to(dtype)
    changed, swapped = a.clone(), a.clone()
    changed[1, 2] += 1
    swapped.view(-1)[:2] = a.view(-1)[:2].flip(0)
    assert counted(("a", a), ("b", b)) == counted(("a", a.clone()), ("b", b.clone()))
    different = [
        counted(("a", a), ("c", b)),
        counted(("a", a.reshape(4, 3)), ("b", b)),
        counted(("b", b), ("a", a)),
        counted(("a", changed), ("b", b)),
        counted(("a", swapped), ("b", b)),
        counted(("a", a)),
        counted(("a", a.to(torch.float16)), ("b", b)),
    ]
    assert counted(("a", a), ("b", b)) not in different
    assert len(set(different)) == len(different)


class Actor:
    """Takes calls as a Ray actor's handle."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.error = error

    def __getattr__(self, method: str) -> Any:
        def remote(*argument: Any) -> Any:
            self.asked.append((method, *argument))
            return self.error

        return type("Call", (), {"remote": staticmethod(remote)})


@pytest.fixture
def two_engines(monkeypatch):
    def get(references: list[Exception | None], timeout: float) -> None:
        assert timeout == 7.0
        for reference in references:
            if reference is not None:
                raise reference

    monkeypatch.setattr(weight_transfer.ray, "get", get)
    return [Actor(), Actor()]


def test_each_engine_is_a_rank_of_its_own(two_engines):
    engines = Engines(two_engines, timeout_s=7.0)
    engines.version = 3
    engines.init_weight_transfer_engine({"rank_offset": 1, "world_size": 3})
    engines.start_weight_update()
    engines.update_weights({"names": ["w"]})
    engines.finish_weight_update()
    for place, actor in enumerate(two_engines):
        assert actor.asked == [
            ("connect", {"rank_offset": 1 + place, "world_size": 3}),
            ("begin_weights", 3),
            ("receive_weights", {"names": ["w"]}),
            ("finish_weights",),
        ]


def test_what_has_no_ranks_is_given_none(two_engines):
    Engines(two_engines, timeout_s=7.0).init_weight_transfer_engine({"packed": True})
    assert [actor.asked for actor in two_engines] == [[("connect", {"packed": True})]] * 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RayActorError(error_msg="the\n  actor died"),
            (TransferError, r"begin_weights\(\) of an engine failed: the actor died"),
        ),
        (RayTaskError("f", "gone", RuntimeError("gone")), (TransferError, "of an engine failed")),
        (RayTaskError("f", "trace", ValueError("no such tensor")), (ValueError, "^no such tensor$")),
    ],
)
def test_when_an_engine_fails_others_are_let_go(two_engines, error, told):
    two_engines[1].error = error
    let_go = []
    with pytest.raises(told[0], match=told[1]):
        Engines(two_engines, timeout_s=7.0, give_up=lambda: let_go.append(True)).start_weight_update()
    assert let_go == [True]
