"""A run folder as a fine-tuning leaves it, made without training, for tests of what reads run folders."""

from __future__ import annotations

import io
import json
import math
import random
import wave
from pathlib import Path

from PIL import Image

PROMPTS = ["a fast bright marimba arpeggio", "slow sad cello, with reverb", '<b>loud</b> & "distorted" bass', "wind"]


def tone(hertz: float, seconds: float = 1.0, rate: int = 16000) -> bytes:
    """A wav file of a decaying sine."""
    samples = (
        int(12000 * math.sin(2 * math.pi * hertz * n / rate) * math.exp(-2 * n / rate))
        for n in range(int(seconds * rate))
    )
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(b"".join(value.to_bytes(2, "little", signed=True) for value in samples))
    return buffer.getvalue()


def picture(brightness: int) -> bytes:
    """A small PNG."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((128, 64)).point(lambda v: min(255, v + brightness)).save(buffer, "PNG")
    return buffer.getvalue()


def make_finetune(folder: Path, steps: int = 120, *, finished: bool = True) -> Path:
    """Write a fine-tuning's run folder: config, metrics with evaluations, sounds, and final/ where finished."""
    folder.mkdir(parents=True)
    noise = random.Random(0)
    config = f"""[run]
model = "bundled"
reward = ["clap:0.7", "fad:0.3"]
algorithm = "dragon"
output = "{folder}"
lora_rank = 16
prompt_count = 2000

[train]
steps = {steps}
lr = 0.0001

[algorithm]
beta = "auto"
generations = 2
"""
    (folder / "config.toml").write_text(config)
    start = {"command": "gencontrol finetune --reward clap:0.7 --reward fad:0.3 --output " + str(folder)}
    start |= {
        "versions": {"gencontrol": "0.1.0", "torch": "2.13.0", "transformers": "5.0"},
        "commit": "0123abc",
        "device": "CPU, 2 cores",
    }
    (folder / "run.json").write_text(json.dumps({"kind": "finetune", "starts": [start]}))
    rows = [_row(step, steps, noise) for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (0, steps):
        _samples(folder / "samples" / f"step_{step:08d}", step / steps)
    if finished:
        (folder / "final" / "lora").mkdir(parents=True)
    return folder


def _row(step: int, steps: int, noise: random.Random) -> dict[str, object]:
    progress = 1 - math.exp(-3 * step / steps)
    row: dict[str, object] = {"step": step, "time/wall": 2.5 * step, "lr": 1e-4}
    if step:
        row |= {
            "reward/mean": 0.21 + 0.2 * progress + noise.gauss(0, 0.02),
            "loss/total": 0.5 - 0.04 * progress + noise.gauss(0, 0.01),
            "grad_norm": 0.3 + abs(noise.gauss(0, 0.05)),
            "reward/valid_fraction": 1.0,
            "time/collect": 2.0 + noise.random(),
            "policy/g_std": 0.001 * progress,
        }
    if step % max(1, steps // 5) == 0:
        gain = 0.18 * progress
        row |= {
            "eval/reward/mean": 0.24 + gain,
            "eval/reward/base_mean": 0.24,
            "eval/reward/gain": gain,
            "eval/reward/gain_low": gain - 0.03,
            "eval/reward/gain_high": gain + 0.03,
            "eval/win_rate": 0.5 + 0.4 * progress,
            "eval/win_rate_low": 0.4 + 0.4 * progress,
            "eval/win_rate_high": min(1.0, 0.6 + 0.4 * progress),
            "eval/items": 64.0,
            "eval/distance_to_base": 2e-4 * progress,
        }
    return row


def _samples(folder: Path, progress: float) -> None:
    folder.mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        base, tuned = 0.2 + 0.05 * index, 0.2 + 0.05 * index + (0.15 - 0.06 * index) * progress
        place = ("best", "median", "lower quarter", "worst")[index]
        rows.append({"prompt": prompt, "item": index, "place": place, "base_reward": base, "tuned_reward": tuned})
        for side, hertz, light in (("base", 220.0, 0), ("tuned", 220.0 * (1 + progress), 60)):
            (folder / f"{side}_{index:02d}.wav").write_bytes(tone(hertz * (1 + 0.5 * index)))
            (folder / f"{side}_{index:02d}.png").write_bytes(picture(light))
    (folder / "prompts.json").write_text(json.dumps(rows))
    (folder / "metrics.json").write_text("{}")


def make_pretrain(folder: Path, steps: int = 30) -> Path:
    """Write a flow pretraining's run folder."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[run]\nstage = "flow"\n\n[train]\nsteps = {steps}\n')
    rows = [
        {"step": step, "loss/total": 1 / (1 + step)} | ({"eval/loss": 1 / (1 + step)} if step % 10 == 0 else {})
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = folder / "samples" / f"step_{steps:08d}"
    samples.mkdir(parents=True)
    (samples / "sample_00.wav").write_bytes(tone(330))
    (samples / "sample_00.png").write_bytes(picture(0))
    (samples / "captions.txt").write_text("00 a happy flute\n")
    (folder / "final").mkdir()
    return folder
