"""The options of a search: sections [run] and [search]; plain values that are checked without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AllowInfNan

from gencontrol.config import Count, Natural, NonNegative, options
from gencontrol.errors import UsageError, nearest
from gencontrol.sampling.samplers import SAMPLERS, TREES, sampler

_RULES, _WIDENINGS = ("shrunk", "boltzmann", "uct", "tempered", "uniform"), ("steady", "paper", "text", "small")


@options
class SourceConfig:
    """The [run] section: which model, prompts and rewards, and where the results go.

    Args:
        model: "bundled", "bundled-digits", a folder or a hub id.
        reward: clap, clip:0.3, package.module:Name, http://…; several are summed with their weights.
        prompt: a prompt as text; may be repeated.
        prompts: prompt file (txt, jsonl, csv); its prompts follow those of `prompt`.
        reward_model: folder or hub id of the reward's network; None takes the bundled one.
        reference: folder of sound, or a text file of captions, for rewards that compare with a reference law.
        encoder: encoder of such rewards; None takes theirs.
        output: the run folder.
        online: allow downloads from the hub.
        device: where it runs.
        threads: CPU threads; 0 leaves it to the library.
        precision: of the network's autocast; states and rewards stay float32; "auto" is bf16 where that
            is fast.
        prompts_hash: written by a search, so that an edited prompt file is noticed; not meant to be set.
    """

    model: str = "bundled"
    reward: tuple[str, ...] = ("clap",)
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    reward_model: str | None = None
    reference: str | None = None
    encoder: str | None = None
    output: str = "runs/search"
    online: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Natural = 0
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    prompts_hash: str | None = None

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("reward is empty; name at least one, e.g. reward = ['clap']")
        if not self.output:
            raise ValueError("output is empty; name the run folder")


@options
class SearchConfig:
    """The [search] section: how p(x)·exp(reward/temperature) is searched.

    Args:
        sampler: {SAMPLERS}; "dts-star" looks for the best sample, "islands" draws from the law, "dts" does so with a
            tree.
        nfe: model calls per prompt; a guided call (two rows of the network) counts one.
        temperature: τ > 0 in units of the reward; smaller follows the reward more.
        steps: sampler steps of a whole path; None is the model's own number.
        branch: equal segments between levels ("5"), "all", or times such as "0.8,0.6,0.4"; where particles resample.
            None is 5 segments, or one per step where there are fewer.
        leaf_batch: leaves per round and prompt of a tree; particles of one model call.
        widening: "steady", "paper", "text", "small", or "C,alpha": how many children a node of N visits may have,
            C·N^alpha; None is the sampler's own.
        select: rule while a tree grows: "shrunk", "boltzmann", "uct", "tempered", "uniform"; None is the sampler's own.
        backup: how values go up a tree: "soft", or "max" (the limit τ → 0).
        guidance_scale: classifier-free guidance; None is the model's own, 1 or below is none.
        gradient: strength of the reward's gradient in a tree's proposals, 0 is none.
        max_grad_norm: longer reward gradients are shortened to this; 0 leaves them.
        children: candidates per step of the beam.
        count: samples written per prompt.
        seed: of everything drawn.
        save_every: seconds between saves of a tree.
        peer: draw best of n with as many model calls too, which doubles the cost; the page compares the two.
    """

    sampler: str = "dts-star"
    nfe: Count = 4000
    temperature: float = 0.1
    steps: Count | None = None
    branch: str | None = None
    leaf_batch: Count = 8
    widening: str | None = None
    select: str | None = None
    backup: str = "soft"
    guidance_scale: Annotated[float, AllowInfNan(False)] | None = None
    gradient: NonNegative = 0.0
    max_grad_norm: NonNegative = 0.0
    children: Count = 10
    count: Count = 4
    seed: Natural = 0
    save_every: NonNegative = 30.0
    peer: bool = False

    def __post_init__(self) -> None:
        row = sampler(self.sampler)
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature = {self.temperature}; it must be above 0 and finite (for the limit 0 give --backup max)"
            )
        for what, name, known in (("backup", self.backup, ("soft", "max")), ("selection rule", self.select, _RULES)):
            if name is not None and name not in known:
                raise ValueError(f"unknown {what} '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
        given = {"select": self.select, "widening": self.widening, "gradient": self.gradient or None}
        for name, value in {**given, "backup": self.backup if self.backup != "soft" else None}.items():
            if value is not None and not row.tree:
                raise ValueError(
                    f"{name} has no effect on {self.sampler}; leave it out, or choose {' or '.join(TREES)}"
                )
        if self.branch is not None:
            parse_branch(self.branch)
        if self.widening is not None:
            parse_widening(self.widening)

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable."""
        return sampler(self.sampler).gradient or self.gradient > 0


SearchConfig.__doc__ = (SearchConfig.__doc__ or "").replace("{SAMPLERS}", ", ".join(SAMPLERS))


def parse_branch(text: str) -> int | str | list[float]:
    """Return a number of segments, "all", or times.

    Raises:
        UsageError: something else.
    """
    if text == "all":
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError:
        times = []
    if not times or not all(0 < time <= 1 for time in times):
        raise UsageError(
            f"branch '{text}' is not understood; give a number of segments (5), all, or times in (0, 1] (0.8,0.6,0.4)."
        )
    return times


def parse_widening(text: str) -> str | tuple[float, float]:
    """Return the name of a preset, or (C, alpha).

    Raises:
        UsageError: something else.
    """
    if text in _WIDENINGS:
        return text
    try:
        constant, alpha = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"unknown widening '{text}'.{nearest(text, _WIDENINGS)} Known: {', '.join(_WIDENINGS)}, or C,alpha such as "
            "2,0.8."
        ) from None
    if not (0 < constant < math.inf and 0 < alpha <= 1):
        raise UsageError(f"widening {text}: C·N^alpha needs C > 0 and alpha in (0, 1].")
    return constant, alpha


def branch_of(config: SearchConfig, steps: int) -> int | str | list[float]:
    """Return where levels lie on a path of so many steps."""
    return min(5, steps) if config.branch is None else parse_branch(config.branch)  # arXiv 2506.20701, table 2
