"""LAION's aesthetic score: a small head on the unit image embedding of CLIP ViT-L/14 (about 1 to 10).

Heads are read from safetensors files with the keys of the two published layouts: "weight" [1 d] and "bias" [1] (the
linear predictor, version 1), or "layers.I.weight" [out in] and "layers.I.bias" [out] (the improved predictor:
layers 0, 2, 4, 6, 7 of sizes 768 → 1024 → 128 → 64 → 16 → 1).  The layers between are dropouts, so no activation
stands between the linear maps; that is how the published weights were trained and how they must be applied.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.base import checked
from gencontrol.rewards.image.clip_backend import ClipEmbeddings, FitImage, Precision, clip_backend
from gencontrol.rewards.image.preference import CLIP_MODEL
from gencontrol.rewards.inputs import image_batch
from gencontrol.types import RewardContext, RewardOut

_KEY = re.compile(r"(?:layers\.(\d+)\.)?(weight|bias)")
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('HEAD.pth', weights_only=True), 'HEAD.safetensors')\""
)


def load_head(path: str | Path) -> torch.nn.Sequential:
    """Read a head as a chain of linear maps in float32.

    Raises:
        UsageError: no such file, a pickle (the message shows how to convert it), or another layout.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"the aesthetic head '{path}' does not exist; give a .safetensors file.")
    if file.suffix != ".safetensors":
        raise UsageError(f"the aesthetic head '{path}' is no .safetensors file; convert it once: {_CONVERT}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UsageError(f"the aesthetic head '{path}' is not a whole safetensors file ({error}).") from error
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UsageError(
                f"the aesthetic head '{path}' has the key '{key}'; expected layers.I.weight, layers.I.bias."
            )
        found.setdefault(int(match[1] or 0), {})[match[2]] = value.float()
    # the sizes of the layers must follow each other and end in one number
    layers: list[torch.nn.Module] = []
    width: int | None = None
    for part in (found[index] for index in sorted(found)):
        weight, bias = part.get("weight"), part.get("bias")
        whole = weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]
        if not whole or weight is None or bias is None or (width is not None and weight.shape[1] != width):
            raise UsageError(
                f"the aesthetic head '{path}' has layers that do not follow each other; download it again."
            )
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        width = weight.shape[0]
    if width != 1:
        raise UsageError(f"the aesthetic head '{path}' ends in {width or 0} numbers; expected one score.")
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


class AestheticReward:
    """`aesthetic`: item reward, a head on the CLIP embedding of the image; needs no prompt; differentiable."""

    title = "LAION's aesthetic predictor"
    paper = ""
    medium = "image"
    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __init__(
        self,
        head: str | Path | None = None,
        model: str | Path = CLIP_MODEL,
        device: str | torch.device | None = None,
        resize: FitImage = "auto",
        batch_size: int = 32,
        precision: Precision = "fp32",
    ) -> None:
        """Load head and backbone.

        Args:
            head: safetensors file of the head; None looks for aesthetic_head.safetensors in the model's folder.
            model: the CLIP backbone, as for `clip`.
            device: None takes the GPU when there is one.
            resize: "crop", "squash" or "pad" instead of the model's own way ("auto").
            batch_size: images in one forward pass.
            precision: of the backbone: "fp32", "bf16" or "fp16".

        Raises:
            UsageError: no head, or one of another width than the backbone's embeddings.
        """
        self.name = "aesthetic"
        beside = Path(model).expanduser() / "aesthetic_head.safetensors"
        if head is None and not beside.is_file():
            raise UsageError(
                "reward 'aesthetic' needs its head: head=FILE.safetensors, or aesthetic_head.safetensors in the folder "
                f"of the CLIP model; a published .pth is converted by: {_CONVERT}"
            )
        layers = load_head(beside if head is None else head)
        self.embeddings = ClipEmbeddings(clip_backend(model, device, precision), resize, batch_size)
        self._head = layers.to(self.embeddings.backend.device)
        width, expected = self.embeddings.backend.width, next(self._head.parameters()).shape[1]
        if width != expected:
            raise UsageError(
                f"the aesthetic head takes embeddings of {expected} numbers, the CLIP model gives {width}; the "
                f"published heads belong to {CLIP_MODEL}."
            )

    def __call__(self, samples: Float[Tensor, "b 3 h w"], context: RewardContext) -> RewardOut:
        """Score per image.

        Raises:
            UsageError: no images in [0, 1].
        """
        images, finite = image_batch(samples, self.name)
        seen = self.embeddings.images(images)
        with torch.autocast(seen.device.type, enabled=False):
            values = self._head(seen.to(self.embeddings.backend.device)).squeeze(-1)
        return checked(self.name, values.to(images.device), len(images), finite)
