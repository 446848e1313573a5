"""The multi-host example as two processes on one host: equal masks on both, and what happens when one of them dies."""

import concurrent.futures
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.devices

EXAMPLE = Path(__file__).parents[2] / "examples" / "multihost.py"
DEVICES_EACH = 2
TIMEOUT = 300  # seconds in which a run must end, one way or the other


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(*arguments: str, num_devices: int = DEVICES_EACH) -> subprocess.Popen:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={num_devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(EXAMPLE.parents[1]),
    }
    command = [sys.executable, str(EXAMPLE), "--batch-size", "128", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(*arguments: str) -> list[subprocess.Popen]:
    together = ("--coordinator", f"localhost:{free_port()}", "--num-processes", "2", *arguments)
    return [start("--process-id", str(i), *together) for i in range(2)]


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """What they print, once all have ended well; read side by side, so that none waits for its reader."""
    with concurrent.futures.ThreadPoolExecutor() as readers:
        reading = [readers.submit(process.communicate, timeout=TIMEOUT) for process in processes]
        try:
            texts = [future.result()[0] for future in reading]
        finally:
            for process in processes:
                process.kill()
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0, text[-3000:]
    return texts


def reports(text: str) -> list[str]:
    """What a process says of each epoch and of the end, without its number."""
    return re.findall(r"^process \d: ((?:epoch|parameters).*)$", text, re.MULTILINE)


def test_a_killed_process_ends_the_other_and_a_checkpoint_restores_both(tmp_path: Path) -> None:
    checkpoints = ("--checkpoint-dir", str(tmp_path))
    survivor, victim = start_two("--epochs", "100000", "--heartbeat-timeout", "10", *checkpoints)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (tmp_path / "2").exists() and survivor.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim.kill()
        text = survivor.communicate(timeout=TIMEOUT)[0]  # ends by itself: no hang
    finally:
        survivor.kill()
        victim.communicate()
    assert survivor.returncode not in (0, None)
    assert re.search(r"connection|peer|heartbeat|unhealthy|disconnect", text, re.IGNORECASE), text[-3000:]

    # Whatever epoch the last whole checkpoint is of, the run goes on from it with the numbers it would have had.
    last = max(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    end = str(last + 1)
    resumed = outputs(start_two("--epochs", end, *checkpoints))
    assert all(f"goes on after epoch {last}" in text for text in resumed)
    expected = [reports(text) for text in outputs(start_two("--epochs", end))]
    assert expected[0] == expected[1] and len(expected[0]) == last + 2  # masks, parameters and state bit for bit
    assert reports(resumed[0]) == reports(resumed[1]) == expected[0][last:]
    assert re.search(r"correlation [01]\.\d{4}, sparsity 90\.00%, masks \w{12}", expected[0][last])
    assert float(re.findall(r"test accuracy ([\d.]+)%", "".join(expected[0]))[-1]) > 80  # of ten digits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--coordinator", "localhost:1"), "--process-id go together, got localhost:1, None, None"),
        (("--batch-size", "3"), "--batch-size 3 must be a multiple of the 2 devices"),
    ],
)
def test_settings_that_make_no_sense_are_an_error(arguments: tuple[str, ...], message: str) -> None:
    process = start(*arguments)
    text, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1 and message in text
