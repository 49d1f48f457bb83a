"""All particle samplers on one problem, against the exact answer.

    python examples/particles.py

A chain of 20 steps has a law of its own (right mode 0.920, log Z 0.374).  best-of-n, beam and dps look for good samples
and do not claim the tilted law.
"""

import torch

from gencontrol.models import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling import particles

base = GaussianMixture(
    torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1, 1) * 0.1, torch.tensor([0.8, 0.2]), GaussianProcess(Linear())
)


def reward(x: torch.Tensor) -> torch.Tensor:
    """r(x) = x, one number per sample."""
    return x[:, 0]


if __name__ == "__main__":
    exact = 0.8 * torch.tensor(-2 + 0.05).exp() + 0.2 * torch.tensor(2 + 0.05).exp()
    print(f"exact: mass of the right mode 0.932, log Z {float(exact.log()):.3f}")
    for name in ("islands", "best-of-n", "snis", "smc", "tds", "das", "beam", "dps"):
        found = particles.run(name, base, reward, (400, 1), steps=20, temperature=1.0, generator=0)
        weights = found.weights.double() / found.weights.double().sum()
        right = float(weights[found.samples[:, 0] > 0].sum())
        log_z = "" if found.log_z != found.log_z else f", log Z {found.log_z:.3f}"
        print(f"{name:>9}: right mode {right:.3f}{log_z}, {found.nfe} model calls")
