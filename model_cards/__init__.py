"""The student's model card: a template, what fills it, and the record of a run that it is filled from."""

from .model_card import render_card
from .record import RunFacts, RunRecord, describe_captions


__all__ = ["RunFacts", "RunRecord", "describe_captions", "render_card"]
