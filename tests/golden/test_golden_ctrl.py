"""CTRL's path KL and its gradient through the chain against the official code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gencontrol.algorithms.ctrl.chain import ControlChain
from gencontrol.models.denoiser import Pred
from gencontrol.process import GaussianProcess, Table
from gencontrol.types import Prediction
from tests.helpers.golden import cases, relative, tensors

ENDS = (0.00085**0.5, 0.012**0.5)


@pytest.mark.parametrize("case", cases("ctrl_kl"))
def test_path_kl_and_its_gradient(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that has a deviation counts: all 20 where the table ends above 0, else 19."""
    config, data = cases("ctrl_kl")[case], tensors("ctrl_kl", case)
    alpha_one = config["set_alpha_to_one"]
    table = Table.from_alphas_cumprod(torch.cumprod(1 - torch.linspace(*ENDS, 1000, dtype=torch.float64) ** 2, 0))
    process, control = GaussianProcess(table), data["c_new"].clone().requires_grad_()
    indices = torch.cat([data["timesteps"].double(), torch.zeros(1, dtype=torch.float64)])
    times = table.time_of_index(indices).tolist()
    times[-1] = 0.0 if alpha_one else times[-1]

    def both(x: Tensor, t: float, cond: Any, *, frozen_gradient: bool = True) -> tuple[Pred, Pred]:
        index = table.index_of(torch.tensor(t, dtype=torch.float64)).round() / 1000
        new, old = torch.tanh(x + control + index), torch.tanh(0.9 * x + data["c_old"] + index)
        at = process.at(t, x)
        return Pred(new, x, at, Prediction.EPS), Pred(old, x, at, Prediction.EPS)

    model: Any = SimpleNamespace(process=process, both=both)
    monkeypatch.setattr(ControlChain, "noise", lambda self, x, keys, index: data["z"][index])
    chain = ControlChain(model, times, config["eta"])
    path = chain.run(data["x_T"], torch.arange(3), None)
    kl = path.kl / data["x_T"][0].numel()
    (slope,) = torch.autograd.grad(kl.sum(), control)
    total, gradient = ("kl_total_without_last", "grad") if alpha_one else ("kl_total", "grad_total")
    assert relative(path.x.detach(), data["x_final"]) < 1e-10
    assert relative(kl.detach(), data[total]) < 1e-10
    assert relative(slope, data[gradient]) < 1e-10
