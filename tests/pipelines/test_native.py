"""The bundled architecture behind the pipeline contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.pipelines import Pipeline, ProcessSpec, TextToAudioPipeline
from tests.helpers.fixtures_models import tiny_text_to_audio
from tests.helpers.pipeline_contract import PROMPTS, PipelineContract, call


@pytest.fixture(scope="module")
def native() -> TextToAudioPipeline:
    return tiny_text_to_audio()


class TestNative(PipelineContract):
    @pytest.fixture(autouse=True)
    def _pipe(self, native: TextToAudioPipeline) -> None:
        self.pipe = native

    def test_sampling_is_the_plain_loop(self) -> None:
        from gencontrol.sampling import cfg, sample

        noise = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
        cond = self.pipe.encode_prompt(PROMPTS[:2])
        model = cfg(self.pipe.denoiser, 2.5, self.pipe.uncond())
        expected = sample(model, noise.shape, steps=4, step="heun", cond=cond, x_init=noise)
        got = call(self.pipe, latents=noise, num_inference_steps=4, guidance_scale=2.5, step="heun")
        assert torch.equal(got, expected)

    def test_prior_is_scaled_by_the_schedule(self) -> None:
        parts = self.pipe.components
        edm = TextToAudioPipeline(**parts, process=ProcessSpec("edm", {"sigma_max": 5.0}, "x0"))
        noise = torch.ones(1, 8, 16)
        seen = []
        edm.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        call(edm, "x", latents=noise, guidance_scale=1.0)
        torch.testing.assert_close(seen[0], 5.0 * noise)  # x_1 = s(1)·noise, s(1) = sigma_max

    def test_uncond_is_the_learned_null(self) -> None:
        x, t = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)), 0.4
        null = self.pipe.denoiser(x, t, self.pipe.uncond()).raw
        torch.testing.assert_close(null, self.pipe.denoiser(x, t, None).raw, atol=1e-6, rtol=1e-5)

    def test_process_file_round_trip(self, tmp_path: Path) -> None:
        spec = ProcessSpec("vp", {"beta_max": 12.0}, "v", steps=7, guidance_scale=1.5)
        pipe = TextToAudioPipeline(**self.pipe.components, process=spec)
        pipe.save_pretrained(tmp_path)
        loaded = TextToAudioPipeline.from_pretrained(tmp_path)
        assert loaded._backend.spec == spec
        assert loaded.denoiser.process.schedule.beta_max == 12.0 and loaded.denoiser.prediction == "v"

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"schedule": "lineer"}, "Did you mean 'linear'"),
            ({"prediction": "noise"}, "noise"),
            ({"parameters": {"shft": 1.0}}, "shft"),
            ({"schedul": "linear"}, "unknown key 'schedul'"),
        ],
    )
    def test_bad_process_file(self, tmp_path: Path, table, message: str) -> None:
        self.pipe.save_pretrained(tmp_path)
        (tmp_path / "process.json").write_text(json.dumps(table))
        with pytest.raises(UsageError, match=message):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_components_must_fit(self) -> None:
        from gencontrol.models.networks.codec import MelCodec, MelCodecConfig

        with pytest.raises(UsageError, match="channels"):
            TextToAudioPipeline(**{**self.pipe.components, "codec": MelCodec(MelCodecConfig(channels=32))})
        with pytest.raises(UsageError, match="text_encoder"):
            TextToAudioPipeline(transformer=self.pipe.transformer)
        with pytest.raises(UsageError, match="is no text-to-audio pipeline"):
            TextToAudioPipeline(object())

    def test_register_modules(self) -> None:
        other = tiny_text_to_audio(seed=1)
        pipe = TextToAudioPipeline.from_pipe(self.pipe)
        pipe.register_modules(transformer=other.transformer)
        assert pipe.transformer is other.transformer is pipe.denoiser.network
        assert self.pipe.transformer is not other.transformer

    def test_long_prompts_are_cut_aloud(self) -> None:
        long = "abcdefghij" * 4
        with pytest.warns(UserWarning, match="only the first 32 of 42 tokens"):
            cut = self.pipe.encode_prompt(long)
        assert cut["tokens"].shape[1] == 32

    def test_variant_is_refused(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        with pytest.raises(UsageError, match="no variants"):
            TextToAudioPipeline.from_pretrained(tmp_path, variant="fp16")

    def test_damaged_tokenizer_is_refused(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        (tmp_path / "tokenizer" / "tokenizer.json").unlink()
        with pytest.raises(UsageError, match="tokenizer"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_low_precision_text_encoder_only_rounds(self) -> None:
        import copy

        half = TextToAudioPipeline(**copy.deepcopy(self.pipe.components), process=ProcessSpec(steps=4))
        half.encode_prompt("x")  # remembered in fp32, to be forgotten by the cast
        half.to(torch.bfloat16)
        assert next(half.text_encoder.parameters()).dtype == torch.bfloat16
        assert not torch.equal(half.encode_prompt("x")["pooled"], self.pipe.encode_prompt("x")["pooled"])
        assert half.codec.mean.dtype == torch.float32  # the codec's algebra stays exact
        # bf16 has 8 bits: 1 % of the values' size per layer; another noise or prompt would differ by the values' size
        assert (call(half, guidance_scale=1.0) - call(self.pipe, guidance_scale=1.0)).abs().mean() < 0.1


class TestWhere:
    """Sources that are not pipelines: one sentence with the name and the remedy."""

    def test_missing_folder(self, tmp_path: Path) -> None:
        for source in (tmp_path / "no", str(tmp_path / "no"), "./no", "no-slash"):
            with pytest.raises(UsageError, match="does not exist; give a folder"):
                TextToAudioPipeline.from_pretrained(source)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no model_index.json; give a folder written by save_pretrained"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"")
        with pytest.raises(UsageError, match="is a file"):
            TextToAudioPipeline.from_pretrained(tmp_path / "a.safetensors")

    def test_run_folder_points_to_final(self, tmp_path: Path) -> None:
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "model_index.json").write_text("{}")
        with pytest.raises(UsageError, match="give '.*final'"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_lora_and_component_folders(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UsageError, match="single component"):
            TextToAudioPipeline.from_pretrained(tmp_path)
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
        with pytest.raises(UsageError, match="load_lora_weights"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_class_name": 3}'])
    def test_damaged_index(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(UsageError, match="model_index.json"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_another_kind_of_pipeline(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        with pytest.raises(UsageError, match="holds a StableDiffusionPipeline; TextToAudioPipeline loads"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_hub_offline(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="'nobody/nothing' is not a folder here.*hub was not reached"):
            TextToAudioPipeline.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)

    def test_hub_gets_the_options(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        tiny_text_to_audio().save_pretrained(tmp_path)
        asked = []

        def file(repo, filename, **options):
            asked.append((repo, filename, options))
            return str(tmp_path / filename)

        def folder(repo, **options):
            asked.append((repo, options.pop("allow_patterns"), options))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", folder)
        pipe = TextToAudioPipeline.from_pretrained("me/model", revision="v1", cache_dir="/c", token="secret")
        options = {"revision": "v1", "cache_dir": "/c", "local_files_only": False, "token": "secret"}
        assert pipe.sampling_rate == 16000
        assert [(a[0], a[2]) for a in asked] == [("me/model", options)] * 2
        assert not any(p.endswith((".bin", ".py", ".pkl", "*")) for p in asked[1][1])

    def test_bundled_says_when_it_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

        monkeypatch.setattr("gencontrol.weights.BUNDLED", tmp_path / "bundled")
        with pytest.raises(EnvironmentMissing, match="not in this installation"):
            TextToAudioPipeline.from_pretrained("bundled")


def test_the_base_makes_no_pipeline() -> None:
    for make in (lambda: Pipeline({}, "x"), lambda: Pipeline.from_pretrained("x"), lambda: Pipeline.from_pipe(None)):
        with pytest.raises(TypeError, match="abstract class Pipeline"):
            make()


def test_push_to_hub_uploads_what_from_pretrained_loads(
    native: TextToAudioPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real call with the network's two functions replaced: what is uploaded must load again."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    seen: dict[str, object] = {}

    def create(self: object, repo_id: str, *, private: bool | None, exist_ok: bool) -> object:
        seen["created"] = (repo_id, private, exist_ok)
        return type("Url", (), {"repo_id": f"me/{repo_id}"})()

    def upload(self: object, *, repo_id: str, folder_path: str, commit_message: str, revision: str | None) -> object:
        loaded = TextToAudioPipeline.from_pretrained(folder_path)
        seen["same"] = all(
            torch.equal(a, b) for a, b in zip(loaded.denoiser.parameters(), native.denoiser.parameters(), strict=True)
        )
        seen["card"] = Path(folder_path, "README.md").read_text(encoding="utf-8")
        return type("Commit", (), {"commit_url": f"{repo_id}@{commit_message}"})()

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert native.push_to_hub("sound", private=True, commit_message="first") == "me/sound@first"
    assert seen["created"] == ("sound", True, True) and seen["same"] is True
    assert 'TextToAudioPipeline.from_pretrained("me/sound")' in str(seen["card"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentMissing, match="HF_HUB_OFFLINE"):
        native.push_to_hub("sound")
