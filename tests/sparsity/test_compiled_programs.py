"""What XLA makes of an ordinary step: the topology update, which is rarely due, costs it no copy and no branch.

The code relies on habits of the compiler: that the carry of a while loop stays in place, that nothing is moved out of a
conditional, that adding zero makes an array of its own. These tests notice when a habit changes.
"""

import collections
import os
import re
import subprocess
import sys

import jax
import optax
import pytest

import agent_optax

SHAPE = (512, 256)
COMPILED_AS_EVER = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}  # the tests let XLA compile quickly


def compiled_step(storage: str, optimizer: str) -> str:
    make = {"sgd": lambda: optax.sgd(0.1, momentum=0.9), "adamw": lambda: optax.adamw(1e-3)}[optimizer]
    options = {"storage": storage, **({"updates": "sparse"} if storage == "compact" else {})}
    tx = agent_optax.sparsify(make(), agent_optax.rigl(), sparsity=0.9, **options)
    params = {"kernel": jax.ShapeDtypeStruct(SHAPE, "float32")}

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, params).compile().as_text()


def ordinary_step(text: str) -> collections.Counter[str]:
    """The operations of large arrays that every step executes: of the entry, not of the bodies of its loops."""
    entry = text[text.index("\nENTRY ") :]
    size = rf"\[{SHAPE[0]},{SHAPE[1]}\]|\[{SHAPE[0] * SHAPE[1]}\]|\[{round(0.1 * SHAPE[0] * SHAPE[1])}\]"
    counts = collections.Counter()
    for line in entry.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", line)
        if found and re.search(size, found.group(1)):
            counts[found.group(2)] += 1
    return counts


if __name__ == "__main__":
    print(compiled_step(*sys.argv[1:]))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_an_ordinary_step_copies_nothing(storage: str, optimizer: str) -> None:
    command = [sys.executable, __file__, storage, optimizer]
    done = subprocess.run(command, env=COMPILED_AS_EVER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = ordinary_step(done.stdout)
    print(counts)
    assert counts["copy"] == 0
    assert counts["conditional"] == 0
    assert counts["while"] == 1
    assert counts["sort"] == 0
