"""Teachers: the models whose features a student learns, one interface over them, and how their weights are made."""

from .load_teacher import load_teacher
from .teacher import Teacher


__all__ = ["Teacher", "load_teacher"]
