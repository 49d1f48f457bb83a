"""What a search is made of: [run] and [search]; plain values that are checked without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gencontrol.config import options
from gencontrol.errors import UsageError, nearest

#: samplers that grow a tree → their selection rule and widening (DTS and DTS*, arXiv 2506.20701; the widening of DTS*
#: is ours: the paper's is best-of-n for the first 36 rollouts, more than most budgets pay for)
TREES = {"dts": ("boltzmann", "paper"), "dts-star": ("uct", "small")}
#: samplers that move particles, and those of them that follow the reward's gradient
PARTICLES = ("best-of-n", "snis", "smc", "tds", "das", "beam", "dps")
GRADIENT = ("tds", "das", "dps")
SAMPLERS = (*TREES, *PARTICLES)

#: Segments of a path between levels where nothing else is asked for (arXiv 2506.20701, table 2)
SEGMENTS = 5

#: options that may change between two commands on one folder: they alter what is shown, not what is drawn
FREE = ("search.count", "search.save_every", "run.device", "run.threads")
#: further ones where a search goes on from its tree
FREE_OF_TREES = ("search.nfe",)


@options
class SourceConfig:
    """The [run] section: which model, prompts and rewards, and where the results go.

    Args:
        model: "bundled", "bundled-digits", a folder or a hub id.
        reward: reward specs such as "clap:0.7"; several are summed with their weights.
        prompt: prompts as text.
        prompts: prompt file (txt, jsonl, csv); its prompts follow those of `prompt`.
        reward_model: folder or hub id of the reward's network; None takes the bundled one.
        reference: folder of sound, or a text file of captions, for rewards that compare with a reference law.
        encoder: encoder of such rewards; None takes theirs.
        output: the run folder.
        online: allow downloads from the hub.
        device, threads: where it runs.
        precision: of the network's autocast; states and rewards stay float32.
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
    device: str = "auto"
    threads: int = 0
    precision: str = "fp32"
    prompts_hash: str | None = None

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("reward is empty; name at least one, e.g. reward = ['clap']")
        if not self.output:
            raise ValueError("output is empty; name the run folder")
        if self.threads < 0:
            raise ValueError(f"threads = {self.threads}; expected 0 (the library's choice) or more")
        for name, allowed in {"device": ("auto", "cpu", "cuda"), "precision": ("fp32", "bf16")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected one of {', '.join(allowed)}")


@options
class SearchConfig:
    """The [search] section: how p(x)·exp(reward/temperature) is searched.

    Args:
        sampler: a tree ("dts" samples, "dts-star" maximises) or particles.
        nfe: model calls per prompt; a guided call (two rows of the network) counts one.
        temperature: τ > 0 in units of the reward; smaller follows the reward more.
        steps: sampler steps of a whole path; None is the model's own number.
        branch: equal segments between levels ("5"), "all", or times such as "0.8,0.6,0.4"; where particles resample.
            None is 5 segments, or one per step where there are fewer.
        leaf_batch: leaves per round and prompt of a tree; particles of one model call.
        widening: "paper", "text", "small", or "C,alpha": how many children a node of N visits may have; None is the
            sampler's own.
        select: rule while a tree grows: "boltzmann", "uct", "tempered", "uniform"; None is the sampler's own.
        backup: "soft", or "max" (the limit τ → 0).
        guidance_scale: classifier-free guidance; None is the model's own, 1 or below is none.
        gradient: strength of the reward's gradient in a tree's proposals, 0 is none.
        max_grad_norm: longer reward gradients are shortened to this; 0 leaves them.
        children: candidates per step of the beam.
        count: samples written per prompt.
        seed: of everything drawn.
        save_every: seconds between saves of a tree.
    """

    sampler: str = "dts-star"
    nfe: int = 4000
    temperature: float = 0.1
    steps: int | None = None
    branch: str | None = None
    leaf_batch: int = 8
    widening: str | None = None
    select: str | None = None
    backup: str = "soft"
    guidance_scale: float | None = None
    gradient: float = 0.0
    max_grad_norm: float = 0.0
    children: int = 10
    count: int = 4
    seed: int = 0
    save_every: float = 30.0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"unknown sampler '{self.sampler}'.{nearest(self.sampler, SAMPLERS)} Known: {', '.join(SAMPLERS)}."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature = {self.temperature}; it must be above 0 and finite (for the limit 0 give --backup max)"
            )
        for name in ("nfe", "leaf_batch", "count", "children"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a whole number of at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps = {self.steps}; at least 1 sampler step is needed")
        for name in ("seed", "gradient", "max_grad_norm", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a finite number of at least 0")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale = {self.guidance_scale}; expected a finite number")
        if self.backup not in ("soft", "max"):
            raise ValueError(
                f"unknown backup '{self.backup}'.{nearest(self.backup, ('soft', 'max'))} Known: soft, max."
            )
        self._check_tree_options()
        if self.branch is not None:
            parse_branch(self.branch)
        if self.widening is not None:
            parse_widening(self.widening)

    def _check_tree_options(self) -> None:
        """Options that a sampler would ignore are refused."""
        rules = ("boltzmann", "uct", "tempered", "uniform")
        if self.select is not None and self.select not in rules:
            raise ValueError(
                f"unknown selection rule '{self.select}'.{nearest(self.select, rules)} Known: {', '.join(rules)}."
            )
        if self.sampler in TREES:
            return
        ignored = {"select": self.select is not None, "widening": self.widening is not None}
        ignored |= {"backup": self.backup != "soft", "gradient": self.gradient > 0}
        for name, given in ignored.items():
            if given:
                raise ValueError(f"{name} has no effect on {self.sampler}; leave it out, or choose dts or dts-star")

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable."""
        return self.sampler in GRADIENT or self.gradient > 0


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


def branch_of(config: SearchConfig, steps: int) -> int | str | list[float]:
    """Return where levels lie on a path of so many steps."""
    return min(SEGMENTS, steps) if config.branch is None else parse_branch(config.branch)


def parse_widening(text: str) -> str | tuple[float, float]:
    """Return the name of a preset, or (C, alpha).

    Raises:
        UsageError: something else.
    """
    presets = ("paper", "text", "small")
    if text in presets:
        return text
    try:
        constant, alpha = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"unknown widening '{text}'.{nearest(text, presets)} Known: {', '.join(presets)}, or C,alpha such as 2,0.8."
        ) from None
    if not (0 < constant < math.inf and 0 < alpha <= 1):
        raise UsageError(f"widening {text}: C·N^alpha needs C > 0 and alpha in (0, 1].")
    return constant, alpha


def all_prompts(source: SourceConfig, read: Sequence[str]) -> list[str]:
    """Return the prompts given as text, then those of the file.

    Raises:
        UsageError: none, or an empty one.
    """
    prompts = [*source.prompt, *read]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("no prompt is given, or an empty one; use --prompt TEXT (repeatable) or --prompts FILE.")
    return prompts
