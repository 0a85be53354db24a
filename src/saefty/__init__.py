"""saefty: sparse autoencoders for the safety of language and vision-language models.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import Any

_PUBLIC = {
    "load_model": "saefty.models.base",
    "Example": "saefty.records",
    "Site": "saefty.records",
    "ActivationStore": "saefty.stores.activations",
    "FeatureStore": "saefty.stores.features",
    "SparseAutoencoder": "saefty.saes.base",
    "load_sae": "saefty.sources",
    "save_sae": "saefty.saes.native",
    "gate": "saefty.interventions.gate",
    "subtract": "saefty.interventions.gate",
    "steer": "saefty.interventions.steer",
    "project_out": "saefty.interventions.steer",
    "cap": "saefty.interventions.steer",
    "clamp": "saefty.interventions.clamp",
    "cap_latents": "saefty.interventions.clamp",
    "in_order": "saefty.interventions.base",
    "intervening": "saefty.interventions.base",
    "SteeringVector": "saefty.interventions.vectors",
    "load_vector": "saefty.interventions.vectors",
    "SaeftyError": "saefty.errors",
    "dataset": "saefty.functions",
    "extract": "saefty.functions",
    "train": "saefty.functions",
    "encode": "saefty.functions",
    "analyze": "saefty.functions",
    "evaluate": "saefty.functions",
    "probe": "saefty.functions",
    "doctor": "saefty.functions",
    "load_guard": "saefty.guards.scoring",
    "show_img": "saefty.notebook",
    "tokens": "saefty.sentences",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'saefty' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
