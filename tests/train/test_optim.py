"""Learning rate, AdamW state, fp16 loss scale, precision of trained weights (P1, P2)."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from gencontrol.algorithms.base import StepContext
from gencontrol.errors import CheckpointError, EnvironmentMissing, UsageError
from gencontrol.models.roles import Roles
from gencontrol.testing.algorithm import assert_same_run, metric_lines
from gencontrol.train.distributed.dist import Group, Layout
from gencontrol.train.optim import LossScale, Optimizer, clip_gradients, gradients, learning_rate, name_parameters
from gencontrol.train.precision import autocast_dtype
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.training_toy import Toy, network


def test_p2_learning_rate_is_a_function_of_the_position_alone() -> None:
    linear = TrainConfig(steps=10, lr=1.0, warmup=4, lr_schedule="linear")
    assert [learning_rate(linear, p) for p in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert [learning_rate(linear, p) for p in (4, 7, 10)] == [1.0, 0.5, 0.0]
    cosine = TrainConfig(steps=10, lr=2.0, lr_schedule="cosine")
    assert learning_rate(cosine, 5) == pytest.approx(1.0) and learning_rate(cosine, 0) == 2.0
    assert learning_rate(cosine, 2.5) == pytest.approx(1 + math.cos(math.pi / 4))
    assert learning_rate(TrainConfig(steps=10, lr=3.0, warmup=2), 9) == 3.0


def test_logged_learning_rates_are_the_schedule(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, lr=1.0, warmup=2, lr_schedule="linear", max_grad_norm=0.1)
    metrics = Trainer(config, tmp_path).fit(Toy(updates=2))["metrics"]
    assert metrics["lr"] == learning_rate(config, 3) == 0.5
    assert metrics["updates"] == 8


def test_every_update_has_its_own_rate_and_tells_the_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of update u of U in step s is that of position s + u/U; `after_update` follows taken updates only."""
    rates: list[float] = []
    take = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, lr: (rates.append(lr), take(self, lr)))
    told: list[tuple[int, int]] = []

    class Told(Toy):
        def after_update(self, ctx: StepContext, update: int) -> None:
            told.append((ctx.step, update))
            super().after_update(ctx, update)

    config = TrainConfig(steps=3, lr=1.0, lr_schedule="linear", micro_batch=8, max_grad_norm=0.1)
    Trainer(config, tmp_path).fit(Told(updates=2, on_loss=lambda step, calls: math.nan if calls == 4 else 1.0))
    positions = [0, 0.5, 1, 2, 2.5]  # the fourth loss, update 1 of step 1, was not finite
    assert rates == [learning_rate(config, position) for position in positions]
    assert told == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("lr", 0.0), ("lr", math.inf), ("betas", (0.9, 1.0)), ("max_grad_norm", -1.0), ("precision", "fp8")]
    + [("micro_batch", 0), ("save_every", 0), ("keep", 0), ("eval_every", -1), ("seed", -1), ("track", "wandb")]
    + [("lr_schedule", "step"), ("device", "tpu"), ("threads", -1), ("max_bad_steps", 0), ("weight_decay", math.nan)],
)
def test_ranges_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = .*(expected|choose from)"):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_adamw_follows_its_paper() -> None:
    """Against a direct float64 computation of Loshchilov and Hutter (2019), algorithm 2; decay on matrices only."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    config = TrainConfig(lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    optimizer = Optimizer(name_parameters(module, list(module.parameters())), config)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 4):
        for name, parameter in module.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.clone()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            decay = 0.3 if name == "weight" else 0.0
            update = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[name] = expected[name] - 0.01 * step * (update + decay * expected[name])
        optimizer.step(0.01 * step)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_optimizer_state_is_strict() -> None:
    module = nn.Linear(2, 2)
    optimizer = Optimizer(name_parameters(module, list(module.parameters())), TrainConfig())
    gradients(optimizer.parameters())
    optimizer.step(0.1)
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"missing \['bias'\]"):
        optimizer.load_state_dict({"weight": state["weight"]})
    with pytest.raises(CheckpointError, match=r"unexpected \['other'\]"):
        optimizer.load_state_dict({**state, "other": state["bias"]})
    with pytest.raises(CheckpointError, match=r"'bias.exp_avg' has shape \(3,\), the model has \(2,\)"):
        optimizer.load_state_dict({**state, "bias": {"exp_avg": torch.zeros(3)}})


def test_p1_half_precision_weights_are_refused() -> None:
    module = nn.Linear(2, 2).bfloat16()
    with pytest.raises(UsageError, match="keep trainable weights in float32"):
        name_parameters(module, list(module.parameters()))
    with pytest.raises(UsageError, match="no trainable parameter"):
        name_parameters(module, [])
    clean = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="listed twice"):
        name_parameters(clean, [clean.weight, clean.weight])


def test_device_must_be_where_the_weights_are(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentMissing, match="sees no CUDA device") as caught:
            Trainer(TrainConfig(device="cuda"), tmp_path).fit(Toy())
        assert caught.value.exit_code == 6
    assert Trainer(TrainConfig(steps=1, device="cpu"), tmp_path / "b").fit(Toy())["status"] == "finished"


def test_clipping_scales_to_the_norm_and_leaves_non_finite_ones_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = float(Layout(Group()).norm([parameter]))
    assert norm == 5.0
    assert clip_gradients([parameter.grad], norm, 0.0) == 5.0 and parameter.grad.tolist() == [3.0, 4.0]
    assert clip_gradients([parameter.grad], norm, 1.0) == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    parameter.grad = torch.tensor([math.inf, 1.0])
    assert clip_gradients([parameter.grad], math.inf, 1.0) == math.inf and parameter.grad[1] == 1.0


def test_p1_loss_scale_halves_and_doubles() -> None:
    scale = LossScale(enabled=True, scale=8.0, growth_interval=2)
    scale.update(overflow=True)
    assert scale.scale == 4.0
    scale.update(overflow=False)
    scale.update(overflow=False)
    assert scale.scale == 8.0 and scale.good == 0
    constant = LossScale()
    constant.update(overflow=True)
    assert constant.scale == 1.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_p1_half_precision_trains_and_resumes_bit_equal(tmp_path: Path, precision: str) -> None:
    """fp16: an overflow in step 5 halves the scale without counting as bad; the scale survives the resume."""

    def overflow(step: int, calls: int) -> float:
        return 1e34 if step == 4 and precision == "fp16" else 1.0

    config = TrainConfig(steps=8, micro_batch=8, precision=precision, lr=1e-2)  # type: ignore[arg-type]
    whole = Trainer(config, tmp_path / "a").fit(Toy(on_loss=overflow))["metrics"]
    Trainer(config, tmp_path / "b").fit(Toy(on_loss=overflow), stop_at=5)
    Trainer(config, tmp_path / "b").fit(Toy(on_loss=overflow))
    assert_same_run(tmp_path / "a", tmp_path / "b", 8)
    assert whole["health/skipped"] == 0 and math.isfinite(whole["loss/total"])
    if precision == "fp16":
        halvings = 13 - math.log2(whole["health/loss_scale"])
        assert halvings >= 1 and whole["updates"] == 8 - halvings
    else:  # 8 bits of mantissa: about 1 % off the float32 loss, and not equal to it
        Trainer(TrainConfig(steps=1, micro_batch=8, lr=1e-2), tmp_path / "c").fit(Toy())
        exact, half = (metric_lines(tmp_path / name)[0]["loss/total"] for name in "ca")
        assert half == pytest.approx(exact, rel=0.02) and half != exact


def test_compile_runs_the_network_through_torch_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, asked = Toy(), []
    monkeypatch.setattr(toy.roles.module, "compile", lambda: asked.append(True))
    Trainer(TrainConfig(steps=1, compile=True), tmp_path).fit(toy)
    assert asked == [True]


def cannot_compile() -> str:
    """Why inductor cannot build C++ code here, or an empty text."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "inductor needs a C++ compiler: neither $CXX nor g++ nor clang++ is on the path"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"inductor needs Python's headers: {header} is absent"


