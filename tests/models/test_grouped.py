"""Shared conditions: equal outputs, and projections of text counted once per prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.path.flow_grpo import FlowGrpo, FlowGrpoConfig
from gencontrol.bench.toys import toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.transformer import Transformer, TransformerConfig
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling import sample
from gencontrol.sampling.guidance import cfg
from gencontrol.types import Grouped, RewardContext, RewardOut, cat_cond, cond_rows, grouped, index_cond, map_cond

DIM, WORDS, CONTEXT = 16, 5, 6


def network(**options: Any) -> Transformer:
    """A backbone with text whose every output depends on everything."""
    torch.manual_seed(0)
    sizes = {"in_dim": 3, "out_dim": 3, "dim": DIM, "depth": 2, "heads": 2, "context_dim": CONTEXT, "pooled_dim": 4}
    net = Transformer(TransformerConfig(**(sizes | options)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def text(rows: int) -> dict[str, Tensor]:
    """Conditions of `rows` prompts, some words hidden, the last prompt dropped."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(rows, WORDS, generator=generator) < 0.7
    mask[:, 0] = True
    drop = torch.zeros(rows, dtype=torch.bool)
    drop[-1] = True
    tokens = torch.randn(rows, WORDS, CONTEXT, generator=generator)
    return {"pooled": torch.randn(rows, 4, generator=generator), "tokens": tokens, "mask": mask, "drop": drop}


def count_projected(net: Transformer) -> list[int]:
    """Return a list that will hold the rows of every projection of text to keys and values, block 0."""
    seen: list[int] = []
    net.blocks[0].cross.to_kv.register_forward_hook(lambda m, inputs, out: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 1, 0, 2], [1, 1, 1]])
@pytest.mark.parametrize("keys", [("pooled", "tokens", "mask", "drop"), ("tokens",), ("pooled",)])
def test_grouped_conditions_equal_expanded_ones(rows: list[int], keys: tuple[str, ...]) -> None:
    """Outputs and gradients, plain and prepared, with and without checkpointing (1e-5: sums in another order)."""
    net = network()
    cond = {key: value for key, value in text(3).items() if key in keys}
    index = torch.tensor(rows)
    x, t = torch.randn(len(rows), 7, 3), torch.rand(len(rows))
    gradients, outputs = [], []
    for given in (index_cond(cond, index), Grouped(cond, index).pick(slice(None))):
        net.zero_grad()
        out = net(x, t, given)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))
    with torch.no_grad():
        prepared = net.prepare(Grouped(cond, index))
        torch.testing.assert_close(net(x, t, prepared), outputs[0], rtol=1e-5, atol=1e-5)
    checkpointed = network(gradient_checkpointing=True)
    torch.testing.assert_close(checkpointed(x, t, Grouped(cond, index)).detach(), outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [2, 0, 1], [1, 1, 1]])
@pytest.mark.parametrize("keys", [("pooled", "tokens", "mask", "drop"), ("tokens",)])
def test_one_time_for_all_equals_a_time_each(rows: list[int], keys: tuple[str, ...]) -> None:
    """A shared time is embedded and modulates once per prompt; outputs and gradients stay (1e-5: other sums)."""
    net, index, widths = network(), torch.tensor(rows), []
    net.modulation.register_forward_hook(lambda m, inputs, out: widths.append(len(out)))
    cond = {key: value for key, value in text(3).items() if key in keys}
    x, t = torch.randn(len(rows), 7, 3), torch.full((1,), 0.3)
    gradients, outputs = [], []
    for times, given in (
        (t.repeat(len(rows)), index_cond(cond, index)),
        (t.expand(len(rows)), Grouped(cond, index).pick(slice(None))),
        (t.expand(len(rows)), index_cond(cond, index)),
    ):
        net.zero_grad()
        out = net(x, times, given)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    for out, gradient in zip(outputs[1:], gradients[1:]):
        torch.testing.assert_close(out, outputs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))
    assert widths == [len(rows), len(set(rows)), len(rows)]


def test_projections_follow_the_number_of_prompts() -> None:
    net = network()
    seen = count_projected(net)
    x, t, index = torch.randn(6, 7, 3), torch.rand(6), torch.tensor([0, 0, 0, 1, 1, 1])
    net(x, t, Grouped(text(2), index))
    net(x, t, index_cond(text(2), index))
    prepared = net.prepare(Grouped(text(2), index))
    for _ in range(5):
        net(x, t, prepared)
    assert seen == [2, 6, 2]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("micro_batch", [8, 5, 100])
