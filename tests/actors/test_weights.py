"""Weights in buckets: what another process reads is what was published, or it is told."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.shared_memory import Readings, UnreachableError
from actors.weights import Ack, ChecksumError, Publisher, combine, receive

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 7), max_size=3)), min_size=1, max_size=12
    ),
    bucket_bytes=st.integers(8, 400),
)
def test_tensors_of_any_type_and_shape_come_back_bit_for_bit(shapes, bucket_bytes):
    weights = {f"w{i}": torch.randn(shape).mul(100).to(dtype) for i, (dtype, shape) in enumerate(shapes)}
    buckets = list(Publisher(bucket_bytes).pack(weights.items()))
    back = dict(pair for bucket in buckets for pair in bucket.tensors())
    assert list(back) == list(weights)
    assert all(back[name].dtype == w.dtype and torch.equal(back[name], w) for name, w in weights.items())
    assert all(b.data.nbytes <= bucket_bytes or len(b.entries) == 1 for b in buckets)


def test_buckets_hold_copies_so_that_the_trainer_may_go_on():
    weight = torch.zeros(4)
    [bucket] = Publisher().pack([("w", weight)])
    weight.add_(1)
    assert dict(bucket.tensors())["w"].tolist() == [0, 0, 0, 0]


def test_the_checksum_sees_bytes_names_shapes_and_order():
    def checksum(*weights):
        return combine(bucket.digest() for bucket in Publisher().pack(weights))

    a, b = ("a", torch.arange(6.0)), ("b", torch.zeros(2))
    versions = [
        checksum(a, b),
        checksum(b, a),
        checksum(a),
        checksum(("c", a[1]), b),
        checksum(("a", a[1].view(2, 3)), b),
        checksum(("a", a[1] + 1e-6), b),
    ]
    assert len(set(versions)) == len(versions)
    assert checksum(a, b) == versions[0]


def test_versions_use_the_same_memory_and_a_reader_sees_the_last_one():
    publisher, readings = Publisher(64), Readings()
    weights = {"a": torch.arange(12.0), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(100)}
    first = publisher.publish(weights.items(), 1)
    for tensor in weights.values():
        tensor.add_(1)
    second = publisher.publish(weights.items(), 2)
    assert first.addresses == second.addresses
    assert (first.num_bytes, len(first.layout)) == (48 + 6 + 400, 2)
    buckets, ack = receive(second, readings, timeout_s=1)
    assert ack == Ack(2, second.checksum)
    back = dict(pair for bucket in buckets for pair in bucket.tensors())
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ChecksumError, match="version 1 has checksum"):
        receive(first, readings, timeout_s=1)


READER = """
import pickle, sys
from actors.shared_memory import Readings
from actors.weights import receive
snapshot = pickle.loads(bytes.fromhex(sys.argv[1]))
buckets, ack = receive(snapshot, Readings(), timeout_s=1)
print(sum(float(tensor.sum()) for bucket in buckets for _, tensor in bucket.tensors()), ack.version)
"""


def test_another_process_reads_them_in_place():
    publisher = Publisher()
    snapshot = publisher.publish([("w", torch.full((1000,), 2.0))], 7)
    command = [sys.executable, "-c", READER, pickle.dumps(snapshot).hex()]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert said.stdout.split() == ["2000.0", "7"], said.stderr


def test_memory_of_a_process_that_is_gone_or_another_machines_is_told():
    publisher = Publisher()
    snapshot = publisher.publish([("w", torch.zeros(3))], 1)
    [address] = snapshot.addresses
    for wrong in (replace(address, path="/proc/999999999/fd/3"), replace(address, inode=1)):
        with pytest.raises(UnreachableError):
            receive(replace(snapshot, addresses=(wrong,)), Readings(), timeout_s=1)
