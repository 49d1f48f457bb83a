"""A new condition: no effect until trained, the base without labels, scale of a residual push, files, text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.conditions.base import add_condition, conditioned, load_condition, save_condition, with_labels
from gencontrol.models.conditions.labels import join_prompt, split_prompt
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
from gencontrol.models.networks.transformer import Transformer
from gencontrol.models.readers.classifier_fit import calibrate, fit_classifier
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rewards import load_reward
from gencontrol.rewards.image.classifier import ClassifierReward, attributes_of
from gencontrol.rng import stream
from gencontrol.sampling.control.controlled import ControlGuided, plan_of, sample_controlled
from gencontrol.types import Prediction, RewardContext

GRID = (1.0, 0.75, 0.5, 0.25, 0.0)
SHAPE = (1, 4, 4)


def base(prediction: Prediction = Prediction.VELOCITY) -> Denoiser:
    """A small random patch transformer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cut = PatchConfig(1, 4, 2)
        network = PatchTransformer(cut, Transformer(backbone_config(cut, classes=3, dim=16, depth=1, heads=2)))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return Denoiser(network, GaussianProcess(Linear()), prediction)


def stirred(denoiser: Denoiser) -> Denoiser:
    """Give the condition arbitrary weights."""
    generator = stream(0, "test/stir")
    with torch.no_grad():
        for parameter in conditioned(denoiser).own_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def noisy(count: int = 5) -> Tensor:
    return torch.randn(count, *SHAPE, generator=stream(0, "test/x"))


@pytest.mark.parametrize("inject", ["time", "residual"])
@pytest.mark.parametrize(
    ("kind", "cardinality", "label"),
    [
        ("categorical", 3, 1),
        ("vector", 2, [0.5, -1.0]),
        ("multi", {"style": 2, "size": ["s", "m", "l"]}, {"size": "l"}),
    ],
)
def test_zero_start_and_null_labels_are_the_base(inject: Any, kind: Any, cardinality: Any, label: Any) -> None:
    plain = base()
    added = add_condition(plain, shape=SHAPE, kind=kind, cardinality=cardinality, inject=inject)
    network, x = conditioned(added), noisy()
    given, null = network.labels.encode(label, 5), network.labels.encode(None, 5)
    with torch.no_grad():
        expected = plain(x, 0.6).raw
        assert torch.equal(added(x, 0.6, with_labels(None, given)).raw, expected)
        stirred(added)
        assert torch.equal(added(x, 0.6).raw, expected)
        assert torch.equal(added(x, 0.6, with_labels(None, null)).raw, expected)
        moved = added(x, 0.6, with_labels(None, given)).raw
        assert (moved - expected).abs().amax((1, 2, 3)).min() > 1e-3
        mixed = torch.cat([given[:2], null[:3]])
        found = added(x, 0.6, with_labels(None, mixed)).raw
        torch.testing.assert_close(found[:2], moved[:2])
        torch.testing.assert_close(found[2:], expected[2:])
        assert torch.equal(added(x, 0.6, with_labels(None, given, scale=0.0)).raw, expected)
        network.set_grid(GRID)
        last = added(x, 0.25, with_labels(None, given)).raw  # a deterministic step: labels are off
        assert torch.equal(last, plain(x, 0.25).raw)


@pytest.mark.parametrize("prediction", [Prediction.VELOCITY, Prediction.X0, Prediction.V, Prediction.EDM])
def test_residual_moves_the_mean_by_variance_times_push(prediction: Prediction) -> None:
    """P3, DERIVED: with the grid, mean_new − mean_old = std²·u on every step, also the first one (a = 0)."""
    added = stirred(add_condition(base(prediction), shape=SHAPE, cardinality=3))
    network, x = conditioned(added), noisy()
    network.set_grid(GRID)
    pushes: list[Tensor] = []
    assert network.control is not None
    network.control.register_forward_hook(lambda module, inputs, output: pushes.append(output))
    for t, t_next in zip(GRID[:-2], GRID[1:-1]):
        w0, w1, std = added.process.step_weights(t, t_next, 1.0, x)
        with torch.no_grad():
            new = added(x, t, with_labels(None, torch.ones(5, 1).long())).mix(w0, w1)
            old = added(x, t).mix(w0, w1)
        torch.testing.assert_close(new - old, std**2 * pushes[-1], rtol=1e-3, atol=1e-5)


