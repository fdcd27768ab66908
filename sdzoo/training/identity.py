"""What makes a run this run and no other: its recipe, data, survival probabilities and processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is compared by when a run goes on, and the processes of a run when it starts.

    Attributes:
        recipe: The recipe's entries.
        data_sha256: Fingerprint of the training data, ``validation_data_sha256`` that of the validation data.
        survival_probs: p of every block.
        start_sha256: Of the weights before the first step.
        world: Number of processes.
        data_dir: Where the data is, for messages.
    """

    recipe: dict[str, Any]
    data_sha256: str
    validation_data_sha256: str
    survival_probs: list[float]
    start_sha256: str
    world: int
    data_dir: Path

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, beside its weights and its environment."""
        return {
            "recipe": self.recipe,
            "recipe_sha256": _sha256(self.recipe),  # for people: entries are what is compared
            "data_sha256": self.data_sha256,
            "validation_data_sha256": self.validation_data_sha256,
        }

    def digests(self) -> dict[str, str]:
        """Return what all processes must have alike, by name; where each has its data is its own affair."""
        return {
            "recipe": _sha256(self.recipe | {"data_dir": None}),
            "data": f"{self.data_sha256} {self.validation_data_sha256}",
            "starting weights": self.start_sha256,
        }

    def differences(self, stored: Mapping[str, Any], survival_probs: Sequence[float]) -> list[str]:
        """Return how the run of a checkpoint, which holds ``stored`` and ``survival_probs``, was another."""
        theirs = stored["recipe"]
        faults = [
            f"{name} was {theirs.get(name)}, is {self.recipe.get(name)}"
            for name in sorted(self.recipe.keys() | theirs.keys())
            if self.recipe.get(name) != theirs.get(name)
        ]
        if list(survival_probs) != self.survival_probs:
            faults.append("it was trained with other survival probabilities than the recipe's")
        data = (stored.get("data_sha256"), stored.get("validation_data_sha256"))
        if data != (self.data_sha256, self.validation_data_sha256):
            faults.append(f"the data is not what it was trained on ({self.data_dir})")
        before = stored["environment"][-1].get("world")
        if before != self.world:
            faults.append(f"it ran in {before} processes, now {self.world}: the global batch is another")
        return faults


def _sha256(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
