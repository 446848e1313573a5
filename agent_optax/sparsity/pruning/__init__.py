"""Pruning a network at one point: masks from scores, from magnitudes, from zeros."""
