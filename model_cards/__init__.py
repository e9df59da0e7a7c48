"""The student's model card: a template and what fills it."""
