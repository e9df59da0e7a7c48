"""How a student learns: losses, their balancer, trainers and the evaluation by recall."""

from .balancers import make_balancer
from .batches import RetrievalCollator, RetrievalDataset
from .contrastive_trainer import ContrastiveTrainer
from .distillation_trainer import DSMDTrainer
from .feature_queue import FeatureQueue
from .losses import (
    OtherStudents,
    TeacherRows,
    contrastive_distillation,
    feature_distillation,
    hard_negative_distillation,
    similarity_distillation,
)
from .metrics import retrieval_metrics
from .streaming import StreamedRetrievalDataset
from .teacher_pca import fit_pca
from .training_args import DSMDTrainingArguments, RetrievalTrainingArguments


__all__ = [
    "ContrastiveTrainer",
    "DSMDTrainer",
    "DSMDTrainingArguments",
    "FeatureQueue",
    "OtherStudents",
    "RetrievalCollator",
    "RetrievalDataset",
    "RetrievalTrainingArguments",
    "StreamedRetrievalDataset",
    "TeacherRows",
    "contrastive_distillation",
    "feature_distillation",
    "fit_pca",
    "hard_negative_distillation",
    "make_balancer",
    "retrieval_metrics",
    "similarity_distillation",
]
