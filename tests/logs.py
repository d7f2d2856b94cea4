"""What a run computed, read from its log."""

import json
from pathlib import Path

VALUES = ("step", "loss", "ntp", "grad_norm", "learning_rate")


def computed(output):
    """Each step's losses and gradient norm, without the times and the memory that no two runs share."""
    lines = (Path(output) / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines if '"ntp"' in line]
    return [{name: value for name, value in e.items() if name in VALUES or "/" in name} for e in entries]
