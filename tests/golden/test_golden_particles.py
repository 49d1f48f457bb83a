"""FK steering and DAS against their official code: weights, decisions, memory, proposal, tempering, ancestors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from gencontrol.models import GaussianMixture
from gencontrol.models.denoiser import Pred
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling import chain
from gencontrol.sampling.chain import Twist, make_chain
from gencontrol.sampling.particles import steering
from gencontrol.sampling.particles.population import Target
from gencontrol.sampling.particles.resampling import effective_size, systematic
from gencontrol.sampling.scoring import Scorer, Scores
from gencontrol.sampling.steps import StochasticStep
from gencontrol.types import Prediction
from tests.helpers.golden import cases, relative, tensors

MODEL = GaussianMixture(torch.zeros(1, 1), torch.eye(1)[None], torch.ones(1), GaussianProcess(Linear()))
SCORER = Scorer(lambda x: x[:, 0])


@pytest.mark.parametrize("case", cases("fk_steering"))
def test_fk_steering(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our run is fed the stored rewards of each slot and the stored ancestors; all else is its own."""
    config, data = cases("fk_steering")[case], tensors("fk_steering", case)
    looks, n = data["values"].shape
    values, weights, entries, drawn = iter(data["values"]), [], [], []

    def scores(self: Any, x: Any, roots: Any) -> Scores:
        return Scores(next(values), torch.ones(n, dtype=torch.bool))

    def published(gain: Any, valid: Any) -> Any:
        weights.append(original["_published"](gain, valid))
        return weights[-1]

    def look(target: Any, cloud: Any, *rest: Any) -> None:
        entries.append((cloud.memory.clone(), cloud.credit.clone()))
        original["_look"](target, cloud, *rest)

    def ancestors(target: Any, log_weights: Any, level: int, rule: Any) -> Any:
        drawn.append(len(weights) - 1)
        return data["ancestors"][len(weights) - 1]

    patches: dict[str, Any] = {"_published": published, "_look": look, "_ancestors": ancestors}
    original = {name: getattr(steering, name) for name in patches}
    for name, patch in patches.items():
        monkeypatch.setattr(steering, name, patch)
    monkeypatch.setattr(Scorer, "__call__", scores)
    target = Target(make_chain(MODEL, (1,), steps=looks + 1), SCORER, temperature=1 / config["lmbda"])
    kind = "fk-published" + ("" if config["potential"] == "diff" else f"-{config['potential']}")
    threshold = 0.5 if config["adaptive"] else 1.0
    steering.smc(target, n, resample_at="all", ess_threshold=threshold, potential=kind)

    assert len(weights) == looks and drawn == data["resampled"].nonzero().flatten().tolist()
    for k, log in enumerate(weights):
        assert relative(log.exp(), data["weights"][k] / data["weights"][k].sum()) < 1e-12
    for k, (memory, credit) in enumerate(entries[1:]):
        assert relative(memory, data["memory"][k]) < 1e-12
        if config["potential"] != "diff":
            assert relative(credit.exp(), data["product"][k]) < 1e-12


@dataclass(frozen=True)
class Fixed(StochasticStep):
    """A transition of a given deviation whose mean is the clean prediction."""

    std: float = 1.0

    @property
    def stochastic(self) -> bool:
        return True

    def weights(self, process: Any, t: Any, t_next: Any, like: Any) -> tuple[Any, Any, Any]:
        return 1.0, 0.0, self.std


def test_das_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    """x', log p − log q and the weight's increment; the official density's constant is float32, and cancels."""
    data = tensors("das_smc")
    monkeypatch.setattr(chain, "randn", lambda *arguments: data["z"])
    twist = Twist(lambda x, roots: x, lambda t: 1.0)
    steps = replace(make_chain(MODEL, (3, 4), steps=4), step=Fixed(float(data["std"])), twist=twist)
    pred = Pred(data["mean"], data["mean"], MODEL.process.at(1.0, data["mean"]), Prediction.X0)
    x, ratio = steps.twisted(pred, data["gradient"], 0, torch.arange(len(data["mean"])))
    assert relative(x, data["proposal"]) < 1e-12
    assert relative(ratio, data["log_p"] - data["log_q"]) < 1e-12
    assert relative(ratio + data["twist_new"] - data["twist_old"], data["log_w_increment"]) < 1e-12


def test_das_tempering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of step i counts with γ_i, the gradient of the step with γ_(i+1)."""
    data = tensors("das_smc")
    values = [steering.das_tempering(i, 100) for i in range(100)]
    assert relative(values, data["gamma_value"]) < 1e-12
    kept: list[Any] = []

    def stopped(target: Any, n: int, at: Any, threshold: float, rule: Any, fade: Any) -> None:
        kept.append(fade)
        raise InterruptedError

    monkeypatch.setattr(steering, "_twisted", lambda target, name, scale, norm: kept.append(scale) or target)
    monkeypatch.setattr(steering, "_run", stopped)
    target = Target(make_chain(MODEL, (1,), steps=100), SCORER)
    with pytest.raises(InterruptedError):
        steering.das(target, 4)
    scale, fade = kept
    assert relative([fade(i) for i in range(100)], data["gamma_value"]) < 1e-12
    assert relative([scale(t) for t in target.chain.grid[:100]], data["gamma_gradient"]) < 1e-12


def test_effective_size_and_systematic_resampling() -> None:
    data = tensors("das_smc", "systematic")
    for row, log in enumerate(data["log_w"]):
        assert effective_size(log) == pytest.approx(float(data["ess"][row]), rel=1e-12)
        assert torch.equal(systematic(log, float(data["uniform"][row, 0])), data["indices"][row])
