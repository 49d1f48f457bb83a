"""Text side of the bundled scene model: tokenizer and CLIP text encoder in transformers' formats, trained from scratch.

The tokenizer knows the words of the caption grammar and the capital letters one by one, so that words are spelled;
everything else is <unk>.  The encoder learns with the image model, and from reading captions: a linear layer on its
pooled embedding names what the caption says (`caption_targets`), which organises the embedding long before the images
could.  That layer is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.models.conditions.text import MAX_TEXT_TOKENS, text_states
from gencontrol.recipes.scenes.data.font import LETTERS
from gencontrol.recipes.scenes.data.grammar import COLOURS, MAX_LETTERS, RELATIONS, SHAPES, SIZES, VOCABULARY, SceneSpec

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
#: values of each fact of a caption, "nothing said" included: three things, relation, word colour, letters
FACTS = (*(len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, 5) * 3, len(RELATIONS) + 1, len(COLOURS) + 1) + (
    len(LETTERS) + 1,
) * MAX_LETTERS


def build_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of captions: lower-case words, capital letters and commas; `<s> … </s>`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *VOCABULARY, *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z]|[a-z]+|[^\sA-Za-z]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, words.index(name)) for name in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_TEXT_TOKENS,
    )


def build_text_encoder(seed: int, *, width: int = 128, depth: int = 3) -> CLIPTextModelWithProjection:
    """A freshly initialised text encoder; a pure function of its arguments (the global generator is put back)."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(SPECIAL) + len(VOCABULARY) + len(LETTERS),
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=MAX_TEXT_TOKENS,
        hidden_act="gelu",
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModelWithProjection(config)


class CaptionedNetwork(nn.Module):
    """Text encoder and image network as one network of a Denoiser whose condition is {"ids", "mask", "drop"}."""

    def __init__(self, text_encoder: nn.Module, transformer: nn.Module) -> None:
        """Put together the two, and the layer that reads captions from the pooled embedding."""
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        config: Any = text_encoder.config
        self.reader = nn.Linear(config.projection_dim, sum(FACTS))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the image network's output; "drop" [b] of the condition marks the learned null."""
        return self.transformer(x, t, self.encode(cond))

    def encode(self, cond: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the image network's condition of token ids; one that is encoded already stays as it is."""
        if "ids" not in cond:
            return cond
        states = text_states(self.text_encoder, cond["ids"], cond["mask"])
        return {**states, "drop": cond.get("drop", states["drop"])}

    def read(self, encoded: Mapping[str, Tensor]) -> Float[Tensor, "b facts"]:
        """Return logits of what encoded captions say, `FACTS` one after the other."""
        return self.reader(encoded["pooled"])


def caption_targets(specs: Sequence[SceneSpec]) -> Int64[Tensor, "b f"]:
    """Return what captions say, one column per entry of FACTS; 0 is "nothing said"."""
    rows = []
    for spec in specs:
        row: list[int] = []
        for place in range(3):
            if place >= len(spec.things):
                row += [0, 0, 0, 0]
                continue
            thing = spec.things[place]
            row += [
                SHAPES.index(thing.shape) + 1,
                0 if thing.colour is None else list(COLOURS).index(thing.colour) + 1,
                0 if thing.size is None else SIZES.index(thing.size) + 1,
                thing.count,
            ]
        row.append(0 if spec.relation is None else RELATIONS.index(spec.relation) + 1)
        row.append(0 if spec.word_colour is None else list(COLOURS).index(spec.word_colour) + 1)
        letters = [LETTERS.index(letter) + 1 for letter in spec.word or ""]
        rows.append(row + letters + [0] * (MAX_LETTERS - len(letters)))
    return torch.tensor(rows)


def reading_loss(logits: Float[Tensor, "b facts"], targets: Int64[Tensor, "b f"]) -> Float[Tensor, " b"]:
    """Return the mean cross-entropy of the facts of each caption."""
    losses = [F.cross_entropy(part.float(), t, reduction="none") for part, t in zip(logits.split(FACTS, 1), targets.T)]
    return torch.stack(losses, 1).mean(1)


def save_text(folder: Path, text_encoder: Any, tokenizer: Any) -> None:
    """Write text_encoder/ and tokenizer/ of a pipeline folder; the weights in half precision, loaded in single."""
    import copy

    from gencontrol._compat import quiet

    with quiet():
        copy.deepcopy(text_encoder).half().save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"float16"', '"float32"'), encoding="utf-8")
