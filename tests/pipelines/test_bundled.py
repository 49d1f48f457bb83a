"""The weights that come with the package: they load offline and make sounds that depend on the prompt."""

from __future__ import annotations

import torch

from gencontrol.pipelines import TextToAudioPipeline


def test_bundled_model_makes_sound(fenced_rng: None) -> None:
    pipe = TextToAudioPipeline.from_pretrained("bundled")
    assert pipe.sampling_rate == 16000 and pipe.latent_shape == (64, 64)
    prompts = ["a fast bright marimba arpeggio", "a slow sad cello melody"]
    out = pipe(prompts, num_inference_steps=4, seed=[0, 0])
    assert out.audios.shape == (2, 32768) and bool(out.audios.isfinite().all())
    loudness = out.audios.square().mean(1).sqrt()
    assert bool((loudness > 1e-3).all())  # not silence
    same = pipe(prompts[0], num_inference_steps=4, seed=[0]).audios[0]
    # the same noise: only the prompt differs between the first two
    assert (out.audios[0] - out.audios[1]).square().mean() > 10 * (out.audios[0] - same).square().mean()
    assert not torch.equal(out.audios[0], out.audios[1])
