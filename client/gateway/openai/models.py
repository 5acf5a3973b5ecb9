"""GET /v1/models, as OpenAI's clients and Codex read it."""

from __future__ import annotations

from typing import Any

from ..served_model import ServedModel


def model_object(model: ServedModel) -> dict[str, Any]:
    """One entry of `data`; beyond OpenAI's fields: the context, and why the model cannot be used now, if so."""
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.started),
        "owned_by": "petal",
        "context_length": model.context_length,
        "unavailable": model.lack or None,
    }


def codex_model(model: ServedModel) -> dict[str, Any]:
    """One entry of `models`: a field that Codex misses spoils the whole list for it."""
    return {
        "slug": model.name,
        "display_name": model.name,
        "description": "served by a Petal swarm",
        "default_reasoning_level": None,
        "supported_reasoning_levels": [],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 1,
        "availability_nux": None,
        "upgrade": None,
        "base_instructions": "You are a coding agent that works in the user's terminal.",
        "supports_reasoning_summaries": False,
        "default_reasoning_summary": "none",
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": None,
        "truncation_policy": {"mode": "bytes", "limit": 10_000},
        "supports_parallel_tool_calls": False,
        "context_window": model.context_length or None,
        "auto_compact_token_limit": None,
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
    }
