"""Load for any OpenAI-compatible server, and what its answers were like: `muster bench serve`.

`workload.py` says what is sent and when, `client.py` sends one request, `drive.py` all of them, `figures.py` makes
the table. Knows servers by their HTTP alone.
"""
