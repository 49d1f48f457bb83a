"""LoRA files and adapters of a pipeline's network, in diffusers' layout, by peft, with strict keys.

A file is `pytorch_lora_weights.safetensors`: keys `transformer.<module>.lora_A.weight` (or `unet.…`), and a header
`lora_adapter_metadata` with rank and alpha.  Nothing is loaded halfway: a file is compared with the network first.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.pipelines.hub.hub import LORA_FILE

METADATA_KEY = "lora_adapter_metadata"
_CONFIG_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_PREFIXES = ("transformer", "unet")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read from disk: weights by peft's names without prefix, and the settings of `peft.LoraConfig`."""

    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    source: str


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise EnvironmentMissing("LoRA needs peft; pip install peft.") from error
    return peft


def tuner_layers(network: nn.Module) -> dict[str, Any]:
    """LoRA layers of a network by the name of the layer they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}


def uncompiled(network: nn.Module) -> Any:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    inner = network._modules.get("_orig_mod")
    return network if inner is None else inner


def has_adapters(network: nn.Module) -> bool:
    """Whether a network carries LoRA layers; does not import peft where nobody else did."""
    import sys

    return "peft" in sys.modules and bool(tuner_layers(network))


def adapter_names(network: nn.Module) -> list[str]:
    """Names of the adapters that a network carries, in the order of loading."""
    names: dict[str, None] = {}
    for layer in tuner_layers(network).values():
        names.update(dict.fromkeys(layer.lora_A.keys()))
    return list(names)


def adapter_state(network: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The parameters of an adapter, by peft's file names without prefix: `<layer>.lora_A.weight` and so on."""
    state: dict[str, Tensor] = {}
    for path, layer in tuner_layers(network).items():
        if adapter in layer.lora_A:
            name = path.replace("_orig_mod.", "")
            state[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight
            state[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight
            if adapter in layer.lora_magnitude_vector:
                state[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter].weight
    return state


def adapter_config(network: nn.Module, adapter: str) -> dict[str, Any]:
    """Settings of `peft.LoraConfig` that rebuild an adapter, read from its layers."""
    layers = {path.replace("_orig_mod.", ""): layer for path, layer in tuner_layers(network).items()}
    layers = {path: layer for path, layer in layers.items() if adapter in layer.lora_A}
    ranks = {path: int(layer.r[adapter]) for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha[adapter] for path, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{path}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{path}": value for path, value in alphas.items() if value != alpha},
        "use_rslora": any(layer.use_rslora.get(adapter, False) for layer in layers.values()),
        "use_dora": any(adapter in layer.lora_magnitude_vector for layer in layers.values()),
        "target_modules": sorted(layers),
    }


def read_lora(path: Path, prefix: str) -> LoraFile:
    """Read a LoRA file, or the folder that holds one.

    Args:
        path: `pytorch_lora_weights.safetensors`, or its folder.
        prefix: name of the network's component; a file without any prefix is taken as meant for it.

    Raises:
        UsageError: no such file, no LoRA in it, or a LoRA for another kind of network.
    """
    from safetensors import SafetensorError, safe_open

    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"'{path}' has no LoRA: {file.name} is not there; give the file or its folder.")
    try:
        with safe_open(str(file), framework="pt") as handle:
            header = handle.metadata() or {}
            weights = {key: handle.get_tensor(key) for key in handle.keys()}  # not a mapping
    except (SafetensorError, OSError) as error:
        raise UsageError(f"'{file}' cannot be read as safetensors ({error}); download or save it again.") from error
    found = {p for p in _PREFIXES if any(key.startswith(f"{p}.") for key in weights)}
    if found and prefix not in found:
        raise UsageError(f"'{file}' is a LoRA for a {'/'.join(sorted(found))}; this pipeline's network is '{prefix}'.")
    config = json.loads(header.get(METADATA_KEY, "{}"))
    if found:
        foreign = sorted(key for key in weights if not key.startswith(f"{prefix}."))
        if foreign:
            raise UsageError(f"'{file}' also has weights for other components, e.g. {foreign[:3]}; split the file.")
        weights = {key.removeprefix(f"{prefix}."): value for key, value in weights.items()}
        config = {key.removeprefix(f"{prefix}."): value for key, value in config.items()}
    config = {key: config[key] for key in _CONFIG_KEYS if key in config}
    return LoraFile(weights, config or _infer(weights), str(file))


def _infer(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of a file without a header: ranks from the shapes, alpha = rank (as diffusers takes it)."""
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in weights.items() if ".lora_A." in key}
    if not ranks:
        return {}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    return {"r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def check_lora(file: LoraFile, network: nn.Module) -> None:
    """Raise UsageError, with the lists, unless each weight has its place in the network and its partner in the file."""
    layers = {
        name.replace(".base_layer", ""): layer for name, layer in network.named_modules() if _weight(layer) is not None
    }
    unexpected, missing, wrong = [], [], []
    for key, value in file.weights.items():
        module, _, part = key.partition(".lora_")
        partner = f"{module}.lora_{'B' if part.startswith('A') else 'A'}.weight"
        if part not in ("A.weight", "B.weight", "magnitude_vector") or module not in layers:
            unexpected.append(key)
            continue
        if part != "magnitude_vector" and partner not in file.weights:
            missing.append(partner)
        weight = _weight(layers[module])
        assert weight is not None
        axis = {"A.weight": (1, 1), "B.weight": (0, 0)}.get(part)
        if axis is not None and value.shape[axis[0]] != weight.shape[axis[1]]:
            wrong.append(f"{key} {tuple(value.shape)} for a weight {tuple(weight.shape)}")
    if unexpected or missing or wrong or not file.weights:
        raise UsageError(
            f"'{file.source}' does not fit this {type(network).__name__}: unexpected keys {_short(unexpected)}, "
            f"missing keys {_short(missing)}, other shapes {_short(wrong)}; use the model it was trained for."
        )


def _weight(layer: nn.Module) -> Tensor | None:
    """The weight that a LoRA of this layer would change, or None where a LoRA has no place."""
    return layer.weight if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) else None


def _short(names: Sequence[str]) -> str:
    return str(list(names)) if len(names) <= 6 else f"{list(names[:6])} and {len(names) - 6} more"


def inject(network: nn.Module, file: LoraFile, adapter: str) -> None:
    """Add a checked LoRA file to a network as the adapter `adapter`, which becomes the active one.

    Raises:
        UsageError: the name is taken, or keys do not fit (the network is unchanged then).
    """
    peft = _peft()
    if adapter in adapter_names(network):
        raise UsageError(f"an adapter '{adapter}' is loaded already; choose another adapter_name or unload it.")
    check_lora(file, network)
    modules = sorted({key.partition(".lora_")[0] for key in file.weights})
    config = peft.LoraConfig(**file.config, target_modules=modules, bias="none")
    # peft takes the configurations of a new tuner from its argument, or, with a warning, from the network
    owner = uncompiled(network)
    others = owner.__dict__.pop("peft_config", {})
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws initial weights, which are replaced below
            peft.LoraModel(network, {**others, adapter: config}, adapter, state_dict=dict(file.weights))
    except BaseException:
        if others:
            owner.peft_config = others
        raise
    own = adapter_state(network, adapter)
    missing, unexpected = sorted(own.keys() - file.weights.keys()), sorted(file.weights.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & file.weights.keys() if own[k].shape != file.weights[k].shape)
    if missing or unexpected or wrong:
        delete(network, [adapter])
        raise UsageError(
            f"'{file.source}': unexpected keys {_short(unexpected)}, missing keys {_short(missing)}, shapes that "
            f"contradict its header {_short(wrong)}; save it again."
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(file.weights[key])
    activate(network, [adapter], [1.0])


def activate(network: nn.Module, names: Sequence[str], weights: Sequence[float]) -> None:
    """Make these adapters, and no others, act, each times its weight.

    Raises:
        UsageError: an adapter that is not loaded, or another number of weights.
    """
    known = adapter_names(network)
    for name in names:
        if name not in known:
            raise UsageError(f"no adapter '{name}'.{nearest(name, known)} Loaded: {', '.join(known) or 'none'}.")
    if len(weights) != len(names):
        raise UsageError(f"{len(names)} adapters and {len(weights)} weights; give one weight for each.")
    for layer in tuner_layers(network).values():
        here = [name for name in names if name in layer.lora_A]
        layer.enable_adapters(bool(here))
        if here:
            layer.set_adapter(here, inference_mode=True)
        for name, weight in zip(names, weights, strict=True):
            if name in here:
                layer.set_scale(name, weight)


def delete(network: nn.Module, names: Sequence[str]) -> None:
    """Remove adapters; a layer that has none left is replaced by the layer it wrapped (merged weights stay)."""
    for path, layer in tuner_layers(network).items():
        for name in names:
            if name in layer.lora_A:
                layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, attribute = path.rpartition(".")
            setattr(network.get_submodule(parent), attribute, layer.get_base_layer())
    owner = uncompiled(network)
    configs = owner.__dict__.get("peft_config", {})
    for name in names:
        configs.pop(name, None)
    if not configs and "peft_config" in owner.__dict__:
        del owner.peft_config


def write_lora(network: nn.Module, adapter: str, prefix: str, folder: Path) -> Path:
    """Write one adapter as a LoRA file that diffusers loads; returns its path.

    Raises:
        UsageError: no such adapter.
    """
    from safetensors.torch import save_file

    known = adapter_names(network)
    if adapter not in known:
        raise UsageError(f"no adapter '{adapter}'.{nearest(adapter, known)} Loaded: {', '.join(known) or 'none'}.")
    state = adapter_state(network, adapter)
    header = {f"{prefix}.{key}": value for key, value in adapter_config(network, adapter).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{prefix}.{key}": value.detach().cpu().contiguous() for key, value in state.items()},
        str(folder / LORA_FILE),
        metadata={"format": "pt", METADATA_KEY: json.dumps(header, indent=2, sort_keys=True)},
    )
    return folder / LORA_FILE


@torch.no_grad()
def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """State of the network as if its active adapters were fused and unloaded; the network is not changed."""
    layers = tuner_layers(network)
    state: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        if ".lora_" in key or ".lora_magnitude_vector" in key:
            continue
        name = key.replace(".base_layer.", ".").replace("_orig_mod.", "")
        state[name] = value
    for path, layer in layers.items():
        if not layer.disable_adapters and not layer.merged:
            fused = copy.deepcopy(layer)
            fused.merge()
            weight = fused.get_base_layer().weight
            state[f"{path.replace('_orig_mod.', '')}.weight"] = weight.detach()
    return state
