"""Storages: how the state of the inner optimizer is kept."""
