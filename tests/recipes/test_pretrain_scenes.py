"""Scene pretraining: the contract, the two losses, what is saved; the reader and the judge learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.cli import main
from gencontrol.errors import UsageError
from gencontrol.models.conditions.text import encode_text
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
from gencontrol.models.networks.transformer import Transformer
from gencontrol.process import GaussianProcess, Linear
from gencontrol.recipes.scenes.data.corpus import SceneCorpus
from gencontrol.recipes.scenes.data.grammar import parse
from gencontrol.recipes.scenes.data.render import arrange
from gencontrol.recipes.scenes.flow import SceneMicro, ScenesPretrain, ScenesPretrainConfig
from gencontrol.recipes.scenes.networks import ATTRIBUTES, SceneJudge, SceneReader, attributes_of
from gencontrol.recipes.scenes.readers import SceneReadersConfig, SceneReadersPretrain
from gencontrol.recipes.scenes.text import FACTS, CaptionedNetwork, build_text_encoder, build_tokenizer, reading_loss
from gencontrol.testing.algorithm import AlgorithmContract
from tests.helpers.fixtures_scenes import tiny_text_to_image


def network() -> CaptionedNetwork:
    cut = PatchConfig(channels=3, size=32, patch=8)
    shape = backbone_config(cut, classes=16, context=16, dim=16, depth=1, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CaptionedNetwork(build_text_encoder(0, width=16, depth=1), PatchTransformer(cut, Transformer(shape)))
        for part in (made.transformer.backbone.out.weight, made.transformer.backbone.blocks[0].cross.to_out.weight):  # type: ignore[union-attr, index]
            torch.nn.init.normal_(part, std=0.1)  # zero at the start, so that nothing would reach the text
    return made


def make(**options: Any) -> ScenesPretrain:
    settings = {"batch": 4, "eval_items": 4, "eval_times": 2, "eval_samples": 2, "eval_steps": 2, **options}
    tokenizer = build_tokenizer()
    return ScenesPretrain(
        Denoiser(network(), GaussianProcess(Linear()), "velocity"),
        SceneCorpus(tokenizer, size=40),
        ScenesPretrainConfig(**settings),
        held_out=SceneCorpus(tokenizer, "test", size=40),
        seed=1,
        save=lambda folder: folder.mkdir(parents=True, exist_ok=True),
    )


class TestScenesContract(AlgorithmContract):
    def make(self) -> ScenesPretrain:
        return make()


class TestReadersContract(AlgorithmContract):
    def make(self) -> SceneReadersPretrain:
        return readers()


def readers(**options: Any) -> SceneReadersPretrain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SceneReadersPretrain(
            SceneReader(), SceneJudge(), SceneReadersConfig(**{"batch": 4, "eval_items": 4, **options}), seed=1
        )


def context(step: int = 0, **changes: Any) -> StepContext:
    return StepContext(seed=1, step=step, **{"micro_batch": 8, **changes})


def micros(algorithm: Any, step: int = 0, **changes: Any) -> list[Any]:
    ctx = context(step, **changes)
    return list(algorithm.minibatches(algorithm.collect(ctx).data, 0, ctx))


def test_loss_is_flow_plus_weighted_reading_and_teaches_the_text_encoder() -> None:
    algorithm = make(drop=0.0, reading=0.5)
    micro: SceneMicro = micros(algorithm)[0]
    out = algorithm.loss(micro, context())
    logits = algorithm.network.read(algorithm.network.encode(micro.cond))
    expected = algorithm.errors(micro).sum() + 0.5 * reading_loss(logits, micro.facts).sum()
    torch.testing.assert_close(out.total, expected)
    without = make(drop=0.0, reading=0.0)
    without.loss(micro, context()).total.backward()
    gradients = [p.grad for p in without.network.text_encoder.parameters()]
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0  # through the images alone


def test_dropped_captions_do_not_matter_to_the_image_but_are_read() -> None:
    algorithm = make(drop=1.0)
    micro: SceneMicro = micros(algorithm)[0]
    other = {**micro.cond, "ids": micro.cond["ids"].roll(1, 0), "mask": micro.cond["mask"].roll(1, 0)}
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b = (algorithm.network(x, torch.tensor(0.5), cond) for cond in (micro.cond, other))
    torch.testing.assert_close(a, b)
    keep = {**micro.cond, "drop": torch.zeros(4, dtype=torch.bool)}
    assert float((algorithm.network(x, torch.tensor(0.5), keep) - a).abs().max()) > 1e-4


def test_padding_changes_nothing() -> None:
    """What training sees (padded to the longest) is what sampling sees (padded to 32)."""
    made, tokenizer = network().eval(), build_tokenizer()
    text = "a red circle and a blue square"
    tokens = tokenizer([text], return_tensors="pt")
    short = made.encode({"ids": tokens["input_ids"], "mask": tokens["attention_mask"].bool()})
    long = encode_text(made.text_encoder, tokenizer, [text])
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        made.transformer(x, torch.tensor(0.3), short), made.transformer(x, torch.tensor(0.3), long)
    )


def test_reading_loss_by_hand() -> None:
    targets = torch.zeros(2, len(FACTS), dtype=torch.long)
    uniform = reading_loss(torch.zeros(2, sum(FACTS)), targets)
    expected = torch.tensor([float(torch.tensor(FACTS).double().log().mean())] * 2)
    torch.testing.assert_close(uniform, expected)


def test_evaluation_draws_one_picture_of_held_out_captions() -> None:
    found = make().evaluate(context())
    assert found.artefacts["samples.png"][:4] == b"\x89PNG" and "eval/loss" in found.metrics
    assert len(found.artefacts["captions.txt"].splitlines()) == 2
    assert "samples.png" not in make(eval_samples=0).evaluate(context()).artefacts


def test_wrong_parts_are_refused() -> None:
    with pytest.raises(UsageError, match="CaptionedNetwork"):
        ScenesPretrain(
            Denoiser(network(), GaussianProcess(Linear()), "velocity"),
            SceneCorpus(None),
            ScenesPretrainConfig(),
            held_out=SceneCorpus(None),
            seed=0,
            save=lambda folder: None,
        )
    with pytest.raises(ValueError, match="reading"):
        ScenesPretrainConfig(reading=-1.0)
    with pytest.raises(ValueError, match="scramble"):
        SceneReadersConfig(scramble=2.0)


def test_reader_and_judge_learn_and_come_back(tmp_path: Path) -> None:
    algorithm = readers(batch=8, ema=0.5)
    optimizer = torch.optim.AdamW(algorithm.roles.trainable(), lr=3e-3)
    first = micros(algorithm)[0]
    before = algorithm.loss(first, context())
    for _ in range(12):
        algorithm.loss(first, context()).total.div(8).backward()
        optimizer.step()
        optimizer.zero_grad()
        algorithm.after_update(context(), 0)
    after = algorithm.loss(first, context())
    for name in ("loss/reader", "loss/judge"):
        assert float(after.metrics[name]) < 0.7 * float(before.metrics[name])
    algorithm.save_final(tmp_path)
    judge, reader = (
        SceneJudge.from_pretrained(tmp_path / "scene_judge"),
        SceneReader.from_pretrained(tmp_path / "scene_reader"),
    )
    with algorithm.roles.use("ema"), torch.no_grad():
        torch.testing.assert_close(
            judge.embed(first.to_judge), algorithm.judge.embed(first.to_judge), atol=2e-2, rtol=0
        )
        torch.testing.assert_close(reader(first.to_read), algorithm.reader(first.to_read), atol=5e-2, rtol=0)
    assert not any(p.requires_grad for p in judge.parameters())
    with pytest.raises(UsageError, match="class SceneReader"):
        SceneReader.from_pretrained(tmp_path / "scene_judge")
    with pytest.raises(UsageError, match="32, 32"):
        judge.embed(torch.zeros(1, 3, 16, 16))


def test_attributes_of_a_scene_by_hand() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    scenes = [arrange(parse(text), rng) for text in ("a large red circle and a small cyan cross", "the word CAT")]
    rows = [dict(zip(ATTRIBUTES, row, strict=True)) for row in attributes_of(scenes).tolist()]
    assert {name: k for name, k in rows[0].items() if k} == {
        "objects": 2, "circle": 1, "cross": 1, "red": 1, "cyan": 1, "small": 1, "large": 1
    }  # fmt: skip
    assert {name: k for name, k in rows[1].items() if k} == {"word": 1}


def test_cli_makes_loadable_folders(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    sizes = ["model.dim=16", "model.depth=1", "model.heads=2", "model.text_width=16", "model.text_depth=1"]
    quick = ["algorithm.eval_items=2", "algorithm.eval_samples=0", "train.precision=fp32"]
    run = tmp_path / "scenes"
    command = ["pretrain", "scenes", "--output", str(run), "--threads", "1", "--steps", "2", "--batch", "2"]
    assert main([*command, *sizes, *quick]) == 0
    assert main([*command, *sizes, *quick]) == 0  # the same command again finds the finished run, its settings equal
    folder = run / "final"
    made = PatchTransformer.from_pretrained(folder / "transformer")
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    assert text.dtype == torch.float32
    cond = encode_text(text, AutoTokenizer.from_pretrained(folder / "tokenizer"), ["the word CAT in red"])
    assert made(torch.zeros(1, 3, 32, 32), 0.5, cond).shape == (1, 3, 32, 32)
    again = [
        "pretrain",
        "scene-readers",
        "--output",
        str(tmp_path / "r"),
        "--threads",
        "1",
        "--steps",
        "1",
        "--batch",
        "2",
    ]
    assert main([*again, "algorithm.eval_items=2"]) == 0
    SceneReader.from_pretrained(tmp_path / "r" / "final" / "scene_reader")
    assert main(["pretrain", "scene-readers", "--output", str(tmp_path / "x"), "model.dim=8"]) == 2
    assert main(["pretrain", "scenes", "--output", str(tmp_path / "y"), "model.patch=5"]) == 2


def test_tiny_folder_has_the_layout(tmp_path: Path) -> None:
    folder = tiny_text_to_image(tmp_path)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", "process.json", "transformer/config.json", "text_encoder/model.safetensors"} <= names
    assert {"transformer/backbone/model.safetensors", "tokenizer/tokenizer.json"} <= names
