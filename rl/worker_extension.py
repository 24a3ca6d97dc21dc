"""What runs inside the vLLM worker: a backend for vLLM's own weight-transfer interface, which takes weights from a file
(in shared memory, as a rule) or from the learner's server.

vLLM imports this module by the name given in `worker_extension_cls`, in the process that holds the model. An update is
a transaction: names, shapes and digest are checked before the first tensor is touched, and a refused update leaves the
engine as it was. After an accepted one the engine equals, bit for bit, an engine started from those weights.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models.llama4 import Llama4MoE

import rl.text_of_multimodal  # noqa: F401  vLLM's registry learns its class
from rl.generator import TRANSFER_BACKEND
from rl.weight_stream import SCHEME, StreamedWeights, WeightClient
from rl.weight_sync import WeightFiles, Weights, WeightsRefused, check_names, check_tied_head, weights_digest

KEPT_ROUTES = 4096  # requests


def repack_for_cpu(model: torch.nn.Module) -> None:
    """Redo the packing for CPU kernels that vLLM forgets on a reload. Without it the engine answers from old or
    scrambled weights, and no error says so:

    - expert weights are packed only when their layer is first loaded, and afterwards lie unpacked behind a kernel that
      reads them as packed;
    - an output head tied to the embedding is sent no tensor of its own, and keeps its packed copy of the old one.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight"):
            kernel.fused_experts.process_weights_after_loading(module)
        elif isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)


@dataclass
class InitInfo(WeightTransferInitInfo):
    checkpoint: str = ""  # what the engine was started from: the tensors every update must bring


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    location: str = ""  # a file, a Hugging Face directory, or an address of `rl/weight_stream.py`
    expected_digest: str | None = None


@dataclass
class Receipt:
    """What became of the last update. `refusal` empty and `half_loaded` false: the engine holds the new weights."""

    digest: str = ""
    num_tensors: int = 0
    refusal: str = ""
    half_loaded: bool = False


@dataclass
class _Expected:
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False


class WholeOrNothingEngine(WeightTransferEngine):
    """Loads published weights, or a whole Hugging Face directory, into the running model."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        tied = bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))
        with WeightFiles(init_info.checkpoint) as weights:
            self.expected = _Expected(weights.shapes(), tied)
        self.receipt = Receipt()
        self.client = WeightClient(self.device)

    def start_weight_update(self) -> None:
        # Taking the layers apart waits until the weights have been verified, in `receive_weights`.
        self.receipt = Receipt()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator here, which a CPU does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Verify, then load. Raises `WeightsRefused`; the receipt says whether the model was touched."""
        try:
            with self._open(update_info.location) as weights:
                self._verify(weights, update_info)
                self.receipt.half_loaded = True
                layerwise.initialize_layerwise_reload(self.model)
                self.model.load_weights(iter(weights))
        except WeightsRefused as error:
            self.receipt.refusal = str(error)
            raise

    def _open(self, location: str) -> WeightFiles | StreamedWeights:
        return self.client.get(location) if location.startswith(f"{SCHEME}://") else WeightFiles(location)

    def _verify(self, weights: Weights, update_info: UpdateInfo) -> None:
        check_names(self.expected.shapes, weights.shapes(), tied=self.expected.tied)
        if self.expected.tied:
            check_tied_head(weights)
        self.receipt.digest, self.receipt.num_tensors = weights_digest(iter(weights)), len(weights)
        if update_info.expected_digest not in (None, self.receipt.digest):
            raise WeightsRefused(
                f"{update_info.location} has digest {self.receipt.digest}, but {update_info.expected_digest} "
                "was announced"
            )

    def finish_weight_update(self) -> None:
        layerwise.finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_for_cpu(self.model)
        self.receipt.half_loaded = False

    def shutdown(self) -> None:
        self.client.close()


if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, WholeOrNothingEngine)


class RouteRecorder:
    """Which expert each token of each request took. vLLM returns that itself, but not on a CPU."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.step: list[torch.Tensor] = []  # expert ids [tokens] of each MoE layer, in this step
        self.of_request: OrderedDict[str, list[torch.Tensor]] = OrderedDict()
        for module in runner.model.modules():
            if isinstance(module, Llama4MoE):
                module.router.register_forward_hook(self._note)
        self.execute, runner.execute_model = runner.execute_model, self._recorded

    def _note(self, router: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.step.append(output[0].argmax(dim=-1).short())

    def _recorded(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        self.step.clear()
        output = self.execute(scheduled, *args, **kwargs)
        if self.step:
            ids_TM, first = torch.stack(self.step, dim=1), 0
            for request in self.runner.input_batch.req_ids:  # in the order in which their tokens lie
                count = scheduled.num_scheduled_tokens.get(request, 0)
                self.of_request.setdefault(request, []).append(ids_TM[first : first + count])
                first += count
            while len(self.of_request) > KEPT_ROUTES:  # of requests that nobody asked about
                self.of_request.popitem(last=False)
        return output

    def take(self, request: str) -> list[list[int]]:
        """Empty for a model without experts."""
        steps = self.of_request.pop(request, [])
        return torch.cat(steps).tolist() if steps else []


class WorkerExtension:
    """Mixed into the vLLM worker; its methods are called by name through `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any

    def record_routes(self) -> None:
        """From now on, for every request that comes."""
        self.routes = RouteRecorder(self.model_runner)

    def take_routes(self, requests: list[str]) -> list[list[list[int]]]:
        """Expert ids [tokens, MoE layers] of each finished request; they are forgotten."""
        return [self.routes.take(request) for request in requests]

    def weight_receipt(self) -> dict[str, Any]:
        """The `Receipt` of the last update, as plain values."""
        return vars(self.weight_transfer_engine.receipt)

    def clear_infinities(self) -> None:
        """From the KV cache."""
        for cache in self.model_runner.kv_caches:
            torch.nan_to_num_(cache, nan=0.0, posinf=0.0, neginf=0.0)

    def seed_sampling(self, seed: int) -> None:
        """Restart the generator that unseeded requests draw from."""
        torch.manual_seed(seed)
