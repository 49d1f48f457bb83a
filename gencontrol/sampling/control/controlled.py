"""The chain that a control is trained on and sampled with: schedule, guidance, path KL (CTRL, arXiv 2406.12120).

A control is optimal for one chain: time grid, noise level eta and guidance.  `ControlPlan` holds them, the artefact
stores it, and `sample_controlled` refuses another schedule unless it is forced.

Guidance (docs/methods/ctrl.md#p9), with u, c the frozen model without and with the prompt and y the controlled one:
new = u + s·(c − u) + w·(y − c), old = u + s·(c − u).  "none" s = 1; "separate" w = 1, exact for the guided chain as the
base law, and two strengths at sampling; "amplified" w = s, as the released code has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.conditions.base import conditioned, with_labels
from gencontrol.models.denoiser import Denoiser, Pred
from gencontrol.process.gaussian import GaussianProcess, Time
from gencontrol.process.schedule import Schedule
from gencontrol.sampling.grids import make_grid
from gencontrol.sampling.loop import sample
from gencontrol.sampling.state import Generators, repeat_cond
from gencontrol.sampling.steps import Ddim
from gencontrol.types import Cond

Guidance = Literal["none", "separate", "amplified"]


@dataclass(frozen=True)
class ControlPlan:
    """What a control was trained for.

    Args:
        grid: decreasing times from 1 to 0.
        eta: noise level of the DDIM family, 1 for exactness.
        guidance, guidance_scale: see the module docstring.
        gamma: strength of the target p(y given x)^gamma.
        schedule: text of the process's schedule.
        classifier: hash of the reward's weights, "" where it has none.
    """

    grid: tuple[float, ...]
    eta: float = 1.0
    guidance: Guidance = "none"
    guidance_scale: float = 1.0
    gamma: float = 1.0
    schedule: str = ""
    classifier: str = ""

    def __post_init__(self) -> None:
        if self.guidance not in ("none", "separate", "amplified"):
            raise UsageError(f"guidance is '{self.guidance}'; known: none, separate, amplified.")
        if (self.guidance == "none") != (self.guidance_scale == 1.0):
            raise UsageError(
                f"guidance_scale {self.guidance_scale:g} with guidance '{self.guidance}': say how the control meets "
                "classifier-free guidance: 'none' (scale 1), 'separate' (control not amplified) or 'amplified'."
            )

    def table(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "grid": list(self.grid)}


def plan_of(
    process: GaussianProcess,
    steps: int,
    *,
    eta: float = 1.0,
    guidance: Guidance = "none",
    guidance_scale: float = 1.0,
    gamma: float = 1.0,
    classifier: str = "",
) -> ControlPlan:
    """Return the plan of the model's own grid of that many steps, or of a uniform one."""
    times = process.times(steps)
    grid = tuple(make_grid(process.schedule, steps if times is None else None, times))
    return ControlPlan(grid, eta, guidance, guidance_scale, gamma, repr(process.schedule), classifier)


def memory(schedule: Schedule, grid: Sequence[float], eta: float) -> float:
    """Return rho², the squared correlation of the first and the last state of a chain over N(0, 1) data (P2, DERIVED).

    A control cannot move the first state, so that it reaches (1 − rho²) of a wanted shift; 0 is memoryless.
    """
    process = GaussianProcess(schedule)
    start = schedule.at(grid[0]).s
    variance, kept, like = start * start, 1.0, torch.zeros(1)
    for t, t_next in zip(grid, grid[1:]):
        here = schedule.at(t)
        w0, w1, std = (float(value) for value in process.step_weights(t, t_next, eta, like))
        rate = (w0 * here.a + w1 * here.s) / here.scale2 if t_next > 0 else here.a / here.scale2
        std = std if t_next > 0 else 0.0
        variance, kept = rate * rate * variance + std * std, kept * rate
    return kept * kept * start * start / variance if variance > 0 else 1.0


