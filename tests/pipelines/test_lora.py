"""LoRA files and adapters: round trips, strict keys, weights, fusion, saving, and interchange with diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gencontrol.errors import UsageError
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.pipelines import TextToAudioPipeline
from gencontrol.pipelines.hub.lora import METADATA_KEY
from tests.helpers.fixtures_models import tiny_stable_audio, tiny_text_to_audio
from tests.helpers.pipeline_contract import call

FILE = "pytorch_lora_weights.safetensors"

#: (W + BA)x against Wx + B(Ax): rounding of another order of summation, in fp32
ORDER = 1e-5


def trained_roles(pipe: TextToAudioPipeline, seed: int = 0, **lora: Any) -> Roles:
    """LoRA roles whose policy has moved away from zero effect, as after training."""
    roles = Roles(pipe.denoiser.network, ("policy", "ref"), LoraConfig(rank=3, **lora))  # as the trainer makes them
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.trainable():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    return roles


@pytest.fixture(params=["native", "stable_audio"])
def build(request: pytest.FixtureRequest) -> Callable[[], TextToAudioPipeline]:
    if request.param == "native":
        return tiny_text_to_audio
    return lambda: TextToAudioPipeline(tiny_stable_audio())


def test_trained_lora_round_trip(build, tmp_path: Path) -> None:
    pipe, fresh = build(), build()
    base = call(fresh)
    trained_roles(pipe, alpha=6.0)
    tuned = call(pipe)
    assert (tuned - base).abs().max() > 1e-3
    assert pipe.get_active_adapters() == ["policy"]
    path = pipe.save_lora_weights(tmp_path)
    assert path == tmp_path / FILE
    fresh.load_lora_weights(tmp_path)
    assert fresh.get_list_adapters() == fresh.get_active_adapters() == ["default"]
    assert torch.equal(call(fresh), tuned)  # rank and alpha (scale 2) come from the header
    fresh.unload_lora_weights()
    assert fresh.get_list_adapters() == [] and torch.equal(call(fresh), base)
    assert set(fresh.network.state_dict()) == set(build().network.state_dict())


def test_file_of_the_roles_is_the_same(build, tmp_path: Path) -> None:
    pipe, fresh = build(), build()
    trained_roles(pipe, alpha=6.0).save_lora(tmp_path / "roles")
    pipe.save_lora_weights(tmp_path / "pipeline")
    theirs, mine = load_file(tmp_path / "roles" / FILE), load_file(tmp_path / "pipeline" / FILE)
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[k], mine[k]) for k in mine)
    fresh.load_lora_weights(tmp_path / "roles")
    assert torch.equal(call(fresh), call(pipe))


def test_loading_draws_nothing_from_the_global_generator(build, tmp_path: Path, fenced_rng) -> None:
    pipe = build()
    trained_roles(pipe)
    pipe.save_lora_weights(tmp_path)
    fresh = build()
    fresh.load_lora_weights(tmp_path / FILE)
    call(fresh)


def test_save_pretrained_merges_the_active_adapter(build, tmp_path: Path) -> None:
    pipe = build()
    roles = trained_roles(pipe)
    tuned = call(pipe)
    before = {key: value.clone() for key, value in pipe.network.state_dict().items()}
    pipe.save_pretrained(tmp_path / "tuned")
    after = pipe.network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    merged = TextToAudioPipeline.from_pretrained(tmp_path / "tuned")
    assert merged.get_list_adapters() == []
    torch.testing.assert_close(call(merged), tuned, atol=ORDER, rtol=ORDER)
    with roles.use("ref"):
        pipe.save_pretrained(tmp_path / "base")
        assert torch.equal(call(TextToAudioPipeline.from_pretrained(tmp_path / "base")), call(pipe))


def test_save_final_has_both_forms(build, tmp_path: Path) -> None:
    pipe, fresh = build(), build()
    trained_roles(pipe)
    pipe.save_final(tmp_path)
    fresh.load_lora_weights(tmp_path / "lora")
    assert torch.equal(call(fresh), call(pipe))
    merged = TextToAudioPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(call(merged), call(pipe), atol=ORDER, rtol=ORDER)


def test_adapters_and_their_weights(build, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for seed in (0, 1):
        pipe = build()
        trained_roles(pipe, seed)
        pipe.save_lora_weights(tmp_path / str(seed))
    base, both = call(build()), build()
    both.load_lora_weights(tmp_path / "0", "first")
    one = call(both)
    both.load_lora_weights(tmp_path / "1")
    assert not [str(w.message) for w in recwarn if "peft" in str(w.message)]
    assert both.get_list_adapters() == ["first", "default"] and both.get_active_adapters() == ["default"]
    two = call(both)
    assert (one - two).abs().max() > 1e-3
    both.set_adapters("first")
    assert torch.equal(call(both), one)
    both.set_adapters(["first", "default"], [1.0, 0.0])
    torch.testing.assert_close(call(both), one, atol=ORDER, rtol=ORDER)
    both.set_adapters(["first", "default"], [0.0, 0.0])
    torch.testing.assert_close(call(both), base, atol=ORDER, rtol=ORDER)
    both.set_adapters(["first", "default"])
    assert min((call(both) - other).abs().max() for other in (one, two, base)) > 1e-3
    with pytest.raises(UsageError, match="several|name the one"):
        both.save_lora_weights(tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'first'"):
        both.set_adapters("frist")
    with pytest.raises(UsageError, match="2 adapters and 1 weights"):
        both.set_adapters(["first", "default"], [1.0])
    with pytest.raises(UsageError, match="loaded already"):
        both.load_lora_weights(tmp_path / "1", "first")


def test_fuse_and_unfuse(build, tmp_path: Path) -> None:
    pipe = build()
    trained_roles(pipe)
    pipe.save_lora_weights(tmp_path)
    fresh = build()
    base = call(fresh)
    with pytest.raises(UsageError, match="load or name"):
        fresh.fuse_lora()
    fresh.load_lora_weights(tmp_path)
    tuned = call(fresh)
    fresh.fuse_lora()
    torch.testing.assert_close(call(fresh), tuned, atol=ORDER, rtol=ORDER)
    with pytest.raises(UsageError, match="fused already"):
        fresh.fuse_lora()
    fresh.save_pretrained(tmp_path / "fused")  # fused adapters are in the weights once, not twice
    torch.testing.assert_close(
        call(TextToAudioPipeline.from_pretrained(tmp_path / "fused")), tuned, atol=ORDER, rtol=ORDER
    )
    fresh.unfuse_lora()
    torch.testing.assert_close(call(fresh), tuned, atol=ORDER, rtol=ORDER)
    fresh.set_adapters("default", 0.0)
    torch.testing.assert_close(call(fresh), base, atol=ORDER, rtol=ORDER)
    fresh.set_adapters("default")
    fresh.fuse_lora(lora_scale=0.5)
    half = call(fresh)
    fresh.unload_lora_weights()  # fused weights stay
    assert torch.equal(call(fresh), half) and fresh.get_list_adapters() == []
    again = build()
    again.load_lora_weights(tmp_path)
    again.set_adapters("default", 0.5)
    torch.testing.assert_close(call(again), half, atol=ORDER, rtol=ORDER)


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a LoRA file with other tensors, without its header."""
    weights = load_file(source / FILE)
    change(weights)
    target.mkdir()
    save_file(weights, target / FILE)
    return target


