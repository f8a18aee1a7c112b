"""Engines over a checkpoint in fp32, sound or not."""

import dataclasses
from pathlib import Path

import torch

from janus_server.attention.config import EngineConfig
from janus_server.attention.engine import Engine
from janus_server.attention.weights import AttentionWeights, load_attention_weights
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.weights import WeightReader

POISONED_TOKEN = 200


def load_weights(folder: Path) -> AttentionWeights:
    checkpoint = Checkpoint.open(folder)
    with WeightReader(checkpoint, dtype=torch.float32, device=torch.device("cpu")) as reader:
        return load_attention_weights(reader)


def make_engine(folder: Path, weights: AttentionWeights | None = None, **config: float) -> Engine:
    return Engine(
        Checkpoint.open(folder).spec,
        weights or load_weights(folder),
        EngineConfig(**{"kv_cache_gib": 0.01, **config}),
    )


def poisoned_weights(folder: Path) -> AttentionWeights:
    """The embedding of one token is not a number."""
    weights = load_weights(folder)
    embedding_VH = weights.embedding_VH.clone()
    embedding_VH[POISONED_TOKEN] = torch.nan
    return dataclasses.replace(weights, embedding_VH=embedding_VH)
