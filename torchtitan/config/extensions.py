"""Which keys does job.custom_config_module add? The user's own, or those of an upstream module."""

import dataclasses
import functools
import importlib
from dataclasses import field, make_dataclass
from typing import Any

from torchtitan.config.faults import Fault, with_place
from torchtitan.config.schema import JobConfig
from torchtitan.config.values import key_types

UPSTREAM_PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "torchtitan.models.flux.job_config": {
        "training": {"classifier_free_guidance_prob": 0.0, "img_size": 256, "test_mode": False},
        "encoder": {
            "t5_encoder": "google/t5-v1_1-small",
            "clip_encoder": "openai/clip-vit-large-patch14",
            "autoencoder_path": "torchtitan/experiments/flux/assets/autoencoder/ae.safetensors",
            "max_t5_encoding_len": 256,
        },
        "validation": {
            "enable_classifier_free_guidance": False,
            "classifier_free_guidance_scale": 5.0,
            "denoising_steps": 50,
            "eval_freq": 100,
            "save_img_count": 1,
            "save_img_folder": "img",
            "all_timesteps": False,
        },
        "inference": {
            "save_img_folder": "inference_results",
            "prompts_path": "./torchtitan/experiments/flux/inference/prompts.txt",
            "local_batch_size": 2,
            "img_size": 256,
        },
    },
    "torchtitan.components.ft.config": {
        "fault_tolerance": {
            "sync_steps": 5,
            "should_quantize": False,
            "fragment_sync_delay": 0,
            "fragment_update_alpha": 0.0,
            "module_fqns_per_model_fragment": [],
            "num_fragments": 1,
        },
    },
    "torchtitan.experiments.vlm.job_config": {
        "data": {
            "max_images_per_batch": 10,
            "max_patches_per_image": 256,
            "patch_size": 16,
            "spatial_merge_size": 1,
            "packing_buffer_size": 0,
        },
    },
    "torchtitan.experiments.transformers_modeling_backend.job_config": {},
    "torchtitan.experiments.simple_fsdp.job_config": {"compile": {"graph_passes": None}},
    "torchtitan.experiments.compiler_toolkit.job_config": {
        "compile": {"joint_passes": [], "passes": []},
    },
    "torchtitan.experiments.autoparallel.job_config": {
        "experimental": {"comms_bucket_reorder_strategy": "aten", "autop_force_bf16": False},
    },
}
"""Modules of upstream whose keys its files use, as section, key and default: such files load here,
and what they ask for is refused by name (not_built.py), instead of as an unknown key."""


def extended_schema(module: str) -> tuple[type[JobConfig], list[Fault]]:
    """Our schema with a module's JobConfig merged in; ours alone, and why, where that fails."""
    if not module:
        return JobConfig, []
    if module in UPSTREAM_PARTS:
        return merge_schema(JobConfig, _as_dataclass(UPSTREAM_PARTS[module])), []
    reason, remedy = "", "It names a Python module that can be imported from here."
    try:
        extension = getattr(importlib.import_module(module), "JobConfig", None)
        if isinstance(extension, type) and dataclasses.is_dataclass(extension):
            return merge_schema(JobConfig, extension), []
        reason, remedy = "has no dataclass JobConfig.", "Define one whose fields are sections."
    except ImportError as error:
        reason = f"cannot be imported: {error}."
    except TypeError as error:
        reason, remedy = f"cannot extend the configuration: {error}.", "Give every key a default."
    except Exception as error:  # whatever its code does
        reason, remedy = f"fails: {with_place(error)}.", ""
    return JobConfig, [Fault("job.custom_config_module", reason, remedy, module)]


@functools.cache
def merge_schema(base: type, extension: type) -> type:
    """The base with the extension's fields. Sections in both merge; else the extension wins."""
    base_kinds, kinds = key_types(base), key_types(extension)
    merged: list[tuple[str, Any, Any]] = []
    for key in dataclasses.fields(extension):
        kind = kinds[key.name]
        if dataclasses.is_dataclass(kind) and dataclasses.is_dataclass(base_kinds.get(key.name)):
            kind = merge_schema(base_kinds[key.name], kind)
            merged.append((key.name, kind, field(default_factory=kind)))
        else:
            default = {"default": key.default, "default_factory": key.default_factory}
            merged.append((key.name, kind, field(**default)))
    return make_dataclass(f"Merged{base.__name__}", merged, bases=(base,), frozen=True)


def _as_dataclass(sections: dict[str, dict[str, Any]]) -> type:
    """A JobConfig of sections given by their defaults, whose types follow from these."""
    parts = []
    for section, keys in sections.items():
        part = make_dataclass(section, [_key(name, default) for name, default in keys.items()])
        parts.append((section, part, field(default_factory=part)))
    return make_dataclass("JobConfig", parts)


def _key(name: str, default: Any) -> tuple[str, Any, Any]:
    if isinstance(default, list):
        return name, list[str], field(default_factory=list)
    return name, str | None if default is None else type(default), field(default=default)
