"""Frozen teachers: what each wants to see, what it gives, how it is drawn."""
