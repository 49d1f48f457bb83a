"""One run of `gencontrol bench crd`: a method's own class on equal samples, with its network passes counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.base import Loop, kept, run_in_memory
from gencontrol.errors import NumericsError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.registry import ALGORITHMS, find
from gencontrol.train import precision


@dataclass(frozen=True)
class Method:
    """A row of the bench: label, name in the registry, the options that differ from the common ones, its own rate."""

    label: str
    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None


#: CRD trains at the rollout's own times as its trainer does (PORT), NFT and AWM at theirs, which are their defaults
GRID = {"time_sampling": "grid"}
#: the anchor of docs/methods/crd.md#experiment-a, as each family of methods names it
ANCHOR = {"kl_coef": 0.1, "kl_guidance": 3.0, "kl_adapt": "raw_reward"}
_NFT_OCR = {"beta": 0.1, "decay": "75-0-0.0075-0.999"}
_OCR_OLD = "0-0.25-0.005-0.999"

METHODS = (
    Method("CRD", "crd", ANCHOR),
    Method("CRD, times from all of (0, 1)", "crd", ANCHOR | {"time_sampling": "stratified"}),
    Method("CRD, no decoupling (sampler = old)", "crd", ANCHOR | {"sampling_decay": _OCR_OLD}),
    Method("CRD, no anchor", "crd", {"kl_coef": 0.0}),
    Method("CRD, no anchor, old = policy", "crd", {"kl_coef": 0.0, "old_decay": "none", "sampling_decay": "none"}),
    Method("CRD, anchor without CFG", "crd", ANCHOR | {"kl_guidance": 1.0}),
    Method("CRD, constant KL", "crd", ANCHOR | {"kl_adapt": "off"}),
    Method("CRD, no adaptive weights", "crd", ANCHOR | {"weighting": "none"}),
    Method("NFT, official GenEval", "nft", {}),
    Method("NFT, official OCR", "nft", _NFT_OCR),
    Method("NFT + anchor", "nft", ANCHOR),
    Method("AWM", "awm", {"updates_per_round": 2}),
    Method("AWM + anchor", "awm", ANCHOR | {"updates_per_round": 2}),
    Method("Flow-GRPO", "flow-grpo", {}),
    Method("Flow-GRPO, exponential step", "flow-grpo", {"integrator": "exponential"}),
    Method("Flow-GRPO, KL .04 in the paper's unit", "flow-grpo", {"path_kl_unit": "paper", "path_kl_coef": 0.04}),
    Method("Flow-GRPO, clip range 1e-3", "flow-grpo", {"clip_range": 1e-3}),
    Method("Flow-GRPO, no KL, rate 1e-3", "flow-grpo", {"path_kl_coef": 0.0}, 1e-3),
    Method("Flow-GRPO + anchor", "flow-grpo", {"path_kl_coef": 0.0, "kl_coef": 0.1, "kl_guidance": 3.0}),
    Method("RWR", "rwr", {}),
    Method("RWR + anchor", "rwr", {"kl_coef": 0.1, "kl_guidance": 3.0}),
)


@dataclass(frozen=True)
class Plan:
    """What all methods of a comparison share: rounds, groups, samples of each, updates, sampler steps, rate, …"""

    rounds: int = 150
    groups: int = 10
    generations: int = 24
    updates: int = 2
    demo_steps: int = 10
    train_times: int = 6
    lr: float = 5e-4
    precision: str = "fp32"
    lora: int = 0
    ema: float = 0.0
    compiled: bool = False
    measured: tuple[int, ...] = (25, 50, 75, 100, 125, 150)


#: the parts scenes and words.  Rate, anchor (weight, guidance), rounds, one update per round and the average were
#: chosen on seed 100, which no bench uses: by CRD's progress, the guidance by the accuracy of the base under 1 to 3.
#: All rows share them; a network this small, on so few samples, needs a stronger anchor than the digits of
#: docs/methods/crd.md#experiment-a.
SCENES_PLAN = Plan(
    rounds=60,
    groups=8,
    generations=12,
    updates=1,
    demo_steps=8,
    train_times=3,
    lr=2e-4,
    precision="auto",
    ema=0.95,
    compiled=True,
    measured=(15, 30, 45, 60),
)
SCENES_ANCHOR = {"kl_coef": 2.0, "kl_guidance": 2.0, "updates_per_round": 1}


def of_part(part: str) -> tuple[Method, ...]:
    """Return the rows of the parts scenes, words and shifted: CRD and the peers, with and without the anchor."""
    if part == "shifted":
        shown = ("CRD", "CRD, times from all of (0, 1)", "NFT, official GenEval", "AWM", "Flow-GRPO")
        return tuple(method for method in METHODS if method.label in shown)
    variants = ("CRD, no anchor", "Flow-GRPO, exponential step")
    rows = [method for method in METHODS if "OCR" not in method.label]
    rows = [
        method for method in rows if not method.label.startswith(("CRD, ", "Flow-GRPO, ")) or method.label in variants
    ]
    chosen = []
    for method in rows:
        anchored = method.label == "CRD" or method.label.endswith("+ anchor")
        names = method.options if anchored else set(method.options) & {"updates_per_round"}
        options = {**method.options, **{name: SCENES_ANCHOR[name] for name in names if name in SCENES_ANCHOR}}
        chosen.append(replace(method, options=options))
    words = ("CRD", "Flow-GRPO", "Flow-GRPO, exponential step")
    return tuple(chosen) if part == "scenes" else tuple(m for m in chosen if m.label in words)


@dataclass
class Calls:
    """Rows that passed through a network while counting was on."""

    rows: int = 0
    counting: bool = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside the block."""
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def watch(self, denoiser: Denoiser) -> None:
        """Count the rows of this denoiser's network."""

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.rows += len(inputs[0]) if self.counting else 0

        denoiser.register_forward_pre_hook(hook)


