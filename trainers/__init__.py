"""How a student learns: losses, their balancer, trainers and the evaluation by recall."""

from .balancers import make_balancer
from .contrastive_trainer import ContrastiveTrainer
from .distillation_trainer import DSMDTrainer
from .feature_queue import FeatureQueue
from .losses import (
    TeacherRows,
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
)
from .metrics import retrieval_metrics
from .training_args import DSMDTrainingArguments, RetrievalTrainingArguments


__all__ = [
    "ContrastiveTrainer",
    "DSMDTrainer",
    "DSMDTrainingArguments",
    "RetrievalTrainingArguments",
    "TeacherRows",
    "FeatureQueue",
    "contrastive_distillation",
    "feature_distillation",
    "hard_negative_distillation",
    "make_balancer",
    "retrieval_metrics",
    "similarity_distillation",
]
