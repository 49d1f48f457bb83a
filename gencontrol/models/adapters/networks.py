"""How each diffusers network class is called: a condition mapping becomes its keyword arguments.

A condition may use generic names ("tokens" [b m c], "mask" [b m], "pooled" [b p]) or the network's own keyword names.
A new class is one function and one line in `CALLS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.errors import UsageError, nearest
from gencontrol.types import Cond

Given = dict[str, Tensor]


class DiffusersNetwork(nn.Module):
    """A diffusers network called as `network(x, t, cond)`, with t in [0, 1]; the inner module is `model`.

    Args:
        model: the diffusers network.
        timestep: maps t [b] to the number that the network was trained on.
    """

    def __init__(self, model: nn.Module, timestep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        name = type(model._modules.get("_orig_mod", model)).__name__  # inside torch.compile's wrapper
        if name not in CALLS:
            raise UsageError(f"no adapter for the network class {name}; known: {', '.join(CALLS)}.")
        self.model, self.timestep, self._call = model, timestep, CALLS[name]

    def forward(self, x: Float[Tensor, "b *d"], t: Float[Tensor, " b"], cond: Cond = None) -> Float[Tensor, "b *d"]:
        """Return the network's prediction, shaped as x.

        Raises:
            UsageError: an entry of the condition is missing or unknown to this network.
        """
        if cond is not None and not isinstance(cond, Mapping):
            raise UsageError(f"{type(self.model).__name__} takes a condition mapping, not a {type(cond).__name__}.")
        given = {key: value.to(x.dtype) if value.is_floating_point() else value for key, value in (cond or {}).items()}
        return self._call(self.model, x, self.timestep(t), given)


def _keywords(
    model: nn.Module, given: Given, names: Mapping[str, str], required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Rename generic entries to the network's keywords; `names` maps every accepted entry to one."""
    keywords: dict[str, Any] = {}
    accepted = {**{keyword: keyword for keyword in names.values()}, **names}
    for key, value in given.items():
        if key not in accepted:
            known = ", ".join(sorted(accepted)) or "none at all"
            raise UsageError(
                f"{type(model).__name__} has no condition '{key}'.{nearest(key, accepted)} It takes: {known}."
            )
        keywords[accepted[key]] = value
    missing = [key for key in required if key not in keywords]
    if missing:
        raise UsageError(f"{type(model).__name__} needs the condition {', '.join(missing)}; given: {sorted(given)}.")
    return keywords


def _mean_part(output: Tensor, x: Tensor) -> Tensor:
    """Drop the learned variance that follows the prediction in the channel axis, where there is one."""
    return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * x.shape[1] else output


def _unet2d(model: nn.Module, x: Tensor, timestep: Tensor, given: Given) -> Tensor:
    keywords = _keywords(model, given, {"class_labels": "class_labels"})
    return _mean_part(model(x, timestep, **keywords, return_dict=False)[0], x)


def _unet2d_condition(model: nn.Module, x: Tensor, timestep: Tensor, given: Given) -> Tensor:
    """Stable Diffusion 1, 2 and XL: the last also takes "pooled" and "time_ids" in `added_cond_kwargs`."""
    config: Any = model.config
    names = {"tokens": "encoder_hidden_states", "mask": "encoder_attention_mask", "class_labels": "class_labels"}
    required: tuple[str, ...] = ("encoder_hidden_states",)
    if config.addition_embed_type == "text_time":
        names |= {"pooled": "text_embeds", "time_ids": "time_ids"}
        required = (*required, "text_embeds", "time_ids")
    keywords = _keywords(model, given, names, required)
    added = {key: keywords.pop(key) for key in ("text_embeds", "time_ids") if key in keywords}
    return _mean_part(model(x, timestep, **keywords, added_cond_kwargs=added, return_dict=False)[0], x)


