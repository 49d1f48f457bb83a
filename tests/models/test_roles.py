"""Roles: switching without a trace, moving averages, strict states, LoRA files that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gencontrol.errors import CheckpointError, UsageError
from gencontrol.models.networks.transformer import Transformer, TransformerConfig
from gencontrol.models.roles import LORA_FILE, LoraConfig, Roles, ema_decay, lora_targets
from tests.helpers.tiny_diffusers import build, cond

LORA = [None, LoraConfig(rank=2, alpha=4.0)]


def network() -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(in_dim=3, out_dim=3, dim=16, depth=1, heads=2, max_tokens=8))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    return model(x, 0.5)


def train(roles: Roles, steps: int = 3) -> None:
    """Move the policy by SGD on a loss that depends on the reference."""
    optimizer = torch.optim.SGD(roles.trainable(), lr=0.02)
    for _ in range(steps):
        out = run(roles.module)
        with roles.use("ref"), torch.no_grad():
            target = run(roles.module) + 1.0
        optimizer.zero_grad()
        (out - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("lora", LORA)
def test_roles_start_equal_and_ref_never_moves(lora: LoraConfig | None, fenced_rng: None) -> None:
    model = network()
    start = run(model).detach()
    roles = Roles(model, lora=lora)
    torch.testing.assert_close(roles.state_dict()["ema"], roles.state_dict()["policy"], atol=0, rtol=0)
    for role in roles.names():
        with roles.use(role) as module:
            assert torch.equal(run(module), start)
    train(roles)
    assert (run(model) - start).abs().max() > 1e-3
    for role in ("ref", "ema"):
        with roles.use(role):
            torch.testing.assert_close(run(model), start, atol=0, rtol=0)


@pytest.mark.parametrize("lora", LORA)
def test_gradient_is_that_of_a_plain_training(lora: LoraConfig | None) -> None:
    """Entering `ref` between the policy's forward and backward pass changes no gradient."""
    roles = Roles(network(), lora=lora)
    train(roles)
    roles.module.zero_grad()
    out = run(roles.module)
    expected = torch.autograd.grad((out - 2.0).square().sum(), roles.trainable())
    out = run(roles.module)
    with roles.use("ref"):
        inside = run(roles.module)
        assert not inside.requires_grad
        with roles.use("ema"):
            assert roles.active == "ema"
        assert roles.active == "ref" and torch.equal(run(roles.module), inside)  # back to the outer role
    (out - 2.0).square().sum().backward()
    for parameter, gradient in zip(roles.trainable(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=0, rtol=0)


@pytest.mark.parametrize("lora", LORA)
def test_an_exception_inside_use_leaves_the_policy(lora: LoraConfig | None) -> None:
    roles = Roles(network(), lora=lora)
    train(roles)
    before = run(roles.module)
    with pytest.raises(RuntimeError, match="boom"), roles.use("ema"):
        raise RuntimeError("boom")
    assert roles.active == "policy" and torch.equal(run(roles.module), before)
    assert all(p.requires_grad for p in roles.trainable())


@pytest.mark.parametrize("lora", LORA)
def test_lerp_and_copy(lora: LoraConfig | None) -> None:
    roles = Roles(network(), lora=lora)
    train(roles)
    state = {r: {k: v.clone() for k, v in w.items()} for r, w in roles.state_dict().items()}
    roles.lerp("ema", 0.75)
    for name, value in roles.state_dict()["ema"].items():
        expected = 0.75 * state["ema"][name] + 0.25 * state["policy"][name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    roles.copy("policy", "ema")
    with roles.use("ema"):
        averaged = run(roles.module)
    assert torch.equal(averaged, run(roles.module))
    roles.lerp("ema", 0.5)
    torch.testing.assert_close(roles.state_dict()["policy"], state["policy"], atol=0, rtol=0)
    with pytest.raises(ValueError, match="1.5"):
        roles.lerp("ema", 1.5)
    with roles.use("ema"), pytest.raises(RuntimeError, match="inside"):
        roles.lerp("ema", 0.5)


def test_ema_decay_warms_up() -> None:
    assert ema_decay(0.999, 0) == pytest.approx(0.1)
    assert ema_decay(0.999, 90) == pytest.approx(0.91)
    assert ema_decay(0.999, 10**6) == 0.999


@pytest.mark.parametrize("lora", LORA)
def test_state_round_trip_and_strictness(lora: LoraConfig | None) -> None:
    roles = Roles(network(), lora=lora)
    train(roles)
    roles.lerp("ema", 0.5)
    saved = {r: {k: v.clone() for k, v in w.items()} for r, w in roles.state_dict().items()}
    outputs = {}
    for role in roles.names():
        with roles.use(role):
            outputs[role] = run(roles.module)
    other = Roles(network(), lora=lora, seed=5)
    parameters = [id(p) for p in other.trainable()]
    other.load_state_dict(saved)
    assert [id(p) for p in other.trainable()] == parameters  # the optimizer keeps what it holds
    for role, expected in outputs.items():
        with other.use(role):
            assert torch.equal(run(other.module), expected)
    first = next(iter(saved["policy"]))
    broken = {**saved, "policy": {k: v for k, v in saved["policy"].items() if k != first} | {"extra": torch.ones(1)}}
    with pytest.raises(CheckpointError) as error:
        other.load_state_dict(broken)
    assert f"missing ['policy/{first}']" in str(error.value) and "unknown ['policy/extra']" in str(error.value)
    with pytest.raises(CheckpointError, match="other shape"):
        other.load_state_dict({**saved, "policy": {**saved["policy"], first: torch.ones(1)}})
    with pytest.raises(CheckpointError, match="missing"):
        other.load_state_dict({"policy": saved["policy"]})


def test_frozen_parameters_are_shared() -> None:
    model = network()
    model.embed.requires_grad_(False)
    roles = Roles(model)
    assert not any(name.startswith("embed") for name in roles.state_dict()["ref"])
    train(roles)
    assert not model.embed.weight.requires_grad and model.embed.weight.grad is None


def test_lora_holds_no_copy_of_the_base() -> None:
    model = network()
    base = sum(p.numel() for p in model.parameters())
    roles = Roles(model, ("policy", "ref", "ema"), LoraConfig(rank=1))
    assert roles.state_dict()["ref"] == {}
    extra = sum(v.numel() for w in roles.state_dict().values() for v in w.values())
    assert extra < base / 2
    assert sum(p.numel() for p in model.parameters()) == base + extra
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in roles.trainable()}


def test_several_slots_are_no_reason_for_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    roles = Roles(network(), ("policy", "ref", "ema", "old"), LoraConfig(rank=2))
    assert not [str(w.message) for w in recwarn]
    assert set(roles.module.peft_config) == {"policy", "ema", "old"}
    for layer in roles.module.modules():
        if hasattr(layer, "lora_A"):
            assert set(layer.lora_A) == {"policy", "ema", "old"} and layer.active_adapters == ["policy"]


def test_lora_start_depends_on_the_seed_alone() -> None:
    one, same, other = (Roles(network(), lora=LoraConfig(rank=2), seed=s).state_dict()["policy"] for s in (1, 1, 2))
    torch.testing.assert_close(one, same, atol=0, rtol=0)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_refusals() -> None:
    model = network()
    with pytest.raises(UsageError, match="'policy' among them"):
        Roles(model, ("ref",))
    with pytest.raises(UsageError, match="float32"):
        Roles(network().to(torch.bfloat16))
    with pytest.raises(UsageError, match="nothing to train"):
        Roles(network().requires_grad_(False))
    with pytest.raises(UsageError, match="no linear layer"):
        lora_targets(model, ["to_nothing"])
    roles = Roles(model, lora=LoraConfig(rank=1))
    with pytest.raises(UsageError, match="Did you mean 'ema'"), roles.use("emma"):
        pass
    with pytest.raises(UsageError, match="has LoRA layers already"):
        Roles(model, lora=LoraConfig(rank=1))
    with pytest.raises(UsageError, match="ref"):
        roles.copy("policy", "ref")
    with pytest.raises(UsageError, match="save_lora"):
        Roles(network()).save_lora("x")


def load_by_peft(model: nn.Module, path: Path) -> None:
    import peft
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    settings = {key.removeprefix("transformer."): value for key, value in header.items()}
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    weights = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    result = peft.set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "UNet2DConditionModel", "StableAudioDiTModel"])
def test_saved_lora_loads_into_the_diffusers_model(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trained by us, loaded by `load_lora_adapter`: the same output, every key used, alpha kept."""
    from gencontrol.models.adapters.networks import DiffusersNetwork

    shape, condition = cond(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)

    def predict(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return DiffusersNetwork(model, lambda t: t * 1000)(x, t, condition)

    model = build(name)
    plain = predict(model)
    roles = Roles(model, ("policy", "ref"), LoraConfig(rank=2, alpha=6.0))
    model.double()
    torch.testing.assert_close(predict(model), plain, atol=1e-12, rtol=0)
    with torch.no_grad():
        for index, parameter in enumerate(roles.trainable()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2)
    tuned = predict(model)
    assert (tuned - plain).abs().max() > 1e-2
    roles.save_lora(tmp_path)
    fresh = build(name)
    prefix = "unet" if "UNet" in name else "transformer"
    if name == "StableAudioDiTModel":  # diffusers gives it no loader; peft reads the same keys
        load_by_peft(fresh, tmp_path / LORA_FILE)
    else:
        fresh.load_lora_adapter(str(tmp_path), prefix=prefix, use_safetensors=True)
    torch.testing.assert_close(predict(fresh.double()), tuned, atol=1e-5, rtol=1e-5)  # the file is fp32
    assert "unexpected" not in caplog.text.lower() and "missing" not in caplog.text.lower()
    with roles.use("ref"):
        torch.testing.assert_close(predict(model), plain, atol=1e-12, rtol=0)


def test_saved_lora_loads_into_a_pipeline(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    model = build("SD3Transformer2DModel").float()
    roles = Roles(model, lora=LoraConfig(rank=2))
    with torch.no_grad():
        for parameter in roles.trainable():
            parameter.add_(0.1)
    roles.save_lora(tmp_path)
    names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=build("SD3Transformer2DModel").float(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(names),
    )
    pipe.load_lora_weights(str(tmp_path), adapter_name="ours")
    loaded = {k: v for k, v in pipe.transformer.state_dict().items() if ".lora_" in k}
    mine = roles.state_dict()["policy"]
    assert {k.replace(".ours.", ".") for k in loaded} == set(mine)
    for key, value in loaded.items():
        assert torch.equal(value, mine[key.replace(".ours.", ".")])


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"actor": nn.Linear(2, 1), "critic": nn.Linear(3, 1), "value": nn.Linear(2, 1)}


def test_several_networks_with_a_target_of_one() -> None:
    roles = Roles(parts(), ("policy", "target", "ema"), only={"target": ["critic"], "ema": ["actor", "value"]})
    module: Any = roles.module
    assert roles.state_dict()["target"].keys() == {"critic.weight", "critic.bias"}
    assert [p.shape for p in roles.trainable("critic")] == [(1, 3), (1,)] and len(roles.trainable()) == 6
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    with roles.use("target") as held:
        assert torch.equal(held["critic"].weight, start["critic.weight"])  # the copy
        assert torch.equal(held["actor"].weight, start["actor.weight"] + 1)  # the policy's
        assert not any(p.requires_grad for p in held.parameters())
        with roles.use("ema"):
            assert torch.equal(module["critic"].weight, start["critic.weight"] + 1)
            assert torch.equal(module["value"].weight, start["value.weight"])
    assert torch.equal(module["critic"].weight, start["critic.weight"] + 1)
    roles.lerp("target", 0.75)
    roles.lerp("ema", 0.5, "actor")
    state = roles.state_dict()
    torch.testing.assert_close(state["target"]["critic.weight"], start["critic.weight"] + 0.25)
    torch.testing.assert_close(state["ema"]["actor.weight"], start["actor.weight"] + 0.5)
    torch.testing.assert_close(state["ema"]["value.weight"], start["value.weight"])
    roles.copy("target", "policy")  # what both hold
    assert torch.equal(module["critic"].weight, state["target"]["critic.weight"])
    assert torch.equal(module["actor"].weight, start["actor.weight"] + 1)
    again = Roles(parts(), ("policy", "target", "ema"), only={"target": ["critic"], "ema": ["actor", "value"]})
    again.load_state_dict(roles.state_dict())
    torch.testing.assert_close(again.state_dict(), roles.state_dict(), atol=0, rtol=0)


def test_adapters_of_one_network_beside_a_whole_one_with_a_target() -> None:
    module = {"actor": network(), "critic": nn.Linear(3, 1)}
    roles = Roles(module, ("policy", "ref", "target"), LoraConfig(2), whole=["critic."], only={"target": ["critic"]})
    state = roles.state_dict()
    assert state["target"].keys() == {"critic.weight", "critic.bias"}
    assert any(".lora_" in name for name in state["policy"]) and len(roles.trainable("actor")) > 0
    with torch.no_grad():
        for parameter in roles.trainable():
            parameter.add_(0.5)
    policy = run(module["actor"]).detach()
    with roles.use("target"):
        assert torch.equal(module["critic"].weight, state["target"]["critic.weight"])
        torch.testing.assert_close(run(module["actor"]), policy)  # the policy's adapters
    with roles.use("ref"):
        assert not torch.allclose(run(module["actor"]), policy)


def test_parts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="role 'target': no trained parameter lies in the part 'critics'"):
        Roles(parts(), ("policy", "target"), only={"target": ["critics"]})
    with pytest.raises(UsageError, match="roles other than 'policy'"):
        Roles(parts(), ("policy", "target"), only={"policy": ["critic"]})
    roles = Roles(parts(), ("policy", "target"), only={"target": ["critic"]})
    with pytest.raises(UsageError, match="nothing in common of the part 'actor'"):
        roles.lerp("target", 0.5, "actor")
    with pytest.raises(UsageError, match="no trained parameter lies in the part 'act'"):
        roles.trainable("act")
