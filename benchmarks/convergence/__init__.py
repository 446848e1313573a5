"""Accuracy side by side: methods, settings, seeds, and what is made of the runs. `python benchmarks/convergence.py`."""
