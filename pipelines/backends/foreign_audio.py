"""diffusers' Stable Audio and AudioLDM2 pipelines as backends: their own encoders, decoders and files, our denoiser.

Conditions are the network's own keyword arguments.  Each prompt is encoded alone and padded to one fixed length, so
that a sound does not depend on its neighbours in the batch (diffusers pads AudioLDM2's prompts to the longest one,
which changes its language model's positions).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol._compat import quiet
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.pipelines.backends.audio import Defaults
from gencontrol.pipelines.backends.schedulers import step_of
from gencontrol.pipelines.hub.hub import LoadOptions, hub_errors, own_memory
from gencontrol.pipelines.hub.lora import uncompiled
from gencontrol.types import Cond, cat_cond

#: longest AudioLDM2 prompt in tokens of its T5; longer ones are cut
MAX_T5_TOKENS = 128


class DiffusersBackend:
    """What the backends around diffusers pipelines have in common: the pipeline, its components, its saving."""

    network_name: str

    def __init__(self, pipe: Any) -> None:
        """Share the pipeline's components and freeze all but the network.

        Raises:
            UsageError: it is offloaded, or its network or scheduler has no adapter.
        """
        from gencontrol.models.adapters.diffusers import from_diffusers

        self.pipe = pipe
        self.components = {name: part for name, part in pipe.components.items() if part is not None}
        network = self.components[self.network_name]
        for name, part in self.components.items():
            if isinstance(part, torch.nn.Module):
                _refuse_hooks(part, type(pipe).__name__)
                part.eval()
                if name != self.network_name:
                    part.requires_grad_(False)
        self.denoiser = from_diffusers(network, pipe.scheduler)

    def replace(self, components: Mapping[str, Any]) -> Self:
        """The same kind of backend around other components."""
        pipe = copy.copy(self.pipe)  # a new pipeline of the same settings; `register_modules` makes its own record
        pipe.register_modules(**components)
        return type(self)(pipe)

    def times(self, steps: int, extent: Any = None) -> Float[Tensor, " k"]:
        """The scheduler's own grid of noise levels, as times."""
        from gencontrol.models.adapters.diffusers import scheduler_times

        return scheduler_times(self.pipe.scheduler, self.denoiser, steps)

    def enable_gradient_checkpointing(self) -> None:
        """Switch on diffusers' own.

        Raises:
            UsageError: this network has none.
        """
        network: Any = uncompiled(self.components[self.network_name])
        try:
            network.enable_gradient_checkpointing()
        except ValueError as error:
            raise UsageError(f"{error} Leave --gradient-checkpointing out and lower --micro-batch.") from error

    def save(self, folder: Path, weights: Callable[[], dict[str, Tensor]] | None) -> None:
        """Write the folder as diffusers does; with `weights`, the network is saved from them."""
        with quiet():
            if weights is None:
                self.pipe.save_pretrained(folder, safe_serialization=True)
                return
            network = self.components[self.network_name]
            with torch.device("meta"):
                kind: Any = type(uncompiled(network))
                plain = kind.from_config(network.config)
            plain.load_state_dict(weights(), assign=True)
            self.pipe.register_modules(**{self.network_name: plain})
            try:
                self.pipe.save_pretrained(folder, safe_serialization=True)
            finally:
                self.pipe.register_modules(**{self.network_name: network})


def _refuse_hooks(module: torch.nn.Module, owner: str) -> None:
    """Raise UsageError if accelerate moves this module about: its device says nothing then."""
    if any("_hf_hook" in part.__dict__ for part in module.modules()):
        raise UsageError(f"this {owner} is offloaded; call its remove_all_hooks(), wrap it, then offload the wrapper.")


class StableAudio(DiffusersBackend):
    """StableAudioPipeline: T5 and seconds → DiT on [channels, length] latents → Oobleck decoder, stereo."""

    network_name = "transformer"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.sampling_rate = int(pipe.vae.config.sampling_rate)
        self.max_seconds = pipe.transformer.config.sample_size * pipe.vae.hop_length / self.sampling_rate
        self.defaults = Defaults(step_of(pipe.scheduler), steps=100, guidance_scale=7.0)

    def latent_shape(self, seconds: float | None) -> tuple[int, ...]:
        """Shape [channels length]; fixed, the length of the sound is a condition."""
        return self.pipe.transformer.config.in_channels, self.pipe.transformer.config.sample_size

    def offload_order(self) -> list[torch.nn.Module]:
        """Text encoder, projection, transformer, decoder."""
        return [self.components[name] for name in ("text_encoder", "projection_model", "transformer", "vae")]

    def encode(self, prompts: Sequence[str], seconds: float | None, device: torch.device) -> Cond:
        """Text and duration embeddings, exactly those of StableAudioPipeline."""
        return cat_cond([self._encode(text, seconds, device) for text in prompts])

    def _encode(self, text: str, seconds: float | None, device: torch.device) -> Cond:
        embeds = self.pipe.encode_prompt([text], device, False)
        last = self.max_seconds if seconds is None else seconds
        start, end = self.pipe.encode_duration(0.0, last, device, False, 1)
        return {
            "encoder_hidden_states": torch.cat([embeds, start, end], dim=1),
            "global_hidden_states": torch.cat([start, end], dim=2),
        }

    def uncond(self, seconds: float | None, device: torch.device) -> Cond:
        """Zeros in place of text and duration tokens, the duration kept in the global embedding."""
        cond = self._encode("", seconds, device)
        return {**cond, "encoder_hidden_states": torch.zeros_like(cond["encoder_hidden_states"])}

    def decode(self, latents: Float[Tensor, "b c n"]) -> Float[Tensor, "b 2 m"]:
        """Stereo waveforms."""
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype)).sample


