"""The student's model card: its template, the record of a run, and the code that fills one from the other."""

from .model_card import render_card
from .record import RunFacts, RunRecord, describe_captions


__all__ = ["RunFacts", "RunRecord", "describe_captions", "render_card"]
