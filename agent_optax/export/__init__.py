"""Trained sparse networks for other software: sparse matrices, safetensors files, dense weights, N:M checks."""

from agent_optax.export._bcoo import from_bcoo, to_bcoo
from agent_optax.export._bcsr import from_bcsr, to_bcsr
from agent_optax.export._merge import merge
from agent_optax.export._n_m import NMReport, is_n_m, n_m_report
from agent_optax.export._safetensors import load_safetensors, save_safetensors

__all__ = [
    "NMReport",
    "from_bcoo",
    "from_bcsr",
    "is_n_m",
    "load_safetensors",
    "merge",
    "n_m_report",
    "save_safetensors",
    "to_bcoo",
    "to_bcsr",
]
