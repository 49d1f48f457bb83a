"""The search job: best samples of a model by reward, by a tree or by particles."""
