"""The offline world: rendered scenes, tiny models and teachers, the whole pipeline on two cores."""
