from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weights import combine, pack

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
    buckets = list(pack(weights.items(), bucket_bytes))
    back = dict(pair for bucket in buckets for pair in bucket.tensors())
    assert list(back) == list(weights)
    assert all(back[name].dtype == w.dtype and torch.equal(back[name], w) for name, w in weights.items())
    assert all(b.data.nbytes <= bucket_bytes or len(b.entries) == 1 for b in buckets)


def test_buckets_hold_copies_so_that_the_trainer_may_go_on():
    weight = torch.zeros(4)
    [bucket] = pack([("w", weight)])
    weight.add_(1)
    assert dict(bucket.tensors())["w"].tolist() == [0, 0, 0, 0]


def test_the_checksum_sees_bytes_names_shapes_and_order():
    def checksum(*weights):
        return combine(bucket.digest() for bucket in pack(weights))

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
