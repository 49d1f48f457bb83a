"""One optimisation epoch (sample, reward, update): our DDPO against a plain loop in the style of TRL's former trainer.

Same network, text encoder, prompts, sampler steps, micro-batch, optimizer and number of samples; both train the
stochastic steps alone.  The plain loop (ours to write; TRL's DDPO trainer was removed in huggingface/trl pull 4068)
encodes the text of every sample, repeats its condition, and projects keys and values of it in every step; ours does
each once per prompt.  A third row is the plain loop one sample at a time, the default of TRL's configuration
(sample_batch_size = train_batch_size = 1).  Claims: at least 1.2 times the plain loop's samples per second, at no more
memory.  Interleaved runs in one process, CPU time (wall time on an accelerator), median, least and greatest of pairwise
ratios; peak memory of a fresh process each.  `--compile` runs the network of all loops through torch.compile.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.algorithms.online.task import PromptTask
from gencontrol.algorithms.path.base import clipped_surrogate
from gencontrol.algorithms.path.flow_grpo import Ddpo, DdpoConfig
from gencontrol.bench.base import Check, Loop, run_in_memory, table, verdicts, write_result
from gencontrol.bench.toys import toy_task
from gencontrol.config import Count, options
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling import cfg, sample
from gencontrol.sampling.state import gaussian_log_prob
from gencontrol.sampling.steps import Ddim
from gencontrol.types import RewardContext, RewardOut, index_cond

Arm = Literal["ours", "plain", "single"]
ARMS: tuple[Arm, ...] = ("ours", "plain", "single")
LABELS = {"ours": "ddpo", "plain": "plain loop, same micro-batch", "single": "plain loop, one sample at a time"}


@dataclass(frozen=True)
class Work:
    """What one epoch does: sizes of the bundled text-to-image layout, and of the round."""

    prompts: int = 8
    group: int = 8
    steps: int = 10
    micro_batch: int = 16
    guidance: float = 1.0
    dim: int = 128
    depth: int = 4
    size: int = 32
    patch: int = 4
    device: str = "cpu"
    compile: bool = False


class Brightness:
    """The cheapest item reward: mean of the sample."""

    name, differentiable = "brightness", False
    kind: Literal["item", "set"] = "item"

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """Score each sample."""
        return RewardOut(samples.flatten(1).mean(1), torch.ones(len(samples), dtype=torch.bool))


def make_task(work: Work) -> PromptTask:
    """Return an untrained model of the bundled text-to-image layout, with its text encoder, in fixed weights."""
    from gencontrol.models.conditions.text import encode_text, null_text
    from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
    from gencontrol.models.networks.transformer import Transformer
    from gencontrol.recipes.scenes.text import build_text_encoder, build_tokenizer

    cut = PatchConfig(channels=3, size=work.size, patch=work.patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = backbone_config(cut, classes=128, context=128, dim=work.dim, depth=work.depth, heads=4)
        network = PatchTransformer(cut, Transformer(shape)).to(work.device)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.05)
    if work.compile:
        network.compile()
    encoder, tokenizer = build_text_encoder(0).eval().to(work.device), build_tokenizer()
    colours = ("red", "green", "blue", "yellow")
    prompts = [f"a {colours[i % 4]} circle left of a {colours[i // 4 % 4]} square" for i in range(work.prompts)]
    task = toy_task(
        Denoiser(network, GaussianProcess(Linear()), "velocity"),
        3,
        prompts=prompts,
        encode=lambda texts: encode_text(encoder, tokenizer, texts),
    )
    return replace(
        task, latent_shape=(3, work.size, work.size), uncond=null_text(encode_text(encoder, tokenizer, [""]))
    )


def ours(work: Work) -> Callable[[], float]:
    """Return a function that runs one epoch of `Ddpo` and returns its mean reward."""
    task = make_task(work)
    config = DdpoConfig(
        prompts_per_round=work.prompts,
        generations=work.group,
        updates_per_round=1,
        demo_steps=work.steps,
        guidance_scale=work.guidance,
        ema_decay=0.0,
    )
    algorithm = Ddpo(task, Brightness(), config, roles=Roles(task.denoiser.network, ("policy", "ref")), seed=0)
    loop = Loop(1e-5, micro_batch=work.micro_batch)
    return lambda: run_in_memory(algorithm, 1, loop, seed=0)[0]["reward/mean"]


class Plain:
    """The plain loop: rows of samples, each with its own text, condition and noise."""

    def __init__(self, work: Work, micro_batch: int) -> None:
        """Build the same model, and an optimizer like ours."""
        self.work, self.size, self.task = work, micro_batch, make_task(work)
        self.optimizer = torch.optim.AdamW(self.task.denoiser.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.step = Ddim(eta=1.0)
        self.texts = [prompt for prompt in self.task.prompts for _ in range(work.group)]

    def _model(self) -> Any:
        scale = self.work.guidance
        return self.task.denoiser if scale == 1.0 else cfg(self.task.denoiser, scale, self.task.uncond)

    def epoch(self) -> float:
        """Sample, score and update once; returns the mean reward."""
        batches = [self._sampled(self.texts[i : i + self.size], i) for i in range(0, len(self.texts), self.size)]
        states = torch.cat([batch[0] for batch in batches], 1)
        log_probs = torch.cat([batch[1] for batch in batches], 1)
        keys = batches[0][2].keys()
        cond = {key: torch.cat([batch[2][key] for batch in batches]) for key in keys}
        rewards = torch.cat([batch[3] for batch in batches])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1)).to(states.device)
        self._update(states[:, order], log_probs[:, order], index_cond(cond, order), advantages[order])
        return float(rewards.mean())

    @torch.no_grad()
    def _sampled(self, texts: Sequence[str], first: int) -> tuple[Tensor, Tensor, Any, Float[Tensor, " b"]]:
        """Return states, log-probabilities, conditions and rewards of one batch."""
        cond = self.task.encode(texts)
        path = sample(
            self._model(),
            (len(texts), *self.task.latent_shape),
            steps=self.work.steps,
            step=self.step,
            generator=torch.Generator().manual_seed(first),
            cond=cond,
            keep_path=True,
        )
        values = Brightness()(self.task.decode(path.x), RewardContext(prompts=list(texts))).values
        assert path.log_probs is not None
        return path.states, path.log_probs, cond, values

    def _update(self, states: Tensor, log_probs: Tensor, cond: Any, advantages: Float[Tensor, " n"]) -> None:
        """One optimizer step over all samples and stochastic steps, a micro-batch and a step at a time."""
        times, axes, model = (
            [1 - k / self.work.steps for k in range(self.work.steps + 1)],
            states[0, 0].numel(),
            self._model(),
        )
        count = len(advantages) * (self.work.steps - 1)
        for start in range(0, len(advantages), self.size):
            rows = slice(start, start + self.size)
            for k in range(self.work.steps - 1):
                mean, std = self.step.moments(model, states[k, rows], times[k], times[k + 1], index_cond(cond, rows))
                change = (gaussian_log_prob(states[k + 1, rows], mean, std) - log_probs[k, rows]) / axes
                (clipped_surrogate(change, advantages[rows], 1e-4)[0].sum() / count).backward()
        nn.utils.clip_grad_norm_(self.task.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make(arm: Arm, work: Work) -> Callable[[], float]:
    """Return the epoch of an arm."""
    return ours(work) if arm == "ours" else Plain(work, work.micro_batch if arm == "plain" else 1).epoch


def seconds(call: Callable[[], float], device: str) -> float:
    """CPU time of this process during one call, or wall time on an accelerator."""
    if device == "cpu":
        begun = time.process_time()
        call()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_bytes(arm: Arm, work: Work) -> int:
    """Memory that two epochs of an arm add to this process: run it in a fresh one."""
    run = make(arm, work)
    if work.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        run(), run()
        return int(torch.cuda.max_memory_allocated())
    before = _high_water()
    run(), run()
    return _high_water() - before


def _high_water() -> int:
    """Largest resident memory of this process so far, bytes (getrusage would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def _peak_of(arm: Arm, work: Work) -> int:
    """`peak_bytes` in a process of its own."""
    words = [f"bench.{name}={json.dumps(value)}" for name, value in vars(work).items()]
    command = [sys.executable, "-m", "gencontrol", "bench", "epoch", *words, "--peak", arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(work: Work, runs: int) -> dict[str, Any]:
    """Return samples/s and peak memory of all arms, and median and range of pairwise ratios to ours."""
    calls = {arm: make(arm, work) for arm in ARMS}
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(runs):
        for arm, call in calls.items():
            taken[arm].append(seconds(call, work.device))
    count = work.prompts * work.group
    result: dict[str, Any] = {}
    for arm in ARMS:
        ratios = [theirs / own for theirs, own in zip(taken[arm], taken["ours"], strict=True)]
        result[arm] = {
            "samples_per_second": count / statistics.median(taken[arm]),
            "ours_is_faster_by": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
            "peak_mib": _peak_of(arm, work) / 2**20,
        }
    return result


@options
class Options(Work):
    """Options of the benchmark.

    Args:
        prompts, group: prompts of the epoch, and samples of each.
        steps: sampler steps.
        micro_batch: rows of one pass.
        guidance: guidance scale.
        dim, depth, size, patch: of the network.
        device: where it runs.
        compile: run the network through torch.compile.
        runs: measured pairs.
        output: folder of epoch.json.
        peak: print the peak memory of this arm alone; not meant to be set.
    """

    runs: Count = 3
    output: str = "runs/bench"
    peak: Literal["ours", "plain", "single", ""] = ""


def main(options: Options) -> int:
    """Measure, print the table and the claims, write epoch.json; returns 0 when all claims hold, else 1."""
    work = Work(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Work)})
    runs, peak = options.runs, options.peak
    torch.set_num_threads(1)
    if peak:
        print(peak_bytes(peak, work))
        return 0
    begun = time.perf_counter()
    result = measure(work, runs)
    rows: list[list[Any]] = [[LABELS[arm], *result[arm].values()] for arm in ARMS]
    print(table("One epoch of DDPO", ["loop", "samples/s", "ours is faster by", "least", "greatest", "peak MiB"], rows))
    ratio, mine, theirs = result["plain"]["ours_is_faster_by"], result["ours"]["peak_mib"], result["plain"]["peak_mib"]
    spread = f"{result['plain']['least']:.3f} to {result['plain']['greatest']:.3f} in {runs} pairs"
    checks = [
        Check("ours ≥ 1.2 × the plain loop's samples/s, same micro-batch", f"{ratio:.3f} ({spread})", ratio >= 1.2),
        Check(
            "peak memory not more than the plain loop's", f"{mine:.0f} against {theirs:.0f} MiB", mine <= theirs * 1.02
        ),
    ]
    print(verdicts(checks))
    write_result(
        Path(options.output), "epoch", {"work": vars(work), **result, "checks": checks}, time.perf_counter() - begun
    )
    return 0 if all(check.holds for check in checks) else 1
