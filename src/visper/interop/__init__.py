"""Published VisPer-LM and OLA-VLM checkpoints become our folders, and ours theirs."""

from visper.interop.export import convert_to_published
from visper.interop.imports import convert_published
from visper.interop.names import Report
from visper.interop.probes import Probe, load_probes

__all__ = ["Probe", "Report", "convert_published", "convert_to_published", "load_probes"]
