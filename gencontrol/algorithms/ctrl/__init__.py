"""CTRL: a new condition on a pretrained model by KL-regularised control; the algorithm, its chain, its bound."""
