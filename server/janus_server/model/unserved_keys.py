"""Keys that make `transformers` compute something else, but for one value of each.

Many of those of config.json are of no family: its classes read them all the same, from whatever
config.json has them. Keys that neither stand here nor are read elsewhere in this package change no
number. Keys of generation_config.json that are only defaults of what a request says, such as
temperature, do not stand here either.
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

_SERVED_GENERATION: Mapping[str, object] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": [],
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "repetition_penalty": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": [],
    "watermarking_config": None,
}
"""Each changes which tokens `transformers` generates even where it takes the most likely ones."""


def refuse_unserved(config: Mapping[str, Any]) -> None:
    """Raise ValueError, with the key, where config.json asks for what no family here has."""
    _refuse_other_values(config, _SERVED_VALUE)
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise ValueError(f'layer_types {shown(layer_types)} are not served, only "full_attention"')


def refuse_unserved_generation(config: Mapping[str, Any]) -> None:
    """The same for the keys by which `transformers` steers what it generates.

    They are of generation_config.json, or of config.json where there is no such file.
    """
    _refuse_other_values(config, _SERVED_GENERATION)


def _refuse_other_values(config: Mapping[str, Any], served_values: Mapping[str, object]) -> None:
    for key, served in served_values.items():
        value = config.get(key)
        if value is not None and value != served:
            only = "" if served is None else f", only {shown(served)}"
            raise ValueError(f"{key} {shown(value)} is not served{only}")