def test_additive_attributes_and_two_controls() -> None:
    """P11: the embedding of a combination is the sum; two conditions can be stacked."""
    first = stirred(add_condition(base(), shape=SHAPE, kind="multi", cardinality={"a": 2, "b": 2}, inject="time"))
    network = conditioned(first)
    both, one, other = (network.labels.encode(v, 1) for v in ({"a": 1, "b": 0}, {"a": 1}, {"b": 0}))
    vectors = [network.labels.vectors(network.embed, rows) for rows in (both, one, other)]
    torch.testing.assert_close(vectors[0], vectors[1] + vectors[2])
    second = stirred(add_condition(first, shape=SHAPE, name="z", cardinality=2))
    x, cond = noisy(), with_labels(None, both.expand(5, -1))
    with torch.no_grad():
        assert torch.equal(second(x, 0.5, cond).raw, first(x, 0.5, cond).raw)
        assert not torch.equal(
            second(x, 0.5, with_labels(cond, torch.ones(5, 1).long(), name="z")).raw, first(x, 0.5, cond).raw
        )
    with pytest.raises(UsageError, match="already"):
        add_condition(first, shape=SHAPE, cardinality=2)


def test_lora_beside_it_is_off_without_labels() -> None:
    plain = base()
    x = noisy()
    with torch.no_grad():
        expected = plain(x, 0.6).raw
    added = add_condition(plain, shape=SHAPE, cardinality=3)
    network = conditioned(added)
    roles = Roles(
        network,
        ("policy", "ref", "ema"),
        LoraConfig(2, targets=("linear_in", "to_q", "to_qkv", "to_out")),
        whole=("embed", "control"),
    )
    with torch.no_grad():
        for parameter in roles.trainable():
            parameter.add_(0.3)
        labels = torch.tensor([[0], [1], [-1], [2], [-1]])
        assert torch.equal(added(x, 0.6).raw, expected)
        mixed = added(x, 0.6, with_labels(None, labels)).raw
        torch.testing.assert_close(mixed[[2, 4]], expected[[2, 4]])
        assert (mixed - expected)[[0, 1, 3]].abs().amax((1, 2, 3)).min() > 1e-3
        with roles.use("ref"):
            torch.testing.assert_close(added(x, 0.6, with_labels(None, labels)).raw, expected)
    assert {name.split(".")[0] for name in roles.state_dict()["policy"]} == {"network", "embed", "control"}
    assert all(p.requires_grad for p in roles.trainable())


def test_two_strengths_and_the_trained_schedule() -> None:
    added = stirred(add_condition(base(), shape=SHAPE, cardinality=3))
    network, x = conditioned(added), noisy()
    cond = {"pooled": torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]}
    labels = torch.ones(5, 1).long()
    assert isinstance(added.process, GaussianProcess)
    plan = plan_of(added.process, 4, guidance="separate", guidance_scale=2.0)
    network.set_grid(plan.grid)
    with torch.no_grad():
        free, plain, given = added(x, 0.5).raw, added(x, 0.5, cond).raw, added(x, 0.5, with_labels(cond, labels)).raw
        model = ControlGuided(added, prompt_scale=2.0, control_scale=0.7, uncond=None)
        expected = free + 2 * (plain - free) + 0.7 * (given - plain)
        torch.testing.assert_close(model(x, 0.5, with_labels(cond, labels)).raw, expected, rtol=1e-4, atol=1e-5)
        shape, generators = (2, *SHAPE), [stream(0, "a"), stream(0, "b")]
        common = {"cond": {"pooled": torch.eye(3)[:2]}, "uncond": None}
        sampled = sample_controlled(added, plan, shape, labels=labels[:2], strength=0.0, generator=generators, **common)
        generators = [stream(0, "a"), stream(0, "b")]
        without = sample_controlled(added, plan, shape, labels=None, generator=generators, **common)
        torch.testing.assert_close(sampled, without)
        for change in ({"steps": 7}, {"eta": 0.0}):
            with pytest.raises(UsageError, match="another chain"):
                sample_controlled(added, plan, shape, labels=None, **common, **change)
            sample_controlled(added, plan, shape, labels=None, force=True, **common, **change)


