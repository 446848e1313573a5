"""The parts of `train.py`, one a file."""
