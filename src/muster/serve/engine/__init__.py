"""The engine that serves: continuous batching over a paged key-value cache.

`blocks.py` and `scheduler.py` decide over plain data; `network.py` computes what they decided; nothing here knows of
text or HTTP.
"""
