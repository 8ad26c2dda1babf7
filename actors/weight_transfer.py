"""Weights from device to device, by vLLM's weight-transfer engines: CUDA IPC on one device, NCCL between devices.

    controller --- send(version, engines) --> every rank of the policy: vLLM's sending engine reads its weights
                                                rank 0 asks the engines: connect, begin, receive ..., finish
    engine's thread, no step in between <------   vLLM's receiving engine loads what comes
    controller <-- Ack(version, checksum) ---   both have counted the same

Weights travel in buckets, so there is never a second copy of the model. `Config.weight_route` chooses the way by where
the roles sit. Where there is no GPU, gloo runs the same steps (actors/gloo_transfer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal, cast

import ray
import torch
import xxhash
from ray.exceptions import RayError, RayTaskError

from actors.group import BrokenError
from actors.process import RankInfo, free_port
from actors.weights import BUCKET_BYTES, Ack

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer import WeightSource

Route = Literal["memory", "ipc", "nccl", "gloo"]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TransferError(RuntimeError):
    """An engine did not take the weights, or the way to it broke: who took part is in no state to go on."""


class Tally:
    """Counts tensors that pass: a checksum over names, shapes, types and sums of the words, computed where they lie."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._described = xxhash.xxh3_128()
        self._sums: list[torch.Tensor] = []

    def count(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, counted."""
        for name, tensor in weights:
            self.num_bytes += tensor.numel() * tensor.element_size()
            self._described.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            words = tensor.detach().reshape(-1).view(WORDS[tensor.element_size()])
            self._sums += [words.sum(dtype=torch.int64), words[::2].sum(dtype=torch.int64)]
            yield name, tensor

    def checksum(self) -> str:
        """Of all that passed, in order."""
        if self._sums:
            self._described.update(torch.stack(self._sums).cpu().numpy().tobytes())
        return self._described.hexdigest()


class PolicyWeights:
    """The policy's weights, as vLLM's sending engines read them (its `WeightSource`)."""

    def __init__(self, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        """With ZeRO-3 the iterators are collectives."""
        self._weights = weights
        self._metadata: list[Any] = []
        self.tally = Tally()

    def metadata(self) -> list[Any]:
        """Name, type and shape of each."""
        from vllm.distributed.weight_transfer import ParamMeta

        self._metadata = self._metadata or [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self._weights()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.tally = Tally()
        return self.tally.count(self._weights())


class Engines:
    """The engines, as vLLM's sending engines ask them (its `VLLMWeightSyncClient`)."""

    def __init__(self, actors: Sequence[Any], timeout_s: float, give_up: Callable[[], None] = lambda: None) -> None:
        """`give_up` ends what others may wait in when one has failed."""
        self.actors = list(actors)
        self.version = -1
        """The one that is sent next."""
        self._timeout_s = timeout_s
        self._give_up = give_up

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect; where there is a group, each engine is a rank of its own."""
        first = init_info.get("rank_offset")
        ranks = range(len(self.actors))
        self._ask("connect", [init_info | ({} if first is None else {"rank_offset": first + i}) for i in ranks])

    def start_weight_update(self) -> None:
        """No steps from now on."""
        self._ask("begin_weights", [self.version] * len(self.actors))

    def update_weights(self, update_info: Any) -> None:
        """Receive some."""
        self._ask("receive_weights", [update_info] * len(self.actors))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All are there."""
        self._ask("finish_weights")

    def _ask(self, method: str, arguments: Sequence[Any] | None = None) -> None:
        own = [()] * len(self.actors) if arguments is None else [(argument,) for argument in arguments]
        calls = [getattr(actor, method).remote(*given) for actor, given in zip(self.actors, own, strict=True)]
        try:
            ray.get(calls, timeout=self._timeout_s)
        except RayError as error:
            self._give_up()
            if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                raise error.cause from None  # it would fail again
            raise TransferError(f"{method}() of an engine failed: {' '.join(str(error).split())}") from error


class Sender:
    """One rank of the policy, as the engines' source of weights."""

    def __init__(
        self,
        route: Route,
        info: RankInfo,
        weights: Callable[[], Iterator[tuple[str, torch.Tensor]]],
        timeout_s: float,
    ) -> None:
        """`timeout_s` bounds each answer of the engines."""
        self._route = route
        self._info = info
        self._source = PolicyWeights(weights)
        self._timeout_s = timeout_s
        self._client = Engines([], timeout_s)
        self._endpoint: Any = None

    def send(self, version: int, actors: Sequence[Any]) -> tuple[Ack, int]:
        """Bring engines to the current weights; what they are to acknowledge, and the bytes. Run it on all ranks.

        Raises:
            ValueError: the weights are not those of the engine's model.
            TransferError: an engine failed; neither it nor the others can go on.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # vLLM reads the weights on streams of its own
        try:
            if self._endpoint is None or list(actors) != self._client.actors:
                self._connect(actors)
            self._client.version = version
            self._endpoint.send_weights()
        except (TransferError, ValueError):
            raise
        except Exception as error:
            raise TransferError(f"sending weights by {self._route} failed: {error!r}") from error
        return Ack(version, self._source.tally.checksum()), self._source.tally.num_bytes

    def _connect(self, actors: Sequence[Any]) -> None:
        """A way to these engines in the place of the one before."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        self._leave()
        self._client = Engines(actors, self._timeout_s, self._leave)
        place, source = self._place(world_size=1 + len(actors)), cast("WeightSource", self._source)
        self._endpoint = WeightTransferTrainerFactory.trainer_init(place, client=self._client, source=source)

    def _leave(self) -> None:
        """Others that wait for this rank find out."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.shutdown()

    def _place(self, world_size: int) -> Any:
        """This rank's part in the transfer, in vLLM's terms."""
        rank = self._info.rank
        if self._route == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            largest = max(m.dtype.itemsize * prod(m.shape) for m in self._source.metadata())
            return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(BUCKET_BYTES, largest))
        return _group_place(self._route)(
            rank=rank,
            master_address=self._info.master_addr,
            master_port=free_port(),
            world_size=world_size,
            packed_buffer_size_bytes=BUCKET_BYTES,
        )


class Receiver:
    """An engine's side: what its worker does between two steps. All of it runs on the engine's thread."""

    def __init__(self, worker: Any) -> None:
        """vLLM's worker, which holds the receiving engine."""
        self._worker = worker
        self._tally = Tally()
        self._loaded: set[str] | None = set()
        self.version = -1
        """What came last, or is coming."""
        self.at_work = False
        """Whether some weights are new and others old."""
        self.ack: Ack | None = None
        """What came last."""

    def check_whole(self) -> None:
        """Refuse to go on with a part of the weights.

        Raises:
            BrokenError: the rest never came.
        """
        if self.at_work:
            raise BrokenError("new weights came in part only")

    def connect(self, init_info: dict[str, Any]) -> None:
        """Leave what it was in before, and join another."""
        self.check_whole()
        self._worker.shutdown_weight_transfer_engine()
        self._worker.init_weight_transfer_engine(init_info)

    def begin(self, version: int) -> None:
        """Count what is loaded from now on."""
        self.check_whole()
        self.at_work, self.version, self._tally, self._loaded = True, version, Tally(), set()
        model = self._worker.get_model()
        plain = model.load_weights

        def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
            loaded: set[str] | None = plain(self._tally.count(iter(weights)))
            self._loaded = None if loaded is None or self._loaded is None else self._loaded | loaded
            return loaded

        model.load_weights = load_weights
        self._worker.start_weight_update()

    def receive(self, update_info: dict[str, Any]) -> None:
        """Load some."""
        self._worker.update_weights(update_info)

    def finish(self) -> set[str] | None:
        """All are there; the parameters that were loaded, where vLLM's model says so."""
        self._worker.finish_weight_update()
        del self._worker.get_model().load_weights  # the class has its own
        return self._loaded

    def accept(self) -> Ack:
        """The weights count as whole."""
        self.at_work, self.ack = False, Ack(self.version, self._tally.checksum())
        return self.ack


def _group_place(route: Route) -> Any:
    """vLLM's description of a rank of a process group."""
    if route == "gloo":
        from actors.gloo_transfer import GlooTrainerInitInfo

        return GlooTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo
