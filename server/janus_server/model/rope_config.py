"""The rotary position embedding that a config.json calls for, resolved as `transformers` does."""

import math
from collections.abc import Mapping
from typing import Any

from janus_scheduler.model_spec import Llama3Scaling, RopeSpec, YarnScaling
from janus_server.model.config_json import boolean, integer, number, shown, table

_DEFAULT_THETA = 10_000.0
_MAX_FACTOR = 1e6


def rope_spec(config: Mapping[str, Any], *, head_dim: int, max_context: int) -> RopeSpec:
    """Read `rope_parameters`, or their older spelling `rope_scaling`; raises ValueError.

    `transformers` does not merge the two: a `rope_scaling` that says anything replaces the other.
    """
    key = "rope_scaling" if table(config, "rope_scaling") else "rope_parameters"
    rope = table(config, key)
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{key} for some layers only ({shown(nested[0])}) are not served")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = _theta(config, rope)
    if kind == "default":  # whatever else is said, partial_rotary_factor too, is ignored
        return RopeSpec(theta=theta)
    # dynamic and longrope change every frequency at some length, and so would the cached keys.
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"rope type {shown(kind)} is not served, only default, linear, llama3 and yarn"
        )
    _check_whole_head(config, rope, head_dim, kind)
    if kind == "linear":
        return RopeSpec(theta=theta, factor=_factor(rope))
    # A value beside the others wins over the one in the object.
    where = config if config.get("original_max_position_embeddings") is not None else rope
    original_context = integer(where, "original_max_position_embeddings", max_context)
    if kind == "llama3":
        return RopeSpec(
            theta=theta, factor=_factor(rope), scaling=_llama3_scaling(rope, original_context)
        )
    if theta == 1:
        raise ValueError("rope_theta must be above 1 with the rope type yarn")
    factor = _factor(rope, max_context / original_context)
    return RopeSpec(
        theta=theta,
        factor=factor,
        scaling=_yarn_scaling(rope, original_context),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _theta(config: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    where = rope if rope.get("rope_theta") is not None else config
    return number(where, "rope_theta", _DEFAULT_THETA, low=1, high=1e12)


def _factor(rope: Mapping[str, Any], default: float | None = None) -> float:
    return number(rope, "factor", default, low=1e-3, high=_MAX_FACTOR)


def _check_whole_head(
    config: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int, kind: str
) -> None:
    where = rope if rope.get("partial_rotary_factor") is not None else config
    part = number(where, "partial_rotary_factor", 1.0, low=0, high=_MAX_FACTOR)
    # Its only effect in this family, for `transformers` cannot rotate a part of a head here.
    if int(head_dim * part) != head_dim:
        raise ValueError(f"partial_rotary_factor {part:g} is not served with the rope type {kind}")


def _llama3_scaling(rope: Mapping[str, Any], original_context: int) -> Llama3Scaling:
    low = number(rope, "low_freq_factor", low=1e-3, high=_MAX_FACTOR)
    high = number(rope, "high_freq_factor", low=1e-3, high=_MAX_FACTOR)
    if high <= low:
        raise ValueError(f"high_freq_factor {high:g} must be above low_freq_factor {low:g}")
    return Llama3Scaling(
        original_context=original_context, low_freq_factor=low, high_freq_factor=high
    )


def _yarn_scaling(rope: Mapping[str, Any], original_context: int) -> YarnScaling:
    if "truncate" in rope and rope["truncate"] is None:  # false for transformers, absent for us
        raise ValueError("truncate must be true or false, not null")
    return YarnScaling(
        original_context=original_context,
        beta_fast=number(rope, "beta_fast", 32.0, low=1e-3, high=_MAX_FACTOR),
        beta_slow=number(rope, "beta_slow", 1.0, low=1e-3, high=_MAX_FACTOR),
        truncate=boolean(rope, "truncate", True),
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    scale = number(rope, "mscale", 0.0, low=0, high=_MAX_FACTOR)
    scale_all = number(rope, "mscale_all_dim", 0.0, low=0, high=_MAX_FACTOR)
    growth = 0.1 * math.log(max(factor, 1.0))
    default = (scale * growth + 1) / (scale_all * growth + 1) if scale and scale_all else growth + 1
    return number(rope, "attention_factor", default, low=0, high=_MAX_FACTOR)
