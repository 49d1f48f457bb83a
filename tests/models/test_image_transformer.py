"""PatchTransformer: cutting and joining are inverse, conditions and places reach the output, folders load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
from gencontrol.models.networks.transformer import Transformer


def make(patch: int = 2, channels: int = 1, seed: int = 0) -> PatchTransformer:
    config = PatchConfig(channels=channels, size=8, patch=patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PatchTransformer(config, Transformer(backbone_config(config, classes=3, dim=16, depth=2, heads=2)))
        nn.init.normal_(network.backbone.out.weight, std=0.3)
        nn.init.normal_(network.backbone.modulation.weight, std=0.1)
    return network.requires_grad_(False)


def images(n: int = 4, channels: int = 1) -> Tensor:
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(1))


class _First(nn.Module):
    """Stands for a backbone that returns its first channels: what the patches hold."""

    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.config, self.seen = inner.config, torch.empty(0)

    def forward(self, x: Tensor, t: object, cond: object) -> Tensor:
        self.seen = x
        return x[..., : self.config.out_dim]


@pytest.mark.parametrize(("patch", "channels"), [(2, 1), (4, 3)])
def test_joining_undoes_cutting(patch: int, channels: int) -> None:
    network = make(patch, channels)
    first = _First(network.backbone)
    network.backbone = first  # type: ignore[assignment]
    x = images(2, channels)
    assert torch.equal(network(x, 0.5), x)
    tokens = first.seen
    assert torch.equal(tokens[0, 1, : channels * patch**2], x[0, :, :patch, patch : 2 * patch].flatten())
    assert torch.equal(tokens[0, :, channels * patch**2 :], torch.eye((8 // patch) ** 2))  # each patch knows its place


def test_condition_and_its_absence() -> None:
    network, x, t = make(), images(2), torch.tensor([0.3, 0.8])
    one_hot = {"pooled": torch.eye(3)[[0, 2]], "drop": torch.zeros(2, dtype=torch.bool)}
    free = network(x, t, None)
    assert torch.equal(network(x, t, network.null_cond(2)), free)
    assert torch.equal(network(x, t, {**one_hot, "drop": torch.tensor([True, False])})[0], free[0])
    labelled = network(x, t, one_hot)
    assert (labelled - free).abs().mean() > 1e-3


def test_save_and_load_are_bit_equal(tmp_path: Path) -> None:
    network = make(seed=3)
    network.save_pretrained(tmp_path)
    again = PatchTransformer.from_pretrained(tmp_path)
    x, t = images(), torch.full((4,), 0.4)
    torch.testing.assert_close(again(x, t), network(x, t), atol=1e-6, rtol=1e-6)  # mapped memory may round otherwise
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"takes \[1, 8, 8\]"):
        make()(torch.zeros(2, 64), 0.5)
    with pytest.raises(UsageError, match="backbone_config"):
        PatchTransformer(PatchConfig(patch=4), make().backbone)
    with pytest.raises(ValueError, match="divide"):
        PatchConfig(patch=3)
    with pytest.raises(UsageError, match="no folder of a PatchTransformer"):
        PatchTransformer.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "stride": 1}))
    with pytest.raises(UsageError, match="stride"):
        PatchTransformer.from_pretrained(tmp_path)