class ControlGuided(Denoiser):
    """A conditioned denoiser with two strengths: of the prompt (classifier-free guidance) and of the control."""

    def __init__(self, denoiser: Denoiser, *, prompt_scale: float, control_scale: float, uncond: Cond) -> None:
        """Wrap; `uncond` is the backbone's empty condition, batch 1 or None where it takes None.

        Raises:
            UsageError: a scale that is not finite.
        """
        conditioned(denoiser)
        assert denoiser.prediction is not None
        super().__init__(denoiser.network, denoiser.process, denoiser.prediction, denoiser.sigma_data)
        if not (math.isfinite(prompt_scale) and math.isfinite(control_scale)):
            raise UsageError(f"prompt and control scale are {prompt_scale} and {control_scale}; give finite numbers.")
        self.prompt_scale, self.control_scale, self.uncond = prompt_scale, control_scale, uncond

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred:
        """Predict with u + prompt_scale·(c − u) + control_scale·(y − c); terms with nothing to add are not computed."""
        new, old = self.both(xt, t, cond)
        return old if new is None else new

    def plain(self, cond: Cond) -> Cond:
        """Return the backbone's own condition, without labels."""
        return conditioned(self).split(cond)[2]

    def both(self, xt: Tensor, t: Time, cond: Cond, *, frozen_gradient: bool = True) -> tuple[Pred | None, Pred]:
        """Return (controlled or None where no label acts, base) predictions.

        Args:
            frozen_gradient: whether gradients flow through the frozen network to x_t; off is cheaper and biased (P5).
        """
        network = conditioned(self)
        labels, _, rest = network.split(cond)
        active = labels is not None and network.acts(labels, self._times(xt, t, torch.float32))
        given: Pred | None = None
        plain: Pred | None = None
        if active:
            network.detach_backbone = not frozen_gradient
            found = super().forward(xt, t, cond)
            assert isinstance(found, Pred)
            given = found
            raw, network.base_output = network.base_output, None
            if raw is not None:  # a residual control runs the backbone once for both
                plain = given.replace(raw.to(given.raw.dtype))
        with torch.set_grad_enabled(torch.is_grad_enabled() and (frozen_gradient or not active)):
            if plain is None:
                other = super().forward(xt, t, rest)
                assert isinstance(other, Pred)
                plain = other
            old = plain
            if self.prompt_scale != 1.0:
                free = super().forward(xt, t, repeat_cond(self.uncond, len(xt)))
                old = plain.replace(torch.lerp(free.raw, plain.raw, self.prompt_scale))
        if given is None:
            return None, old
        if self.prompt_scale == 1.0 and self.control_scale == 1.0:
            return given, old
        return old.replace(old.raw + self.control_scale * (given.raw - plain.raw)), old


def controlled(
    denoiser: Denoiser, plan: ControlPlan, uncond: Cond, *, strength: float = 1.0, prompt_scale: float | None = None
) -> ControlGuided:
    """Return the model of a plan.

    Args:
        strength: multiplies the control (1 is what was trained, 0 the base).
        prompt_scale: classifier-free guidance instead of the trained scale.
    """
    amplified = plan.guidance_scale if plan.guidance == "amplified" else 1.0
    scale = plan.guidance_scale if prompt_scale is None else prompt_scale
    return ControlGuided(denoiser, prompt_scale=scale, control_scale=amplified * strength, uncond=uncond)


def check_schedule(plan: ControlPlan, *, steps: int | None, eta: float | None, schedule: str, force: bool) -> None:
    """Check that what is asked for is what was trained.

    Raises:
        UsageError: it differs, and `force` is False.
    """
    trained = len(plan.grid) - 1
    differences = []
    if steps is not None and steps != trained:
        differences.append(f"{steps} steps instead of {trained}")
    if eta is not None and eta != plan.eta:
        differences.append(f"eta {eta:g} instead of {plan.eta:g}")
    if plan.schedule and schedule != plan.schedule:
        differences.append(f"schedule {schedule} instead of {plan.schedule}")
    if differences and not force:
        raise UsageError(
            f"this control was trained for another chain: {', '.join(differences)}. Its law is exact for its own alone "
            "(methods: eta = 0 afterwards gives a different law); leave the option out, or force it (force=True)."
        )


def sample_controlled(
    denoiser: Denoiser,
    plan: ControlPlan,
    shape: Sequence[int],
    *,
    labels: Tensor | None,
    cond: Cond = None,
    uncond: Cond = None,
    strength: float = 1.0,
    prompt_scale: float | None = None,
    generator: Generators = None,
    steps: int | None = None,
    eta: float | None = None,
    force: bool = False,
) -> Float[Tensor, "b *d"]:
    """Sample with a trained control.

    Args:
        labels: of `Labels.encode`, or None for the base, bit-exactly.
        strength: of the control; w ≠ 1 approximates gamma·w near 1 only (docs/methods/ctrl.md#composition).
        prompt_scale: classifier-free guidance instead of the trained scale.
        steps, eta: another chain than the trained one, refused unless `force`.

    Raises:
        UsageError: another schedule without `force`.
    """
    assert isinstance(denoiser.process, GaussianProcess)
    check_schedule(plan, steps=steps, eta=eta, schedule=repr(denoiser.process.schedule), force=force)
    model = controlled(denoiser, plan, uncond, strength=strength, prompt_scale=prompt_scale)
    name = conditioned(denoiser).config.name
    count = None if steps is None else steps
    return sample(
        model,
        shape,
        steps=count,
        step=Ddim(eta=plan.eta if eta is None else eta),
        generator=generator,
        cond=cond if labels is None else with_labels(cond, labels, name=name),
        times=plan.grid if count is None else None,
    )
