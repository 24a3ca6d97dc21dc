"""vLLM's own model and loader on a checkpoint, without an engine."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

from rl.generator import text_model_alone

IMAGES = "transformers.models.llama4.image_processing_llama4"


def loaded_by_vllm(
    directory: Path,
    tmp_path: Path,
    streamed: dict[str, torch.Tensor] | None = None,
    *,
    with_vision: bool = False,
) -> dict[str, torch.Tensor]:
    """The parameters of the class that our engines run, once vLLM's loader has read the checkpoint, before any kernel
    packs them; with `streamed`, once it has been given these tensors too, as in a sync.

    `with_vision`: of the class that vLLM itself runs for a multimodal checkpoint, as it will once that is shipped.
    KeyError for a tensor that lands nowhere, ValueError for a parameter that no tensor of the checkpoint is for.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    if with_vision:
        register_multimodal_class()
    ours = {} if with_vision else text_model_alone(json.loads((directory / "config.json").read_text()))
    with patch.dict(os.environ):  # vLLM sets variables for the engine that would follow
        config = EngineArgs(
            model=str(directory), skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=64,
            block_size=16, **ours,
        ).create_engine_config()  # fmt: skip
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            try:
                init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, "gloo")
                initialize_model_parallel()
                model = initialize_model(config)
                loader = DefaultModelLoader(config.load_config)
                loader.enable_weights_track = True  # on its own vLLM asks this of unquantised models only
                loader.load_weights(model, config.model_config)
                if streamed is not None:
                    model.load_weights(iter(streamed.items()))
            finally:
                cleanup_dist_env_and_memory()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def register_multimodal_class() -> None:
    """vLLM's own, whose file imports the preparation of images and with it torchvision, which the locks leave out.
    Loading prepares no image."""
    from vllm.model_executor.models import ModelRegistry

    stub = ModuleType(IMAGES)
    vars(stub).update(find_supported_resolutions=None, get_best_fit=None)
    if importlib.util.find_spec("torchvision") is None:
        sys.modules[IMAGES] = stub
    try:
        from vllm.model_executor.models.mllama4 import Llama4ForConditionalGeneration
    finally:
        if sys.modules.get(IMAGES) is stub:
            del sys.modules[IMAGES]
    # As a class: its name alone would be looked up in a process of its own, which has no stub.
    ModelRegistry.register_model("Llama4ForConditionalGeneration", Llama4ForConditionalGeneration)
