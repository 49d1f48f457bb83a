"""Tree search (DTS) over a law that is known in closed form, so that you can see how near it comes.

    python examples/tree_search.py

The base law has 80 % of its mass at −2 and 20 % at +2; with the reward r(x) = x the tilted law p(x)·exp(x) has 93 % at
+2, 92 % on a chain of 20 steps.  Trees are read by the weights of their rollouts; the paper's read-out, "boltzmann",
takes every descent as if it had been uniform, and says so in a warning.  For draws of one law alone,
particles.run("islands", …) is cheaper.
"""

import torch

from gencontrol.models import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling.tree import DiffusionTree

base = GaussianMixture(
    torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1, 1) * 0.1, torch.tensor([0.8, 0.2]), GaussianProcess(Linear())
)
right = base.tilt(linear=torch.tensor([1.0])).weights[1]

if __name__ == "__main__":
    print(f"mass of the right mode: {0.2:.3f} in the base, {float(right):.3f} in the tilted law")
    tree = DiffusionTree(base, lambda x: x[:, 0], (1, 1), steps=20, temperature=1.0, generator=0)
    for _ in tree.build(nfe=20_000):  # anytime: stop, look, go on
        pass
    for rule in ("weighted", "boltzmann"):
        share = float((tree.sample(2000, rule=rule) > 0).double().mean())
        print(f"{rule}: {share:.3f} after {tree.nfe} model calls; best reward {float(tree.best(1).rewards[0]):.3f}")
    tree.retilt(temperature=0.5)  # another question, no further call
    print(f"at temperature 0.5: {float((tree.sample(2000) > 0).double().mean()):.3f} after {tree.nfe} model calls")
