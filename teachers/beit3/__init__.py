"""BEiT-3 fine-tuned for retrieval, as a transformers model; `python -m teachers.beit3.convert` makes one."""

from transformers import AutoConfig, AutoModel

from .configuration_beit3 import Beit3Config
from .modeling_beit3 import Beit3RetrievalModel, Beit3RetrievalOutput


# With the package imported, AutoModel knows the class; a saved folder carries the code for everybody else.
AutoConfig.register(Beit3Config.model_type, Beit3Config, exist_ok=True)
AutoModel.register(Beit3Config, Beit3RetrievalModel, exist_ok=True)
Beit3Config.register_for_auto_class()
Beit3RetrievalModel.register_for_auto_class("AutoModel")

__all__ = ["Beit3Config", "Beit3RetrievalModel", "Beit3RetrievalOutput"]
