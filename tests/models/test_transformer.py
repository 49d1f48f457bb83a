"""The backbone: start, conditions, positions, precision, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gencontrol.errors import UsageError
from gencontrol.models.networks.layers import rotary_table, rotate
from gencontrol.models.networks.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(in_dim=3, out_dim=3, dim=32, depth=2, heads=2, context_dim=6, pooled_dim=5, max_tokens=9)


def make(config: TransformerConfig = CONFIG, *, zero: bool = False) -> Transformer:
    """A model whose zero-initialised layers are drawn, so that every path matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(config)
        for parameter in model.parameters():
            if not zero and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(b: int = 4, n: int = 7) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(b, 4, dtype=torch.bool)
    mask[1, 2:] = False
    cond = {
        "pooled": torch.randn(b, 5, generator=g),
        "tokens": torch.randn(b, 4, 6, generator=g),
        "mask": mask,
        "drop": torch.tensor([False, False, True, False])[:b],
    }
    return torch.randn(b, n, 3, generator=g), torch.rand(b, generator=g), cond


def test_starts_at_zero() -> None:
    x, t, cond = batch()
    assert not make(zero=True)(x, t, cond).any()


def test_bundled_size() -> None:
    config = TransformerConfig(in_dim=64, out_dim=64, context_dim=128, pooled_dim=128, max_tokens=64)
    count = sum(p.numel() for p in Transformer(config).parameters())
    assert 4.3e6 < count < 4.7e6


def test_each_input_matters() -> None:
    model = make()
    x, t, cond = batch()
    base = model(x, t, cond)
    assert (model(x + 1, t, cond) - base).abs().max() > 1e-3
    assert (model(x, 1 - t, cond) - base).abs().max() > 1e-3
    for key in ("pooled", "tokens"):
        change = (model(x, t, {**cond, key: cond[key] + 1}) - base).abs().amax((1, 2))
        assert (change[[0, 1, 3]] > 1e-4).all() and change[2] == 0  # sample 2 is dropped
    hidden = cond["tokens"].clone()
    hidden[1, 2:] += 5
    assert torch.equal(model(x, t, {**cond, "tokens": hidden}), base)  # masked tokens are not read


def test_null_condition_is_the_same_in_every_form() -> None:
    model = make()
    x, t, cond = batch()
    none = model(x, t, None)
    dropped = model(x, t, {**cond, "drop": torch.ones(4, dtype=torch.bool)})
    unmasked = model(x, t, {k: v for k, v in cond.items() if k != "mask"} | {"drop": torch.ones(4, dtype=torch.bool)})
    for other in (model(x, t, {}), model(x, t, model.null_cond(4)), dropped, unmasked):
        torch.testing.assert_close(other, none, atol=2e-6, rtol=0)  # sums over equal keys round differently
    mixed = model(x, t, cond)
    torch.testing.assert_close(mixed[2], none[2], atol=2e-6, rtol=0)
    assert (mixed[0] - none[0]).abs().max() > 1e-3
    # a dropped sample reads the null even where its own caption is empty
    empty = {**cond, "mask": torch.zeros(4, 4, dtype=torch.bool)}
    torch.testing.assert_close(model(x, t, empty)[2], none[2], atol=2e-6, rtol=0)


def test_samples_do_not_depend_on_the_batch() -> None:
    model = make()
    x, t, cond = batch()
    alone = model(x[1:2], t[1:2], {k: v[1:2] for k, v in cond.items()})
    torch.testing.assert_close(model(x, t, cond)[1:2], alone, atol=2e-6, rtol=0)


def test_positions_are_relative_rotations() -> None:
    cos, sin = rotary_table(12, 8)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=g)
    at = lambda x, p: rotate(x, cos[p : p + 1], sin[p : p + 1])  # noqa: E731
    torch.testing.assert_close(at(q, 5).norm(), q.norm())
    one, other = (at(q, 3) * at(k, 1)).sum(), (at(q, 11) * at(k, 9)).sum()
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)  # depends on the distance alone
    assert abs(one - (at(q, 4) * at(k, 1)).sum()) > 1e-3
    x, t, _ = batch()
    assert (make()(x.flip(1), t).flip(1) - make()(x, t)).abs().max() > 1e-3


