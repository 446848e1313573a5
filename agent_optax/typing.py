"""The protocols of which the library is made: write a memory, coefficient, topology, pattern or storage of your own.

Each takes one file and no change of another. `Memory` and `Coefficient` are protocols; `MemoryState`,
`CoefficientState`, `Topology`, `RunningScore`, `Pattern`, `Storage` and `ActiveWeights` are base classes.
"""

from agent_optax._estimate import Estimate
from agent_optax.correction._coefficient import Coefficient, CoefficientState
from agent_optax.correction._find import CorrectionWrapper, StorageView
from agent_optax.correction._memory import Memory, MemoryState, Recalled
from agent_optax.sparsity._groups import Groups
from agent_optax.sparsity._layer import Layer, Target
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._running_score import RunningScore
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._start import Start
from agent_optax.sparsity._storage import ActiveWeights, Storage
from agent_optax.sparsity._topology import Topology

__all__ = [
    "ActiveWeights",
    "Coefficient",
    "CoefficientState",
    "CorrectionWrapper",
    "Estimate",
    "Groups",
    "Layer",
    "Memory",
    "MemoryState",
    "Pattern",
    "PrunedLeaf",
    "Recalled",
    "RunningScore",
    "SparseOptimizer",
    "Start",
    "Storage",
    "StorageView",
    "Target",
    "Topology",
]
