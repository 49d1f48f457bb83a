"""The sampling loop: prior, steps, callback.  It knows nothing of prediction types, controls or rewards.

Times and coefficients are Python floats computed once for the whole grid, so the loop copies nothing between devices.
Gradients are off (torch.no_grad; a caller that trains nothing may wrap the call in torch.inference_mode, which gains
little and poisons tensors that a network caches) except in the last `grad_steps` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gencontrol.errors import UsageError, nearest
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.process.masked import MaskedProcess
from gencontrol.registry import resolve_dotted
from gencontrol.rng import Keyed
from gencontrol.sampling.grids import make_grid
from gencontrol.sampling.masked_steps import Ancestral, Blocks, Confidence
from gencontrol.sampling.multistep import DpmPp2M, Lms, Plms, SdeDpmPp2M
from gencontrol.sampling.state import Generators, State, Step
from gencontrol.sampling.steps import Ddim, Euler, EulerMaruyama, Heun, Sde
from gencontrol.types import Cond

#: callback(index, t, x) after step `index`, at the time t it reached; a returned tensor replaces x.
Callback = Callable[[int, float, Tensor], Tensor | None]

STEPS: dict[str, type[Step]] = {
    "euler": Euler,
    "heun": Heun,
    "ddim": Ddim,
    "sde": Sde,
    "euler-maruyama": EulerMaruyama,
    "dpmpp2m": DpmPp2M,
    "sde-dpmpp2m": SdeDpmPp2M,
    "plms": Plms,
    "lms": Lms,
    "ancestral": Ancestral,
    "confidence": Confidence,
    "blocks": Blocks,
}


@dataclass(frozen=True)
class Path:
    """A sampled path with all its states.

    Args:
        x: the result [b *d].
        states: [k+1 b *d], from the start to the result (after callbacks).
        times: k+1 decreasing times.
        log_probs: [k b] log-density of each step, 0 for a deterministic last step; None if the step has none.
    """

    x: Shaped[Tensor, "b *d"]
    states: Shaped[Tensor, "k1 b *d"]
    times: tuple[float, ...]
    log_probs: Float[Tensor, "k b"] | None


def make_step(step: str | Step | None, process: GaussianProcess | MaskedProcess) -> Step:
    """Return the Step of a name with its defaults (None: euler or ancestral), checked against the process.

    A name is one of `STEPS`, or package.module:Class of a step of your own, which is made without arguments.

    Raises:
        UsageError: unknown name, a class that is no step, or a step of the other kind of process.
    """
    kind = "masked" if isinstance(process, MaskedProcess) else "gaussian"
    if step is None:
        step = "ancestral" if kind == "masked" else "euler"
    if isinstance(step, str):
        if ":" in step:
            made = resolve_dotted(step, "step")()
            if not isinstance(made, Step):
                raise UsageError(f"step '{step}' is none; it must be a subclass of gencontrol.sampling.state.Step.")
            step = made
        elif step in STEPS:
            step = STEPS[step]()
        else:
            raise UsageError(
                f"unknown step '{step}'.{nearest(step, STEPS)} Known: {', '.join(STEPS)}; or package.module:Class of "
                "your own."
            )
    if step.kind != kind:
        fitting = ", ".join(name for name, value in STEPS.items() if value.kind == kind)
        raise UsageError(f"{type(step).__name__} is a {step.kind} step but the model is {kind}; use one of: {fitting}")
    return step


@overload
def sample(
    model: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    step: str | Step | None = None,
    generator: Generators = None,
    cond: Cond = None,
    callback: Callback | None = None,
    keep_path: Literal[False] = False,
    x_init: Tensor | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    grad_steps: int = 0,
    device: torch.device | str | None = None,
) -> Tensor: ...
@overload
def sample(
    model: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    step: str | Step | None = None,
    generator: Generators = None,
    cond: Cond = None,
    callback: Callback | None = None,
    keep_path: Literal[True],
    x_init: Tensor | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    grad_steps: int = 0,
    device: torch.device | str | None = None,
) -> Path: ...
def sample(
    model: Any,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    step: str | Step | None = None,
    generator: Generators = None,
    cond: Cond = None,
    callback: Callback | None = None,
    keep_path: bool = False,
    x_init: Tensor | None = None,
    times: str | Sequence[float] | Tensor | None = None,
    grad_steps: int = 0,
    device: torch.device | str | None = None,
) -> Tensor | Path:
    """Sample from a model: start at the prior (or `x_init`), take the steps of a time grid, return x or a Path.

    Args:
        shape: (b, *d) of the result.
        steps: number of steps; may be left out when `times` holds values.
        step: name or Step object; None is euler, or ancestral for tokens.
        generator: one for the batch, or a list with one per sample or `Keyed` (step i takes its counter + i + 1),
            which make a sample independent of its batch; None uses torch's global generator.
        cond: condition of batch b.
        callback: called after every step with (index, time reached, x); a returned tensor replaces x.
        x_init: state at the first time, instead of a draw from the prior.
        times: "uniform", "logsnr", "karras" or decreasing values in [0, 1]; see `make_grid`.  None is the model's own
            grid where its process has one, else uniform.
        grad_steps: how many of the last steps keep their autograd graph (if gradients are enabled outside).
        device: where to sample; by default that of x_init, of the model's parameters, or of the generator.

    Raises:
        UsageError: the step, grid, shape or number of generators does not fit.
    """
    process = model.process
    chosen = make_step(step, process)
    if grad_steps < 0:
        raise UsageError(f"grad_steps is {grad_steps}; give the number of last steps that keep gradients, >= 0")
    schedule = process.schedule if isinstance(process, GaussianProcess) else None
    if times is None and steps is not None and isinstance(process, GaussianProcess):
        times = process.times(steps)
        steps = steps if times is None else len(times) - 1
    grid = make_grid(schedule, steps, times)
    if schedule is not None:
        schedule.prepare(grid)
    x = _start(model, tuple(shape), generator, x_init, device)
    state = State(x)
    states: list[Tensor] = [x]
    log_probs: list[Tensor | None] = []
    graph = torch.is_grad_enabled()
    for index, (t, t_next) in enumerate(zip(grid, grid[1:])):
        with torch.set_grad_enabled(graph and index >= len(grid) - 1 - grad_steps):
            noise = None
            if chosen.stochastic_at(t_next):
                noise = chosen.draw(state.x, _of_step(generator, index))
            state = chosen(model, state, t, t_next, cond, noise)
            if callback is not None:
                replaced = callback(index, t_next, state.x)
                if replaced is not None:
                    state = State(replaced, state.log_prob, state.history)
        if keep_path:
            states.append(state.x)
            log_probs.append(state.log_prob)
    if not keep_path:
        return state.x
    known = [value for value in log_probs if value is not None]
    complete = torch.stack(known) if len(known) == len(log_probs) else None
    return Path(state.x, torch.stack(states), tuple(grid), complete)


def _of_step(generator: Generators, index: int) -> Generators:
    """Keyed noise has no state: every step takes a counter of its own, the prior the first."""
    return Keyed(generator.keys, generator.counter + index + 1) if isinstance(generator, Keyed) else generator


def _start(
    model: Any, shape: tuple[int, ...], generator: Generators, x_init: Tensor | None, device: torch.device | str | None
) -> Tensor:
    """The first state, on the right device.

    Raises:
        UsageError: x_init or the list of generators does not fit the shape.
    """
    if not (generator is None or isinstance(generator, torch.Generator)) and len(generator) != shape[0]:
        raise UsageError(f"{len(generator)} generators for a batch of {shape[0]}; give one per sample or a single one")
    if x_init is not None:
        if tuple(x_init.shape) != shape:
            raise UsageError(f"x_init has shape {tuple(x_init.shape)} but {shape} was asked for; make them equal")
        return x_init if device is None else x_init.to(device)
    return model.process.prior(shape, generator, model_device(model, generator) if device is None else device)


def model_device(model: Any, generator: Generators) -> torch.device:
    """Device of the model's first parameter or buffer, else of the generator, else the CPU."""
    if isinstance(model, nn.Module):
        for tensors in (model.parameters(), model.buffers()):
            for tensor in tensors:
                return tensor.device
    if isinstance(generator, Keyed):
        return generator.keys.device
    first = generator if generator is None or isinstance(generator, torch.Generator) else generator[0]
    return torch.device("cpu") if first is None else first.device
