"""Teachers: the models whose features a student learns, one interface over them, and how their weights are made."""

from .load_teacher import Teacher, load_teacher


__all__ = ["Teacher", "load_teacher"]
