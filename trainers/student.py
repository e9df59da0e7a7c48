"""The student that a run trains: which towers, which processor."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    TrainingArguments,
    VisionTextDualEncoderProcessor,
    ViTImageProcessorPil,
)
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.trainer_utils import align_special_tokens

from modeling_dsmd import DSMDModel
from rows.texts import cut, text_positions

from .inherited import (
    MODALITIES,
    TEACHER,
    Source,
    cut_to_size,
    load_tokenizer,
    take_projections,
    tower_config,
    tower_source,
)
from .student_arguments import StudentArguments


def load_student(
    name: str | os.PathLike, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, VisionTextDualEncoderProcessor]:
    """A saved student and its processor.

    Args:
        name: a folder or Hub id.
        trust_remote_code: run code that the repository brings; a student of this project needs none of it.

    Raises:
        OSError, ValueError: there is none that can be read.
    """
    origin = {"trust_remote_code": trust_remote_code}
    model = AutoModel.from_pretrained(name, **origin)
    # Not AutoProcessor: it hands `backend` to the tokenizer too, which would write it down with every checkpoint.
    processor = VisionTextDualEncoderProcessor(
        AutoImageProcessor.from_pretrained(name, backend="pil", **origin),
        AutoTokenizer.from_pretrained(name, **origin),
    )
    take_any_mode(processor)
    align_tokens(model, processor)
    return model, processor


def as_student(model: PreTrainedModel | str | os.PathLike, processor: ProcessorMixin | None):
    """A model and its processor, loaded where a trainer is given a saved student's name instead.

    Args:
        model: a model, which is given back; or a folder or Hub id.
        processor: the one to use; None: with a name, the one that was saved with the student.

    Raises:
        ValueError: the name is of no student that can be read.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model, processor
    try:
        model, own = load_student(model)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model={str(model)!r} is no student that can be read: expected the folder or Hub id of one that was "
            f"saved with its processor. ({reason})"
        ) from error
    return model, own if processor is None else processor


def build_student(
    args: StudentArguments, captions: Iterable[str], teacher_dim: int | None, teacher: Source | None = None
) -> tuple[DSMDModel, VisionTextDualEncoderProcessor]:
    """The student of a run and its processor.

    Args:
        args: which student.
        captions: of the training split, read only where the text tower starts from scratch, for its tokenizer's
            training, or its vocabulary is trimmed.
        teacher_dim: width of the teacher's features, where there is one.
        teacher: its folder or Hub id and its revision, for a student with a tower of its.

    Raises:
        ValueError: where not exactly one way to a student is given for each tower.
    """
    if args.model_name_or_path is not None:
        return load_student(args.model_name_or_path, args.trust_remote_code)
    for modality in MODALITIES:
        if (getattr(args, f"{modality}_model_name_or_path") is None) == (getattr(args, f"{modality}_config") is None):
            raise ValueError(
                f"Which {modality} tower? Give either {modality}_model_name_or_path (pre-trained) or "
                f"{modality}_config (from scratch), or model_name_or_path for a saved student."
            )
        if getattr(args, f"{modality}_model_name_or_path") == TEACHER:
            tower_config(args, modality, teacher)  # which refuses a teacher that has no such tower
    fields = {
        "projection_dim": args.projection_dim or teacher_dim or 256,
        "vision_pooling": args.vision_pooling,
        "text_pooling": args.text_pooling,
    }
    if args.vision_config is None:
        name, revision = tower_source(args, "vision", teacher)
        image_processor = without_cropping(
            AutoImageProcessor.from_pretrained(
                name, revision=revision, backend="pil", trust_remote_code=args.trust_remote_code
            )
        )
    else:
        side = {"height": args.image_size, "width": args.image_size}
        image_processor = ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if args.text_config is None:
        tokenizer = load_tokenizer(args, teacher)
    else:
        tokenizer = train_tokenizer(captions, args.vocab_size)
    if args.vision_config is None and args.text_config is None:
        (vision_name, vision_revision), (text_name, text_revision) = (
            tower_source(args, modality, teacher) for modality in MODALITIES
        )
        model = DSMDModel.from_vision_text_pretrained(
            vision_name,
            text_name,
            trust_remote_code=args.trust_remote_code,
            vision_revision=vision_revision,
            text_revision=text_revision,
            **fields,
        )
        model, tokenizer = cut_to_size(model, tokenizer, args, captions)
        take_projections(model, args, teacher)
    elif args.vision_config is not None and args.text_config is not None:
        vision = {"image_size": args.image_size, **args.vision_config}
        text = {**args.text_config, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model = DSMDModel.from_vision_text_configs(
            AutoConfig.for_model(**vision), AutoConfig.for_model(**text), **fields
        )
    else:
        raise ValueError("One tower is pre-trained and the other is not: give two names or two configurations.")
    processor = VisionTextDualEncoderProcessor(image_processor, tokenizer)
    take_any_mode(processor)
    align_tokens(model, processor)
    # A tower fails on a caption that is longer than its positions.
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_positions(model.text_model))
    return model, processor


