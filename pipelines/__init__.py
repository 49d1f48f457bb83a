"""Pipelines: ready models behind diffusers' interface.  Importing this package loads nothing but what is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gencontrol.pipelines.backends.audio import ProcessSpec
    from gencontrol.pipelines.base import Pipeline
    from gencontrol.pipelines.class_to_image import ClassToImagePipeline
    from gencontrol.pipelines.outputs import AudioPipelineOutput, ImagePipelineOutput
    from gencontrol.pipelines.policy import ComposedPolicyPipeline, PolicyPipeline
    from gencontrol.pipelines.search.outputs import AudioSearchOutput, ImageSearchOutput
    from gencontrol.pipelines.search.tree_search import TreeSearchPipeline
    from gencontrol.pipelines.text_to_audio import TextToAudioPipeline
    from gencontrol.pipelines.text_to_image import TextToImagePipeline

__all__ = [
    "AudioPipelineOutput",
    "AudioSearchOutput",
    "ClassToImagePipeline",
    "ComposedPolicyPipeline",
    "ImagePipelineOutput",
    "ImageSearchOutput",
    "Pipeline",
    "PolicyPipeline",
    "ProcessSpec",
    "TextToAudioPipeline",
    "TextToImagePipeline",
    "TreeSearchPipeline",
]

_WHERE = {
    "AudioPipelineOutput": "outputs",
    "AudioSearchOutput": "search.outputs",
    "ClassToImagePipeline": "class_to_image",
    "ComposedPolicyPipeline": "policy",
    "ImagePipelineOutput": "outputs",
    "ImageSearchOutput": "search.outputs",
    "Pipeline": "base",
    "PolicyPipeline": "policy",
    "ProcessSpec": "backends.audio",
    "TextToAudioPipeline": "text_to_audio",
    "TextToImagePipeline": "text_to_image",
    "TreeSearchPipeline": "search.tree_search",
}


def __getattr__(name: str) -> Any:
    """Import an exported class when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
