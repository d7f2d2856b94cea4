"""Many processes: launching, FSDP, DeepSpeed."""