def test_keys_are_strict(build, tmp_path: Path) -> None:
    pipe = build()
    trained_roles(pipe)
    pipe.save_lora_weights(tmp_path / "good")
    keys = list(load_file(tmp_path / "good" / FILE))
    name = keys[0].partition(".lora_")[0]
    down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    fresh = build()
    base, state = call(fresh), list(fresh.network.state_dict())
    changes = {
        "missing": (lambda w: w.pop(up), rf"missing keys \['{up.partition('.')[2]}'\]"),
        "unknown": (
            lambda w: w.update({"transformer.no.lora_A.weight": w[down].clone()}),
            r"unexpected keys \['no.lora_A",
        ),
        "kind": (lambda w: w.update({f"{name}.lora_down.weight": w[down].clone()}), "unexpected keys"),
        "shape": (lambda w: w.update({down: torch.zeros(3, 5)}), "other shapes"),
        "empty": (lambda w: w.clear(), "does not fit"),
        "foreign": (lambda w: w.update({"text_encoder.q.lora_A.weight": w[down].clone()}), "other components"),
        "other": (lambda w: [w.update({k.replace("transformer.", "unet."): w.pop(k)}) for k in list(w)], "for a unet"),
    }
    for label, (change, message) in changes.items():
        with pytest.raises(UsageError, match=message):
            fresh.load_lora_weights(edited(tmp_path / "good", tmp_path / label, change))
    assert list(fresh.network.state_dict()) == state and torch.equal(call(fresh), base)
    fresh.load_lora_weights(edited(tmp_path / "good", tmp_path / "plain", lambda w: None))
    assert torch.equal(call(fresh), call(pipe))  # without a header alpha = rank, which is what was trained


