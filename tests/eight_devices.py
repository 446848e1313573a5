"""A test file in a process of its own, in which the CPU counts as eight devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax

FLAG = "--xla_force_host_platform_device_count=8"
ARE_HERE = FLAG in os.environ.get("XLA_FLAGS", "")
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # jax < 0.7


def run_tests(file: str, part: str, root: Path) -> None:
    """Runs the tests of a file that ``-k part`` chooses."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part, file],
        cwd=root,
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