def _audioldm2(model: nn.Module, x: Tensor, timestep: Tensor, given: Given) -> Tensor:
    """AudioLDM2: language-model states are "tokens", T5 states and mask go by their own names (suffix _1)."""
    names = {"tokens": "encoder_hidden_states", "mask": "encoder_attention_mask", "class_labels": "class_labels"}
    names |= {key: key for key in ("encoder_hidden_states_1", "encoder_attention_mask_1")}
    keywords = _keywords(model, given, names, ("encoder_hidden_states",))
    return model(x, timestep, **keywords, return_dict=False)[0]


def _sd3(model: nn.Module, x: Tensor, timestep: Tensor, given: Given) -> Tensor:
    names = {"tokens": "encoder_hidden_states", "pooled": "pooled_projections"}
    keywords = _keywords(model, given, names, tuple(names.values()))
    return model(hidden_states=x, timestep=timestep, **keywords, return_dict=False)[0]


def _pixart(model: nn.Module, x: Tensor, timestep: Tensor, given: Given) -> Tensor:
    """PixArt-α and Σ; sizes "resolution" and "aspect_ratio" are needed where the model was trained with them."""
    config: Any = model.config
    sizes = ("resolution", "aspect_ratio")
    extra = config.use_additional_conditions
    if extra is None:
        extra = config.sample_size == 128
    names = {"tokens": "encoder_hidden_states", "mask": "encoder_attention_mask"}
    names |= {key: key for key in sizes if extra}
    keywords = _keywords(model, given, names, ("encoder_hidden_states", *(sizes if extra else ())))
    added = {key: keywords.pop(key, None) for key in sizes}
    return _mean_part(model(x, timestep=timestep, **keywords, added_cond_kwargs=added, return_dict=False)[0], x)


def _flux(model: nn.Module, x: Tensor, timestep: Tensor, given: Given) -> Tensor:
    """FLUX on unpacked latents [b c h w]: 2×2 patches become tokens, position ids are made here, times end at 1."""
    if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise UsageError(f"FLUX latents are [b c h w] with even h and w (unpacked), not {tuple(x.shape)}.")
    config: Any = model.config
    names = {"tokens": "encoder_hidden_states", "pooled": "pooled_projections", "txt_ids": "txt_ids"}
    required: tuple[str, ...] = ("encoder_hidden_states", "pooled_projections")
    if config.guidance_embeds:
        names, required = names | {"guidance": "guidance"}, (*required, "guidance")
    keywords = _keywords(model, given, names, required)
    if "txt_ids" not in keywords:
        keywords["txt_ids"] = x.new_zeros(keywords["encoder_hidden_states"].shape[1], 3)
    b, c, h, w = x.shape
    packed = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    ids = _image_ids(h // 2, w // 2).to(x)
    out = model(hidden_states=packed, timestep=timestep / 1000, img_ids=ids, **keywords, return_dict=False)[0]
    return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


@lru_cache(maxsize=16)
def _image_ids(rows: int, columns: int) -> Float[Tensor, "n 3"]:
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.cat([torch.zeros(len(grid), 1), grid], dim=1)


def _stable_audio(model: nn.Module, x: Tensor, timestep: Tensor, given: Given) -> Tensor:
    """Stable Audio on [b c n]: "pooled" is the global duration state [b 1 c], rotary positions are made here."""
    config: Any = model.config
    names = {"tokens": "encoder_hidden_states", "pooled": "global_hidden_states", "mask": "encoder_attention_mask"}
    keywords = _keywords(model, given, names, ("encoder_hidden_states", "global_hidden_states"))
    length = x.shape[2] + keywords["global_hidden_states"].shape[1]
    cos, sin = _rotary(config.attention_head_dim // 2, length)
    rotary = (cos.to(x.device), sin.to(x.device))
    return model(x, timestep, **keywords, rotary_embedding=rotary, return_dict=False)[0]


@lru_cache(maxsize=16)
def _rotary(dim: int, length: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return get_1d_rotary_pos_embed(dim, length, use_real=True, repeat_interleave_real=False)


#: Network class → call.
CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor, Given], Tensor]] = {
    "UNet2DModel": _unet2d,
    "UNet2DConditionModel": _unet2d_condition,
    "AudioLDM2UNet2DConditionModel": _audioldm2,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "StableAudioDiTModel": _stable_audio,
}
