"""The student: encoder, projector, LLM and task tokens."""
