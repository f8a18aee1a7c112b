"""Keys of config.json that make `transformers` compute something else, but for one value of each.

Many are of no family: its classes read them all the same, from whatever config.json has them.
Keys that neither stand here nor are read elsewhere in this package change no number.
"""

from collections.abc import Mapping
from typing import Any

from janus_server.model.config_json import shown

_SERVED_VALUE: Mapping[str, object] = {
    "attention_chunk_size": None,
    "attribute_map": None,
    "configuration_files": None,
    "decoder": None,
    "fusion_config": None,
    "generator": None,
    "hidden_act": "silu",
    "is_causal": True,
    "is_encoder_decoder": False,
    "kv_sharing_modes": None,
    "per_layer_config": None,
    "quantization_config": None,
    "text_config": None,
    "text_encoder": None,
    "transformers_weights": None,
    "use_sliding_window": False,
}


def refuse_unserved(config: Mapping[str, Any]) -> None:
    """Raise ValueError, with the key, where config.json asks for what no family here has."""
    for key, served in _SERVED_VALUE.items():
        value = config.get(key)
        if value is not None and value != served:
            only = "" if served is None else f", only {shown(served)}"
            raise ValueError(f"{key} {shown(value)} is not served{only}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise ValueError(f'layer_types {shown(layer_types)} are not served, only "full_attention"')
