"""The client of OpenAI-compatible servers, against a local one that fails as real ones do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine.config import UserError
from engine.rewards.endpoint import Completion, Endpoint, EndpointError
from tests.rewards.scripted_server import Answer, completion, scripted

BODY = {"model": "m", "messages": [{"role": "user", "content": "?"}], "temperature": 0, "top_k": 3}


def text(answered: Completion) -> str:
    return answered.text


def ask(endpoint: Endpoint, *draws: int) -> list[str]:
    async def together() -> list[str]:
        return await asyncio.gather(*(endpoint.ask(BODY, text, draw) for draw in draws or (0,)))

    return asyncio.run(together())


def in_turn(*answers: Answer) -> Any:
    left = iter(answers)
    return lambda body: next(left)


def test_the_request_arrives_whole_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    with scripted(lambda body: completion("yes")) as server:
        assert ask(Endpoint(url=server.url, key_variable="JUDGE_KEY")) == ["yes"]
    assert server.bodies == [BODY]
    assert server.keys == ["Bearer sk-1"]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_passes_is_tried_again(status: int) -> None:
    with scripted(in_turn((status, {}, b"busy"), completion("yes"))) as server:
        assert ask(Endpoint(url=server.url)) == ["yes"]
    assert len(server.bodies) == 2


def test_it_waits_as_long_as_the_server_says() -> None:
    with scripted(in_turn((429, {"Retry-After": "2"}, b""), completion("yes"))) as server:
        assert ask(Endpoint(url=server.url)) == ["yes"]
    assert 1.9 < server.times[1] - server.times[0] < 4


def test_repetitions_end() -> None:
    with (
        scripted(lambda body: (503, {}, b"too   busy")) as server,
        pytest.raises(EndpointError, match="HTTP 503: too busy"),
    ):
        ask(Endpoint(url=server.url, retries=1))
    assert len(server.bodies) == 2


def test_a_refusal_is_final_and_names_the_keys_variable_never_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with scripted(lambda body: (401, {}, b"no such key: sk-secret")) as server:
        with pytest.raises(EndpointError, match=r"HTTP 401: no such key: <key> \(the key is that of JUDGE_KEY\)"):
            ask(Endpoint(url=server.url, key_variable="JUDGE_KEY"))
        with pytest.raises(EndpointError, match=r"no key was sent; name its key_variable"):
            ask(Endpoint(url=server.url))
    assert len(server.bodies) == 2


def test_no_answer_in_time_is_an_error() -> None:
    release = threading.Event()

    def late(body: Any) -> Answer:
        release.wait(20)
        return completion("yes")

    with scripted(late) as server:
        start = time.monotonic()
        with pytest.raises(EndpointError, match=r"no answer within 0\.3 s"):
            ask(Endpoint(url=server.url, deadline=0.3, retries=1))
        assert time.monotonic() - start < 5
        release.set()


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9/v1: cannot be reached: ConnectError"):
        ask(Endpoint(url="http://127.0.0.1:9/v1/", retries=0))


@pytest.mark.parametrize("garbage", [b"<html>", b"{}", b'{"choices": []}'])
def test_something_else_than_a_completion_is_an_error_and_not_kept(garbage: bytes, tmp_path: Path) -> None:
    with scripted(in_turn((200, {}, garbage), completion("yes"))) as server:
        endpoint = Endpoint(url=server.url, cache=tmp_path)
        with pytest.raises(EndpointError, match="no chat completion"):
            ask(endpoint)
        assert ask(endpoint) == ["yes"]


def test_kept_answers_are_not_asked_for_again_and_cost_nothing(tmp_path: Path) -> None:
    with scripted(lambda body: completion("yes")) as server:
        for _ in range(2):
            endpoint = Endpoint(url=server.url, cache=tmp_path, input_price=2.0, output_price=10.0)
            assert ask(endpoint, 0, 1) == ["yes", "yes"]
            assert ask(endpoint, 0) == ["yes"]
        assert len(server.bodies) == 2, "two draws of one question"
    assert (endpoint.usage.answers, endpoint.usage.cached, endpoint.usage.cost) == (0, 3, 0.0)


def test_an_answer_that_its_reader_refuses_is_not_kept(tmp_path: Path) -> None:
    def refuse(answered: Completion) -> str:
        raise ValueError(answered.text)

    with scripted(lambda body: completion("yes")) as server:
        endpoint = Endpoint(url=server.url, cache=tmp_path)
        with pytest.raises(ValueError, match="yes"):
            asyncio.run(endpoint.ask(BODY, refuse))
        assert ask(endpoint) == ["yes"]
        assert len(server.bodies) == 2


def test_a_broken_file_in_the_cache_is_asked_for_again(tmp_path: Path) -> None:
    with scripted(lambda body: completion("yes")) as server:
        ask(Endpoint(url=server.url, cache=tmp_path))
        [kept] = tmp_path.rglob("*.json")
        kept.write_text("{")
        assert ask(Endpoint(url=server.url, cache=tmp_path)) == ["yes"]
        assert json.loads(kept.read_text())["request"] == BODY


def test_tokens_and_cost_are_counted() -> None:
    silent = json.loads(completion("yes")[2])
    del silent["usage"]
    with scripted(in_turn(completion("a"), completion("b"), (200, {}, json.dumps(silent).encode()))) as server:
        endpoint = Endpoint(url=server.url, input_price=2.0, output_price=10.0)
        for _ in range(3):
            ask(endpoint)
    used = endpoint.usage
    assert (used.answers, used.uncounted, used.prompt_tokens, used.completion_tokens) == (3, 1, 200, 20)
    assert used.cost == pytest.approx((200 * 2 + 20 * 10) / 1e6)


def test_no_more_than_so_many_requests_at_once() -> None:
    def slow(body: Any) -> Answer:
        time.sleep(0.1)
        return completion("yes")

    with scripted(slow) as server:
        ask(Endpoint(url=server.url, concurrent=3), *range(9))
    assert server.most_at_once == 3


@pytest.mark.parametrize("shared", [False, True])
def test_requests_keep_their_distance(shared: bool, tmp_path: Path) -> None:
    cache = tmp_path if shared else None
    with scripted(lambda body: completion("yes")) as server:
        one = Endpoint(url=server.url, requests_per_second=10, cache=cache)
        other = Endpoint(url=server.url, requests_per_second=10, cache=cache) if shared else one
        ask(one, 0, 1, 2)
        ask(other, 3, 4, 5)
    assert server.times[-1] - server.times[0] > 0.45, "six requests, a tenth of a second apart"


def test_a_named_server_is_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(lambda body: completion("yes")) as server:
        monkeypatch.setenv("GNOMON_SERVER_REF_URL", server.url)
        monkeypatch.setenv("GNOMON_SERVER_REF_KEY", "k")
        assert ask(Endpoint(server="ref")) == ["yes"]
    assert server.keys == ["Bearer k"]


def test_a_named_server_outside_of_a_run_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GNOMON_SERVER_REF_URL", raising=False)
    with pytest.raises(UserError, match=r"server 'ref': GNOMON_SERVER_REF_URL is not set"):
        ask(Endpoint(server="ref"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either url or server"),
        ({"url": "http://h/v1", "server": "ref"}, "either url or server"),
        ({"url": "h:80"}, "must begin with http"),
        ({"url": "http://me:secret@h/v1"}, "no user, password"),
        ({"url": "http://h/v1?key=secret"}, "no user, password or parameters"),
        ({"url": "http://h/v1", "key_variable": "sk-secret"}, "not the key itself"),
        ({"server": "ref", "key_variable": "K"}, "key_variable goes with url"),
    ],
)
def test_bad_arguments_are_told_without_secrets(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(**arguments)
    assert "secret" not in str(caught.value)


def test_a_missing_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_KEY"):
        ask(Endpoint(url="http://127.0.0.1:9/v1", key_variable="JUDGE_KEY"))
