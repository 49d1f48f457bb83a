"""Diffusion-DPO from files: the loss, the Trainer's contract, bad data by the line, images and a real VAE."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.offline.diffusion_dpo import DiffusionDpo, DpoConfig
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.data.images import to_pil
from gencontrol.errors import UsageError
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.testing.algorithm import AlgorithmContract
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.dragon_worlds import PROMPTS, SIZE, FirstAxis, make_task

CTX = StepContext(seed=0, step=0, micro_batch=1000)
COUNT = 10


def write_pairs(folder: Path, count: int = COUNT) -> Path:
    """Pairs of vectors: chosen ones lie at +1 on the first axis, rejected ones at −1."""
    generator = torch.Generator().manual_seed(3)
    lines = []
    for i in range(count):
        for name, sign in (("chosen", 1.0), ("rejected", -1.0)):
            latent = 0.3 * torch.randn(SIZE, generator=generator)
            latent[0] += sign
            save_file({"latent": latent}, str(folder / f"{name}{i}.safetensors"))
        row = {"prompt": PROMPTS[i % 3], "chosen": f"chosen{i}.safetensors", "rejected": f"rejected{i}.safetensors"}
        lines.append(json.dumps(row))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_dpo(data: Path, task: Any = None, **options: Any) -> DiffusionDpo:
    task = task or make_task()
    small = {"batch": 4, "updates_per_round": 2, "eval_steps": 4, "ema_decay": 0.9, "beta": 20.0}
    config = DpoConfig(**(small | options), data=str(data))
    return DiffusionDpo(task, FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path)


class TestContract(AlgorithmContract):
    """Ten pairs, batches of four: epochs overlap steps."""

    folder: ClassVar[Path]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def files(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        TestContract.folder = write_pairs(tmp_path_factory.mktemp("pairs"))

    def make(self) -> DiffusionDpo:
        return make_dpo(self.folder)


def test_loss_is_log_two_at_the_base_and_diffusion_dpo_beyond(pairs: Path) -> None:
    dpo = make_dpo(pairs)
    (micro,) = dpo.minibatches(dpo.collect(CTX).data, 0, CTX)
    first = dpo.loss(micro, CTX)
    assert float(first.total.detach()) == pytest.approx(4 * math.log(2), rel=1e-5) and first.count == 4
    base, network = [], dpo.task.denoiser.network

    def error(x0: Tensor) -> Tensor:
        t = micro.t[:, None]
        out = network((1 - t) * x0 + t * micro.noise, micro.t, micro.cond.expand())
        return (out.double() - (micro.noise - x0).double()).square().mean(1)

    with torch.no_grad():
        base = [error(micro.chosen), error(micro.rejected)]
        dpo.roles.trainable()[0].add_(0.1)
    gap = (error(micro.chosen) - base[0]) - (error(micro.rejected) - base[1])
    expected = torch.nn.functional.softplus(10.0 * gap).sum()
    torch.testing.assert_close(dpo.loss(micro, CTX).total, expected, rtol=1e-4, atol=1e-5)


def test_every_pair_is_seen_once_per_epoch(pairs: Path) -> None:
    dpo = make_dpo(pairs, batch=5, updates_per_round=2)
    data = dpo.collect(CTX).data
    assert sorted(data.entry.tolist()) == list(range(COUNT))
    torch.testing.assert_close(data.latents["chosen"][:, 0], torch.ones(COUNT), atol=1.2, rtol=0)


def test_two_ranks_share_the_pairs_and_their_noise(pairs: Path) -> None:
    dpo = make_dpo(pairs)
    (whole,) = dpo.minibatches(dpo.collect(CTX).data, 1, CTX)
    parts = []
    for rank in (0, 1):
        ctx = dataclasses.replace(CTX, rank=rank, world_size=2)
        parts += list(dpo.minibatches(dpo.collect(ctx).data, 1, ctx))
    order = [0, 2, 1, 3]
    for name in ("chosen", "rejected", "t", "noise"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)[order])


def test_training_moves_towards_the_chosen(pairs: Path) -> None:
    dpo = make_dpo(pairs, batch=10, ema_decay=0.0, eval_samples=16)
    run_in_memory(dpo, 10, Loop(3e-3), seed=0)
    assert dpo.evaluate(CTX).metrics["eval/reward/gain_low"] > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "chosen0.safetensors"}', "line 2: field 'rejected' is missing"),
        ('{"prompt": "a", "chosen": "x.png", "rejected": "x.png"}', "line 2: chosen 'x.png' does not exist"),
        ('{"prompt": "a", "choosen": "x", "rejected": "y"}', "line 2: unknown field 'choosen'. Did you mean 'chosen'"),
        ('{"prompt": 3, "chosen": "x", "rejected": "y"}', "line 2: 'prompt' is a int"),
        ("[1]", "line 2 is a list"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named(pairs: Path, line: str, message: str) -> None:
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(UsageError) as caught:
        make_dpo(pairs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_empty_manifests_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        make_dpo(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="has no entry"):
        make_dpo(tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match=r"algorithm\.data=FILE\.jsonl"):
        DiffusionDpo(make_task(), FirstAxis(), DpoConfig(), roles=Roles(make_task().denoiser.network), seed=0)


def test_files_that_do_not_fit_the_model_are_named(pairs: Path) -> None:
    folder = pairs.parent
    save_file({"latent": torch.zeros(SIZE + 1)}, str(folder / "chosen0.safetensors"))
    with pytest.raises(UsageError, match=r"line 1: chosen 'chosen0.safetensors' gives a latent of shape \[4\]"):
        make_dpo(pairs, batch=10).collect(CTX)
    save_file({"other": torch.zeros(SIZE)}, str(folder / "chosen0.safetensors"))
    with pytest.raises(UsageError, match="holds no tensor 'latent'"):
        make_dpo(pairs, batch=10).collect(CTX)
    (folder / "x.png").write_bytes(b"no image")
    row = {"prompt": PROMPTS[0], "chosen": "x.png", "rejected": "x.png"}
    pairs.write_text(json.dumps(row))
    with pytest.raises(UsageError, match="cannot be read as an image"):
        make_dpo(pairs).collect(CTX)
    to_pil(torch.zeros(3, 4, 4)).save(folder / "x.png")
    with pytest.raises(UsageError, match="no encoder of samples"):
        make_dpo(pairs).collect(CTX)
    wrong = dataclasses.replace(make_task(), encode_samples=lambda x: x.flatten(1))
    with pytest.raises(UsageError, match=r"'x.png' gives a latent of shape \[48\]"):
        make_dpo(pairs, wrong).collect(CTX)
    with pytest.raises(UsageError, match=r"expected \.wav"):
        make_dpo(pairs, dataclasses.replace(make_task(), sampling_rate=16000)).collect(CTX)


def test_two_steps_on_images_with_a_diffusers_vae(tmp_path: Path) -> None:
    """Stable Diffusion's layout with LoRA; images enter by the VAE's mode."""
    from gencontrol.pipelines import TextToImagePipeline
    from tests.helpers.fixtures_images import tiny_sd

    pipe = tiny_sd()
    task = TextToImagePipeline(pipe).task(["a"], ["b"])
    side = task.decode(torch.zeros(1, *task.latent_shape)).shape[-1]

    @torch.no_grad()
    def encode_samples(images: Tensor) -> Tensor:
        return pipe.vae.encode(images * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor

    generator = torch.Generator().manual_seed(0)
    for name in ("good", "bad"):
        to_pil(torch.rand(3, side, side, generator=generator)).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "good.png", "rejected": "bad.png"}))

    class Bright:
        name, kind, differentiable = "bright", "item", False

        def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
            return RewardOut(samples.flatten(1).mean(1), torch.ones(len(samples), dtype=torch.bool))

    roles = Roles(task.denoiser.network, ("policy", "ref"), LoraConfig(2))
    config = DpoConfig(data=str(tmp_path / "pairs.jsonl"), batch=2, updates_per_round=1, ema_decay=0.0)
    task = dataclasses.replace(task, encode_samples=encode_samples)
    start = [p.detach().clone() for p in roles.trainable()]
    records = run_in_memory(DiffusionDpo(task, Bright(), config, roles=roles, seed=0), 2, Loop(1e-3), seed=0)
    assert records[0]["loss/dpo"] == pytest.approx(math.log(2), rel=1e-4)
    assert any(not torch.equal(p, q) for p, q in zip(roles.trainable(), start))


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"batch": 0}, {"ema_decay": 1.0}, {"guidance_scale": -1.0}])
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DpoConfig(**options)
