"""Checkpoints of other trainers to ours: read without running anything in them, one tensor at a time.

`unpickle.py` and `torchfile.py` read their containers; `deepspeed.py`, `universal.py` and `megatron.py` know where
in those a model's tensors lie; `checkpoint.py` writes what a run resumes from.
"""
