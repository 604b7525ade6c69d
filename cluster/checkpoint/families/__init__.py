"""One small file for each family of models: what its layers are made of, by its config.json.

Beside transformers' `modular_*.py` of the same name it should read like the same difference. Knows no tensor and no
file. A new family is a file here, a line in `FAMILIES`, and what `LayerSpec` does not say yet.
"""

from collections.abc import Mapping

from cluster.checkpoint.families import (
    granitemoe,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from cluster.checkpoint.families.family import Family

FAMILIES: Mapping[str, Family] = {  # by model_type
    module.FAMILY.model_type: module.FAMILY
    for module in (mixtral, mistral, llama, qwen2, qwen3, qwen3_moe, olmoe, qwen2_moe, granitemoe)
}
