"""FSDP 2: what accelerate's plugin must be told of a student before it shards it."""

from __future__ import annotations

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
from transformers import PreTrainedModel

from . import distributed


def prepare_sharding(plugin: FullyShardedDataParallelPlugin, model: PreTrainedModel) -> None:
    """Settles in the plugin what accelerate leaves open, and gives every rank the first one's weights, as DDP does.

    The temperature, a scalar, is not sharded, since FSDP 2 shards no scalars: every rank holds it and computes its
    gradient over all ranks' rows, so that it stays equal.

    Raises: ValueError for settings that leave checkpoints without a student or that do not run.
    """
    if (
        plugin.fsdp_version != 2
        or plugin.state_dict_type != StateDictType.FULL_STATE_DICT
        or plugin.cpu_ram_efficient_loading
    ):
        raise ValueError(
            f"FSDP has fsdp_version {plugin.fsdp_version}, fsdp_state_dict_type {plugin.state_dict_type.name}, "
            f"fsdp_cpu_ram_efficient_loading {plugin.cpu_ram_efficient_loading}; expected 2, FULL_STATE_DICT and "
            "False: start from accelerate_configs/fsdp2.yaml."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        # Without the classes that towers list and do not contain, and without those around the embedding, which
        # accelerate shards by itself.
        embedding = model.get_input_embeddings()
        apart = {type(module).__name__ for module in model.modules() if embedding not in module.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(apart & set(model._no_split_modules))
    plugin.ignored_modules = [nn.ParameterList(p for p in model.parameters() if p.ndim == 0)]
    # Autocast does what it does under DDP; the plugin's own policy would round embeddings and gradients to bf16.
    plugin.mixed_precision_policy = None
    for tensor in model.state_dict().values():
        distributed.from_first_rank(tensor)


def show_shards(model: nn.Module) -> None:
    """Lets the model's parameters be the shards that FSDP 2 keeps; of a model that is not sharded nothing changes.

    After a forward pass without a backward one the outermost module still has its parameters whole, and what is
    written into these is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