def test_files(tmp_path: Path) -> None:
    added = stirred(add_condition(base(), shape=SHAPE, kind="multi", cardinality={"a": 2, "b": ["x", "y"]}))
    conditioned(added).set_grid(GRID)
    save_condition(conditioned(added), tmp_path)
    loaded = load_condition(base(), tmp_path)
    cond = with_labels(None, torch.tensor([[1, 0]]).expand(5, -1))
    with torch.no_grad():
        assert torch.equal(loaded(noisy(), 0.5, cond).raw, added(noisy(), 0.5, cond).raw)
    assert conditioned(loaded).grid == GRID and conditioned(loaded).config == conditioned(added).config
    with pytest.raises(UsageError, match="holds no condition"):
        load_condition(base(), tmp_path / "nothing")


def test_labels_in_text_and_errors() -> None:
    assert split_prompt(join_prompt("a cube", "style=ink, size=3")) == ("a cube", {"style": "ink", "size": "3"})
    assert split_prompt("a cube | not a label") == ("a cube | not a label", {})
    network = conditioned(
        add_condition(base(), shape=SHAPE, kind="multi", cardinality={"style": ["ink", "oil"], "size": 3})
    )
    assert network.labels.encode([{"style": "oil"}, None]).tolist() == [[1, -1], [-1, -1]]
    assert len(network.labels.combinations(excluded=[(0, 1)])) == 5
    for label, message in (
        ({"stile": "ink"}, "Did you mean 'style'"),
        ({"style": "inc"}, "Did you mean 'ink'"),
        (1, "mapping"),
    ):
        with pytest.raises(UsageError, match=message):
            network.labels.encode(label, 1)  # type: ignore[arg-type]  # wrong on purpose


def test_classifier_fit_calibration_and_reward() -> None:
    generator = stream(0, "test/blobs")
    labels = torch.arange(60) % 3
    means = torch.tensor([-0.6, 0.0, 0.6])[labels]
    images = means[:, None, None, None] + 0.35 * torch.randn(60, 1, 4, 4, generator=generator)
    model = fit_classifier(images, labels, ("low", "mid", "high"), folds=2, steps=30, width=8)[0]
    assert (model(images).argmax(1) == labels).float().mean() > 0.85
    before = model.config.temperature
    assert before != 1.0 and calibrate(model, images, labels) == model.config.temperature
    with pytest.raises(UsageError, match=r"high \(0\)"):
        fit_classifier(images[labels < 2], labels[labels < 2], ("low", "mid", "high"))
    with pytest.raises(UsageError, match="numbers from 0 to 1"):
        calibrate(
            fit_classifier(images[:40], labels[:40].clamp(max=1), ("a", "b"), folds=1, steps=2, width=8)[0],
            images,
            labels,
        )
    pictures = ((images[:4] + 1) / 2).clamp(0, 1).requires_grad_()
    reward = ClassifierReward(reward_model={"tone": model, "again": model}, weights={"again": 2.0}, device="cpu")
    assert attributes_of(reward) == {"tone": ("low", "mid", "high"), "again": ("low", "mid", "high")}
    out = reward(pictures, RewardContext(prompts=["x | tone=low, again=high", "x | tone=mid", "x", "x | again=low"]))
    log_p = model.log_probs(pictures * 2 - 1)
    expected = torch.stack([log_p[0, 0] + 2 * log_p[0, 2], log_p[1, 1], torch.zeros(()), 2 * log_p[3, 0]])
    torch.testing.assert_close(out.values, expected)
    out.values.sum().backward()
    assert pictures.grad is not None and pictures.grad[0].abs().max() > 0
    with pytest.raises(UsageError, match="Did you mean 'high'"):
        reward(pictures, RewardContext(metadata={"tone": ["hig"] * 4, "again": ["low"] * 4}))
    assert load_reward("classifier", label="3", device="cpu").name == "classifier"
