"""Optimiser pieces: the decoupled KL step."""
