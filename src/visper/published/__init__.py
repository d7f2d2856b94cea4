"""Converts published VisPer-LM and OLA-VLM checkpoints to visper's folders."""

from visper.published.names import Report
from visper.published.probes import Probe, load_probes
from visper.published.to_visper import convert_published

__all__ = ["Probe", "Report", "convert_published", "load_probes"]
