"""A vLLM engine inside a Ray actor, owned by one thread.

    callers' threads                       engine's thread: one task after another
    admit()               --- requests -->  step, and the next step behind what waits by then
    load_weights(): fetch --- tensors --->    finished request -> future
    collect()             <-- groups -----

The engine runs in this process (no engine-core child to supervise). Its steps, new requests and weight updates are
tasks of the one thread, so weights change between two steps and never inside one; and all computing has one team of
OpenMP threads: with more threads in teams than cores, libgomp would put them to sleep between any two operations. Each
token is stamped with the version that made it.
Prompts that come while the engine is idle find nothing cached, so that what an engine computes in a synchronous run
depends on them alone and not on when calls arrive. If a step fails, every group under way has its error.

Responses that are under way when weights change go on, with their cached keys and values or without
(`rollout.on_new_weights`); prompts that come later never find keys of older weights, since cached keys are kept by
version and idle time. With LoRA the frozen weights are read from disk and only the adapter is published.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from tokenizers.decoders import DecodeStream

from actors.episode import EpisodePlayer
from actors.group import BrokenError
from actors.lora_engine import engine_lora_arguments, load_adapter
from actors.process import offloads
from actors.shared_memory import Readings
from actors.weight_transfer import Receiver, Route
from actors.weights import Ack, Snapshot, receive
from engine.algorithms.products import linear
from engine.config import Config
from engine.roles import Generation, GenerationRequest, SamplingSettings

T = TypeVar("T")

LONG_SPAN_S = 5.0
"""An engine that is always at work says so in pieces of about this length."""
PREFILL_TOKENS = 4096
"""Tokens that an engine on the CPU takes in one step."""


@dataclass
class _Request:
    """A sample in the engine: its output so far, and who waits for it."""

    prompt: Sequence[int]
    future: Future[Generation] = field(default_factory=Future)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def extend(self, output: Any, version: int) -> None:
        """Take what one engine step added."""
        self.token_ids += output.token_ids
        self.logprobs += [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        self.versions += [version] * len(output.token_ids)
        self.text += output.text
        self.finish_reason = output.finish_reason

    def generation(self, tokenizer: Any) -> Generation:
        """The whole response; a `tokenizer` decodes what the engine has not."""
        return Generation(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            versions=tuple(self.versions),
            text=self.text if tokenizer is None else decoded(tokenizer, self.prompt, self.token_ids),
            finish_reason="length" if self.finish_reason == "length" else "stop",
        )


@dataclass
class _Group:
    """The responses to one prompt in the making. When all are there it goes to those that are whole."""

    key: int
    futures: list[Future[Generation]]
    whole: queue.SimpleQueue[_Group]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: int = 0

    def watch(self) -> None:
        """Count the responses from now on."""
        for future in self.futures:
            future.add_done_callback(self._one_done)

    def _one_done(self, _: Future[Generation]) -> None:
        with self._lock:
            self._done += 1
            if self._done == len(self.futures):
                self.whole.put(self)


def _waiting(items: queue.SimpleQueue[T], wait_s: float = 0.0) -> list[T]:
    """All that a queue holds; waits for the first up to `wait_s` seconds."""
    held = []
    with suppress(queue.Empty):
        held.append(items.get(timeout=wait_s))
        while True:
            held.append(items.get_nowait())
    return held


def decoded(tokenizer: Any, prompt: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of a response behind its prompt, without special tokens, by a tokenizer of the package tokenizers.

    As vLLM decodes token by token, in a hundredth of the time. What is no text at its end (half a character) is left
    out.
    """
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    try:
        return "".join(stream.step(tokenizer, token) or "" for token in token_ids)
    except Exception:  # the package knows no finer kind; some byte sequences are too much for a stream
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def engine_environment(device: str, threads: int) -> dict[str, str]:
    """Environment of a rollout process; must be set before vLLM is imported."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        # torch.compile would be entered for one log-prob helper alone; thread pinning would reserve a core.
        env |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return env


def serves_teacher(config: Config) -> bool:
    """Whether the engines hold a teacher from disk, which nobody trains or publishes, as version 0."""
    return config.stage == "distill" and config.distill.mode == "sequence"


def engine_arguments(config: Config, route: Route = "memory") -> dict[str, Any]:
    """Arguments of vLLM's engine; weights come by this `route`."""
    rollout = config.rollout
    arguments: dict[str, Any] = {
        "model": config.distill.teacher if serves_teacher(config) else config.model.path,
        "dtype": config.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_len": rollout.max_model_len,
        "max_num_seqs": rollout.concurrent_samples,
        "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # after the temperature: what the tokens were sampled from
        "seed": config.seed,
        "disable_log_stats": True,
        "async_scheduling": False,  # a step is over when it returns, so that its tokens are of one version
    }
    if not serves_teacher(config):
        # Of an adapter the frozen weights are read from disk; else the first published version brings all weights.
        alone = config.model.adapter.shipped_alone
        arguments |= engine_lora_arguments(config) if alone else {"load_format": "dummy"}
    if route != "memory":
        arguments["weight_transfer_config"] = {"backend": route}
    if offloads(config):
        arguments["enable_sleep_mode"] = True
    if config.device == "cpu":
        # A prompt is prefilled whole: after a part of one, vLLM winds a seeded sample's generator back, and the CPU's
        # cannot be.
        budget = max(rollout.max_model_len, PREFILL_TOKENS)
        arguments |= {"enforce_eager": True, "block_size": 32}
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": budget}
    return arguments


