"""The classical 5x7 pixel font of capital letters (columns from left to right, lowest bit at the top)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COLUMNS = (
    "7e1111117e 7f49494936 3e41414122 7f4141413e 7f49494941 7f09090901 3e4149497a 7f0808087f 00417f4100 2040413f01 "
    "7f08142241 7f40404040 7f020c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e 7f09192946 2649494932 01017f0101 "
    "3f4040403f 1f2040201f 3f4038403f 6314081463 0304780403 6151494543"
)
#: pixels from the left edge of one letter to the next, in a word
PITCH = 8
WIDTH, HEIGHT = 5, 7


def _glyph(code: str) -> np.ndarray:
    columns = np.frombuffer(bytes.fromhex(code), np.uint8)
    return ((columns[None, :] >> np.arange(HEIGHT)[:, None]) & 1).astype(np.float32)


#: [26 7 5] in {0, 1}
GLYPHS: Float[np.ndarray, "26 7 5"] = np.stack([_glyph(code) for code in _COLUMNS.split()])
