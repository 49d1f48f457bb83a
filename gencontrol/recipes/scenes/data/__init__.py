"""The bundled scene data: a grammar of captions, a renderer of 32x32 colour images and endless labelled data.

`grammar` says what a scene is and how it is described, and reads a caption back exactly; `layout` and `render` turn a
description into pixels; `corpus` draws captions, keeps some apart for tests, and serves images with captions.
"""

from gencontrol.recipes.scenes.data.grammar import (
    CATEGORIES,
    COLOURS,
    SHAPES,
    CaptionError,
    SceneSpec,
    Thing,
    caption,
    category,
    parse,
)

__all__ = ["CATEGORIES", "COLOURS", "SHAPES", "CaptionError", "SceneSpec", "Thing", "caption", "category", "parse"]
