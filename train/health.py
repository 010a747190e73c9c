"""Reads the values of every step and says in one line what is wrong with a run.

Values are averages over ranks, so that every rank comes to the same diagnosis at the same step. What is done about a
symptom is decided by the task, which owns the parts; a diagnosis is given again only after it has gone for a while.
"""

from collections.abc import Mapping
from typing import Any, Literal

from train.loss_config import HealthConfig
from train.task import Values

Symptom = Literal["collapsed discriminator", "posterior collapse", "exploding adaptive weight"]


class Monitor:
    """Counts for how many steps in a row each symptom has been there."""

    def __init__(self, config: HealthConfig, adaptive_cap: float) -> None:
        self._config = config
        self._cap = adaptive_cap
        self._steps: dict[str, int] = {}

    def update(self, values: Values) -> list[tuple[Symptom, str]]:
        """Return the symptoms that have now lasted `health.window` steps, each with its figures."""
        config = self._config
        found: dict[Symptom, str] = {}
        if values.get("phase") in ("ramp", "adversarial") and "d_real" in values:
            gap = values["d_real"] - values["d_fake"]
            if gap < config.logit_gap:
                found["collapsed discriminator"] = f"its mean logits differ by {gap:.4f} between real and fake"
        per_channel = values.get("kl_per_channel")
        if per_channel:
            active = sum(nats > config.active_nats for nats in per_channel)
            if active < config.min_active * len(per_channel):
                found["posterior collapse"] = f"{active} of {len(per_channel)} channels carry anything"
        if values.get("phase") in ("ramp", "adversarial") and values.get("adaptive_raw", 0.0) > self._cap:
            found["exploding adaptive weight"] = f"{values['adaptive_raw']:.3g}, capped at {self._cap:g}"
        due: list[tuple[Symptom, str]] = []
        self._steps = {symptom: self._steps.get(symptom, 0) + 1 for symptom in found}
        for symptom, figures in found.items():
            if self._steps[symptom] == config.window:
                due.append((symptom, f"{symptom}: {figures}, for {config.window} steps"))
            elif self._steps[symptom] == 10 * config.window:
                self._steps[symptom] = 0  # still there: say it again
        return due

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._steps = dict(state["steps"])
