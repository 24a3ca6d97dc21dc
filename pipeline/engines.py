"""The one shape of engine that rollouts and evaluation share, so that a running engine serves both.

Called by the online_rl and evaluate stages.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import DataError
from rl.types import EngineSettings

LONGEST_TOKENS = 1024  # prompt and answer together; a longer KV cache row would cost sequences decoded at once


def engine_settings(dtype: str, checkpoint: Path, seed: int, record_routes: bool = False) -> EngineSettings:
    """Settings for a policy's engine: as long as the checkpoint can read, up to LONGEST_TOKENS. Raises DataError."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        positions = (config.get("text_config") or config)["max_position_embeddings"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{checkpoint}/config.json: {error!r}; a Llama-like max_position_embeddings is needed"
        ) from error
    longest = min(LONGEST_TOKENS, positions)
    return EngineSettings(
        checkpoint=str(checkpoint), dtype=dtype, max_model_len=longest, seed=seed, record_routes=record_routes
    )
