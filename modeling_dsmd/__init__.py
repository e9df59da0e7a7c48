"""The student: what travels with a checkpoint."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from .configuration_dsmd import DSMDConfig
from .modeling_dsmd import DSMDModel, DSMDOutput


# With the package imported, AutoModel knows the class; a saved folder carries the code for everybody else.
AutoConfig.register(DSMDConfig.model_type, DSMDConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
    auto_class.register(DSMDConfig, DSMDModel, exist_ok=True)
DSMDConfig.register_for_auto_class()
DSMDModel.register_for_auto_class("AutoModel")

__all__ = ["DSMDConfig", "DSMDModel", "DSMDOutput"]
