"""What flow pretraining is made of: the network's sizes, the frozen codec and text encoder, the cached latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencontrol.config import options
from gencontrol.errors import UsageError
from gencontrol.files import replacing


@options
class SoundRun:
    """The [run] section of a pretraining on sound.

    Args:
        stage: clap, attributes or flow; not meant to be set.
        data: folder of `gencontrol pretrain sound-data`.
        output: the run folder (default: runs/STAGE).
        clap: "bundled" or a CLAP folder, whose text encoder conditions the flow model.
        codec: "bundled" or a folder of a MelCodec.
        cache: folder of the cached latents; empty means `latents` inside the data folder.
    """

    stage: str
    data: str = "data/sound"
    output: str = ""
    clap: str = "bundled"
    codec: str = "bundled"
    cache: str = ""


def train_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of [train]: ten evaluations."""
    steps = given.get("steps", 1000)
    return {"eval_every": max(1, steps // 10)} if isinstance(steps, int) else {}


@dataclass(frozen=True)
class FlowModel:
    """The [model] section: sizes of the transformer that the codec and the text encoder leave open."""

    dim: int = 256
    depth: int = 8
    heads: int = 4
    mlp_ratio: float = 4.0
    attention: str = "auto"
    gradient_checkpointing: bool = False


def flow_process(table: Mapping[str, Any]) -> Any:
    """Build the [process] section; keys that are not of the pipeline's ProcessSpec are parameters of the schedule.

    Raises:
        UsageError: an unknown schedule, prediction or parameter.
    """
    import dataclasses

    from torch import nn

    from gencontrol.config import build
    from gencontrol.pipelines.backends.audio import ProcessSpec

    known = {field.name for field in dataclasses.fields(ProcessSpec)}
    given = {key: value for key, value in table.items() if key in known}
    shape = {key: value for key, value in table.items() if key not in known}
    spec = build(ProcessSpec, {**given, **({"parameters": shape} if shape else {})}, "process")
    spec.denoiser(nn.Identity())  # refuses an unknown schedule or prediction
    return spec


def make_flow(
    algorithm: Any, run: SoundRun, options: Any, sizes: FlowModel, spec: Any, *, seed: int, device: str
) -> Any:
    """Assemble the bundled architecture with fresh weights and return the pretraining algorithm on it."""
    from gencontrol.models.roles import Roles
    from gencontrol.pipelines.backends.audio import NativeAudio
    from gencontrol.recipes.sound.latents import prepare_sound_latents

    text_encoder, tokenizer = _text_encoder(run.clap)
    codec = load_codec(run.codec).to(device)
    network = _network(sizes, codec, text_encoder.to(device), seed).to(device)
    audio = NativeAudio(network, text_encoder, tokenizer, codec, spec)
    cache = run.cache or str(Path(run.data) / "latents")
    data = {
        split: prepare_sound_latents(run.data, codec, text_encoder, tokenizer, cache, split)
        for split in ("train", "val")
    }
    return algorithm(
        audio.denoiser,
        data["train"],
        options,
        roles=Roles(network, ("policy", "ema")),
        seed=seed,
        held_out=data["val"],
        artefacts=lambda stem, latent: _artefacts(audio, stem, latent),
        save=lambda folder: _save(audio, folder),
    )


def make_reader(algorithm: Any, run: SoundRun, options: Any, *, seed: int, device: str) -> Any:
    """Return the pretraining of a CLAP or of the attribute reader on the sound data."""
    codec = load_codec(run.codec) if options.codec_share > 0 else None
    return algorithm(run.data, options, codec=codec, seed=seed, device=device)


def load_codec(name: str) -> Any:
    """Load the MelCodec of a folder, or the bundled one."""
    from gencontrol.models.networks.codec import MelCodec
    from gencontrol.weights import BUNDLED

    return MelCodec.from_pretrained(BUNDLED / "text_to_audio" / "codec" if name == "bundled" else name)


def _save(audio: Any, folder: Path) -> None:
    """Write the pipeline; its weights are stored in half precision and loaded in single."""
    audio.save(folder, None)
    half_precision(folder)


def half_precision(folder: Path) -> None:
    """Store the floating weights of the transformer and the text encoder of a pipeline folder as float16."""
    from safetensors.torch import load_file, save_file

    for path in (folder / "transformer" / "model.safetensors", folder / "text_encoder" / "model.safetensors"):
        weights = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        with replacing(path) as staged:
            save_file(weights, staged, metadata={"format": "pt"})


def _text_encoder(name: str) -> tuple[Any, Any]:
    """Load the text half and the tokenizer of a CLAP folder."""
    from transformers import AutoTokenizer, ClapTextModelWithProjection

    from gencontrol._compat import quiet
    from gencontrol.weights import BUNDLED

    folder = BUNDLED / "clap" if name == "bundled" else Path(name)
    if not (folder / "config.json").exists():
        raise UsageError(
            f"no CLAP in '{folder}'; make it: gencontrol pretrain clap --output {folder}, or set run.clap."
        )
    with quiet():  # the audio half of the file is left out on purpose
        model = ClapTextModelWithProjection.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.requires_grad_(False).eval(), tokenizer


def _network(sizes: FlowModel, codec: Any, text_encoder: Any, seed: int) -> Any:
    """Draw the transformer that fits the codec's latents and the text encoder's states, from the seed alone."""
    import torch

    from gencontrol.models.networks.transformer import Transformer, TransformerConfig

    tokens, channels = codec.latent_shape
    config = TransformerConfig(
        in_dim=channels,
        out_dim=channels,
        dim=sizes.dim,
        depth=sizes.depth,
        heads=sizes.heads,
        mlp_ratio=sizes.mlp_ratio,
        context_dim=text_encoder.config.hidden_size,
        pooled_dim=text_encoder.config.projection_dim,
        max_tokens=tokens,
        attention=sizes.attention,
        gradient_checkpointing=sizes.gradient_checkpointing,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config)


def _artefacts(audio: Any, stem: str, latent: Any) -> dict[str, bytes]:
    """Decode one latent into a wav and a spectrogram picture."""
    from gencontrol.pipelines.artefacts import sound_artefacts

    return sound_artefacts(stem, audio.decode(latent[None])[0].clamp(-1, 1), audio.sampling_rate)
