"""What every test shares: JAX on the CPU, double precision on request, the golden numbers."""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported
# Most of the time of the tests is XLA compiling small programs: let it compile quickly rather than well.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"  # the tests take all cores by themselves
)
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # which has no such flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Many tests, and the programs that some of them start, compile the same: what one has compiled, the others load. The
# first process of a session makes the folder, and those that it starts find its name in their environment.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp(
    prefix=f"agent_optax_tests_{os.getpid()}_"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"

# The first call of a jitted function compiles, which no deadline for an example allows for.
hypothesis.settings.register_profile("jax", deadline=None)
hypothesis.settings.load_profile("jax")


def pytest_unconfigure() -> None:
    """At the end of the session."""
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if f"agent_optax_tests_{os.getpid()}_" in cache:
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """Programs of a module are of no use to the next, and Python's garbage collector walks over all that is kept."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision, for this test only."""
    if hasattr(jax, "enable_x64"):
        enable = jax.enable_x64
    else:  # jax < 0.8
        from jax.experimental import enable_x64 as enable
    with enable(True):
        yield


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Numbers of the authors' published code: `golden("e2e_dense")` reads golden/e2e_dense.npz."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load
