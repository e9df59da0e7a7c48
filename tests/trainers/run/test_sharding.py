"""What FSDP 2 is told of a student."""

from __future__ import annotations

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import make_student

from trainers.run.sharding import prepare_sharding


@pytest.mark.parametrize(
    "vision", ["clip_vision_model", "siglip_vision_model", "dinov2", "swin", "convnext", "resnet", "mobilevit"]
)
def test_layers_to_shard_are_found_in_every_tower(vision):
    """accelerate stops at a class that a tower names and has not, and at an embedding that is sharded twice."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if vision in ("swin", "convnext", "resnet", "mobilevit"):
        small = {}
    if "clip" in vision:
        small["patch_size"] = 16
    model = make_student(vision={"model_type": vision, **small})[0]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        mixed_precision_policy="bf16",
        state_dict_type="FULL_STATE_DICT",
    )
    prepare_sharding(plugin, model)
    plugin.set_auto_wrap_policy(model)
    names = plugin.transformer_cls_names_to_wrap
    assert "BertLayer" in names and "BertEmbeddings" not in names and len(names) > 1
    assert plugin.mixed_precision_policy is None
    assert [p for module in plugin.ignored_modules for p in module.parameters()] == [model.logit_scale]


@pytest.mark.parametrize(
    "setting", [{"fsdp_version": 1}, {"state_dict_type": "SHARDED_STATE_DICT"}, {"cpu_ram_efficient_loading": True}]
)
def test_other_ways_to_shard_are_refused(setting):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", **setting})
    with pytest.raises(ValueError, match="accelerate_configs/fsdp2.yaml"):
        prepare_sharding(plugin, make_student()[0])
