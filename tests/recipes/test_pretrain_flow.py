"""Flow pretraining: targets, draws as functions of (seed, position), learning, averaging, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.transformer import Transformer, TransformerConfig
from gencontrol.models.roles import Roles
from gencontrol.process import Cosine, GaussianProcess, Linear, MaskedProcess
from gencontrol.recipes.sound.flow import FlowPretrain, FlowPretrainConfig, time_of_uniform
from gencontrol.recipes.sound.latents import LatentDataset
from gencontrol.sampling import sample
from gencontrol.testing.algorithm import AlgorithmContract


def data(n: int = 10, seed: int = 0) -> LatentDataset:
    """Point masses: the latent is ±1.5 everywhere by the caption, which has two wordings."""
    g = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (n,), generator=g)
    latents = (3.0 * sign - 1.5)[:, None, None].expand(n, 2, 3).half()
    cond = {
        "pooled": torch.tensor([[-1.0, 0.1], [-1.0, 0.2], [1.0, 0.1], [1.0, 0.2]]).half(),
        "tokens": torch.randn(4, 3, 2, generator=g).half(),
        "mask": torch.ones(4, 3, dtype=torch.bool),
    }
    return LatentDataset(latents, torch.stack([2 * sign, 2 * sign + 1], 1), cond, ["low", "deep", "high", "shrill"])


def make(
    schedule: Any = None, prediction: str = "velocity", held_out: LatentDataset | None = None, **options: Any
) -> FlowPretrain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TransformerConfig(
            in_dim=3, out_dim=3, dim=16, depth=1, heads=2, context_dim=2, pooled_dim=2, max_tokens=2
        )
        network = Transformer(config)
        torch.nn.init.normal_(network.out.weight, std=0.1)
    denoiser = Denoiser(network, GaussianProcess(schedule or Linear()), prediction)
    settings = FlowPretrainConfig(**{"batch": 8, "eval_items": 6, "eval_samples": 2, "eval_steps": 3, **options})
    return FlowPretrain(
        denoiser,
        data(),
        settings,
        roles=Roles(network, ("policy", "ema")),
        seed=1,
        held_out=held_out,
        artefacts=lambda stem, x: {f"{stem}.bin": x.numpy().tobytes()},
    )


class TestContract(AlgorithmContract):
    def make(self) -> FlowPretrain:
        return make()


def context(step: int = 0, **changes: Any) -> StepContext:
    return StepContext(seed=1, step=step, **{"micro_batch": 8, **changes})


def micros(algorithm: FlowPretrain, ctx: StepContext) -> list[Any]:
    return list(algorithm.minibatches(algorithm.collect(ctx).data, 0, ctx))


def joined(parts: Sequence[Any], field: str) -> torch.Tensor:
    return torch.cat([getattr(part, field) for part in parts])


def test_draws_do_not_depend_on_micro_batches_or_ranks(fenced_rng: None) -> None:
    algorithm = make()
    whole = micros(algorithm, context(3))
    split = micros(algorithm, context(3, micro_batch=3))
    assert [len(part.x0) for part in split] == [3, 3, 2]
    ranks = [micros(algorithm, context(3, rank=r, world_size=2))[0] for r in range(2)]
    for field in ("x0", "t", "noise"):
        expected = getattr(whole[0], field)
        assert torch.equal(joined(split, field), expected)
        assert torch.equal(ranks[0].__dict__[field], expected[0::2])
        assert torch.equal(ranks[1].__dict__[field], expected[1::2])
    assert not torch.equal(micros(algorithm, context(4))[0].noise, whole[0].noise)


def test_an_epoch_reads_each_item_once() -> None:
    algorithm = make()
    order = [[algorithm._item(p) for p in range(10 * e, 10 * e + 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in order)
    assert order[0] != order[1] != order[2]
    assert algorithm._item(7) == order[0][7]  # going back after a resume


def test_drop_wordings_and_times_have_their_laws() -> None:
    algorithm = make(drop=0.25, times="uniform")
    parts = [micros(algorithm, context(step))[0] for step in range(100)]
    n = 800
    dropped = torch.cat([p.cond["drop"] for p in parts]).float().mean()
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    second = torch.cat([p.cond["pooled"][:, 1] > 0.15 for p in parts]).float().mean()
    assert abs(second - 0.5) < 4 * (0.25 / n) ** 0.5
    for part in parts:  # one time in each stratum of the batch
        assert torch.equal((part.t.sort().values * 8).floor(), torch.arange(8.0))
    noise = joined(parts, "noise")
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 0.05


def test_logit_normal_quantiles() -> None:
    config = FlowPretrainConfig(times="logit-normal", times_mean=-0.5, times_std=1.2)
    u = torch.linspace(0.001, 0.999, 9999)
    logits = torch.logit(time_of_uniform(u, config))
    assert abs(logits.mean() + 0.5) < 0.01 and abs(logits.std() - 1.2) < 0.02


@pytest.mark.parametrize(("schedule", "prediction"), [(Linear(), "velocity"), (Cosine(), "v"), (Cosine(), "eps")])
def test_loss_is_the_regression_on_the_target(schedule: Any, prediction: str) -> None:
    algorithm = make(schedule, prediction)
    part = micros(algorithm, context())[0]
    t = part.t[:, None, None]
    if prediction == "velocity":
        a, s, target = 1 - t, t, part.noise - part.x0
    else:
        a, s = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        target = a * part.noise - s * part.x0 if prediction == "v" else part.noise
    output = algorithm.roles.module(a * part.x0 + s * part.noise, part.t, part.cond)
    expected = ((output - target) ** 2).mean((1, 2))
    torch.testing.assert_close(algorithm.errors(part), expected, atol=1e-5, rtol=1e-5)
    out = algorithm.loss(part, context())
    torch.testing.assert_close(out.total, expected.sum(), atol=1e-4, rtol=1e-5)
    assert out.count == 8


def fit(algorithm: FlowPretrain, steps: int, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(algorithm.roles.trainable(), lr=lr, fused=True)
    for step in range(steps):
        ctx = context(step)
        for micro in micros(algorithm, ctx):
            (algorithm.loss(micro, ctx).total / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        algorithm.after_update(ctx, 0)


def test_learns_the_conditional_law() -> None:
    """The caption fixes the latent, so the best loss is 0 and samples are the point masses."""
    algorithm = make(ema=0.9, drop=0.1)
    before = algorithm.evaluate(context()).metrics["eval/loss"]
    fit(algorithm, 250)
    metrics = algorithm.evaluate(context(250)).metrics
    assert metrics["eval/loss"] < 0.1 * before
    cond = {k: v.float() if v.dtype != torch.bool else v for k, v in algorithm.data.cond.items()}
    with torch.no_grad():
        x = sample(algorithm.denoiser, (4, 2, 3), steps=20, generator=torch.Generator().manual_seed(0), cond=cond)
    torch.testing.assert_close(x[:2].mean(), torch.tensor(-1.5), atol=0.3, rtol=0)
    torch.testing.assert_close(x[2:].mean(), torch.tensor(1.5), atol=0.3, rtol=0)
    with torch.no_grad():  # without a condition both signs come out
        free = sample(algorithm.denoiser, (64, 2, 3), steps=20, generator=torch.Generator().manual_seed(0))
    assert 0.15 < (free.mean((1, 2)) > 0).float().mean() < 0.85


def test_evaluation_reads_the_average_on_held_out_items() -> None:
    other = data(7, seed=5)
    algorithm = make(held_out=other)
    first = algorithm.evaluate(context())
    assert set(first.artefacts) == {"sample_00.bin", "sample_01.bin", "captions.txt"}
    assert first.artefacts["captions.txt"].decode().splitlines()[0] == f"00 {other.text(0)}"
    assert {"eval/loss", "eval/loss_t_low", "eval/loss_t_mid", "eval/loss_t_high"} == set(first.metrics)
    with torch.no_grad():
        for parameter in algorithm.roles.trainable():
            parameter.add_(1.0)
    assert algorithm.evaluate(context(9, micro_batch=5)).metrics["eval/loss"] == pytest.approx(
        first.metrics["eval/loss"], rel=1e-5
    )
    algorithm.roles.copy("policy", "ema")
    assert algorithm.evaluate(context()).metrics["eval/loss"] != pytest.approx(first.metrics["eval/loss"], rel=1e-2)


def test_final_model_has_the_average_weights(tmp_path: Path) -> None:
    algorithm = make()
    fit(algorithm, 3)
    algorithm.save_final(tmp_path)
    saved = Transformer.from_pretrained(tmp_path).state_dict()
    ema = algorithm.roles.state_dict()["ema"]
    assert all(torch.equal(saved[name], value) for name, value in ema.items())
    assert any(not torch.equal(saved[name], value) for name, value in algorithm.roles.state_dict()["policy"].items())


def test_refusals() -> None:
    network = make().roles.module
    denoiser = make().denoiser
    with pytest.raises(UsageError, match="'policy' and 'ema'"):
        FlowPretrain(denoiser, data(), FlowPretrainConfig(), roles=Roles(network, ("policy",)), seed=0)
    with pytest.raises(UsageError, match="no items"):
        FlowPretrain(denoiser, data(0), FlowPretrainConfig(), roles=Roles(network, ("policy", "ema")), seed=0)
    masked = Denoiser(network, MaskedProcess(4, 3))
    with pytest.raises(UsageError, match="GaussianProcess"):
        FlowPretrain(masked, data(), FlowPretrainConfig(), roles=Roles(network, ("policy", "ema")), seed=0)
    for bad in ({"times": "cosine"}, {"drop": 1.5}, {"ema": 1.0}, {"batch": 0}):
        with pytest.raises(ValueError):
            FlowPretrainConfig(**bad)
