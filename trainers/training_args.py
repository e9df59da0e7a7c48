"""Settings of a run: `TrainingArguments` and what the method adds."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields

from transformers import TrainingArguments

from . import precision
from .balancers import BALANCERS
from .losses import PAIRS, TARGETS


LOSSES = ("contrastive", "feature", "similarity", "hard_negative")


@dataclass
class RetrievalTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what every training of a dual encoder adds.

    Defaults that differ from `TrainingArguments`: `remove_unused_columns=False` (a batch is no set of model inputs),
    `dataloader_drop_last=True` (accelerate would fill up an uneven last batch with the first rows again),
    `logging_nan_inf_filter=False` (it syncs every step), `accelerator_config` with
    `non_blocking`, `ddp_find_unused_parameters=False`, `metric_for_best_model="rsum"`, `lr_scheduler_type="cosine"`;
    and, where nobody has said, `bf16` and `tf32` follow the GPU, see trainers/precision.py.
    """

    captions_per_image: int | None = field(
        default=None, metadata={"help": "How many captions are drawn for each image in an epoch (default: all)."}
    )
    shuffle_buffer_size: int = field(
        default=2000,
        metadata={"help": "With streaming: how many rows each loader worker holds to draw from; more shuffle better."},
    )
    max_caption_length: int = field(
        default=64,
        metadata={
            "help": "Longest caption in tokens; longer ones are cut, in training and wherever the student is used. An "
            "evaluation alone cuts where the student was trained to, if that is shorter."
        },
    )
    random_shift: float = field(
        default=0.0, metadata={"help": "Augmentation: largest shift of an image, as a fraction of its side."}
    )
    random_zoom: float = field(
        default=0.0,
        metadata={"help": "Augmentation: largest relative change of an image's scale (0.1: by up to a tenth)."},
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of projections and temperature (default: learning_rate)."}
    )

    recall_by_index: bool = field(
        default=False,
        metadata={
            "help": "Count only an image's own captions and its group's as right, as Flickr30k and COCO are reported; "
            "else a caption that is equal to one of these is right too."
        },
    )
    freeze: str | None = field(
        default=None,
        metadata={
            "help": "Leave a tower as it is, 'vision' or 'text', and train its projection and the other one. A frozen "
            "vision tower sees each image once, not once an epoch, where random_shift and random_zoom are 0."
        },
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={"help": "Stop after this many steps in a row that are skipped, their gradient not being finite."},
    )
    card_images: bool = field(
        default=True,
        metadata={
            "help": "Show pictures of the data with their captions on the student's card, which a push brings to the "
            "Hub; with False none is written."
        },
    )
    allow_changes: bool = field(
        default=False,
        metadata={
            "help": "Resume although settings, data, processes or versions differ from those of the checkpoint."
        },
    )
    resume_from_hub: str | None = field(
        default=None,
        metadata={"help": "Resume from the last checkpoint that was pushed to this Hub repository (user/name)."},
    )

    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the trainer reads more columns than the model does."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last batch of an epoch if it is not full."}
    )
    bf16: bool = field(
        default=None,
        metadata={
            "help": "Train in bf16 under autocast (default: on a GPU of compute capability 8 or more, and there with "
            "tf32, where neither fp16 nor accelerate's configuration says otherwise)."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log; makes every step wait for the device."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Let DDP look in every step for parameters without gradient; training finds them before it begins."
        },
    )
    do_train: bool = field(
        default=False, metadata={"help": "Train; with False the student of model_name_or_path is only evaluated."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run: its checkpoints, the student with its card, the figures."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this checkpoint's folder, or with 'last' from the last whole one in output_dir."
        },
    )
    metric_for_best_model: str | None = field(
        default="rsum", metadata={"help": "Figure on the validation split that chooses the best checkpoint."}
    )
    greater_is_better: bool | None = field(
        default=True, metadata={"help": "Whether a larger metric_for_best_model is better."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})

    def __post_init__(self):
        if self.hub_token is not None:
            raise ValueError(
                "hub_token is refused: Trainer would write it into files that are pushed. "
                "Log in with `hf auth login` or set HF_TOKEN instead."
            )
        if self.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise ValueError(
                "DeepSpeed does not train this student (it cannot send a scalar, the temperature): use FSDP 2, "
                "by accelerate_configs/fsdp2.yaml."
            )
        if self.output_dir is None:
            raise ValueError("output_dir is missing: name the folder that the student is written to.")
        if not self.max_caption_length > 2:
            raise ValueError(f"max_caption_length={self.max_caption_length}: expected more than 2.")
        for name in ("random_shift", "random_zoom"):
            _check_fraction(name, getattr(self, name))
        if self.freeze not in (None, "vision", "text"):
            raise ValueError(f"freeze={self.freeze!r}: expected 'vision', 'text' or none.")
        if self.max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps={self.max_skipped_steps}: expected 1 or more.")
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size={self.shuffle_buffer_size}: expected 1 (in order) or more.")
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(f"captions_per_image={self.captions_per_image}: expected 1 or more, or none for all.")
        chosen = self.accelerator_config is not None
        refused = self.bf16 is False
        capability = precision.capability_of_gpus(self.use_cpu)
        self.bf16, self.tf32 = precision.choose(
            self.bf16, self.fp16, self.tf32, precision.of_this_process(), capability
        )
        super().__post_init__()
        if self.device.type in ("cpu", "mps"):  # torch pins memory for neither, and would warn
            self.dataloader_pin_memory = False
        if refused and self.mixed_precision == "bf16":  # the setting goes before accelerate's configuration
            self.mixed_precision = "no"
        if not chosen:  # a batch goes to the device during the step before
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
        default_factory=lambda: list(LOSSES),
        metadata={"help": f"Which losses are used, of {', '.join(LOSSES)} (default: all)."},
    )
    contrastive_pairs: list[str] = field(
        default_factory=lambda: list(PAIRS),
        metadata={
            "help": "Which pairs the contrastive loss compares, of II, TT, IT and TI: the student's modality (image "
            "or text), then the teacher's (default: all)."
        },
    )
    contrastive_temperature: float = field(
        default=0.05, metadata={"help": "Temperature of the contrastive loss: similarities are divided by it."}
    )
    contrastive_targets: str = field(
        default="pairs",
        metadata={
            "help": "What IT and TI of the contrastive loss aim at: 'pairs', a row's own partner, or 'teacher', the "
            "teacher's own similarities to all rows of the dictionary, which rows without a partner always have.",
            "choices": list(TARGETS),
        },
    )
    queue_size: int = field(
        default=8192,
        metadata={
            "help": "How many teacher features of each modality the contrastive loss compares with: the step's own, "
            "and older ones up to this number."
        },
    )
    hard_negative_pairs: list[str] = field(
        default_factory=lambda: list(PAIRS),
        metadata={"help": "Which pairs the hard-negative loss compares; see contrastive_pairs (default: all)."},
    )
    hard_negative_margin: float = field(
        default=0.2,
        metadata={
            "help": "Margin of the hard-negative loss, a difference of cosines, with hard_negative_margin_kind fixed."
        },
    )
    hard_negative_margin_kind: str = field(
        default="fixed",
        metadata={
            "help": "'fixed': hard_negative_margin; 'teacher': for each query and negative, the gap between the "
            "teacher's own cosines.",
            "choices": ["fixed", "teacher"],
        },
    )
    hardest_negative: bool = field(
        default=True, metadata={"help": "Count only each query's hardest negative; False sums over all of them."}
    )
    balancer: str = field(
        default="dynamic",
        metadata={
            "help": "How the losses' weights are set while training; trainers/balancers.py describes each.",
            "choices": list(BALANCERS),
        },
    )
    balancer_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the softmax over the losses' rates of descent; smaller sets the weights further "
            "apart (default: 1; for dwa 2)."
        },
    )
    balancer_smoothing: float = field(
        default=0.9,
        metadata={
            "help": "Decay, in [0, 1), of the dynamic balancer's moving averages of the losses: larger reacts later."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the fixed balancer, in the order of `losses` (default: all 1)."}
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
