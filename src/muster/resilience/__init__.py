"""Keeping a run alive: the agent that starts the local ranks and says which one failed, and why."""
