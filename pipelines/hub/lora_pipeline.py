"""The LoRA methods of a pipeline, under diffusers' names; the work is done by `gencontrol.pipelines.hub.lora`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gencontrol.errors import UsageError
from gencontrol.pipelines.base import Pipeline
from gencontrol.pipelines.hub import lora
from gencontrol.pipelines.hub.hub import LORA_FILE, LoadOptions, download_folder


class LoraPipeline(Pipeline):
    """A pipeline whose network can carry LoRA adapters: load, save, weigh, fuse and remove them."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str = LORA_FILE,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
    ) -> None:
        """Load a LoRA file as an adapter, which becomes the active one; strict about its keys.

        Args:
            pretrained_model_name_or_path: the file, its folder, or a hub id.
            adapter_name: "default", or "default_1" … where it is taken, if not given.
            weight_name: file name in a folder or repository.
            revision, cache_dir, local_files_only, token: of a hub repository, as in `from_pretrained`.

        Raises:
            UsageError: no such file, a taken name, or keys that do not fit (missing and unexpected ones are listed).
        """
        path = Path(pretrained_model_name_or_path).expanduser()
        if not path.exists():
            if isinstance(pretrained_model_name_or_path, Path) or pretrained_model_name_or_path.count("/") != 1:
                raise UsageError(
                    f"LoRA '{path}' does not exist; give a {LORA_FILE}, its folder, or a hub id (owner/name)."
                )
            options = LoadOptions(
                revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
            )
            path = download_folder(str(pretrained_model_name_or_path), options)
        file = lora.read_lora(path / weight_name if path.is_dir() else path, self.network_name)
        taken = lora.adapter_names(self.network) if lora.has_adapters(self.network) else []
        if adapter_name is None:
            free = ("default", *(f"default_{number}" for number in range(1, len(taken) + 1)))
            adapter_name = next(name for name in free if name not in taken)
        lora.inject(self.network, file, adapter_name)

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> Path:
        """Write one adapter as `pytorch_lora_weights.safetensors`, which diffusers loads too; returns the path.

        Args:
            adapter_name: the active adapter if not given.

        Raises:
            UsageError: nothing is loaded, several adapters are active and none is named, or the name is unknown.
        """
        if adapter_name is None:
            active = self.get_active_adapters()
            if len(active) != 1:
                raise UsageError(f"active adapters: {active or 'none'}; name the one to save by adapter_name.")
            adapter_name = active[0]
        return lora.write_lora(self.network, adapter_name, self.network_name, Path(save_directory))

    def get_list_adapters(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return lora.adapter_names(self.network) if lora.has_adapters(self.network) else []

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        if not lora.has_adapters(self.network):
            return []
        active: dict[str, None] = {}
        for layer in lora.tuner_layers(self.network).values():
            if not layer.disable_adapters:
                active.update(dict.fromkeys(name for name in layer.active_adapters if name in layer.lora_A))
        return list(active)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make these adapters act, and no others, each times its weight (1 if not given).

        Raises:
            UsageError: an adapter that is not loaded, or another number of weights than adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if adapter_weights is None:
            weights = [1.0] * len(names)
        elif isinstance(adapter_weights, (int, float)):
            weights = [float(adapter_weights)] * len(names)
        else:
            weights = [float(weight) for weight in adapter_weights]
        lora.activate(self.network, names, weights)

    def fuse_lora(self, adapter_names: Sequence[str] | None = None, lora_scale: float = 1.0) -> None:
        """Add adapters (the active ones if not named), times `lora_scale`, into the weights; `unfuse_lora` undoes it.

        Raises:
            UsageError: an adapter that is not loaded, or some are fused already.
        """
        layers = lora.tuner_layers(self.network)
        names = list(adapter_names) if adapter_names is not None else self.get_active_adapters()
        if not names or any(name not in lora.adapter_names(self.network) for name in names):
            raise UsageError(f"adapters to fuse: {names}; loaded: {self.get_list_adapters()}: load or name them.")
        if any(layer.merged for layer in layers.values()):
            raise UsageError("adapters are fused already; call unfuse_lora() first.")
        for layer in layers.values():
            here = [name for name in names if name in layer.lora_A]
            for name in here:
                layer.scaling[name] *= lora_scale
            if here:
                layer.merge(adapter_names=here)

    def unfuse_lora(self) -> None:
        """Take fused adapters out of the weights again (up to rounding)."""
        for layer in lora.tuner_layers(self.network).values():
            if layer.merged:
                layer.unmerge()

    def unload_lora_weights(self) -> None:
        """Remove all adapters; weights that were fused stay fused, as in diffusers."""
        if lora.has_adapters(self.network):
            lora.delete(self.network, lora.adapter_names(self.network))
