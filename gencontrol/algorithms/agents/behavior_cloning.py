"""Behaviour cloning of chunked policies: denoising regression on windows of demonstrations.

The loss is that of Diffusion Policy (Chi et al. 2023, eq. 5) and of flow matching (Lipman et al. 2023): the network's
own output against its target at a random time, averaged over the chunk; times are uniform in (0, 1], continuous and
stratified over the batch (ours: a policy trained so may be asked at any noise level, which composition needs).  The
moving average of the weights is what is evaluated and saved.  Every draw of window p of the run is a function of
(seed, p), so micro-batches, ranks and resumes change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.algorithms.pretraining import AveragedPretraining
from gencontrol.config import options
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rng import Keyed, row_keys, stream


class Chunks(Protocol):
    """Some windows: observations key → [b n_obs ...], normalised actions [b h A], and where these repeat an end."""

    @property
    def observations(self) -> Mapping[str, Tensor]: ...
    @property
    def actions(self) -> Tensor: ...
    @property
    def pad(self) -> Tensor: ...


class ChunkData(Protocol):
    """Windows of demonstrations; `gencontrol.robotics.datasets.windows.Windows` with normalised actions is one."""

    def __len__(self) -> int: ...
    def batch(self, index: Int64[Tensor, " b"]) -> Chunks: ...


class TrainedPolicy(Protocol):
    """What cloning needs of a policy; those of `gencontrol.robotics.policies.diffusion` have it."""

    @property
    def networks(self) -> nn.ModuleDict: ...
    @property
    def denoiser(self) -> Denoiser: ...
    @property
    def encoder(self) -> nn.Module: ...

    def draw(self, cond: Tensor, noise: Keyed) -> Tensor:
        """Return normalised chunks [b h A] by its own sampler."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads."""
        ...


@options
class PolicyPretrainConfig:
    """Options of `PolicyPretrain`.

    Args:
        batch: windows of one optimizer step, over all ranks.
        ema: largest decay of the moving average of the weights, in [0, 1).
        mask_padding: leave actions past an episode's end out of the loss (they repeat its last action; Diffusion
            Policy keeps them, which teaches the robot to stay).
        eval_items: held-out windows of an evaluation, spread over all of them.
        eval_times: times per window of the evaluation's denoising loss.
    """

    batch: int = 256
    ema: float = 0.9999
    mask_padding: bool = False
    eval_items: int = 256
    eval_times: int = 4

    def __post_init__(self) -> None:
        if min(self.batch, self.eval_items, self.eval_times) < 1 or not 0.0 <= self.ema < 1.0:
            raise ValueError("batch, eval_items and eval_times of at least 1 and ema in [0, 1) are needed")


@dataclass(frozen=True)
class PolicyMicro:
    """One micro-batch: observations, normalised chunks, weights of their actions, times, noise, places of the crops."""

    observations: Mapping[str, Tensor]
    x0: Float[Tensor, "b h a"]
    weight: Float[Tensor, "b h"] | None
    t: Float[Tensor, " b"]
    noise: Float[Tensor, "b h a"]
    places: Float[Tensor, "b 2"] | None


