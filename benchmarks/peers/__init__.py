"""The servers that `serve_cpu.py` compares: how each is installed, given the same weights, started and asked.

`side.py` is what they have in common, `models.py` the weights, and there is one file for each. A peer lives in a
folder of its own below `build/peers`, which `git` ignores; what is there already is not made again.
"""