class RolloutActor:
    """One engine. It serves nothing until a published weight version has been acknowledged."""

    def __init__(self, config: Config, environments: Sequence[Any] = (), route: Route = "memory") -> None:
        """`environments` are the handles of the processes that run them, where there are episodes; weights come by
        this `route`."""
        self.config = config
        self.environments = environments
        self.route = route
        self.version: int | None = 0 if serves_teacher(config) else None
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._stepping = False
        self._idled = 0
        self._requests: dict[str, _Request] = {}
        self._whole: queue.SimpleQueue[_Group] = queue.SimpleQueue()
        self._player: EpisodePlayer | None = None
        self._threads = ThreadPoolExecutor(config.rollout.concurrent_samples, thread_name_prefix="episode")
        self._counter = 0
        self.engine: Any = None
        self._receiver: Receiver
        self._lora: Any = None
        self._tokenizer: Any = None
        self._error: BaseException | None = None
        self._readings = Readings()
        self._busy_since: float | None = None
        self._busy: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()

    def start(self) -> None:
        """Load the model."""
        self._in_order(self._start)
        self._make_player()

    def _in_order(self, task: Callable[..., T], *arguments: Any) -> T:
        """Have the engine's thread do something between two steps; waits for it."""
        return self._engine_thread.submit(task, *arguments).result()

    def _start(self) -> None:
        if self.config.device == "cpu":
            # vLLM's oneDNN path keeps repacked copies of the weights, which in-place loading cannot reach (a tied
            # output embedding would keep its old value without an error). Ours below reads the weights themselves.
            import vllm._custom_ops as ops

            ops._supports_onednn = False
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if self.route == "gloo":
            import actors.gloo_transfer  # noqa: F401  vLLM knows it from then on
        arguments = EngineArgs(**engine_arguments(self.config, self.route))
        self.engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
        for layer in self._model().modules():
            if hasattr(layer, "cpu_linear"):
                layer.cpu_linear = linear
        self._tokenizer = getattr(self.engine.get_tokenizer(), "backend_tokenizer", None)
        self._receiver = Receiver(self._worker())

    def _make_player(self) -> None:
        """Who plays episodes, until the requests of today are forgotten."""
        if self.environments:
            from transformers import AutoTokenizer

            trusted = self.config.model.trust_remote_code
            tokenizer = AutoTokenizer.from_pretrained(self.config.model.path, trust_remote_code=trusted)
            answer = partial(self._answer, self._requests)
            self._player = EpisodePlayer(self.config, tokenizer, self.environments, answer)

    def admit(self, requests: Sequence[GenerationRequest], settings: SamplingSettings, *, version: int) -> None:
        """Take prompts, all before the next engine step; `collect` gives their responses.

        Where there are environments, each response is an episode: its turns are added one by one.

        Raises:
            RuntimeError: the engine does not hold this weight version.
            BrokenError: one of its steps has failed.
        """
        for group in self._in_order(self._admit, requests, settings, version):
            group.watch()

    def _admit(self, requests: Sequence[GenerationRequest], settings: SamplingSettings, version: int) -> list[_Group]:
        self._check_alive()
        if self.version != version:
            raise RuntimeError(f"the engine holds weights version {self.version}, not {version}")
        if not self.engine.has_unfinished_requests():
            self._idled += 1
        return [_Group(r.key, self._responses(r, settings), self._whole) for r in requests]

    def collect(self, *, wait_s: float) -> tuple[list[tuple[int, list[Generation]]], list[tuple[float, float]]]:
        """(key, one response per seed) of the prompts that are answered in full, each of them once.

        And from when to when the engine was at work since the last call, in unix seconds. Waits for the first answer up
        to `wait_s` seconds; blocks its caller's thread only.

        Raises:
            BrokenError: a step has failed, or an episode's turn was late.
        """
        groups = _waiting(self._whole, wait_s)
        answers = [(group.key, [future.result() for future in group.futures]) for group in groups]
        return answers, _waiting(self._busy)

    def _responses(self, request: GenerationRequest, settings: SamplingSettings) -> list[Future[Generation]]:
        if self._player is None:
            return [self._add(request.prompt, settings, seed)[1] for seed in request.seeds]
        play = partial(self._player.play, request, settings)
        return [self._threads.submit(play, seed) for seed in request.seeds]

    def _answer(
        self, requests: dict[str, _Request], prompt: Sequence[int], settings: SamplingSettings, seed: int
    ) -> Generation:
        """One turn of an episode; blocks its caller's thread only.

        Raises:
            CancelledError: the engine has forgotten the `requests` that it had when the episode began.
            BrokenError: a step has failed, or the turn was not over within `timeouts.generate` seconds.
        """
        request_id, future = self._in_order(self._add_turn, requests, prompt, settings, seed)
        within_s = self.config.timeouts.generate
        try:
            return future.result(within_s)
        except TimeoutError:
            raise BrokenError(f"a turn not finished after {within_s:.0f} s") from None
        finally:
            self._in_order(self._give_up, requests, request_id)

    def _add_turn(
        self, requests: dict[str, _Request], prompt: Sequence[int], settings: SamplingSettings, seed: int
    ) -> tuple[str, Future[Generation]]:
        self._check_steps()
        if requests is not self._requests:
            raise CancelledError
        return self._add(prompt, settings, seed)

    def _give_up(self, requests: dict[str, _Request], request_id: str) -> None:
        if requests.pop(request_id, None) is not None and self._error is None:
            self.engine.abort_request([request_id])

    def load_weights(self, snapshot: Snapshot, fetch_s: float) -> Ack:
        """Take a published version between two engine steps and acknowledge it. Versions only go up.

        Raises:
            ValueError: a tensor is missing.
            RuntimeError: the checksum differs, or the version is not newer.
        """
        self._check_newer(snapshot.version)
        buckets, ack = receive(snapshot, self._readings, timeout_s=fetch_s)
        self._in_order(self._load, [tensor for bucket in buckets for tensor in bucket.tensors()], snapshot)
        return ack

    def connect(self, init_info: dict[str, Any]) -> None:
        """Join what weights will come by (`actors/weight_transfer.py`)."""
        self._in_order(self._receiver.connect, init_info)

    def begin_weights(self, version: int) -> None:
        """Stop between two steps until all weights of a version are there.

        Raises:
            RuntimeError: the version is not newer.
        """
        self._check_newer(version)
        self._in_order(self._receiver.begin, version)

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take some of them."""
        self._in_order(self._receiver.receive, update_info)

    def finish_weights(self) -> None:
        """All are there: go on with them.

        Raises:
            ValueError: a tensor is missing.
        """
        self._in_order(self._finish_weights)

    def _finish_weights(self) -> None:
        self._check_whole(self._receiver.finish())
        self._now_holds(self._receiver.accept().version)
        self._keep_stepping()

    def acknowledge(self) -> Ack | None:
        """What came last by `begin_weights` and so on."""
        return self._receiver.ack

    def reset(self) -> None:
        """Forget what is under way, and that any weights were ever loaded."""
        self._in_order(self._forget)
        self._make_player()

    def _forget(self) -> None:
        self._check_alive()
        self.engine.abort_request(list(self._requests))
        for request in self._requests.values():
            request.future.cancel()
        self._requests, self._whole = {}, queue.SimpleQueue()
        self.version = 0 if serves_teacher(self.config) else None

    def sleep(self) -> None:
        """Leave the device's memory to others until `wake`: weights to the host, the cache is given up."""
        if self.engine is not None and offloads(self.config):
            self._in_order(self.engine.sleep, 1)

    def wake(self) -> None:
        """Return to the device."""
        if self.engine is not None and offloads(self.config):
            self._in_order(self.engine.wake_up)

    def _load(self, weights: list[tuple[str, Any]], snapshot: Snapshot) -> None:
        if snapshot.adapter is None:
            self._check_whole(self._model().load_weights(iter(weights)))
        else:
            self._lora = load_adapter(self.engine, dict(weights), snapshot.adapter, version=snapshot.version)
        self._now_holds(snapshot.version)

    def _now_holds(self, version: int) -> None:
        if self.config.rollout.on_new_weights == "recompute":
            self.engine.reset_prefix_cache(reset_running_requests=True)
        self.version = version

    def _check_newer(self, version: int) -> None:
        if self.version is not None and version <= self.version:
            raise RuntimeError(f"weights version {version} is not newer than {self.version}")

    def _check_whole(self, loaded: set[str] | None) -> None:
        """Whether no parameter was left out; of some models vLLM does not say what it has loaded."""
        known = {name for name, _ in self._model().named_parameters()}
        if loaded is not None and (missing := known - loaded):
            raise ValueError(f"{len(missing)} tensors of the engine were not published, e.g. {min(missing)}")

    def _worker(self) -> Any:
        return self.engine.model_executor.driver_worker.worker

    def _model(self) -> Any:
        return self._worker().get_model()

    def _check_alive(self) -> None:
        self._check_steps()
        self._receiver.check_whole()

    def _check_steps(self) -> None:
        if self._error is not None:
            raise BrokenError(f"a step of the engine failed: {self._error!r}") from self._error

    def _add(self, prompt: Sequence[int], settings: SamplingSettings, seed: int) -> tuple[str, Future[Generation]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=list(settings.stop) or None,
            include_stop_str_in_output=True,
            logprobs=0,
            detokenize=self._tokenizer is None or bool(settings.stop),
            seed=seed,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,  # nobody else has it, and a deep copy takes longer than all else here
        )
        self._counter += 1
        request_id = str(self._counter)
        version = self._receiver.version if self._receiver.at_work else self.version
        tokens = {"prompt_token_ids": list(prompt), "cache_salt": f"{version}-{self._idled}"}
        self.engine.add_request(request_id, tokens, params, lora_request=self._lora)
        request = self._requests[request_id] = _Request(prompt)
        self._keep_stepping()
        return request_id, request.future

    def _keep_stepping(self) -> None:
        if not self._stepping:
            self._stepping = True
            self._engine_thread.submit(self._advance)

    def _advance(self) -> None:
        """Take one step, and have the next one follow what waits by then."""
        self._stepping = not self._receiver.at_work and self.engine.has_unfinished_requests()
        if not self._stepping:
            self._end_span()
            return
        try:
            self._step()
        except BaseException as error:
            self._error = error
            for request in self._requests.values():
                request.future.set_exception(BrokenError(f"a step of the engine failed: {error!r}"))
        else:
            self._engine_thread.submit(self._advance)

    def _end_span(self) -> None:
        if self._busy_since is not None:
            self._busy.put((self._busy_since, time.time()))
            self._busy_since = None

    def _step(self) -> None:
        assert self.version is not None  # no request is admitted before
        self._busy_since = self._busy_since or time.time()
        outputs: list[Any] = self.engine.step()
        if not self.engine.has_unfinished_requests() or time.time() - self._busy_since > LONG_SPAN_S:
            self._end_span()
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:
                continue
            request.extend(output.outputs[0], self.version)
            if output.finished:
                del self._requests[output.request_id]
                request.future.set_result(request.generation(None if request.text else self._tokenizer))
