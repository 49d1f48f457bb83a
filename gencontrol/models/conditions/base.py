"""A new condition y on a pretrained denoiser, with no effect until it is trained (CTRL, arXiv 2406.12120, step 2).

Two places to enter, both on a frozen backbone (LoRA beside it is optional):

- inject "time": zero-initialised vectors added to the backbone's time (or pooled) embedding, one per value, summed over
  attributes (CODE; additive rows instead of one row per combination: docs/methods/ctrl.md#p11).
- inject "residual": a small network u beside it.  With a time grid the mean of the step t → t' moves by exactly
  std²·u, so that the path KL is Σ std²·|u|²/2 (P3; DERIVED: Δx0 = (s'²/a')·u for the posterior step).

Labels travel in the condition mapping under the condition's name, next to the backbone's own entries.  Without them,
or where a label is null, the backbone runs as it was, LoRA off: bit-exactly the base.  There is no null row that could
drift (P10).  On the last step of a grid, which is deterministic, labels are off: no KL could price them there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.models.conditions.control import control_net
from gencontrol.models.conditions.labels import ConditionConfig, Labels
from gencontrol.models.denoiser import Denoiser
from gencontrol.process.convert import convert, rows
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.process.schedule import column
from gencontrol.rng import stream_seed
from gencontrol.types import Cond, Prediction, index_cond

#: class of a backbone → (module whose output is the time embedding, layer in it whose width that is)
_TIME = {
    "Transformer": ("time", "time.2"),
    "UNet2DModel": ("time_embedding", "time_embedding.linear_2"),
    "UNet2DConditionModel": ("time_embedding", "time_embedding.linear_2"),
    "AudioLDM2UNet2DConditionModel": ("time_embedding", "time_embedding.linear_2"),
    "SD3Transformer2DModel": ("time_text_embed", "time_text_embed.timestep_embedder.linear_2"),
    "FluxTransformer2DModel": ("time_text_embed", "time_text_embed.timestep_embedder.linear_2"),
    "PixArtTransformer2DModel": ("adaln_single.emb", "adaln_single.emb.timestep_embedder.linear_2"),
    "StableAudioDiTModel": ("timestep_proj", "timestep_proj.2"),
}


def time_module(network: nn.Module) -> tuple[nn.Module, int]:
    """Return the module whose output is the backbone's time embedding, and its width.

    Raises:
        UsageError: no class in the network is known.
    """
    for module in network.modules():
        found = _TIME.get(type(module).__name__)
        if found is not None:
            layer: Any = module.get_submodule(found[1])
            return module.get_submodule(found[0]), int(layer.out_features)
    raise UsageError(
        f"{type(network).__name__} has no time embedding that a condition could join; use inject='residual'. "
        f"Known backbones: {', '.join(_TIME)}."
    )


class Conditioned(nn.Module):
    """A backbone with a new condition; called as the network of a Denoiser."""

    def __init__(self, network: nn.Module, config: ConditionConfig, like: Denoiser, shape: Sequence[int]) -> None:
        """Wrap a backbone and freeze it; see `add_condition`."""
        super().__init__()
        if not isinstance(like.process, GaussianProcess) or like.prediction is None:
            raise UsageError("a new condition needs a Gaussian model; masked tokens have no mean that it could move.")
        self.network, self.config = network.requires_grad_(False), config
        self.labels = Labels(config)
        self.process, self.prediction, self.sigma_data = like.process, like.prediction, like.sigma_data
        self.grid: tuple[float, ...] | None = None
        #: size of the push of every step of the grid but the last; None is 1
        self.scale: tuple[float, ...] | None = None
        self.control: nn.Module | None = None
        #: a residual control leaves the backbone's own output of its last call here, with its graph
        self.base_output: Tensor | None = None
        self.detach_backbone = False
        self._offset: Tensor | None = None
        #: `push` leaves its estimate of x0 here for its call of `forward`
        self._estimate: Tensor | None = None
        if config.inject == "time":
            module, width = time_module(network)
            self.embed = self.labels.embedding(width, zero=True)
            self._hook = module.register_forward_hook(self._join)
        else:
            self.embed = self.labels.embedding(config.embed, zero=False)
            self.control = control_net(shape, config.embed, config.width, config.depth, half=config.half)

    def _join(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Forward hook: add the labels' vector to the time embedding of this call."""
        if self._offset is None:
            return output
        offset = self._offset.to(output.dtype)
        return output + (offset if output.ndim == 2 else offset.reshape(len(offset), *[1] * (output.ndim - 2), -1))

    def unhook(self) -> None:
        """Take the hook of inject "time" out of the backbone, which is then as it was."""
        if self.control is None:
            self._hook.remove()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The condition's parameters by name: all but the backbone's."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("network.")}

    def set_grid(self, grid: Sequence[float] | None, scale: Sequence[float] | None = None) -> None:
        """Declare the time grid of the sampler: it fixes the unit of a residual control, and labels are off on its
        last step, which is deterministic; None forgets it.

        Args:
            scale: factors of a residual control's output, one for each step but the last; None is 1.

        Raises:
            UsageError: fewer than two steps, times that do not decrease, or another number of factors.
        """
        if grid is not None and (len(grid) < 3 or any(b >= a for a, b in zip(grid, grid[1:]))):
            raise UsageError(f"a control needs a decreasing grid of at least two steps, not {list(grid)[:5]}…")
        if scale is not None and (grid is None or len(scale) != len(grid) - 2):
            raise UsageError(f"{len(scale)} factors of a control do not fit a grid of {len(grid or ())} times.")
        self.grid = None if grid is None else tuple(float(t) for t in grid)
        self.scale = None if scale is None else tuple(float(value) for value in scale)

    def split(self, cond: Cond) -> tuple[Tensor | None, Tensor | None, Cond]:
        """Return (labels, strength [b] or None, the backbone's own condition)."""
        name = self.config.name
        if not isinstance(cond, Mapping) or name not in cond:
            return None, None, cond
        own: dict[str, Any] = {key: value for key, value in cond.items() if key not in (name, f"{name}_scale")}
        rest: Cond = own["base"] if own.keys() == {"base"} else own or None
        return cond[name], cond.get(f"{name}_scale"), rest

    def forward(self, x: Float[Tensor, "b *d"], t: Float[Tensor, " b"], cond: Cond = None) -> Float[Tensor, "b *d"]:
        """Return the backbone's output at x and t [b], moved by the labels that the condition names."""
        labels, strength, rest = self.split(cond)
        if self._estimate is not None and labels is not None:
            return self._push(x, self._estimate, t, self.labels.vectors(self.embed, labels))
        given = None if labels is None else self._given(labels, t)
        if labels is None or given is None or not bool(given.any()):
            self.base_output = None
            with self._plain():
                return self.network(x, t, rest)
        if not bool(given.all()) and _lora_layers(self.network):
            return self._mixed(x, t, labels, strength, rest, given)
        vectors = self.labels.vectors(self.embed, labels) * given[:, None]
        if self.control is None:
            return self._timed(x, t, rest, vectors if strength is None else vectors * strength[:, None])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_backbone):
            raw = self.network(x, t, rest)
        self.base_output = None if _lora_layers(self.network) else raw
        moved = raw + self._residual(x, t, raw, vectors, strength).to(raw.dtype)
        return torch.where(given.reshape(-1, *[1] * (raw.ndim - 1)), moved, raw)

    def acts(self, labels: Tensor, t: Float[Tensor, " b"]) -> bool:
        """Whether any row has a label that acts at its time."""
        return bool(self._given(labels, t).any())

    def _given(self, labels: Tensor, t: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which rows have a label that acts at their time."""
        given = self.labels.given(labels)
        return given if self.grid is None else given & (t > self.grid[-2] + 1e-6)

    def _mixed(
        self, x: Tensor, t: Tensor, labels: Tensor, strength: Tensor | None, rest: Cond, given: Bool[Tensor, " b"]
    ) -> Float[Tensor, "b *d"]:
        """Rows without a label must not see LoRA: two calls."""
        parts = []
        for rows_of in (given.nonzero()[:, 0], (~given).nonzero()[:, 0]):
            own = index_cond(rest, rows_of)
            cond = {self.config.name: labels[rows_of], **({"base": own} if not isinstance(own, Mapping) else own)}
            if strength is not None:
                cond[f"{self.config.name}_scale"] = strength[rows_of]
            parts.append((rows_of, self(x[rows_of], t[rows_of], cond)))
        out = torch.zeros_like(x, dtype=parts[0][1].dtype)
        for rows_of, value in parts:
            out = out.index_copy(0, rows_of, value)
        self.base_output = None
        return out

    def _timed(self, x: Tensor, t: Tensor, rest: Cond, vectors: Tensor) -> Tensor:
        self._offset = vectors
        try:
            return self.network(x, t, rest)
        finally:
            self._offset = None

    def _residual(
        self, x: Tensor, t: Tensor, raw: Tensor, vectors: Tensor, strength: Tensor | None
    ) -> Float[Tensor, "b *d"]:
        """The move of the output that moves x0 by unit·u, at least in float32."""
        assert self.control is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        noisy, coeffs = x.to(wide), self.process.at(t, x.to(wide))
        if self.prediction == Prediction.EDM:
            noisy = noisy * (coeffs.s * coeffs.s + coeffs.a * coeffs.a * self.sigma_data**2) ** 0.5
        x0 = convert(raw.to(wide), noisy, coeffs, self.prediction, Prediction.X0, self.sigma_data)
        push = self._push(noisy, x0, t, vectors)
        if strength is not None:
            push = push * column(strength, push)
        row = rows(self.prediction, coeffs, self.sigma_data)
        # x_t stays, so eps moves by -(a/s) times the move of x0
        return (row[0] - row[1] * coeffs.a / coeffs.s) * column(self.unit(t), push) * push

    def _push(self, x: Tensor, x0: Tensor, t: Tensor, vectors: Tensor) -> Tensor:
        assert self.control is not None
        own = next(self.control.parameters()).dtype
        push = self.control(x.to(own), x0.to(own), t, vectors.to(own)).to(x.dtype)
        if self.scale is None or self.grid is None:
            return push
        factors = torch.tensor((*self.scale, 0.0), dtype=push.dtype, device=push.device)
        return push * column(factors[self._step(t)], push)

    def push(
        self, x: Float[Tensor, "b *d"], x0: Float[Tensor, "b *d"], t: Float[Tensor, " b"], labels: Tensor
    ) -> Float[Tensor, "b *d"]:
        """Return a residual control's push at states and the backbone's estimates of x0, without the backbone."""
        self._estimate = x0
        try:  # by way of `forward`, so that the hooks of sharded weights run
            found: Tensor = self(x, t, {self.config.name: labels})
            return found
        finally:
            self._estimate = None

    def _step(self, t: Float[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Number of the grid's step at each time."""
        grid = torch.tensor(self.grid, dtype=torch.float32, device=t.device)
        return torch.searchsorted(-grid, -t.float() - 1e-6).clamp(max=len(grid) - 2)  # grid[place] <= t + 1e-6

    def unit(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Move of x0 per unit of u: s'²/a' where the step lands; without a grid s²/sqrt(a² + s²), where it starts."""
        if self.grid is None:
            here = self.process.schedule.coeffs(t.float())
            return here.s * here.s / here.scale2.sqrt()
        landing = torch.tensor(self.grid, dtype=torch.float32, device=t.device)[self._step(t) + 1]
        there = self.process.schedule.coeffs(landing)
        return torch.where(landing == 0, torch.zeros_like(landing), there.s * there.s / there.a)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The backbone alone, with LoRA layers off; requires_grad of their weights stays as it is."""
        layers = [layer for layer in _lora_layers(self.network) if not layer.disable_adapters]
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also take the gradients away
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False


def _lora_layers(network: nn.Module) -> list[Any]:
    """LoRA layers that `Roles` has put into the backbone, by the class name of peft's base."""
    return [m for m in network.modules() if any(kind.__name__ == "LoraLayer" for kind in type(m).__mro__)]


def add_condition(
    denoiser: Denoiser,
    *,
    shape: Sequence[int],
    name: str = "y",
    kind: Literal["categorical", "vector", "multi"] = "categorical",
    cardinality: int | Sequence[str] | Mapping[str, int | Sequence[str]] = 2,
    inject: Literal["time", "residual"] = "residual",
    embed: int = 16,
    width: int = 64,
    depth: int = 2,
    half: bool = False,
    seed: int = 0,
) -> Denoiser:
    """Return the denoiser with a new condition that has no effect yet; its network is `Conditioned`.

    The backbone is shared with the given denoiser, and frozen.  Trainable is only what is new; give `Roles` a LoRA
    and whole=("embed", "control") to train adapters of the backbone too.

    Args:
        shape: of one sample, without the batch axis.
        name: key of the labels in the condition mapping.
        kind: "categorical" takes one of `cardinality` values, "vector" that many numbers, "multi" one value for each
            attribute of a mapping {attribute: values}, each of which may be absent (additive embeddings).
        cardinality: numbers of values, or their names.
        inject: see the module docstring.
        embed, width, depth: sizes of a residual control: of its label embedding and its layers.
        half: let a residual control of images work at half their resolution.
        seed: of the control's initial draw.

    Raises:
        UsageError: labels that do not fit the kind, a name that is taken, or a backbone that "time" does not know.
    """
    config = ConditionConfig.of(
        name, kind, cardinality, inject=inject, embed=embed, width=width, depth=depth, shape=tuple(shape), half=half
    )
    return _wrap(denoiser, config, seed)


def _wrap(denoiser: Denoiser, config: ConditionConfig, seed: int = 0) -> Denoiser:
    inner: Any = denoiser.network
    while isinstance(inner, Conditioned):
        if inner.config.name == config.name:
            raise UsageError(f"the model has a condition '{config.name}' already; choose another name.")
        inner = inner.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "condition", config.name))
        network = Conditioned(denoiser.network, config, denoiser, config.shape)
    place = next(denoiser.network.parameters(), None)
    if place is not None:
        for parameter in network.own_parameters().values():
            parameter.data = parameter.data.to(place.device)
        if network.control is not None:
            network.control.to(place.device)
    assert denoiser.prediction is not None
    return Denoiser(network, denoiser.process, denoiser.prediction, denoiser.sigma_data)