def test_header_that_contradicts_the_tensors(tmp_path: Path) -> None:
    pipe = tiny_text_to_audio()
    trained_roles(pipe)
    pipe.save_lora_weights(tmp_path)
    header = {METADATA_KEY: json.dumps({"transformer.r": 7, "transformer.lora_alpha": 7})}
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata=header)
    fresh = tiny_text_to_audio()
    with pytest.raises(UsageError, match="contradict its header"):
        fresh.load_lora_weights(tmp_path)
    assert fresh.get_list_adapters() == [] and torch.equal(call(fresh), call(tiny_text_to_audio()))


def test_no_file(tmp_path: Path) -> None:
    pipe = tiny_text_to_audio()
    with pytest.raises(UsageError, match="does not exist"):
        pipe.load_lora_weights(tmp_path / "no")
    with pytest.raises(UsageError, match="has no LoRA"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / FILE).write_bytes(b"not safetensors")
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(UsageError, match="name the one"):
        pipe.save_lora_weights(tmp_path)


def test_offloaded_pipeline_takes_a_lora(build, tmp_path: Path) -> None:
    pipe = build()
    trained_roles(pipe)
    pipe.save_lora_weights(tmp_path)
    fresh = build()
    fresh.enable_model_cpu_offload(device="cpu")
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(call(fresh), call(pipe))


def with_loader(transformer: Any) -> Any:
    """Give a StableAudioDiTModel diffusers' own LoRA loader, which diffusers 0.42 leaves out of this class."""
    from diffusers import StableAudioDiTModel
    from diffusers.loaders import PeftAdapterMixin

    class Loader(StableAudioDiTModel, PeftAdapterMixin):
        pass

    transformer.__class__ = Loader
    return transformer


def test_our_lora_loads_in_diffusers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers.utils import logging

    pipe, plain = TextToAudioPipeline(tiny_stable_audio()), tiny_stable_audio()
    trained_roles(pipe, alpha=6.0)
    pipe.save_lora_weights(tmp_path)
    logging.enable_propagation()
    with_loader(plain.transformer).load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=FILE)
    logging.disable_propagation()
    assert not caplog.records  # diffusers logs missing and unexpected keys
    loaded = {name: value for name, value in plain.transformer.state_dict().items() if ".lora_" in name}
    mine = {name: value for name, value in pipe.network.state_dict().items() if ".lora_" in name}
    assert len(loaded) == len(mine) > 0
    for name, value in mine.items():
        assert torch.equal(loaded[name.replace(".policy.", ".default_0.")], value)
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    cond = pipe.encode_prompt("a bell")
    plain.transformer.__class__ = type(pipe.network)
    with torch.no_grad():
        theirs, ours = (p.denoiser(x, 0.5, cond).raw for p in (TextToAudioPipeline(plain), pipe))
    assert torch.equal(theirs, ours)  # with the same scale: alpha came along


def test_diffusers_lora_loads_in_ours(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig

    theirs = tiny_stable_audio()
    kind = type(theirs.transformer)
    with_loader(theirs.transformer)
    theirs.transformer.add_adapter(PeftConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"]))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    theirs.transformer.save_lora_adapter(tmp_path)
    theirs.transformer.__class__ = kind
    ours = TextToAudioPipeline(tiny_stable_audio())
    base = call(ours)
    ours.load_lora_weights(tmp_path)
    tuned = call(ours)
    assert torch.equal(tuned, call(TextToAudioPipeline(theirs))) and (tuned - base).abs().max() > 1e-4