class PolicyPretrain(AveragedPretraining):
    """Trains a policy on demonstrations; see the module docstring."""

    Config = PolicyPretrainConfig
    #: where the policy class is that this trains
    policy_class: ClassVar[str] = ""
    name, title, paper, medium, summary = "cloning", "behaviour cloning", "", "actions", ""

    def __init__(
        self,
        policy: TrainedPolicy,
        data: ChunkData,
        config: PolicyPretrainConfig,
        *,
        held_out: ChunkData | None = None,
        seed: int,
    ) -> None:
        """Set up the algorithm; its roles hold the policy's network and encoder.

        Args:
            policy: with fresh or earlier weights, on the device of the data.
            data: training windows.
            config: options.
            held_out: windows of episodes that are not trained on; None skips the evaluation.
            seed: of every draw.

        Raises:
            UsageError: no window, or a policy whose denoiser is not Gaussian.
        """
        if len(data) == 0 or (held_out is not None and len(held_out) == 0):
            raise UsageError("the training or held-out data has no window; give more episodes.")
        if not isinstance(policy.denoiser.process, GaussianProcess):
            raise UsageError("cloning needs a policy with a Gaussian denoiser, not a masked one.")
        super().__init__(Roles(policy.networks, ("policy", "ema")), config.ema)
        self.policy, self.data, self.held_out, self.config, self.seed = policy, data, held_out, config, seed
        self._process = policy.denoiser.process
        self._order: dict[int, Tensor] = {}

    # ---- data -------------------------------------------------------------------------------------------------------

    def collect(self, ctx: StepContext) -> Collected:
        """Positions of this rank's windows of the step's batch; one update."""
        first = ctx.step * self.config.batch
        positions = torch.arange(first + ctx.rank, first + self.config.batch, ctx.world_size)
        return Collected(positions, 1, {"data/epoch": first / len(self.data)})

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[PolicyMicro]:
        """Read the windows and draw time, noise and crop of each."""
        for positions in data.split(ctx.micro_batch):
            keys = row_keys(self.seed, "clone/item", positions)
            u = Keyed(keys, 1).uniform((len(keys), 3)).float()
            strata = (positions % self.config.batch + u[:, 0]) / self.config.batch
            yield self._micro(self.data.batch(self._items(positions)), 1.0 - strata, Keyed(keys), u[:, 1:])

    def _items(self, positions: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Window of each position of the run: a fresh permutation for each epoch."""
        count = len(self.data)
        epochs = torch.div(positions, count, rounding_mode="floor")
        items = torch.empty_like(positions)
        needed = epochs.unique().tolist()
        self._order = {epoch: order for epoch, order in self._order.items() if epoch >= min(needed)}
        for epoch in needed:
            if epoch not in self._order:
                self._order[epoch] = torch.randperm(count, generator=stream(self.seed, "clone/order", epoch))
            here = epochs == epoch
            items[here] = self._order[epoch][positions[here] - epoch * count]
        return items

    def _micro(self, chunks: Chunks, t: Tensor, noise: Keyed, places: Tensor | None) -> PolicyMicro:
        x0 = chunks.actions
        weight = None
        if self.config.mask_padding:
            kept = (~chunks.pad).to(x0.dtype)
            weight = kept / kept.mean(1, keepdim=True)  # the window's own step is never padding
        drawn = noise.normal(tuple(x0.shape), x0.device)
        places = None if places is None else places.to(x0.device)
        return PolicyMicro(chunks.observations, x0, weight, t.to(x0.device), drawn, places)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def errors(self, micro: PolicyMicro, cond: Tensor) -> Float[Tensor, " b"]:
        """Mean squared error of the network's own output over each chunk."""
        denoiser = self.policy.denoiser
        output = denoiser(self._process.corrupt(micro.x0, micro.t, micro.noise), micro.t, cond).raw
        squares = (output.float() - denoiser.target(micro.x0, micro.noise, micro.t)).square().mean(2)
        return (squares if micro.weight is None else squares * micro.weight).mean(1)

    def loss(self, micro: PolicyMicro, ctx: StepContext) -> LossOut:
        """Sum of the windows' errors."""
        with ctx.autocast():
            total = self.errors(micro, self.policy.encoder(micro.observations, micro.places)).sum()
        return LossOut(total, len(micro.x0), {"loss/denoising": total.detach()})

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Denoising loss and error of sampled actions on held-out windows, with the averaged weights.

        `eval/action_mse` is in normalised units, over the chunk without padding, one sample per window.
        """
        if self.held_out is None:
            return Evaluation({})
        count = min(self.config.eval_items, len(self.held_out))
        items = torch.arange(count) * len(self.held_out) // count
        losses, errors, weights = [], [], []
        with self.roles.use("ema"):
            for part in items.split(ctx.micro_batch):
                ctx.poll()
                chunks = self.held_out.batch(part)
                with ctx.autocast():
                    cond = self.policy.encoder(chunks.observations)
                    losses.append(self._losses(chunks, part, cond).cpu())
                    made = self.policy.draw(cond.float(), Keyed(row_keys(self.seed, "clone/sample", part)))
                kept = ~chunks.pad
                errors.append(((made - chunks.actions).square().mean(2) * kept).sum(1).cpu())
                weights.append(kept.sum(1).cpu())
        mse = float(torch.cat(errors).sum() / torch.cat(weights).sum())
        return Evaluation({"eval/loss": float(torch.cat(losses).mean()), "eval/action_mse": mse})

    def _losses(self, chunks: Chunks, items: Int64[Tensor, " b"], cond: Tensor) -> Float[Tensor, " b"]:
        """Denoising loss of held-out windows at fixed times, evenly spread, and fixed noise."""
        keys, times = row_keys(self.seed, "clone/eval", items), self.config.eval_times
        shift = Keyed(keys).uniform((len(items), 1))[:, 0].float()
        total = torch.zeros(len(items), device=cond.device)
        for k in range(times):
            micro = self._micro(chunks, (k + 1.0 - shift) / times, Keyed(keys, k + 1), None)
            total = total + self.errors(micro, cond)
        return total / times

    def save_final(self, folder: Path) -> None:
        """Write the policy with the averaged weights."""
        with self.roles.use("ema"):
            self.policy.save_pretrained(folder)


class DiffusionPolicyPretrain(PolicyPretrain):
    """Cloning of a `DiffusionPolicy`."""

    name, title, paper = "diffusion-policy", "Diffusion Policy (Chi et al. 2023)", "arXiv:2303.04137"
    summary = "Denoising regression on windows of demonstrations; actions come in chunks."

    policy_class = "gencontrol.robotics.policies.diffusion:DiffusionPolicy"


class FlowPolicyPretrain(PolicyPretrain):
    """Cloning of a `FlowPolicy`."""

    name, title, paper = "flow-policy", "flow-matching policy (Lipman et al. 2023)", "arXiv:2210.02747"
    summary = "Flow matching on windows of demonstrations; actions come in chunks."

    policy_class = "gencontrol.robotics.policies.diffusion:FlowPolicy"
