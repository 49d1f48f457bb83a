"""Networks of chunks and images: plans against plain calls, small convolutions against torch's, crops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gencontrol.models.networks.chunk_networks import ChunkMlp, ChunkNetwork, ChunkTransformer, logsnr_features
from gencontrol.models.networks.small_conv import convolve, double, pays
from gencontrol.models.networks.unet1d import ChunkUnet
from gencontrol.models.networks.vision import ImageEncoder, crop, spatial_softmax
from gencontrol.process import Cosine, Linear

MAKERS: dict[str, Callable[[], ChunkNetwork]] = {
    "unet": lambda: ChunkUnet(16, 3, 6, width=16, depth=3),
    "mlp": lambda: ChunkMlp(16, 3, 6, Cosine(), width=32),
    "transformer": lambda: ChunkTransformer(16, 3, 6, width=32, depth=1),
}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _network(name: str) -> ChunkNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MAKERS[name]()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * _random(*parameter.shape, seed=index))
    return network


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_a_plan_gives_the_plain_call(name: str, rows: int) -> None:
    """Every entry of a plan, for few rows (matrix products) and many (convolutions), to float32 rounding."""
    network = _network(name)
    x, cond, times = _random(rows, 16, 3), _random(rows, 6, seed=1), torch.tensor([0.03, 0.5, 0.97])
    with torch.no_grad():
        entries = network.plan(times, cond)
        for t, entry in zip(times, entries, strict=True):
            plain = network(x, t.expand(rows), cond)
            assert float(plain.std()) > 0.05
            torch.testing.assert_close(network.planned(x, entry), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_time_and_condition_matter(name: str) -> None:
    """Another time, condition or chunk changes the output."""
    network = _network(name)
    x, cond, t = _random(1, 16, 3), _random(1, 6, seed=1), torch.tensor([0.3])
    with torch.no_grad():
        base = network(x, t, cond)
        for other in (network(x, t + 0.4, cond), network(x, t, cond + 1.0), network(x + 1.0, t, cond)):
            assert float((other - base).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [(16, 5, 1, 2), (8, 3, 2, 1), (7, 3, 2, 1), (4, 1, 1, 0)]
)
def test_small_convolutions_are_torch_s(size: int, kernel: int, stride: int, padding: int) -> None:
    """Windows times weights, for one and two items and a transposed input, to rounding."""
    layer = nn.Conv1d(6, 9, kernel, stride=stride, padding=padding)
    for rows in (1, 2):
        x = _random(rows, size, 6).transpose(1, 2)
        with torch.no_grad():
            torch.testing.assert_close(convolve(x, layer), layer(x), rtol=1e-5, atol=1e-5)


def test_small_doubling_is_torch_s() -> None:
    """The transposed convolution of kernel 4, stride 2, padding 1."""
    layer = nn.ConvTranspose1d(6, 5, 4, stride=2, padding=1)
    x = _random(2, 6, 4)
    with torch.no_grad():
        torch.testing.assert_close(double(x, layer), layer(x), rtol=1e-5, atol=1e-5)
    assert not pays(x)  # gradients are on
    with torch.no_grad():
        assert pays(x) and not pays(_random(3, 6, 4))


def test_logsnr_features_end_where_the_schedule_ends() -> None:
    """Infinite log-SNR at both ends of a schedule becomes ±1, and features are finite."""
    features = logsnr_features(Linear().logsnr(torch.tensor([0.0, 0.5, 1.0])))
    assert features[:, 0].tolist() == [1.0, 0.0, -1.0] and bool(torch.isfinite(features).all())


def test_spatial_softmax_says_where() -> None:
    """A sharp peak gives its own coordinates: x to the right, y downwards, in [−1, 1]."""
    maps = torch.full((1, 1, 5, 9), -50.0)
    maps[0, 0, 4, 2] = 50.0
    torch.testing.assert_close(spatial_softmax(maps), torch.tensor([[-0.5, 1.0]]))


def test_crops_are_windows_of_the_images() -> None:
    """The corner follows `places` over all of the room, the same in each image of an item; None is the middle."""
    images = torch.arange(2 * 2 * 10 * 12 * 3).remainder(251).to(torch.uint8).reshape(2, 2, 10, 12, 3)
    found = crop(images, (8, 8), torch.tensor([[0.0, 0.999], [0.999, 0.5]]))
    assert torch.equal(found[0], images[0, :, 0:8, 4:12]) and torch.equal(found[1], images[1, :, 2:10, 2:10])
    assert torch.equal(crop(images, (8, 8), None), images[:, :, 1:9, 2:10])


def test_image_encoder_sees_the_picture() -> None:
    """Shape, dependence on the picture, and that a crop of all of it is no crop."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ImageEncoder((24, 32), 1.0, 10)
    images = torch.randint(0, 256, (2, 3, 24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = encoder(images).detach()
    assert features.shape == (2, 3, 10) and float(features.std(0).max()) > 1e-4
    assert torch.equal(features, encoder(images, torch.tensor([[0.3, 0.9], [0.0, 0.0]])))
    with pytest.raises(ValueError, match="too small"):
        ImageEncoder((8, 64), 0.9, 10)
