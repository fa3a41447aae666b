"""ijepa-hf: pretrain, continue, inspect, evaluate and publish I-JEPA encoders with Hugging Face tools.

Importing the package makes `AutoModelForPreTraining` know `IJepaForPretraining`. `AutoModel` and `AutoConfig` stay as
they are: what this package saves must load with the stock classes, also where this package is not installed.

The model is imported at once, because it is what is registered; `IJepaDataCollator`, which brings `datasets` along,
when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoModelForPreTraining
from transformers import IJepaConfig as _StockIJepaConfig

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import IJepaModel
from ijepa_hf.model.masking import Masks, MaskSettings, draw_masks
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, IJepaForPretrainingOutput, IJepaPredictor

if TYPE_CHECKING:
    from ijepa_hf.data.collator import IJepaDataCollator

__version__ = "0.1.0"
__all__ = [
    "IJepaConfig",
    "IJepaDataCollator",
    "IJepaForPretraining",
    "IJepaForPretrainingOutput",
    "IJepaModel",
    "IJepaPredictor",
    "MaskSettings",
    "Masks",
    "draw_masks",
]


def __getattr__(name: str) -> Any:
    if name != "IJepaDataCollator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ijepa_hf.data.collator import IJepaDataCollator

    globals()[name] = IJepaDataCollator
    return IJepaDataCollator


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


for _config in (_StockIJepaConfig, IJepaConfig):
    AutoModelForPreTraining.register(_config, IJepaForPretraining, exist_ok=True)
