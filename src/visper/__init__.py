"""VisPer: training multimodal LLMs that see, by visual embedding distillation."""
