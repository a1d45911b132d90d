"""Checkpoints: whole or absent, checked on load, loadable at another world size and ZeRO stage, no pickle.

A checkpoint is a folder:

    step-00000100/
      rank-00000.safetensors   the shards of one rank, offsets in the header (DCP's Hugging Face convention)
      rank-00001.safetensors
      manifest.json            written last: step, layout, run digest, size and SHA-256 of every file

It is written as `step-00000100.partial/`, synced, and renamed; a folder without a manifest does not exist
for `muster`.
"""
