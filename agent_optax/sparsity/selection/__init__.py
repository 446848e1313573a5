"""Exact selection of the largest scores, with reductions only."""