def test_scalar_time_and_bounds() -> None:
    model = make()
    x, _, _ = batch()
    torch.testing.assert_close(model(x, 0.3), model(x, torch.full((4,), 0.3)))
    with pytest.raises(ValueError, match="at most 9"):
        model(torch.zeros(1, 10, 3), 0.5)


def test_refuses_conditions_without_a_place() -> None:
    model = make()
    x, t, cond = batch()
    for bad, text in [
        ({"text": cond["tokens"]}, "'text' has no place"),
        ({"mask": cond["mask"]}, "without 'tokens'"),
        (cond["pooled"], "expected None or a mapping"),
        ({"pooled": [1.0]}, "expected a tensor"),
    ]:
        with pytest.raises(ValueError, match=text):
            model(x, t, bad)
    plain = make(TransformerConfig(in_dim=3, out_dim=3, dim=32, depth=1, heads=2))
    with pytest.raises(ValueError, match="'pooled' has no place"):
        plain(x, t, {"pooled": cond["pooled"]})


def test_token_model() -> None:
    model = make(TransformerConfig(vocab_size=11, dim=32, depth=1, heads=2, pooled_dim=5, max_tokens=6))
    tokens = torch.tensor([[1, 2, 10], [3, 3, 0]])
    logits = model(tokens, torch.tensor([0.2, 0.9]))
    assert logits.shape == (2, 3, 11)
    changed = model(torch.tensor([[1, 2, 10], [3, 3, 1]]), torch.tensor([0.2, 0.9]))
    assert torch.equal(changed[0], logits[0]) and (changed[1] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "kwargs", [{}, {"in_dim": 3}, {"in_dim": 3, "out_dim": 3, "vocab_size": 4}, {"vocab_size": 4, "dim": 30}]
)
def test_refuses_a_contradictory_configuration(kwargs: dict) -> None:
    with pytest.raises(ValueError):
        TransformerConfig(**kwargs)
    with pytest.raises(UsageError, match="nativ"):
        TransformerConfig(in_dim=1, out_dim=1, attention="nativ")


def test_checkpointing_gives_the_same_gradients() -> None:
    x, t, cond = batch()
    grads = []
    for saving in (False, True):
        model = make(TransformerConfig(**{**CONFIG.__dict__, "gradient_checkpointing": saving}))
        model(x, t, cond).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0  # every parameter is used


def test_bf16_autocast_is_close_and_keeps_fp32_weights() -> None:
    model = make()
    x, t, cond = batch()
    exact = model(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        loss_input = model(x, t, cond)
        loss_input.float().square().sum().backward()
    assert (loss_input.float() - exact).norm() / exact.norm() < 0.03  # some twenty roundings of 2⁻⁹
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())


def test_save_and_load(tmp_path: Path) -> None:
    model = make()
    x, t, cond = batch()
    model.save_pretrained(tmp_path / "a")
    again = Transformer.from_pretrained(tmp_path / "a")
    assert again.config == model.config
    assert torch.equal(again(x, t, cond), model(x, t, cond))
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = Transformer.from_pretrained(tmp_path / "half")
    assert (
        half.dtype == torch.float32
        and load_file(tmp_path / "half" / "model.safetensors")["out.weight"].dtype == torch.float16
    )
    assert (half(x, t, cond) - model(x, t, cond)).norm() / model(x, t, cond).norm() < 5e-3  # fp16 has 11 bits
    assert Transformer.from_pretrained(tmp_path / "a", dtype=torch.float64).dtype == torch.float64


def test_loading_is_strict(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**{k: v for k, v in weights.items() if k != "out.bias"}, "other": torch.ones(1)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UsageError, match=r"missing \['out.bias'\], unknown \['other'\]"):
        Transformer.from_pretrained(tmp_path)
    save_file({**weights, "out.bias": torch.ones(7)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"other shape \['out.bias'\]"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"in_dim": 3, "widht": 5}))
    with pytest.raises(UsageError, match="widht"):
        Transformer.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no folder of a Transformer"):
        Transformer.from_pretrained(tmp_path / "nowhere")
