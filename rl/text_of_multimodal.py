"""A multimodal Llama 4 in an engine that reads and writes only text: vLLM runs the text model alone.

`rl/generator.py` asks for it, `rl/worker_extension.py` makes it known in the process that holds the model. The engine
is started from the multimodal checkpoint and is sent all of that checkpoint's tensors at every sync, so digests are
those of what is saved and shipped; vision tensors are left out on their way into the model, and nowhere else. vLLM's
own multimodal class would compute the same text, with the vision part in the engine's memory, and not without
torchvision and the checkpoint's image processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama4 import Llama4ForCausalLM

from model.tensor_map import text_name

ARCHITECTURE = "TextOfMultimodalLlama4"  # what vLLM's registry calls the class below


def text_config_for_engine(config: Any) -> Any:
    """The text part of a checkpoint's config, as vLLM's `hf_overrides`, naming our class.

    vLLM also asks it about an empty config of the same `model_type`, which comes back with its type unchanged.
    """
    text = config.get_text_config()
    text.architectures = [ARCHITECTURE]
    quantization = getattr(config, "quantization_config", None)  # of an FP8 checkpoint: it lies beside the text part
    if quantization is not None:
        text.quantization_config = quantization
    return text


class TextOfMultimodalLlama4(Llama4ForCausalLM):
    """vLLM's text model, loaded from a multimodal checkpoint's tensors under their own names."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(_text_only(weights))


def _text_only(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """One at a time: all of them together would be the whole model once more."""
    for name, tensor in weights:
        renamed = text_name(name)
        if renamed is not None:
            yield renamed, tensor


ModelRegistry.register_model(ARCHITECTURE, TextOfMultimodalLlama4)