def align_tokens(model: DSMDModel, processor: VisionTextDualEncoderProcessor) -> None:
    """Gives the text tower's config the tokenizer's ids of special tokens, as Trainer would once training begins.

    Were it done only then, a checkpoint's config would differ from that of the run that resumes it. And CLIP's text
    tower takes its feature at the end token whose id it was built with: loaded again, it would take another.
    """
    align_special_tokens(model, processor)
    tower = getattr(model, "text_model", model)  # what is no student is refused later
    config = tower.config
    for module in tower.modules():
        if isinstance(getattr(module, "eos_token_id", None), int) and isinstance(config.eos_token_id, int):
            module.eos_token_id = config.eos_token_id


def take_any_mode(processor: VisionTextDualEncoderProcessor) -> None:
    """Lets users give the saved processor images of any mode; it would refuse a grey one or one with transparency.

    Training gives it RGB alone, so nothing changes there.
    """
    if hasattr(processor, "image_processor"):  # what is no student is refused later
        processor.image_processor.do_convert_rgb = True


def set_caption_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, trains: bool
) -> None:
    """Makes `args.max_caption_length` the length at which captions are cut wherever the saved student is used.

    An evaluation without training cuts where the student's tokenizer does, if that is shorter.

    Args:
        model: the student.
        tokenizer: saved with it; its `model_max_length` and the truncation in its `tokenizer.json` are set.
        args: settings of the run.
        trains: the run trains the student.

    Raises:
        ValueError: the text tower has no positions for so many tokens.
    """
    limit = text_positions(getattr(model, "text_model", model))
    limit = tokenizer.model_max_length if limit == math.inf else limit
    if not trains:
        args.max_caption_length = min(args.max_caption_length, tokenizer.model_max_length)
    if args.max_caption_length > limit:
        raise ValueError(
            f"max_caption_length={args.max_caption_length}: the text tower takes {limit} tokens at most; lower it."
        )
    if trains:
        tokenizer.model_max_length = args.max_caption_length
        # A processor takes its defaults from here: with `truncation` unsaid it would warn, and not cut.
        tokenizer.init_kwargs["truncation"] = True
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.enable_truncation(args.max_caption_length)


def without_cropping(processor: BaseImageProcessor) -> BaseImageProcessor:
    """A vision checkpoint's image processor, made to squash the whole image to the size that it would crop to.

    A centre crop drops what the caption describes: a third of a photo of 3 by 2. Colours stay the checkpoint's.
    """
    if hasattr(processor, "data_config"):  # timm's does not save, and would ask users for torchvision
        config = processor.data_config
        _, height, width = config["input_size"]
        return ViTImageProcessorPil(
            size={"height": height, "width": width},
            resample=PILImageResampling[config["interpolation"].upper()],
            image_mean=list(config["mean"]),
            image_std=list(config["std"]),
        )
    if not hasattr(processor, "do_center_crop") or hasattr(processor, "max_num_patches"):
        raise ValueError(
            f"{type(processor).__name__} does not bring all images to one size: choose a vision tower whose processor "
            "does."
        )
    if processor.do_center_crop:
        processor.size, processor.do_center_crop = processor.crop_size, False
    side = processor.size.shortest_edge
    if side:
        processor.size = SizeDict(height=side, width=side)
    if hasattr(processor, "crop_pct"):  # ConvNeXt's and PoolFormer's crop while they resize, whatever the size
        processor = ViTImageProcessorPil(
            size=processor.size,
            resample=processor.resample,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
        )
    return processor


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer, `[CLS] caption [SEP]`, trained on the captions.

    The same captions give the same tokenizer (WordPiece training breaks ties at random), and no text is unknown to it.
    """
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(cut, captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )
