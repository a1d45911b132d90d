"""Serving: an engine that turns token ids into token ids, and the OpenAI-compatible HTTP in front of it.

Read `protocol.py` first: it is the whole contract between the two. Behind it stand `engine/` and `sampler`; before it
`generation`, `detokenize` and `template` (text), then `schema`, `responses`, `failures` and `http` (the API), then
`receipt` and `server` (the socket).
"""