class AudioLDM2(DiffusersBackend):
    """AudioLDM2Pipeline: CLAP, T5 and a language model → UNet on mel latents → VAE and HiFi-GAN, mono."""

    network_name = "unet"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        config = pipe.vocoder.config
        self.sampling_rate = int(config.sampling_rate)
        self._frame = math.prod(config.upsample_rates) / self.sampling_rate  # seconds of one mel frame
        self.max_seconds = pipe.unet.config.sample_size * pipe.vae_scale_factor * self._frame
        self.defaults = Defaults(step_of(pipe.scheduler), steps=200, guidance_scale=3.5)

    def latent_shape(self, seconds: float | None) -> tuple[int, ...]:
        """Shape [channels frames mel/scale] for a length in seconds, rounded up to what the VAE can hold."""
        factor = self.pipe.vae_scale_factor
        frames = math.ceil((self.max_seconds if seconds is None else seconds) / self._frame - 1e-6)
        bins = int(self.pipe.vocoder.config.model_in_dim) // factor
        return self.pipe.unet.config.in_channels, math.ceil(frames / factor), bins

    def offload_order(self) -> list[torch.nn.Module]:
        """As AudioLDM2Pipeline's own: CLAP is called by its parts, never as a whole."""
        clap = self.components["text_encoder"]
        names = ("text_encoder_2", "projection_model", "language_model", "unet", "vae", "vocoder")
        return [clap.text_model, clap.text_projection, *(self.components[name] for name in names)]

    def encode(self, prompts: Sequence[str], seconds: float | None, device: torch.device) -> Cond:
        """Generated embeddings of the language model, T5 embeddings and their mask."""
        return cat_cond([self._encode(text, device) for text in prompts])

    def _encode(self, text: str, device: torch.device) -> Cond:
        embeds, mask, generated = self.pipe.encode_prompt([text], device, 1, False)
        length = min(MAX_T5_TOKENS, int(self.pipe.tokenizer_2.model_max_length))
        embeds, mask = embeds[:, :length], mask[:, :length]
        pad = length - embeds.shape[1]
        return {
            "encoder_hidden_states": generated,
            "encoder_hidden_states_1": torch.nn.functional.pad(embeds, (0, 0, 0, pad)),
            "encoder_attention_mask_1": torch.nn.functional.pad(mask, (0, pad)),
        }

    def uncond(self, seconds: float | None, device: torch.device) -> Cond:
        """The condition of the empty prompt."""
        return self._encode("", device)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Mono waveforms."""
        vae = self.pipe.vae
        mel = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return self.pipe.vocoder(mel.squeeze(1).to(self.pipe.vocoder.dtype))


#: pipelines of diffusers that TextToAudioPipeline takes
FOREIGN: Mapping[str, type[DiffusersBackend]] = {"StableAudioPipeline": StableAudio, "AudioLDM2Pipeline": AudioLDM2}


def load_foreign(kind: str, where: str | Path, options: LoadOptions) -> Any:
    """Load a diffusers pipeline by diffusers' own loader (safetensors only).

    Args:
        kind: class name, from a list of ours.

    Raises:
        UsageError: components are missing or damaged, or the hub was not reached.
        EnvironmentMissing: the pipeline's scheduler needs torchsde.
    """
    import diffusers

    cls = getattr(diffusers, kind)
    try:
        with hub_errors(str(where), options), quiet():
            pipe = cls.from_pretrained(
                str(where),
                revision=options.revision,
                variant=options.variant,
                dtype=options.dtype,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only or isinstance(where, Path),
                token=options.token,
                use_safetensors=True,
            )
    except ImportError as error:
        raise EnvironmentMissing(f"'{where}' needs a package that is not here: {error}".strip()) from error
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            own_memory(part)
    return pipe