def conditioned(denoiser: Denoiser) -> Conditioned:
    """Return the network of a denoiser that `add_condition` made.

    Raises:
        UsageError: it was not made so.
    """
    network: Any = denoiser.network
    network = network._modules.get("_orig_mod", network)  # inside torch.compile's wrapper
    if not isinstance(network, Conditioned):
        raise UsageError(f"{type(network).__name__} has no new condition; call add_condition(denoiser, …) first.")
    return network


def with_labels(cond: Cond, labels: Tensor, *, name: str = "y", scale: float | Tensor | None = None) -> Cond:
    """Return a condition with labels beside the backbone's own entries.

    Args:
        cond: the backbone's condition, batch b, or None.
        labels: [b …] as `Labels.encode` gives them.
        scale: strength of the control, 1 by default, 0 is the base; a number or [b].
    """
    own = cond if isinstance(cond, Mapping) else {} if cond is None else {"base": cond}
    joined = {**own, name: labels}
    if scale is not None:
        joined[f"{name}_scale"] = torch.as_tensor(scale, dtype=torch.float32, device=labels.device).expand(len(labels))
    return joined


def save_condition(network: Conditioned, folder: str | Path) -> None:
    """Write condition.json and condition.safetensors: what is new, without the backbone (and without LoRA)."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = {**asdict(network.config), "grid": network.grid, "scale": network.scale}
    (folder / "condition.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    weights = {name: p.detach().cpu().contiguous() for name, p in network.own_parameters().items()}
    save_file(weights, str(folder / "condition.safetensors"), metadata={"format": "pt"})


def load_condition(denoiser: Denoiser, folder: str | Path) -> Denoiser:
    """Return the denoiser with a condition that `save_condition` wrote.

    Raises:
        UsageError: no such files, or made for another backbone.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        table = json.loads((folder / "condition.json").read_text(encoding="utf-8"))
        weights = load_file(str(folder / "condition.safetensors"))
        grid, scale = table.pop("grid"), table.pop("scale", None)
        table["attributes"] = tuple((name, tuple(values)) for name, values in table["attributes"])
        config = ConditionConfig(**{**table, "shape": tuple(table["shape"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"'{folder}' holds no condition (condition.json, condition.safetensors): {reason}") from error
    added = _wrap(denoiser, config)
    network = conditioned(added)
    network.set_grid(grid, scale)
    own = network.own_parameters()
    if {k: tuple(v.shape) for k, v in own.items()} != {k: tuple(v.shape) for k, v in weights.items()}:
        raise UsageError(f"the condition in '{folder}' was made for another backbone; load the one it was trained on.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return added