def build(method: Method, plan: Plan, task: PromptTask, reward: Any, seed: int) -> Any:
    """Return the method's algorithm on this task."""
    kind = find(ALGORITHMS, method.algorithm, "algorithm")
    shared = {
        "prompts_per_round": plan.groups,
        "generations": plan.generations,
        "updates_per_round": plan.updates,
        "demo_steps": plan.demo_steps,
        "ema_decay": plan.ema,
    }
    forward: dict[str, Any] = {"train_times": plan.train_times} if method.algorithm in ("crd", "nft", "awm") else {}
    forward |= GRID if method.algorithm == "crd" else {}
    config = kind.Config(**{**shared, **forward, **method.options})
    lora = LoraConfig(plan.lora) if plan.lora else None
    roles = Roles(task.denoiser.network, kind.role_names(config), lora=lora, seed=seed)
    return kind(task, reward, config, roles=roles, seed=seed)


def kept_run(folder: Path | None, method: Method, plan: Plan, world: Any, seed: int) -> dict[str, dict[int, float]]:
    """Return a run from the folder, or make it and leave it there."""
    settings = {
        "options": dict(method.options),
        "rate": method.lr or plan.lr,
        "common": GRID if method.algorithm == "crd" else {},
        "plan": {**vars(plan), "lr": None},
        "world": world.mark,
    }

    def make() -> dict[str, dict[int, float]]:
        return run_method(method, plan, world.task(), world.reward, world.measure, seed)

    found = kept(folder, f"{method.algorithm}_{seed}", settings, make)
    return {key: {int(at): value for at, value in points.items()} for key, points in found.items()}


def run_method(
    method: Method,
    plan: Plan,
    task: PromptTask,
    reward: Any,
    measure: Callable[[Denoiser], dict[str, float]],
    seed: int,
) -> dict[str, dict[int, float]]:
    """Fine-tune; returns metric → {round: value}, and the network's passes of training so far.

    Measured is the policy itself, or its average where the plan keeps one.

    A run whose loss is no longer finite ends there; its later measurements are missing, which the tables show.
    """
    algorithm, calls = build(method, plan, task, reward, seed), Calls()
    calls.watch(task.denoiser)
    if plan.compiled:
        task.denoiser.network.compile(dynamic=False)
    autocast = partial(precision.autocast, plan.precision, "cpu")
    curves: dict[str, dict[int, float]] = {}
    role = "ema" if plan.ema else "policy"

    def look(step: int) -> None:
        if step + 1 not in plan.measured:
            return
        with calls.paused(), algorithm.roles.use(role), autocast():
            found = measure(task.denoiser)
        for key, value in (found | {"passes": float(calls.rows)}).items():
            curves.setdefault(key, {})[step + 1] = value

    try:
        run_in_memory(algorithm, plan.rounds, Loop(method.lr or plan.lr, autocast=autocast), seed=seed, on_step=look)
    except NumericsError:
        pass
    return curves
