"""The real laion-clap package, with a random checkpoint of its own architecture, through our loader."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("laion_clap") is None:
    pytest.skip("laion-clap is not installed (make test-extras)", allow_module_level=True)

from gencontrol.data.audio import resample
from gencontrol.errors import UsageError
from gencontrol.rewards import load_reward
from gencontrol.types import RewardContext
from tests.helpers.fixtures_models import roberta_tokenizer, seeded

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer 'roberta-base' folder, which the package looks for in the working directory, and a .pt file."""
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("laion")
    with pytest.MonkeyPatch.context() as patch, seeded(0):
        patch.chdir(folder)
        roberta_tokenizer(77).save_pretrained("roberta-base")
        config = RobertaConfig(vocab_size=64, num_hidden_layers=1, intermediate_size=64, max_position_embeddings=80)
        RobertaModel(config).save_pretrained("roberta-base")
        import laion_clap

        state = laion_clap.CLAP_Module(device="cpu").model.state_dict()
    state = {f"module.{key}": value for key, value in state.items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(80)[None]  # as in the published files
    torch.save({"state_dict": state}, folder / "630k-random.pt")
    return folder / "630k-random.pt"


def test_a_laion_checkpoint_scores_and_passes_a_gradient(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    reward = load_reward("clap", reward_model=str(checkpoint), device="cpu")
    wave = (0.1 * torch.randn(2, 32768, generator=torch.Generator().manual_seed(0))).requires_grad_()
    out = reward(wave, RewardContext(prompts=["abc def", "x"], sampling_rate=16_000))
    out.values.sum().backward()
    assert out.valid.all() and wave.grad is not None and float(wave.grad.norm()) > 0
    module = reward.backend._module  # type: ignore[attr-defined]
    clips = list(resample(wave.detach(), 16_000, 48_000))
    with torch.no_grad():
        audio = module.get_audio_embedding_from_data(x=clips, use_tensor=True)
        text = module.get_text_embedding(["abc def", "x"], use_tensor=True)
    torch.testing.assert_close(out.values.detach(), (audio * text).sum(-1), atol=1e-5, rtol=0)


def test_longer_clips_are_not_cut_by_chance(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    reward = load_reward("clap", reward_model=str(checkpoint), device="cpu")
    wave = 0.1 * torch.randn(1, 25 * 16_000, generator=torch.Generator().manual_seed(0))
    context = RewardContext(prompts=["a"], sampling_rate=16_000)
    assert torch.equal(reward(wave, context).values, reward(wave, context).values)


def test_another_audio_tower_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(UsageError, match="audio_tower"):
        load_reward("clap", reward_model=str(checkpoint), device="cpu", audio_tower="HTSAT-base")
