"""Several processes, each with a GPU, make the same pictures: guidance branches and tokens are split among them.

`split.py` into how many, `world.py` how processes join, `ulysses.py` the split of tokens, which training shares,
`ranks.py` a forward by all of them, `leader.py` by one that has the inputs and others that follow it, `tiles.py` the
VAE's tiles by those. See docs/distributed.md.
"""
