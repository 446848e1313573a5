"""Checkpoints with Orbax: the whole state of a run, from which it goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from training.config import Config

NOT_THE_RUN = ("resume", "out", "checkpoint_every")  # what may change between the first part of a run and the next
PLACES = ("data_dir", "from_hub", "placement")  # of the data: where it lies does not matter


class Checkpoints:
    """The checkpoints of a run, the last two of which are kept, and the configuration that they belong to."""

    def __init__(self, config: Config) -> None:
        """Opens the folder of the run.

        Raises:
            FileNotFoundError: if there is nothing to resume.
            FileExistsError: if a run is there that was not asked for.
            ValueError: if the run to resume has other settings.
        """
        folder = config.out.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "config.json"
        self.manager = ocp.CheckpointManager(
            folder / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )
        try:
            self._claim(config)
        except (OSError, ValueError):
            self.manager.close()
            raise

    def _claim(self, config: Config) -> None:
        """Makes sure that the folder is new, or holds the run to resume."""
        has_run = self.manager.latest_step() is not None
        if config.resume and not has_run:
            raise FileNotFoundError(f"{config.out} holds no checkpoint to resume from: leave --resume out.")
        if has_run and not config.resume:
            raise FileExistsError(f"{config.out} holds a run: add --resume to go on with it, or take another --out.")
        settings = _settings(config)
        if has_run:
            _check_same(json.loads(self.path.read_text()), settings, config.out)
        else:
            self.path.write_text(json.dumps(settings, indent=2) + "\n")

    def save(self, state: Any, step: int) -> None:
        """Saves the state after so many steps of the run, unless that is done already."""
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(state), force=True)
            self.manager.wait_until_finished()

    def restore(self, like: Any) -> Any:
        """The last state, in the shape and with the types of `like`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self.manager.restore(self.manager.latest_step(), args=ocp.args.StandardRestore(target))

    def close(self) -> None:
        """Lets go of the folder."""
        self.manager.close()


def _settings(config: Config) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_THE_RUN}
    settings["data"] = {name: value for name, value in settings["data"].items() if name not in PLACES}
    return json.loads(json.dumps(settings))  # tuples as the lists that they are read back as


def _check_same(saved: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    differing = [
        f"--{name.replace('_', '-')} {_flat(saved).get(name)} (now {_flat(asked).get(name)})"
        for name in sorted(_flat(saved).keys() | _flat(asked).keys())
        if _flat(saved).get(name) != _flat(asked).get(name)
    ]
    if differing:
        raise ValueError(f"the run in {out} was started with {', '.join(differing)}: resume with the same settings.")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
