"""TreeSearchPipeline with trees: budgets, read-outs, forests, resuming, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.pipelines import AudioSearchOutput, ClassToImagePipeline, ImageSearchOutput, TreeSearchPipeline
from gencontrol.sampling.tree.readout import Progress
from gencontrol.sampling.tree.tree import DiffusionTree
from tests.helpers.fixtures_images import tiny_sd
from tests.helpers.fixtures_models import tiny_audioldm2, tiny_stable_audio, tiny_text_to_audio
from tests.helpers.search_toys import PATH, STEPS, Watcher, brightness, rows_of, search_of, tiny_digits


@pytest.fixture(scope="module")
def digits() -> ClassToImagePipeline:
    return tiny_digits()


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd()


# ---- what a search returns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["dts-star", "dts"])
def test_search_of_stable_diffusion(sd: Any, sampler: str, fenced_rng: None) -> None:
    watcher = Watcher()
    rows = rows_of(sd.unet)
    found = search_of(sd, watcher, sampler=sampler)("red cube", nfe=83, num_inference_steps=STEPS, seed=0)
    assert isinstance(found, ImageSearchOutput) and found.images is found[0] is found["images"]
    (image,) = found.images
    assert isinstance(image, Image) and image.size == (16, 16) and image.mode == "RGB"
    tree = found.tree
    assert tree is not None and found.particles is None and tree.config.select.greedy == (sampler == "dts-star")
    # every call of the guided model is two rows of the network, and all of them are counted and within the budget
    assert found.nfe == tree.nfe == sum(rows) / 2 and 83 - 2 * PATH < found.nfe <= 83
    assert found.reward_calls == sum(map(len, watcher.samples)) >= 83 // PATH
    for samples, context in zip(watcher.samples, watcher.contexts):
        assert samples.dtype == torch.float32 and samples.shape[1:] == (3, 16, 16) and len(samples) <= 8
        assert 0 <= float(samples.min()) and float(samples.max()) <= 1
        assert context.prompts == ["red cube"] * len(samples) and context.sampling_rate is None
    # the reward of the image that is returned, to the rounding of its bytes
    assert np.asarray(image).mean() / 255 == pytest.approx(float(found.rewards[0]), abs=0.5 / 255)
    assert math.isfinite(found.log_z[0])


def test_best_readout_is_the_best_leaf_and_beats_the_first(sd: Any) -> None:
    watcher = Watcher()
    found = search_of(sd, watcher)("red cube", nfe=160, num_inference_steps=STEPS, seed=1)
    scored = torch.cat([brightness(samples) for samples in watcher.samples])
    assert float(found.rewards[0]) == pytest.approx(float(scored.max()), abs=1e-7)
    assert float(found.rewards[0]) > float(scored[0])
    # the search concentrates: its later half scores higher than plain samples do (the first round's)
    assert float(scored[len(scored) // 2 :].mean()) > float(scored[: found.tree.config.leaf_batch].mean())  # type: ignore[union-attr]


def test_several_samples_are_distinct_and_sorted(digits: ClassToImagePipeline) -> None:
    found = search_of(digits)("3", nfe=80, num_images_per_prompt=3, seed=0, output_type="pt")
    assert found.images.shape == (3, 1, 8, 8)
    assert found.rewards.tolist() == sorted(found.rewards.tolist(), reverse=True)
    torch.testing.assert_close(brightness(found.images), found.rewards.float(), atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="100 samples were asked for, but the tree has"):
        search_of(digits)("3", nfe=20, num_images_per_prompt=100, seed=0)
    drawn = search_of(digits)("3", nfe=80, num_images_per_prompt=50, seed=0, readout="sample", output_type="pt")
    assert 1 < len(set(drawn.rewards.tolist())) < 50  # draws of a law, which repeat


def test_output_types(digits: ClassToImagePipeline) -> None:
    search = search_of(digits)
    call = {"nfe": 20, "seed": 0, "num_images_per_prompt": 2}
    pil, tensor, array, latent = (
        search("3", **call, output_type=kind).images for kind in ("pil", "pt", "np", "latent")
    )
    assert [image.mode for image in pil] == ["L", "L"]
    assert array.shape == (2, 8, 8, 1) and np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert torch.equal(digits.decode(latent), tensor)
    assert [np.asarray(image).tolist() for image in pil] == (tensor[:, 0] * 255).round().int().tolist()
    plain = search("3", **call, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 7


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_prompts_share_batches_and_keep_their_own_trees(digits: ClassToImagePipeline) -> None:
    call = {"nfe": 60, "seed": 0, "leaf_batch": 2, "output_type": "pt"}
    watcher = Watcher()
    rows = rows_of(digits.network)
    both = search_of(digits, watcher)(["3", "7"], num_images_per_prompt=2, **call)
    assert both.images.shape == (4, 1, 8, 8) and len(both.log_z) == 2 and both.nfe <= 2 * 60
    assert max(rows) == 2 * 2 * 2  # prompts, leaves, sides of guidance
    asked = [prompt for context in watcher.contexts for prompt in context.prompts or []]
    assert both.tree is not None and [asked.count(p) for p in ("3", "7")] == [
        int(both.tree.counts["valid"][root]) for root in (0, 1)
    ]
    # the first prompt's tree does not know that there is a second one (to the rounding of batched products)
    alone = search_of(digits)("3", num_images_per_prompt=2, **call)
    torch.testing.assert_close(both.images[:2], alone.images, atol=1e-5, rtol=0)
    assert both.log_z[0] == pytest.approx(alone.log_z[0], abs=1e-4)
    assert float((both.images[2:] - alone.images).abs().max()) > 0.01


def test_numbers_are_classes(digits: ClassToImagePipeline) -> None:
    watcher = Watcher()
    search_of(digits, watcher)([3, "7"], nfe=8, seed=0)
    assert {prompt for context in watcher.contexts for prompt in context.prompts or []} == {"3", "7"}
    with pytest.raises(UsageError, match="class label '12' is unknown"):
        search_of(digits)(12, nfe=8)


def test_negative_prompts_and_guidance_change_the_law(digits: ClassToImagePipeline) -> None:
    search = search_of(digits)
    call = {"nfe": 8, "seed": 0, "output_type": "pt", "leaf_batch": 2}
    plain, scaled, steered = (
        search("3", **call, **more).images for more in ({}, {"guidance_scale": 5.0}, {"negative_prompt": "7"})
    )
    assert float((plain - scaled).abs().max()) > 0.01 and float((plain - steered).abs().max()) > 0.01
    pair = search(["3", "3"], **call, negative_prompt=["7", "1"])
    torch.testing.assert_close(pair.images[:1], steered, atol=1e-5, rtol=0)


# ---- going on ---------------------------------------------------------------------------------------------------


def test_a_tree_is_grown_further(digits: ClassToImagePipeline, tmp_path: Path) -> None:
    search = search_of(digits)
    whole = search("3", nfe=80, seed=0, leaf_batch=2, output_type="pt")
    first = search("3", nfe=40, seed=0, leaf_batch=2, output_type="pt")
    assert first.tree is search.tree
    first.tree.save(tmp_path / "tree.safetensors")
    small = first.tree.nfe
    second = search("3", nfe=40, tree=first.tree, output_type="pt")
    assert second.tree is first.tree and second.nfe == second.tree.nfe - small <= 40
    assert second.reward_calls < second.tree.reward_calls
    loaded = search("3", nfe=40, tree=tmp_path / "tree.safetensors", output_type="pt")
    assert torch.equal(loaded.images, second.images) and loaded.nfe == second.nfe  # as if it had never stopped
    assert float(second.rewards[0]) >= float(first.rewards[0])
    # the budget's end cuts a round in two, so only the total is that of one long search
    assert abs(second.tree.nfe - whole.nfe) <= 2 * PATH


def test_a_tree_may_change_its_temperature(digits: ClassToImagePipeline) -> None:
    tree = search_of(digits, temperature=1.0, sampler="dts")("3", nfe=80, seed=0).tree
    before = tree.progress().log_z[0]
    colder = search_of(digits, temperature=0.01, sampler="dts")("3", nfe=8, tree=tree)
    assert colder.tree is tree and tree.config.temperature == 0.01 and tree.progress().log_z[0] > before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": "7"}, "another prompt"),
        ({"guidance_scale": 4.0}, "another model or guidance"),
        ({"negative_prompt": "7"}, "another negative prompt or guidance"),
        ({"num_inference_steps": 5}, "built with 4 steps or another scheduler; give num_inference_steps=4"),
        ({"sampler": "dts"}, "sampler belongs to the tree"),
        ({"seed": 1}, "seed belongs to the tree"),
        ({"leaf_batch": 1}, "leaf_batch belongs to the tree"),
    ],
)
def test_a_tree_of_another_problem_is_refused(digits: ClassToImagePipeline, more: dict[str, Any], message: str) -> None:
    tree = search_of(digits)("3", nfe=8, seed=0).tree
    call = {"prompt": "3", "nfe": 8, "tree": tree} | more
    with pytest.raises(UsageError, match=message):
        search_of(digits)(**call)


def test_a_tree_file_of_another_reward_is_refused(digits: ClassToImagePipeline, tmp_path: Path) -> None:
    search_of(digits)("3", nfe=8, seed=0).tree.save(tmp_path / "t")
    with pytest.raises(UsageError, match="another reward"):
        search_of(digits, Watcher())("3", nfe=8, tree=tmp_path / "t")
    with pytest.raises(UsageError, match="another reward"):
        search_of(digits, Watcher())("3", nfe=8, tree=search_of(digits)("3", nfe=8, seed=0).tree)


def test_an_interrupted_search_keeps_its_tree(digits: ClassToImagePipeline) -> None:
    rounds: list[Progress] = []

    def stop(progress: Progress) -> None:
        rounds.append(progress)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    search = search_of(digits)
    with pytest.raises(KeyboardInterrupt):
        search("3", nfe=80, seed=0, callback=stop)
    assert isinstance(search.tree, DiffusionTree) and search.tree.rounds == 3
    assert [p.nfe for p in rounds] == sorted({p.nfe for p in rounds}) and rounds[-1].nfe == search.tree.nfe
    assert search("3", nfe=40, tree=search.tree).tree.rounds > 3
    ended = search("3", nfe=80, seed=0, callback=lambda progress: progress.nfe >= 20)
    assert 20 <= ended.nfe < 40 and len(ended.images) == 1


# ---- sound ------------------------------------------------------------------------------------------------------


def loudness(sounds: Tensor) -> Tensor:
    return sounds.flatten(1).square().mean(1)


def test_search_of_sounds() -> None:
    pipe = tiny_text_to_audio()
    watcher = Watcher()
    found = TreeSearchPipeline(pipe, watcher, temperature=0.01)(
        ["bell", "dog"], nfe=20, audio_end_in_s=0.1, num_waveforms_per_prompt=2, seed=0
    )
    assert isinstance(found, AudioSearchOutput) and found.sampling_rate == 16000 and found.audios.shape == (4, 1600)
    assert all(context.sampling_rate == 16000 for context in watcher.contexts)
    assert all(samples.shape[1:] == (1600,) and samples.abs().max() <= 1 for samples in watcher.samples)
    torch.testing.assert_close(brightness(found.audios), found.rewards.float(), atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="height has no effect with a text-to-audio pipeline"):
        TreeSearchPipeline(pipe, loudness)("bell", nfe=20, height=64)


@pytest.mark.parametrize(("build", "shape"), [(tiny_stable_audio, (1, 2, 96)), (tiny_audioldm2, (1, 64))])
def test_search_of_diffusers_sounds(build: Any, shape: tuple[int, ...]) -> None:
    pipe = build()
    seconds = {"audio_end_in_s": 3.0} if len(shape) == 3 else {}
    search = TreeSearchPipeline(pipe, loudness, temperature=0.01)
    found = search("bell", nfe=24, num_inference_steps=3, seed=0, negative_prompt="hiss", output_type="np", **seconds)
    assert found.audios.shape == shape and isinstance(found.audios, np.ndarray) and 20 < found.nfe <= 24
    assert float(found.rewards[0]) == pytest.approx(float(np.square(found.audios).mean()), rel=1e-4)


# ---- settings ---------------------------------------------------------------------------------------------------


def test_autocast_and_store_are_used(digits: ClassToImagePipeline) -> None:
    seen: list[torch.dtype] = []
    layer = next(module for module in digits.network.modules() if isinstance(module, torch.nn.Linear))
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    found = search_of(digits, autocast=torch.bfloat16, store="cpu")("3", nfe=8, seed=0, output_type="latent")
    handle.remove()
    assert set(seen) == {torch.bfloat16} and found.images.dtype == torch.float32
    assert found.tree.store == torch.device("cpu")


def test_tree_settings_reach_the_tree(digits: ClassToImagePipeline) -> None:
    tree = search_of(digits)(
        "3", nfe=40, seed=5, select="uniform", backup="max", widening=(3.0, 0.5), branch=2, leaf_batch=3
    ).tree
    config = tree.config
    assert (config.hard, config.widening.constant, config.leaf_batch, config.seed) == (True, 3.0, 3, 5)
    assert config.branch == (2, 4) and config.select.power == 0.0
    chosen = search_of(digits)("3", nfe=10 * PATH).tree.config
    assert (chosen.leaf_batch, chosen.widening.alpha, chosen.widening.constant) == (1, 0.5, 1.0)
    assert search_of(digits, sampler="dts")("3", nfe=200 * PATH, callback=lambda p: True).tree.config.leaf_batch == 8


def test_seed_and_generator_fix_the_result(digits: ClassToImagePipeline) -> None:
    search = search_of(digits)
    first, second, other = (search("3", nfe=20, seed=seed, output_type="pt").images for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    drawn = [search("3", nfe=20, generator=torch.Generator().manual_seed(3), output_type="pt").images for _ in range(2)]
    assert torch.equal(*drawn)


def test_progress_bar_counts_model_calls(digits: ClassToImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    search = search_of(digits)
    search("3", nfe=20, seed=0)
    assert capsys.readouterr().err == ""  # not a terminal
    search.set_progress_bar_config(disable=False, desc="search")
    found = search("3", nfe=20, seed=0)
    shown = capsys.readouterr().err
    assert "search" in shown and f"{found.nfe}/20" in shown and "best=" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sampler": "dts-stra"}, "unknown sampler 'dts-stra'. Did you mean 'dts-star'"),
        ({"nfe": 3}, "nfe is 3, less than the 4 model calls"),
        ({"nfe": 0}, "nfe is 0"),
        ({"nfe": 3, "sampler": "smc"}, "nfe is 3, but one particle of smc costs 4"),
        ({"leaf_batch": 0}, "leaf_batch is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_waveforms_per_prompt": 2}, "num_waveforms_per_prompt has no effect with an image pipeline"),
        ({"output_type": "pli"}, "output_type is 'pli'. Did you mean 'pil'"),
        ({"readout": "bset"}, "unknown readout 'bset'"),
        ({"widening": "paper", "sampler": "smc"}, "widening is for trees"),
        ({"options": {"children": 2}}, "options are for particle samplers"),
        ({"step": "euler"}, "euler is deterministic"),
        ({"seed": 1, "generator": torch.Generator()}, "generator and seed are both given"),
        ({"select": "utc"}, "unknown selection rule 'utc'"),
        ({"audio_end_in_s": 1.0}, "audio_end_in_s has no effect"),
    ],
)
def test_refused_calls(digits: ClassToImagePipeline, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search_of(digits)(**({"prompt": "3", "nfe": 20} | more))


def test_refused_constructions(digits: ClassToImagePipeline) -> None:
    with pytest.raises(UsageError, match="unknown sampler 'tree'"):
        search_of(digits, sampler="tree")
    with pytest.raises(UsageError, match="cannot be searched"):
        search_of(object())
    with pytest.raises(UsageError, match="the reward is a int"):
        search_of(digits, 3)
    with pytest.raises(UsageError, match="temperature is 0"):
        search_of(digits, temperature=0.0)("3", nfe=20)
