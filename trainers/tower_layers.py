"""Towers cut from larger ones: some of a pre-trained tower's layers, with their weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_dsmd import DSMDConfig, DSMDModel


# Of towers that are backbones too: names of their outputs, made anew from the number of layers.
OF_THE_DEPTH = ("out_features", "out_indices", "stage_names")
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")


def evenly_spaced(kept: int, count: int) -> list[int]:
    """Which layers of a tower are kept where only their number is given: the first, the last, even steps between.

    DistilBERT starts so from layers 0, 2, 4, 7, 9 and 11 of BERT's twelve (arXiv 1910.01108 and its code). "Poor Man's
    BERT" (arXiv 2004.03844), whose models are fine-tuned on labels and learn from no teacher, does as well or better
    with the first layers. The two were not compared under this project's losses.
    """
    return [round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)]


def depth_of(config: PreTrainedConfig) -> int:
    """The number of a tower's layers, or of its stages where it is made of stages.

    Raises:
        ValueError: its configuration says neither.
    """
    if is_staged(config):
        return len(config.depths)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(f"{type(config).__name__} does not say how many layers it has: it cannot be cut.")
    return count


def is_staged(config: PreTrainedConfig) -> bool:
    """Whether a tower is made of stages of growing width, as convolutional ones are."""
    return isinstance(getattr(config, "depths", None), list | tuple)


def kept_layers(config: PreTrainedConfig, modality: str, number: int | None, indices: list[int] | None) -> list[int]:
    """The indices of the layers that a tower keeps, ascending; of a tower of stages, its first stages.

    Args:
        config: of the whole tower.
        modality: "vision" or "text", for the message.
        number: how many; None where `indices` name them.
        indices: which, from 0.

    Raises:
        ValueError: the tower has not so many layers, or not these.
    """
    count, name = depth_of(config), type(config).__name__
    unit = "stages" if is_staged(config) else "layers"
    if indices is None:
        if number > count:
            raise ValueError(f"{modality}_layers={number}: {name} has {count} {unit}, from which this many are kept.")
        return list(range(number)) if is_staged(config) else evenly_spaced(number, count)
    if max(indices) >= count:
        raise ValueError(
            f"{modality}_layer_indices={indices}: the {unit} of {name} are 0 to {count - 1}, without {max(indices)}."
        )
    if is_staged(config) and indices != list(range(len(indices))):
        raise ValueError(
            f"{modality}_layer_indices={indices}: each stage of {name} takes the width of the one before, so only its "
            f"first stages can be kept. Give {modality}_layers instead."
        )
    return indices


def cut_config(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """The configuration of the tower that has only these layers of another."""
    fields = {name: value for name, value in config.to_dict().items() if name not in OF_THE_DEPTH}
    if is_staged(config):
        fields.update({name: fields[name][: len(layers)] for name in ("depths", "hidden_sizes") if name in fields})
        fields.update({"num_stages": len(layers)} if "num_stages" in fields else {})
        return type(config).from_dict(fields)
    count = depth_of(config)
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    for name, value in fields.items():  # such as ModernBERT's layer_types
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            fields[name] = [value[i] for i in layers]
    return type(config).from_dict(fields)


@torch.no_grad()
def cut_student(model: DSMDModel, layers: dict[str, list[int]]) -> DSMDModel:
    """A student like another one whose towers have fewer layers. All its weights are that one's; only where a tower
    loses stages, and with them the width of its output, is its projection a new one.

    Args:
        model: the whole student, on any device.
        layers: "vision", "text" or both, to the indices of the layers that this tower keeps, ascending.

    Raises:
        ValueError: a tower's layers cannot be found, or its other weights do not fit a tower of fewer layers.
    """
    fields = {name: getattr(model.config, name) for name in DSMDConfig.__annotations__}
    paths = {}
    for modality, kept in layers.items():
        paths[f"{modality}_model.{layers_path(getattr(model, f'{modality}_model'))}"] = kept
    try:
        for modality, kept in layers.items():
            fields[f"{modality}_config"] = cut_config(getattr(model, f"{modality}_model").config, kept)
        with model.device:
            smaller = DSMDModel(DSMDConfig(**fields))
    except Exception as error:  # of whatever class the towers are
        kinds = " and ".join(type(getattr(model, f"{modality}_model")).__name__ for modality in layers)
        counts = " and ".join(str(len(kept)) for kept in layers.values())
        raise ValueError(f"{kinds} cannot have {counts} of its layers alone: {error}") from error
    smaller.load_state_dict(_weights_for(smaller, model, paths))
    return smaller.train(model.training)


def layers_path(tower: PreTrainedModel) -> str:
    """Where a tower has its layers: the name of the one list of modules that is as long as its configuration says.

    Raises:
        ValueError: there is none, or more than one.
    """
    count, name = depth_of(tower.config), type(tower).__name__
    lists = {path: of for path, of in tower.named_modules() if isinstance(of, nn.ModuleList)}
    outer = {path: of for path, of in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    found = [path for path, of in outer.items() if len(of) == count]
    if len(found) != 1:
        lengths = ", ".join(f"{path} of {len(of)}" for path, of in outer.items()) or "none"
        raise ValueError(
            f"The layers of {name} cannot be found: its configuration says {count}, and its lists of modules are "
            f"{lengths}. Take it whole, or another tower."
        )
    return found[0]


def _weights_for(smaller: DSMDModel, model: DSMDModel, paths: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights of a smaller student, by its own names.

    Args:
        paths: where a tower of the whole student has its layers, to those that are kept.

    Raises:
        ValueError: one is missing or of another shape, or a kept layer has weights that the smaller student has not.
    """
    own, whole = smaller.state_dict(), model.state_dict()
    # The new name of each weight that is kept.
    renamed = {}
    for name in whole:
        path = next((path for path in paths if name.startswith(f"{path}.")), None)
        if path is None:
            renamed[name] = name
            continue
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        if int(index) in paths[path]:
            renamed[name] = f"{path}.{paths[path].index(int(index))}.{rest}"
    fresh = {name for name in PROJECTIONS if own[name].shape != whole[name].shape}
    weights = {new: whole[old] for old, new in renamed.items() if new not in fresh}
    wrong = sorted(
        name
        for name in (own.keys() - fresh) | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        of = {name.partition(".")[0] for name in wrong}
        kinds = " and ".join(sorted(type(getattr(model, part)).__name__ for part in of))
        raise ValueError(
            f"{kinds} cannot be cut so: its layers differ, and {', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''} would fit no longer. Keep layer 0, or take the tower whole."
        )
    return {**weights, **{name: own[name] for name in fresh}}
