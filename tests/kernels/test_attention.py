"""Attention backends against the formula in float64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.kernels.attention import attention


def inputs(b: int = 2, n: int = 5, m: int = 7, h: int = 3, d: int = 16, dtype: torch.dtype = torch.float64) -> list:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, s, h, d, generator=generator, dtype=torch.float64).to(dtype) for s in (n, m, m)]


def masks(b: int, n: int, m: int, h: int) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    padding = torch.rand(b, m, generator=generator) > 0.4
    padding[:, 0] = True
    pairs = torch.rand(b, h, n, m, generator=generator) > 0.4
    pairs[0, 0, 0] = False  # one query that sees nothing
    return {"none": None, "padding": padding, "pairs": pairs, "shared": pairs[:, :1] | padding[:, None, None]}


def formula(q, k, v, mask):
    """The definition by loops over batch, head and query."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                if mask is None:
                    seen = torch.ones(k.shape[1], dtype=torch.bool)
                else:
                    seen = mask[b] if mask.ndim == 2 else mask[b, h if mask.shape[1] > 1 else 0, i]
                if seen.any():
                    scores = k[b, seen, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
                    out[b, i, h] = scores.softmax(0) @ v[b, seen, h]
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", ["none", "padding", "pairs", "shared"])
@pytest.mark.parametrize("backend", ["eager", "native", "flex", "auto"])
def test_backend_equals_the_formula(backend: str, kind: str) -> None:
    q, k, v = inputs(dtype=torch.float32)
    mask = masks(2, 5, 7, 3)[kind]
    expected = formula(*(x.double() for x in (q, k, v)), mask)
    # fp32 sums of 7 terms: a few units of 6e-8
    torch.testing.assert_close(attention(q, k, v, mask=mask, backend=backend).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["none", "padding", "pairs"])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_gradients_equal_those_of_the_formula(backend: str, kind: str) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    mask = masks(2, 5, 7, 3)[kind]
    weight = torch.arange(2 * 5 * 3 * 16, dtype=torch.float64).reshape(2, 5, 3, 16).cos()
    expected = torch.autograd.grad((formula(*leaves, mask) * weight).sum(), leaves)
    found = torch.autograd.grad((attention(*leaves, mask=mask, backend=backend) * weight).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_extreme_logits_stay_finite() -> None:
    q, k, v = inputs(dtype=torch.float32)
    for backend in ("eager", "native"):
        out = attention(1e4 * q, 1e4 * k, v, mask=masks(2, 5, 7, 3)["pairs"], backend=backend)
        assert torch.isfinite(out).all()


def test_bf16_is_within_its_rounding() -> None:
    q, k, v = inputs(dtype=torch.bfloat16)
    expected = formula(q.double(), k.double(), v.double(), None)
    for backend in ("eager", "native"):
        error = (attention(q, k, v, backend=backend).double() - expected).norm() / expected.norm()
        assert error < 8e-3  # bf16 has 8 bits of mantissa


def test_auto_follows_the_measured_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    dispatch = importlib.import_module("gencontrol.kernels.attention")
    for name in ("eager", "native"):
        monkeypatch.setattr(dispatch, f"_{name}", lambda q, k, v, mask, name=name: taken.append(name) or q)
    for dtype, n in [(torch.float32, 32), (torch.float32, 33), (torch.bfloat16, 256), (torch.bfloat16, 257)]:
        q, k, v = inputs(n=n, dtype=dtype)
        attention(q, k, v)
        attention(q.requires_grad_(), k, v)  # a policy and its reference take the same road
    assert taken == ["eager"] * 2 + ["native"] * 2 + ["eager"] * 2 + ["native"] * 2


def test_refusals_name_the_cause() -> None:
    q, k, v = inputs(dtype=torch.float32)
    with pytest.raises(UsageError, match="'nativ' is unknown. Did you mean 'native'"):
        attention(q, k, v, backend="nativ")
    with pytest.raises(UsageError, match="no backward on a CPU"):
        attention(q.requires_grad_(), k, v, backend="flex")
    with pytest.raises(EnvironmentMissing, match="CUDA"):
        attention(q, k, v, backend="xformers")
    with pytest.raises(ValueError, match="boolean"):
        attention(q, k, v, mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="shape"):
        attention(q, k, v, mask=torch.ones(2, 5, dtype=torch.bool))
