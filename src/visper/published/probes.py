"""Published probes: for each layer, a resampler with its own latents that reads a frozen student's hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from visper.common.errors import ConfigError
from visper.common.files import read_json_object
from visper.common.manifest import require_undamaged
from visper.distillation.resampler import PerceiverResampler
from visper.published.config import Head

PROBES_FILE = "probes.json"
WEIGHTS_FILE = "weights.safetensors"


class Probe(nn.Module):
    """Predicts a teacher's embedding from one layer's hidden states, with its own latents.

    Args:
        width_in: width of the hidden states (D).
        tokens, width: the embedding's tokens (N) and width (E).
        mlp: adds a Linear-ReLU-Linear after the resampler.
        depth, heads, head_width, ff_mult: the resampler's sizes; see ``config.Head``.
    """

    def __init__(self, width_in: int, tokens: int, width: int, mlp: bool = False, **sizes: int) -> None:
        super().__init__()
        self.resampler = PerceiverResampler(width_in, width, width, num_latents=tokens, **sizes)
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)] if mlp else []
        self.mlp = nn.Sequential(*layers)

    def forward(self, states_BKD: Tensor, key_mask_BK: Tensor | None = None) -> Tensor:
        """Returns ``[B, N, E]`` from hidden states ``[B, K, D]``; the mask is True where a state may be read."""
        predicted: Tensor = self.mlp(self.resampler(states_BKD, None, key_mask_BK))
        return predicted


def probe_settings(width_in: int, heads: Mapping[str, Head]) -> dict[str, dict[str, Any]]:
    """The content of ``probes.json``: arguments of each ``Probe``, by name ("depth_20"; layers count from 1)."""
    return {
        f"{task}_{layer}": {
            "width_in": width_in,
            "tokens": head.target.tokens,
            "width": head.target.width,
            "mlp": head.mlp,
            **head.sizes,
        }
        for task, head in heads.items()
        for layer in head.layers
    }


def build_probes(settings: Mapping[str, Mapping[str, Any]]) -> nn.ModuleDict:
    """Builds untrained probes, by name."""
    return nn.ModuleDict({name: Probe(**arguments) for name, arguments in settings.items()})


def load_probes(folder: str | Path) -> nn.ModuleDict:
    """The probes of a converted checkpoint, by task and layer ("depth_20").

    Raises:
        ConfigError: the folder has no probes.
        DataError: its files do not match their manifest.
    """
    place = Path(folder) / "probes"
    if not (place / PROBES_FILE).is_file():
        raise ConfigError(f"'{folder}' has no probes: expected {place / PROBES_FILE}; convert a probe checkpoint")
    require_undamaged(place)
    probes = build_probes(read_json_object(place / PROBES_FILE))
    weights = {name: value for name, value in load_file(place / WEIGHTS_FILE).items() if name.startswith("predictors.")}
    probes.load_state_dict({name.removeprefix("predictors."): value for name, value in weights.items()})
    return probes.eval()
