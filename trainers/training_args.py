"""Settings of a run: `TrainingArguments` and what the method adds."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields

from transformers import TrainingArguments

from .balancers import BALANCERS
from .losses import PAIRS


LOSSES = ("contrastive", "feature", "similarity", "hard_negative")


@dataclass
class RetrievalTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what every training of a dual encoder adds.

    Defaults that differ from `TrainingArguments`: `remove_unused_columns=False` (a batch is no set of model inputs),
    `dataloader_drop_last=True` (an uneven last batch would be filled with row 0 again on other ranks),
    `logging_nan_inf_filter=False` (it syncs every step), `accelerator_config` with
    `non_blocking`, `ddp_find_unused_parameters=False`, `metric_for_best_model="rsum"`, `lr_scheduler_type="cosine"`.
    """

    captions_per_image: int | None = field(
        default=None, metadata={"help": "Captions drawn for each image in an epoch; all by default."}
    )
    shuffle_buffer_size: int = field(
        default=2000, metadata={"help": "Rows of a stream that each loader worker shuffles among, images undecoded."}
    )
    max_caption_length: int = field(default=64, metadata={"help": "Captions are cut at this many tokens."})
    random_shift: float = field(
        default=0.0, metadata={"help": "Largest shift of an image, as a fraction of its side."}
    )
    random_zoom: float = field(default=0.0, metadata={"help": "Largest relative change of an image's scale."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the projections and the temperature; default: learning_rate."}
    )

    max_skipped_steps: int = field(
        default=10,
        metadata={"help": "The run stops after so many steps in a row whose gradient is not finite; each is skipped."},
    )
    allow_changes: bool = field(
        default=False, metadata={"help": "Resume though settings, data, processes or versions are not the run's own."}
    )
    resume_from_hub: str | None = field(
        default=None, metadata={"help": "Go on from the last-checkpoint of this Hub repository (user/name)."}
    )

    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must stay False."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last incomplete batch."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Syncs every step where True."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search the graph for them in every step; the towers tested here have none."}
    )
    metric_for_best_model: str | None = field(default="rsum", metadata={"help": "Chosen on the validation split."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Of metric_for_best_model."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})

    def __post_init__(self):
        if self.hub_token is not None:
            raise ValueError(
                "hub_token is refused: Trainer would write it into files that are pushed. "
                "Log in with `hf auth login` or set HF_TOKEN instead."
            )
        if self.output_dir is None:
            raise ValueError("output_dir is missing: name the folder that the student is written to.")
        if not self.max_caption_length > 2:
            raise ValueError(f"max_caption_length={self.max_caption_length}: expected more than 2.")
        for name in ("random_shift", "random_zoom"):
            _check_fraction(name, getattr(self, name))
        if self.max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps={self.max_skipped_steps}: expected 1 or more.")
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size={self.shuffle_buffer_size}: expected 1 (in order) or more.")
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(f"captions_per_image={self.captions_per_image}: expected 1 or more, or none for all.")
        chosen = self.accelerator_config is not None
        super().__post_init__()
        if not chosen:  # batches go to the device beside the step before
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: the trainer reads more columns than the model.")

    def to_dict(self) -> dict:
        """The settings as they may be published (TensorBoard, training_args.json): no token, no local path."""
        local = ("output_dir", "resume_from_checkpoint", "run_name")
        return {name: value for name, value in super().to_dict().items() if name not in local and "token" not in name}


@dataclass
class DSMDTrainingArguments(RetrievalTrainingArguments):
    """[`RetrievalTrainingArguments`] with the settings of the distillation."""

    losses: list[str] = field(
        default_factory=lambda: list(LOSSES), metadata={"help": "Which of the four losses to use."}
    )
    contrastive_pairs: list[str] = field(
        default_factory=lambda: list(PAIRS),
        metadata={"help": "Pairs of the contrastive loss: II, TT, IT, TI (student row to teacher row)."},
    )
    contrastive_temperature: float = field(default=0.05, metadata={"help": "Divides its similarities."})
    queue_size: int = field(
        default=8192,
        metadata={"help": "Teacher rows of earlier steps kept for each modality; 0 contrasts with this step's only."},
    )
    hard_negative_pairs: list[str] = field(
        default_factory=lambda: list(PAIRS), metadata={"help": "Pairs of the hard-negative loss."}
    )
    hard_negative_margin: float = field(default=0.2, metadata={"help": "Margin where margin_kind is fixed."})
    hard_negative_margin_kind: str = field(
        default="fixed",
        metadata={
            "help": "'fixed', or 'teacher': the gap that the teacher itself has.",
            "choices": ["fixed", "teacher"],
        },
    )
    hardest_negative: bool = field(
        default=True, metadata={"help": "Only each query's hardest negative; else the sum over all of them."}
    )
    balancer: str = field(
        default="dynamic",
        metadata={"help": "What sets the losses' weights; see trainers/balancers.py.", "choices": list(BALANCERS)},
    )
    balancer_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Of the softmax over the losses' rates: smaller lets rates count for more. Default: 1, of dwa 2."
        },
    )
    balancer_smoothing: float = field(
        default=0.9, metadata={"help": "Decay of the dynamic balancer's averages of the losses, in [0, 1)."}
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the fixed balancer, in the order of `losses`; default all 1."}
    )

    def __post_init__(self):
        _check_choice("losses", self.losses, LOSSES)
        _check_choice("contrastive_pairs", self.contrastive_pairs, PAIRS)
        _check_choice("hard_negative_pairs", self.hard_negative_pairs, PAIRS)
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} values for {len(self.losses)} losses.")
        for name in ("contrastive_temperature", "balancer_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: expected more than 0.")
        _check_fraction("balancer_smoothing", self.balancer_smoothing)
        if self.queue_size < 0:
            raise ValueError(f"queue_size={self.queue_size}: expected 0 or more.")
        super().__post_init__()


def settings_that_differ(args: RetrievalTrainingArguments) -> dict[str, object]:
    """Settings with another value than their default's, without paths and tokens."""
    values = args.to_dict()
    differing = {}
    for setting in fields(args):  # building a second set of arguments would reset accelerate's state
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        default = getattr(default, "value", default)
        value = values.get(setting.name)
        if value != default and (value or default):  # Trainer sets None to False or []
            differing[setting.name] = value
    return differing


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value}: expected a number in [0, 1).")


def _check_choice(name: str, values: list[str], allowed: tuple[str, ...]) -> None:
    wrong = [value for value in values if value not in allowed]
    if wrong or not values or len(set(values)) != len(values):
        raise ValueError(f"{name}={values}: expected one or more of {', '.join(allowed)}, each once.")