def test_a_rollout_projects_and_encodes_once_per_prompt(scale: float, micro_batch: int) -> None:
    """Three prompts, eight samples each, four steps: 3 rows (and one empty one) instead of 24 or 48 per step."""
    net, encoded = network(), []

    def encode(prompts: Any) -> dict[str, Tensor]:
        encoded.append(len(prompts))
        return text(len(prompts))

    denoiser = Denoiser(net, GaussianProcess(Linear()), "velocity")
    task = toy_task(denoiser, 3, prompts=["a", "b", "c"], encode=encode)
    empty = index_cond(text(2), slice(1, 2))
    task = dataclasses.replace(task, latent_shape=(7, 3), uncond=empty)
    config = FlowGrpoConfig(
        prompts_per_round=3,
        generations=8,
        demo_steps=4,
        updates_per_round=1,
        ema_decay=0.0,
        path_kl_coef=0.0,
        guidance_scale=scale,
    )

    class First:
        name, kind, differentiable = "first", "item", False

        def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
            return RewardOut(samples[:, 0, 0], torch.ones(len(samples), dtype=torch.bool))

    algorithm = FlowGrpo(task, First(), config, roles=Roles(net, ("policy", "ref")), seed=0)
    seen = count_projected(net)
    ctx = StepContext(seed=0, step=0, micro_batch=micro_batch)
    data = algorithm.collect(ctx).data
    assert encoded == [3] and sum(seen) == (3 if scale == 1.0 else 4)
    plain = sample(
        denoiser if scale == 1.0 else cfg(denoiser, scale, empty),
        (24, 7, 3),
        step=algorithm.step,
        steps=4,
        x_init=data.states[0],
        times=data.times,
        cond=data.cond.expand(),
        callback=lambda index, t, x: data.states[index + 1] if index < 3 else None,
    )
    torch.testing.assert_close(plain, data.states[-1], rtol=1e-4, atol=1e-4)
    seen.clear()
    for micro in algorithm.minibatches(data, 0, ctx):
        algorithm.loss(micro, ctx)
        assert seen.pop() == cond_rows(micro.cond.unique) + (scale != 1.0) and not seen


def test_lora_reaches_prepared_conditions() -> None:
    """Keys and values are those of the active role."""
    net = network()
    roles = Roles(net, ("policy", "ref"), LoraConfig(2))
    with torch.no_grad():
        for parameter in roles.trainable():
            parameter.add_(0.3)
    x, t, cond = torch.randn(4, 7, 3), torch.rand(4), Grouped(text(2), torch.tensor([0, 0, 1, 1]))
    outputs = {}
    for role in ("policy", "ref"):
        with roles.use(role), torch.no_grad():
            outputs[role] = net(x, t, net.prepare(cond))
            torch.testing.assert_close(outputs[role], net(x, t, cond.expand()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs["policy"], outputs["ref"])


def test_grouped_algebra() -> None:
    """Picking keeps only what is needed, concatenation keeps sharing, other networks get plain rows."""
    cond = text(3)
    shared = Grouped(cond, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert shared.repeats() == 2 and shared.pick(slice(1, 4)).repeats() is None and len(shared) == 6
    part = index_cond(shared, torch.tensor([4, 5, 0]))
    assert cond_rows(part.unique) == 2
    assert torch.equal(part.expand()["pooled"], cond["pooled"][[2, 2, 0]])
    twice = cat_cond([shared, shared])
    assert twice.unique is cond and len(twice) == 12
    mixed = cat_cond([shared, index_cond(cond, slice(0, 2)), part])
    assert torch.equal(mixed.expand()["tokens"], cond["tokens"][[0, 0, 1, 1, 2, 2, 0, 1, 2, 2, 0]])
    assert torch.equal(
        map_cond(lambda leaf: leaf * 2, Grouped(cond["tokens"], shared.rows)).expand()[2], cond["tokens"][1] * 2
    )
    assert grouped(None, shared.rows) is None
    with pytest.raises(ValueError, match="grouped condition of 6 rows for a batch of 5"):
        network()(torch.randn(5, 7, 3), torch.rand(5), shared)

    class Plain(torch.nn.Module):
        def forward(self, xt: Tensor, t: Tensor, cond: Any) -> Tensor:
            assert torch.equal(cond, rows)
            return xt

    rows = torch.tensor([[1.0], [1.0], [2.0]])
    denoiser = Denoiser(Plain(), GaussianProcess(Linear()), "velocity")
    denoiser(torch.zeros(3, 2), 0.5, Grouped(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0, 1])))
