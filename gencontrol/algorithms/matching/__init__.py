"""Methods that match chosen samples: DRAGON and reward-weighted regression."""
