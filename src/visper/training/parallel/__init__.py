"""Training with several processes: launching, FSDP, DeepSpeed."""
