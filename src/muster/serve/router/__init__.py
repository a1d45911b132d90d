"""One address for many servers: chooses a replica for each request, and another when it dies.

Knows HTTP and server-sent events, but neither tokenizers nor models.
"""
