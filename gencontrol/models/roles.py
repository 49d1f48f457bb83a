"""Roles: named parameter sets of a network (policy, ref, ema, target, …), as LoRA adapter slots or as copies.

`policy` is what the optimizer moves.  Without LoRA the other roles are copies of the trainable parameters; with LoRA
(Hu et al. 2021, by peft) every role but `ref` is an adapter slot and `ref` is the base model with adapters off, so that
no second copy of a large model is held.  Parameters that are frozen, and buffers, are shared by all roles.

Several networks (actor, critic, value) are parts of one Roles, and a role may hold some of the parts only:

    roles = Roles({"actor": actor, "critic": critic}, ("policy", "target"), only={"target": ["critic"]})
    with torch.no_grad(), roles.use("target") as networks:
        q = networks["critic"](observation, action)   # the target critic; the actor is the policy's
    roles.lerp("target", 0.995)                       # Polyak average of what the target holds
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.errors import CheckpointError, EnvironmentMissing, UsageError, nearest

#: File name that diffusers' `load_lora_weights` looks for.
LORA_FILE = "pytorch_lora_weights.safetensors"

_ATTENTION_LAYERS = frozenset(
    (
        "to_q to_k to_v to_kv to_qkv to_out to_add_out add_q_proj add_k_proj add_v_proj q_proj k_proj v_proj out_proj"
    ).split()
)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters.

    Args:
        rank: inner dimension.
        alpha: scale; the update is alpha/rank · B·A.  None means `rank` (scale 1).
        targets: names (or name endings) of the linear layers; None means all projections of attention layers.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError(f"lora rank {self.rank} and alpha {self.alpha} must be positive")

    @property
    def scale_alpha(self) -> float:
        """alpha, or the rank where it is not given."""
        return float(self.rank) if self.alpha is None else self.alpha


def lora_targets(module: nn.Module, endings: Sequence[str] | None = None) -> list[str]:
    """Return the full names of the linear layers to adapt, by endings, or all attention projections.

    Raises:
        UsageError: no linear layer fits.
    """
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if endings is None:
        chosen = [n for n in names if n.removesuffix(".0").rpartition(".")[2] in _ATTENTION_LAYERS]
    else:
        chosen = [n for n in names if any(n == e or n.endswith("." + e) for e in endings)]
    if not chosen:
        raise UsageError(f"no linear layer of {type(module).__name__} fits lora targets {endings}; e.g. {names[:5]}.")
    return chosen


#: exchanges the weights of the policy (first) and of another role in place
Swap = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]


def ema_decay(decay: float, update: int) -> float:
    """Decay with warm-up: min(decay, (1 + n)/(10 + n)) after n updates, so that early averages forget the start."""
    return min(decay, (1.0 + update) / (10.0 + update))


class Roles:
    """Named parameter sets of a module; `use(role)` switches them, the module's own state is the policy."""

    def __init__(
        self,
        module: nn.Module | Mapping[str, nn.Module],
        roles: Sequence[str] = ("policy", "ref", "ema"),
        lora: LoraConfig | None = None,
        seed: int = 0,
        whole: Sequence[str] = (),
        only: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Prepare the roles, all equal to the module's present weights.

        Args:
            module: the network, or several by name (`self.module` is then a ModuleDict of them); parameters that
                require gradients are trained (with LoRA: only adapters).
            roles: names; must hold "policy".
            lora: adapters instead of full tuning.
            seed: of the adapters' initial draw (it does not touch the global generator).
            whole: with LoRA, beginnings of the names of parameters that are trained as they are beside the adapters
                (a new condition); "ref" keeps their present values.
            only: role → names (or beginnings of names, up to a dot) of the parts that it holds copies of; its other
                parts, adapters too, are the policy's.  A role that is not listed holds everything that is trained.

        Raises:
            UsageError: "policy" is missing or restricted, a name twice, nothing to train, an unknown part, or trainable
                weights not in fp32.
        """
        if "policy" not in roles or len(set(roles)) != len(roles):
            raise UsageError(f"roles {tuple(roles)}: each name once, and 'policy' among them.")
        if not isinstance(module, nn.Module):
            module = nn.ModuleDict(module)
        self.module, self.lora, self._names, self._only = module, lora, tuple(roles), dict(only or {})
        if "policy" in self._only or not self._only.keys() <= set(roles):
            raise UsageError(f"only {sorted(self._only)}: roles other than 'policy', among {tuple(roles)}.")
        self._active = "policy"
        self._swap: Swap = _exchange
        if lora is None:
            self._sets = self._chosen(_copies(module, self._names))
            self._swapped = self._sets
        else:
            slots = [name for name in self._names if name != "ref" and name not in self._only]
            self._sets = {name: {} for name in self._names} | _inject(module, slots, lora, seed)
            self._layers = _lora_layers(module)
            self._swapped = self._chosen(_beside(module, self._names, whole))
            for role, weights in self._swapped.items():
                self._sets[role] |= weights
            self._switch("policy")

    def _chosen(self, sets: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Leave in each role what it is to hold."""
        for role, parts in self._only.items():
            for part in parts:
                if not any(_in_part(name, part) for name in sets["policy"]):
                    raise UsageError(f"role '{role}': no trained parameter lies in the part '{part}'.")
            sets[role] = {n: t for n, t in sets[role].items() if any(_in_part(n, part) for part in parts)}
        return sets

    def names(self) -> Sequence[str]:
        """Names of the roles."""
        return self._names

    @property
    def active(self) -> str:
        """The role whose weights the module has now."""
        return self._active

    def trainable(self, part: str = "") -> list[nn.Parameter]:
        """Parameters of the policy, for the optimizer: all, or those of one part (a name or its beginning up to a dot).

        Raises:
            UsageError: no trained parameter lies in that part.
        """
        found = [p for n, p in self._sets["policy"].items() if isinstance(p, nn.Parameter) and _in_part(n, part)]
        if not found:
            raise UsageError(f"no trained parameter lies in the part '{part}'.")
        return found

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """Give the module this role's weights inside the block; parameters get no gradients unless it is the policy."""
        self._check(role)
        self._follow_device()
        before = self._active
        self._switch(role)
        try:
            yield self.module
        finally:
            self._switch(before)

    def _switch(self, role: str) -> None:
        if self.lora is not None:
            _select_adapter(self._layers, None if role == "ref" else "policy" if role in self._only else role)
        if role != self._active:
            self._swap(self._swapped["policy"], self._swapped[self._active])  # back to the policy
            self._swap(self._swapped["policy"], self._swapped[role])
        for parameter in self.trainable():
            parameter.requires_grad_(role == "policy")
        self._active = role

    def _check(self, role: str) -> None:
        if role not in self._names:
            raise UsageError(f"no role '{role}'.{nearest(role, self._names)} Roles: {', '.join(self._names)}.")

    @torch.no_grad()
    def copy(self, src: str, dst: str, part: str = "") -> None:
        """Set the weights of role `dst` to those of `src`, as far as both hold them; `part` as in `trainable`."""
        source, target = self._pair(src, dst, part)
        torch._foreach_copy_(target, source)

    @torch.no_grad()
    def lerp(self, dst: str, decay: float, part: str = "") -> None:
        """Move role `dst` (or one part of it) towards the policy: dst ← decay·dst + (1 − decay)·policy.

        The Polyak average of target networks with τ = 1 − decay; its period is how often this is called.  With LoRA
        the two factors are averaged, not their product.

        Args:
            dst: a role other than the policy.
            decay: in [0, 1].
            part: as in `trainable`.
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay {decay} is not in [0, 1]")
        source, target = self._pair("policy", dst, part)
        torch._foreach_lerp_(target, source, 1.0 - decay)

    def _pair(self, src: str, dst: str, part: str) -> tuple[list[Tensor], list[Tensor]]:
        self._check(src)
        self._check(dst)
        self._follow_device()
        if self._active != "policy":
            raise RuntimeError(f"roles cannot be moved inside use('{self._active}')")
        if dst == "policy" and src == "policy" or (self.lora is not None and dst == "ref"):
            raise UsageError(f"role '{dst}' cannot be written from '{src}' (with LoRA, ref is the frozen base).")
        if self.lora is not None and src == "ref":
            raise UsageError("with LoRA the role 'ref' has no weights of its own to copy.")
        names = [name for name in self._sets[dst] if name in self._sets[src] and _in_part(name, part)]
        if not names:
            raise UsageError(f"the roles '{src}' and '{dst}' hold nothing in common of the part '{part}'.")
        return [self._sets[src][name] for name in names], [self._sets[dst][name] for name in names]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Weights of every role, detached; with LoRA `ref` has no adapter (it is the base model)."""
        if self._active != "policy":
            raise RuntimeError(f"state_dict inside use('{self._active}')")
        return {role: {name: value.detach() for name, value in self._sets[role].items()} for role in self._names}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the weights of every role, in place.

        Raises:
            CheckpointError: roles or tensors are missing, unknown or of another shape; both lists are named.
        """
        mine = {(role, name): value for role, weights in self._sets.items() for name, value in weights.items()}
        theirs = {(role, name): value for role, weights in state.items() for name, value in weights.items()}
        missing = sorted("/".join(key) for key in mine.keys() - theirs.keys())
        unknown = sorted("/".join(key) for key in theirs.keys() - mine.keys())
        wrong = sorted("/".join(key) for key in mine.keys() & theirs.keys() if mine[key].shape != theirs[key].shape)
        if missing or unknown or wrong:
            raise CheckpointError(
                f"roles do not fit the checkpoint: missing {_short(missing)}, unknown {_short(unknown)}, "
                f"other shape {_short(wrong)}; use the model, lora and roles it was made with."
            )
        for key, value in mine.items():
            value.copy_(theirs[key])

    def convert(self, change: Callable[[Tensor], Tensor], swap: Swap | None) -> None:
        """Put change(tensor) in the place of every weight of every role: other parameters of the module, or copies.

        Args:
            change: called once for each tensor.
            swap: exchanges two sets from now on; None restores the exchange of whole tensors.
        """
        if self._active != "policy":
            raise RuntimeError(f"roles cannot be converted inside use('{self._active}')")
        tables = {id(weights): weights for weights in (*self._sets.values(), *self._swapped.values())}
        found = {id(tensor): tensor for weights in tables.values() for tensor in weights.values()}
        changed = {key: change(tensor) for key, tensor in found.items()}
        for weights in tables.values():
            weights.update({name: changed[id(tensor)] for name, tensor in weights.items()})
        self._swap = swap or _exchange

    def save_lora(self, folder: str | Path, role: str = "policy") -> None:
        """Write a role's adapter as diffusers' `pytorch_lora_weights.safetensors` (with its alpha in the header).

        Raises:
            UsageError: these roles have no LoRA, or `role` is the base model.
        """
        if self.lora is None or role == "ref":
            raise UsageError("save_lora needs roles made with a LoraConfig, and a role other than 'ref'.")
        self._check(role)
        _write_lora(self.module, self._sets[role], self.lora, Path(folder))

    def _follow_device(self) -> None:
        """Bring copies to where the module has been moved since."""
        for role, weights in self._swapped.items():
            for name, weight in weights.items():
                if weight.device != (device := self._swapped["policy"][name].device):
                    weights[name] = self._sets[role][name] = weight.to(device)


def _in_part(name: str, part: str) -> bool:
    return not part or name.startswith(part if part.endswith(".") else part + ".") or name == part


def _short(names: list[str]) -> str:
    return str(names) if len(names) <= 6 else f"{names[:6]} and {len(names) - 6} more"


def _copies(module: nn.Module, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    policy: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not policy:
        raise UsageError(f"{type(module).__name__} has no parameter that requires gradients: nothing to train.")
    wrong = {str(p.dtype) for p in policy.values()} - {"torch.float32", "torch.float64"}
    if wrong:
        raise UsageError(f"trainable weights are {sorted(wrong)}; load the model in float32 (precision is autocast's).")
    return {r: policy if r == "policy" else {n: p.detach().clone() for n, p in policy.items()} for r in names}


def _beside(module: nn.Module, names: Sequence[str], whole: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Parameters that are trained whole beside LoRA, and their copies for the other roles."""
    policy = {n: p for n, p in module.named_parameters() if any(n.startswith(start) for start in whole)}
    for start in whole:
        if not any(name.startswith(start) for name in policy):
            raise UsageError(f"no parameter of {type(module).__name__} begins with '{start}'; nothing to train whole.")
    for parameter in policy.values():
        parameter.requires_grad_(True)
    held: dict[str, Tensor] = dict(policy)
    return {r: held if r == "policy" else {n: p.detach().clone() for n, p in held.items()} for r in names}


def _exchange(policy: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Swap storages of two sets in place; parameters keep their identity."""
    if policy is other:
        return
    for name, tensor in other.items():
        policy[name].data, tensor.data = tensor.data, policy[name].data


def _lora_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def _inject(module: nn.Module, slots: Sequence[str], lora: LoraConfig, seed: int) -> dict[str, dict[str, Tensor]]:
    """Add adapter slots; all of them start equal, and at zero effect."""
    try:
        import peft
    except ImportError as error:
        raise EnvironmentMissing("LoRA needs the package peft; pip install peft.") from error
    if _lora_layers(module):
        raise UsageError(f"{type(module).__name__} has LoRA layers already; fuse or unload them first.")
    targets = lora_targets(module, lora.targets)
    module.requires_grad_(False)
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.scale_alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # one tuner for all slots: a second one would find the first one's configuration on the module, and warn
        tuner = peft.LoraModel(module, dict.fromkeys(slots, settings), slots[0])
        for slot in slots[1:]:
            tuner.inject_adapter(module, slot)
    sets: dict[str, dict[str, Tensor]] = {name: {} for name in slots}
    for name, parameter in module.named_parameters():
        path, _, rest = name.rpartition(".lora_")
        part, _, slot = rest.removesuffix(".weight").partition(".")
        if path and slot in slots:
            parameter.data = parameter.data.float()
            sets[slot][f"{path}.lora_{part}.weight"] = parameter
    with torch.no_grad():
        for slot in slots:
            torch._foreach_copy_(list(sets[slot].values()), list(sets["policy"].values()))
    return sets


def _select_adapter(layers: Sequence[Any], slot: str | None) -> None:
    """Activate one adapter slot, or none (the base model), without gradients for any."""
    for layer in layers:
        layer.enable_adapters(slot is not None)
        if slot is not None:
            layer.set_adapter(slot, inference_mode=True)


def _write_lora(module: nn.Module, weights: Mapping[str, Tensor], lora: LoraConfig, folder: Path) -> None:
    """Write adapter weights under diffusers' names, with rank, alpha and layers in the header."""
    from safetensors.torch import save_file

    from gencontrol.models.adapters.networks import DiffusersNetwork
    from gencontrol.models.conditions.base import Conditioned

    weights = {name: value for name, value in weights.items() if ".lora_" in name}
    while isinstance(module, Conditioned):  # a condition is saved in files of its own
        module, weights = module.network, {name.removeprefix("network."): value for name, value in weights.items()}
    if isinstance(module, DiffusersNetwork):  # files name the layers of diffusers' own network
        module, weights = module.model, {name.removeprefix("model."): value for name, value in weights.items()}
    prefix = "unet" if "UNet" in type(module).__name__ else "transformer"
    layers = sorted({name.partition(".lora_")[0] for name in weights})
    header = {f"{prefix}.r": lora.rank, f"{prefix}.lora_alpha": lora.scale_alpha, f"{prefix}.target_modules": layers}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{prefix}.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, str(folder / LORA_FILE), metadata={"format": "pt", "lora_adapter_metadata": json.dumps(header)})
