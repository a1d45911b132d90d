"""Trained weights to artifacts that other programs load, each checked against our own numbers first."""
