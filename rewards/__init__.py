"""Rewards of samples and of sets of samples; `load_reward("clap")` is the usual entry.

Submodules: base (protocols, checks, adapters), compose (weighted sums), loading (by name), clap, distribution (FAD,
Vendi), quality, signal.  Importing this package loads torch and none of the model libraries.
"""

from gencontrol.rewards.base import Features, InfluenceAsItem, ItemAsSet, Reward, SetReward, SetState, require_valid
from gencontrol.rewards.compose import weighted
from gencontrol.rewards.loading import compose_rewards, load_reward, load_rewards

__all__ = [
    "Features",
    "InfluenceAsItem",
    "ItemAsSet",
    "Reward",
    "SetReward",
    "SetState",
    "compose_rewards",
    "load_reward",
    "load_rewards",
    "require_valid",
    "weighted",
]
