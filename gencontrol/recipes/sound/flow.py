"""Pretraining of a denoiser on latents with captions: diffusion or flow matching, any schedule and prediction type.

Regression of the network's own output on its target (Ho et al. 2020; Lipman et al. 2023; Liu et al. 2023), times drawn
uniformly or logit-normally (Esser et al. 2024, eq. 19) and stratified over the batch, conditions dropped at random for
classifier-free guidance (Ho & Salimans 2022), an exponential moving average of the weights that is what gets saved.
Every draw of item p of the run is a function of (seed, p): batch composition, micro-batches, ranks and resumes change
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.algorithms.pretraining import AveragedPretraining
from gencontrol.config import options
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rng import item_generators, stream
from gencontrol.types import Cond, cond_to


class LatentData(Protocol):
    """Latents with captions; `gencontrol.recipes.sound.latents.LatentDataset` is one."""

    @property
    def variants(self) -> int: ...
    def __len__(self) -> int: ...
    def read(self, items: Sequence[int], variants: Sequence[int]) -> tuple[Float[Tensor, "b *d"], Cond]: ...
    def text(self, item: int, variant: int = 0) -> str: ...


@options
class FlowPretrainConfig:
    """Options of `FlowPretrain`.

    Args:
        batch: items of one optimizer step, over all ranks.
        times: "uniform" or "logit-normal" times.
        times_mean, times_std: of the normal behind the logit-normal.
        drop: probability that an item's condition is replaced by the learned null, in [0, 1].
        ema: largest decay of the moving average, in [0, 1).
        eval_items: held-out items of the evaluation loss, each at `eval_times` stratified times.
        eval_samples: items that are sampled and decoded at an evaluation.
        eval_steps, eval_guidance: sampler steps and guidance scale of those.
    """

    batch: int = 64
    times: Literal["uniform", "logit-normal"] = "logit-normal"
    times_mean: float = 0.0
    times_std: float = 1.0
    drop: float = 0.1
    ema: float = 0.999
    eval_items: int = 128
    eval_times: int = 4
    eval_samples: int = 4
    eval_steps: int = 20
    eval_guidance: float = 3.0

    def __post_init__(self) -> None:
        if self.times not in ("uniform", "logit-normal"):
            raise ValueError(f"times '{self.times}' is neither 'uniform' nor 'logit-normal'")
        if min(self.batch, self.eval_items, self.eval_times, self.eval_steps) < 1 or self.eval_samples < 0:
            raise ValueError("batch, eval_items, eval_times, eval_steps ≥ 1 and eval_samples ≥ 0 are needed")
        if not (0.0 <= self.drop <= 1.0 and 0.0 <= self.ema < 1.0 and self.times_std > 0):
            raise ValueError("drop in [0, 1], ema in [0, 1) and times_std > 0 are needed")


@dataclass(frozen=True)
class FlowMicro:
    """One micro-batch: clean latents, condition (dropped samples marked), times and noise."""

    x0: Float[Tensor, "b *d"]
    cond: Cond
    t: Float[Tensor, " b"]
    noise: Float[Tensor, "b *d"]


def time_of_uniform(u: Float[Tensor, " b"], config: FlowPretrainConfig) -> Float[Tensor, " b"]:
    """Map uniform numbers in (0, 1) to times of the chosen law, by its quantile function."""
    if config.times == "uniform":
        return u
    return torch.sigmoid(config.times_mean + config.times_std * torch.special.ndtri(u))


class FlowPretrain(AveragedPretraining):
    """Trains a denoiser on (latent, caption) pairs; see the module docstring."""

    Config = FlowPretrainConfig
    summary = "Flow matching on latents of rendered sound with its captions."

    def __init__(
        self,
        denoiser: Denoiser,
        data: LatentData,
        config: FlowPretrainConfig,
        *,
        roles: Roles,
        seed: int,
        held_out: LatentData | None = None,
        artefacts: Callable[[str, Tensor], dict[str, bytes]] | None = None,
        save: Callable[[Path], None] | None = None,
    ) -> None:
        """Set up the algorithm.

        Args:
            denoiser: its network is `roles.module`.
            data: training items.
            config: options.
            roles: with "policy" and "ema".
            seed: of every draw.
            held_out: items of the evaluation; default: the first training items (then metrics say `train` data).
            artefacts: (file stem, one latent [*d]) → {file name: bytes}, to listen to or look at.
            save: (folder) writes a loadable model with the network's present weights; default: the network alone.

        Raises:
            UsageError: roles without "ema" or no data.
        """
        if not {"policy", "ema"} <= set(roles.names()):
            raise UsageError(f"flow pretraining needs the roles 'policy' and 'ema', not {tuple(roles.names())}.")
        if not isinstance(denoiser.process, GaussianProcess):
            raise UsageError("flow pretraining needs a denoiser with a GaussianProcess, not a masked one.")
        if len(data) == 0 or (held_out is not None and len(held_out) == 0):
            raise UsageError("the training or held-out data has no items.")
        super().__init__(roles, config.ema)
        self.denoiser, self.data, self.config, self.seed = denoiser, data, config, seed
        self.held_out = data if held_out is None else held_out
        self.artefacts, self.save = artefacts, save
        self._order: tuple[int, Tensor] | None = None

    def _item(self, position: int) -> int:
        """Data index of the run's item number `position`: a fresh permutation for each epoch."""
        epoch, place = divmod(position, len(self.data))
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.data), generator=stream(self.seed, "pretrain/order", epoch))
            self._order = (epoch, order)
        return int(self._order[1][place])

    def collect(self, ctx: StepContext) -> Collected:
        """Positions of this rank's items of the step's batch; one update."""
        first = ctx.step * self.config.batch
        positions = torch.arange(first + ctx.rank, first + self.config.batch, ctx.world_size)
        return Collected(positions, 1, {"data/epoch": first / len(self.data)})

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[FlowMicro]:
        """Read the items and draw wording, drop, time and noise of each."""
        for start in range(0, len(data), ctx.micro_batch):
            yield self._draw(data[start : start + ctx.micro_batch].tolist())

    def _draw(self, positions: Sequence[int]) -> FlowMicro:
        generators = item_generators(self.seed, "pretrain/item", positions)
        draws = torch.stack([torch.rand(3, generator=g) for g in generators])
        variants = (draws[:, 0] * self.data.variants).long().tolist()
        x0, cond = self.data.read([self._item(p) for p in positions], variants)
        strata = torch.tensor([p % self.config.batch for p in positions])
        u = ((strata + draws[:, 2]) / self.config.batch).clamp(1e-5, 1 - 1e-5)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
        return self._on_device(x0, _drop(cond, draws[:, 1] < self.config.drop), time_of_uniform(u, self.config), noise)

    def _on_device(self, x0: Tensor, cond: Cond, t: Tensor, noise: Tensor) -> FlowMicro:
        device = next(self.roles.module.parameters()).device
        return FlowMicro(x0.to(device), cond_to(cond, device), t.to(device), noise.to(device))

    def errors(self, micro: FlowMicro) -> Float[Tensor, " b"]:
        """Mean squared error of the network's own output for each item: E‖F(x_t, t) − r·(x0, eps)‖² / dim."""
        process = self.denoiser.process
        assert isinstance(process, GaussianProcess)  # checked at construction
        xt = process.corrupt(micro.x0, micro.t, micro.noise)
        target = self.denoiser.target(micro.x0, micro.noise, micro.t)
        output = self.denoiser(xt, micro.t, micro.cond).raw
        return (output.float() - target).square().flatten(1).mean(1)

    def loss(self, micro: FlowMicro, ctx: StepContext) -> LossOut:
        """Sum of the items' errors."""
        with ctx.autocast():
            total = self.errors(micro).sum()
        return LossOut(total, len(micro.x0), {"loss/flow": total.detach()})

    @torch.no_grad()
    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Held-out loss of the average weights at fixed times and noise (by thirds of t), and a few decoded samples."""
        with self.roles.use("ema") as module:
            training = module.training
            module.eval()
            try:
                metrics = self._held_out_loss(ctx)
                artefacts = self._samples(ctx) if self.artefacts is not None and self.config.eval_samples else {}
            finally:
                module.train(training)
        return Evaluation(metrics, artefacts)

    def _held_out_loss(self, ctx: StepContext) -> dict[str, float]:
        repeats, items = self.config.eval_times, min(self.config.eval_items, len(self.held_out))
        pairs = [(item, k) for item in range(items) for k in range(repeats)]
        errors, times = [], []
        for start in range(0, len(pairs), ctx.micro_batch):
            ctx.poll()
            part = pairs[start : start + ctx.micro_batch]
            x0, cond = self.held_out.read([i for i, _ in part], [0] * len(part))
            # times fill (0, 1) evenly over all pairs: stratum k, shifted by the item
            t = torch.tensor([(k + (i + 0.5) / items) / repeats for i, k in part])
            generators = item_generators(self.seed, "pretrain/eval", [i * repeats + k for i, k in part])
            noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
            with ctx.autocast():
                errors.append(self.errors(self._on_device(x0, cond, t, noise)).cpu())
            times.append(t)
        error, time = torch.cat(errors), torch.cat(times)
        metrics = {"eval/loss": float(error.mean())}
        for name, low, high in (("low", 0.0, 1 / 3), ("mid", 1 / 3, 2 / 3), ("high", 2 / 3, 1.0)):
            inside = (time >= low) & (time < high)
            if bool(inside.any()):
                metrics[f"eval/loss_t_{name}"] = float(error[inside].mean())
        return metrics

    def _samples(self, ctx: StepContext) -> dict[str, bytes]:
        """Guided samples of fixed captions from fixed noise, decoded, with their captions."""
        from gencontrol.sampling import sample
        from gencontrol.sampling.guidance import cfg

        assert self.artefacts is not None
        count = min(self.config.eval_samples, len(self.held_out))
        x0, cond = self.held_out.read(range(count), [0] * count)
        micro = self._on_device(x0, cond, torch.zeros(count), x0)
        null = _drop(micro.cond, torch.ones(count, dtype=torch.bool, device=micro.x0.device))
        model = self.denoiser if micro.cond is None else cfg(self.denoiser, self.config.eval_guidance, null)
        latents = sample(
            model,
            tuple(x0.shape),
            steps=self.config.eval_steps,
            generator=item_generators(self.seed, "pretrain/samples", range(count)),
            cond=micro.cond,
            callback=lambda index, t, x: ctx.poll(),
        )
        files: dict[str, bytes] = {}
        for index in range(count):
            files |= self.artefacts(f"sample_{index:02d}", latents[index])
        files["captions.txt"] = "".join(f"{i:02d} {self.held_out.text(i)}\n" for i in range(count)).encode()
        return files

    def save_final(self, folder: Path) -> None:
        """Write the model with the average weights, loadable by `from_pretrained`."""
        with self.roles.use("ema") as module:
            if self.save is not None:
                self.save(folder)
                return
            save_pretrained: Any = module.save_pretrained
            save_pretrained(folder)


def _drop(cond: Cond, drop: Tensor) -> Cond:
    """Mark samples whose condition is replaced by the learned null; no condition stays none."""
    return None if cond is None else {**cond, "drop": drop.to(next(iter(cond.values())).device)}
