"""GPC: one policy out of several trained ones (arXiv 2510.01068), and weights fitted by rollouts on fresh seeds.

The class is in `gencontrol.robotics.composition.policy`, the search for weights in `composition.weight_search`.
"""

from gencontrol.robotics.composition.policy import ComposedPolicy, compose_prediction
from gencontrol.robotics.composition.weight_search import WeightFit, fit_weights

__all__ = ["ComposedPolicy", "WeightFit", "compose_prediction", "fit_weights"]
