"""Published VisPer-LM and OLA-VLM checkpoints become our folders, and ours theirs."""

from visper.published.export import convert_to_published
from visper.published.names import Report
from visper.published.probes import Probe, load_probes
from visper.published.to_visper import convert_published

__all__ = ["Probe", "Report", "convert_published", "convert_to_published", "load_probes"]
