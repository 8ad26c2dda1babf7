"""Products are the same whichever library computes them, and the choice follows the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.algorithms import products
from engine.algorithms.products import add_product, linear, matmul, onednn_is_faster

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


@pytest.fixture(params=["torch's own", "oneDNN"])
def library(request, monkeypatch):
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(products, "WORTH_IT", 1)


def close(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5), (1, 1, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_layer_and_its_gradients(library, shape, with_bias):
    torch.manual_seed(0)
    given = [torch.randn(shape), torch.randn(7, 5), *([torch.randn(7)] if with_bias else [])]
    ours = [tensor.clone().requires_grad_() for tensor in given]
    theirs = [tensor.double().requires_grad_() for tensor in given]
    upstream = torch.randn(*shape[:-1], 7)
    y, expected = linear(*ours), torch.nn.functional.linear(*theirs)
    close(y, expected)
    y.backward(upstream)
    expected.backward(upstream.double())
    for mine, exact in zip(ours, theirs, strict=True):
        close(mine.grad, exact.grad)
    with torch.no_grad():
        close(linear(*given), expected)


def test_frozen_weights_get_no_gradient(library):
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5)
    linear(x, weight).sum().backward()
    close(x.grad, weight.sum(0).expand(4, 5))
    assert weight.grad is None


def test_products_of_views(library):
    a, b = torch.randn(6, 4), torch.randn(6, 9)
    close(matmul(a.T, b), a.T.double() @ b.double())
    close(matmul(b.T, a), b.T.double() @ a.double())
    total = torch.ones(9, 4)
    add_product(total, b.T, a)
    close(total, 1 + b.T.double() @ a.double())


def test_other_types_are_left_to_torch(library):
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(matmul(a, b), a @ b)


@needs_onednn
def test_small_products_do_not_go_to_onednn(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    went = []
    monkeypatch.setattr(products, "_onednn", lambda a, b, bias=None: went.append(a.shape) or a @ b.T)
    side = round(products.WORTH_IT ** (1 / 3))
    for size in (side - 1, side):
        matmul(torch.ones(size, size), torch.ones(size, size))
        linear(torch.ones(size, size), torch.ones(size, size))
    assert went == [(side, side)] * 2


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_the_choice_follows_the_processor(monkeypatch, tmp_path, capability, vendor, expected):
    described = tmp_path / "cpuinfo"
    described.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "CPU_DESCRIPTION", Path(described))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn_is_faster.__wrapped__() is expected