class Whole(nn.Module):
    """The toy's network with a forward of its own: the compiler passes over containers of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out


@pytest.mark.skipif(bool(cannot_compile()), reason=cannot_compile() or "can compile")
def test_steps_through_inductor_equal_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend: generated C++ kernels, forward and backward, under both roles; fp32 in another order."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    from torch._inductor import metrics

    metrics.reset()
    for name, compiled in (("eager", False), ("compiled", True)):
        config = TrainConfig(steps=2, lr=1e-2, eval_every=2, micro_batch=8, compile=compiled)
        toy = Toy()
        toy.roles = Roles(Whole(), ("policy", "ema"))
        Trainer(config, tmp_path / name).fit(toy)
    torch._dynamo.reset()
    assert metrics.generated_kernel_count >= 2
    eager, fused = metric_lines(tmp_path / "eager"), metric_lines(tmp_path / "compiled")
    for before, after in zip(eager, fused, strict=True):
        for key in before.keys() & {"loss/total", "grad_norm", "eval/square"}:
            assert after[key] == pytest.approx(before[key], rel=1e-5), (before["step"], key)


@pytest.mark.parametrize("fast", [False, True])
def test_auto_precision_takes_what_the_device_is_fast_in(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And bf16, asked for where it is slow, is done and said."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    assert autocast_dtype("auto", "cpu") == (torch.bfloat16 if fast else None)
    assert autocast_dtype("auto", "cuda") == autocast_dtype("bf16", "cpu") == torch.bfloat16
    Trainer(TrainConfig(steps=1, micro_batch=8, precision="bf16"), tmp_path / "run").fit(Toy())
    assert ("no bf16 arithmetic" in capsys.readouterr().err) != fast
