"""TreeSearchPipeline with particle samplers, and with a model of one's own whose law is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.pipelines import ClassToImagePipeline, TreeSearchPipeline
from gencontrol.sampling.tree.readout import Progress
from tests.helpers.fixtures_images import tiny_sd
from tests.helpers.search_toys import STEPS, Plane, brightness, search_of, tiny_digits


@pytest.fixture(scope="module")
def digits() -> ClassToImagePipeline:
    return tiny_digits()


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd()


# ---- other samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["best-of-n", "snis", "smc", "beam", "tds", "das", "dps"])
def test_particle_samplers(digits: ClassToImagePipeline, sampler: str) -> None:
    ended: list[Progress] = []
    digits.network.requires_grad_(True)
    found = search_of(digits, sampler=sampler)(
        ["3", "7"], nfe=80, seed=0, output_type="pt", callback=ended.append, num_images_per_prompt=2, readout="best"
    )
    assert all(p.requires_grad and p.grad is None for p in digits.network.parameters())
    assert found.tree is None and len(found.particles) == 2 and found.images.shape == (4, 1, 8, 8)
    assert 0 < found.nfe == sum(p.nfe for p in found.particles) <= 160 and found.reward_calls > 0
    assert [len(p.best) for p in ended] == [1, 2]
    torch.testing.assert_close(brightness(found.images), found.rewards.float(), atol=1e-6, rtol=0)
    assert float(found.rewards[2]) == max(found.particles[1].rewards.tolist())


def test_particles_of_stable_diffusion_climb_through_the_decoder(sd: Any) -> None:
    """A gradient sampler needs the whole way image → latent → network; dps beats plain samples on the same noise."""
    call = {"nfe": 8 * STEPS, "num_inference_steps": STEPS, "seed": 0, "guidance_scale": 1.0}
    search = search_of(sd, temperature=0.0005)
    plain, climbed = (search("a", **call, sampler=name).particles[0].rewards.mean() for name in ("snis", "dps"))
    assert float(climbed) > float(plain)


def test_options_reach_particle_samplers(digits: ClassToImagePipeline) -> None:
    search = search_of(digits, sampler="beam")
    narrow, wide = (search("3", nfe=80, seed=0, options={"children": n}).particles[0] for n in (2, 6))
    assert len(narrow) > len(wide)
    with pytest.raises(UsageError, match="beam has no option 'kids'"):
        search("3", nfe=80, options={"kids": 2})


# ---- a model of one's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["snis", "smc", "dts"])
def test_a_search_of_ones_own_model_has_the_right_law(sampler: str) -> None:
    """r = x1 at τ = 1 tilts N(0, 1) to N(1, 1) with log Z = 1/2."""
    search = TreeSearchPipeline(Plane(), lambda x: x[:, 0], temperature=1.0, sampler=sampler)
    found = search("x", nfe=60000, seed=0, num_waveforms_per_prompt=1000, readout="sample", leaf_batch=250)
    # 1000 paths: the weights' spread sqrt(e − 1) makes 0.04 for Z; 60 steps take 0.04 of the variance off
    assert found.log_z[0] == pytest.approx(0.5, abs=0.16)
    # 370 effective draws make 0.05 for the mean; a tree's draws lag behind until it has converged
    # (docs/methods/dts.md#p1)
    assert float(found.audios[:, 0].mean()) == pytest.approx(1.0, abs=0.5 if sampler == "dts" else 0.2)
    assert float(found.audios[:, 1].mean()) == pytest.approx(0.0, abs=0.2)
