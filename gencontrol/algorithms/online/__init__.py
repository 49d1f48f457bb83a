"""What methods that train on their own samples share: rollouts, groups, advantages, anchor, evaluation."""
