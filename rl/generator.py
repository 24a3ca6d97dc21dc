"""One vLLM engine: token ids in, token ids and log-probabilities out, weights exchanged while it runs.

A plain class; `pipeline/cluster` puts it into a process of its own. Promises: log-probabilities are those of the
distribution that was sampled from (at the sampling temperature, never cut by top-p or top-k); every token carries the
version of the weights that produced it; a refused weight update changes nothing. On CUDA the same class runs vLLM as it
comes (not measured); on a CPU it starts the engine the cheap way, see `_engine_context`. Of a multimodal Llama 4 the
engine runs the text model, see `rl/text_of_multimodal.py`.

    caller ── sample ──▶ AsyncLLM (this process) ──zmq──▶ engine core (a child: scheduler, model, KV cache)
    caller ── take_weights ──▶ pause ▶ verify ▶ load ▶ label ▶ resume;  requests in flight wait and go on
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing.context
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.checkpoint import MULTIMODAL_TYPE
from model.tensor_map import kv_bytes_per_token
from rl.types import EngineSettings, Published, SampledAnswer, SampleRequest, SyncReport
from rl.weight_sync import WeightsRefused

EXTENSION = "rl.worker_extension.WorkerExtension"
TRANSFER_BACKEND = "whole_or_nothing"  # the extension registers it with vLLM
KV_BLOCK_TOKENS = (128, 64, 32, 16)  # blocks vLLM's CPU attention works in, fastest first
PREFILL_TOKENS = 8192  # prompt tokens computed in one step, at most
PROBE_PRIORITY = -1  # before whatever waits: groups are leased again only when it is answered
ENGINE_MODULES = ["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama4",
                  "rl.worker_extension"]  # fmt: skip

CPU_ENGINE_ENV = {
    "TORCH_COMPILE_DISABLE": "1",  # spares a 17 s compilation at the first request for log-probabilities
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # allows the worker inside the engine core: one process fewer
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
ENGINE_ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def query_growth(config: dict[str, Any]) -> dict[str, Any]:
    """Llama 4's NoPE layers scale queries by position if the checkpoint says so. vLLM asks the context length instead
    (on above 32k positions), unless it is told."""
    tuning = config.get("attn_temperature_tuning")
    return {} if tuning is None else {"attn_temperature_tuning": bool(tuning)}


def text_model_alone(config: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments by which vLLM runs the text part of a multimodal Llama 4; none for any other model."""
    if config.get("model_type") != MULTIMODAL_TYPE:
        return {}
    from rl.text_of_multimodal import text_config_for_engine

    return {"hf_overrides": text_config_for_engine}


def kv_block_tokens(config: dict[str, Any]) -> int:
    """Tokens per KV block: the largest that divides the model's attention chunk, as vLLM demands; else ValueError.

    >>> kv_block_tokens({"attention_chunk_size": 192}), kv_block_tokens({})
    (64, 128)
    """
    chunk = config.get("attention_chunk_size") or KV_BLOCK_TOKENS[0]
    for block in KV_BLOCK_TOKENS:
        if chunk % block == 0:
            return block
    raise ValueError(f"attention_chunk_size: {chunk} is no multiple of {KV_BLOCK_TOKENS[-1]}; vLLM cannot serve it")


def sequences_that_fit(settings: EngineSettings, config: dict[str, Any]) -> int:
    """How many sequences of full length the KV cache holds, at most `max_num_seqs`; ValueError when not even one.

    Admitting no more than that means no request is ever preempted: its tokens are computed once, in a batch whose
    make-up depends on the requests alone, and a request with its own seed cannot hit vLLM's crash on a CPU.
    """
    try:
        per_token = kv_bytes_per_token(config, 4 if settings.dtype == "float32" else 2)
    except KeyError:  # another family's words for its shape: vLLM's own limit must do
        return settings.max_num_seqs
    block_bytes = kv_block_tokens(config) * per_token
    blocks = -(-settings.max_model_len // kv_block_tokens(config))
    # One block is vLLM's own null block.
    fit = (int(settings.kv_cache_gib * 2**30 / block_bytes) - 1) // blocks
    if fit < 1:
        needed = (blocks + 1) * block_bytes / 2**30
        raise ValueError(
            f"kv_cache_gib: {settings.kv_cache_gib} holds no sequence of max_model_len {settings.max_model_len}; "
            f"at least {needed:.3f} is needed"
        )
    return min(fit, settings.max_num_seqs)


def versions_of(spans: list[Any], num_tokens: int) -> list[int]:
    """The policy version of each of `num_tokens` tokens, from vLLM's spans (version label, start, end)."""
    versions = [int(span.version) for span in spans for _ in range(span.start, span.end)]
    assert len(versions) == num_tokens, f"{num_tokens} tokens, but versions for {len(versions)}"
    return versions


class VllmGenerator:
    """An engine on one checkpoint's architecture. Build it, `await start()`, use it from one event loop, `stop()`."""

    def __init__(self, settings: EngineSettings, name: str) -> None:
        self.settings, self.name = settings, name
        self.version, self.seed = 0, settings.seed
        self.broken = ""  # why this engine may not be used any more
        self._engine: Any = None
        self._request_numbers = itertools.count()
        self._num_in_flight = 0
        self._batches: dict[str, dict[str, Any]] = {}  # being gathered: name → request id → prompt, parameters, future
        self._sync_lock = asyncio.Lock()

    async def start(self) -> dict[str, float]:
        """Bring the engine up on `settings.checkpoint` as version 0. Returns the seconds it took, by part."""
        for key, value in ENGINE_ENV.items():
            os.environ.setdefault(key, value)
        clock = _PartClock()
        on_gpu = _has_cuda()
        context = None if on_gpu else _engine_context()
        clock.lap("fork_server_s")
        await asyncio.to_thread(_import_vllm)  # the engine's own process imports the same modules meanwhile
        clock.lap("vllm_import_s")
        self._engine = self._build_engine(on_gpu, context)
        clock.lap("engine_s")
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        init_info = {"checkpoint": self.settings.checkpoint}
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))
        await self._engine.update_weight_version("0")
        self._recorder = "engine" if on_gpu else "extension"
        if self.settings.record_routes and not on_gpu:
            await self._engine.collective_rpc("record_routes")
        await self._seed_sampling()
        clock.lap("handshake_s")
        return clock.parts

    def _build_engine(self, on_gpu: bool, context: Any) -> Any:
        import vllm.v1.engine.utils as engine_utils
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if context is not None:
            engine_utils.get_mp_context = lambda: context  # vLLM would start the child afresh: another import of itself
        settings = self.settings
        whole = json.loads((Path(settings.checkpoint) / "config.json").read_text())
        config = whole.get("text_config") or whole
        cpu_only: dict[str, Any] = {"distributed_executor_backend": "uni", "enforce_eager": True,
                                    "block_size": kv_block_tokens(config)}  # fmt: skip
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=settings.checkpoint,
                skip_tokenizer_init=True,  # token ids in, token ids out
                generation_config="vllm",  # nothing of the checkpoint's own sampling defaults
                override_generation_config=query_growth(config),
                dtype=settings.dtype,
                seed=settings.seed,
                max_model_len=settings.max_model_len,
                max_num_seqs=sequences_that_fit(settings, config),
                kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
                # A prompt is computed in one piece: on a CPU a seeded request whose prefill is cut kills the engine.
                enable_chunked_prefill=False,
                scheduling_policy="priority",  # in the order of arrival, but for a probe
                max_num_batched_tokens=max(settings.max_model_len, settings.max_num_seqs, PREFILL_TOKENS),
                # Off for policies: a cache hit changes the order of the arithmetic, and with it the last bits, with
                # the history of the engine. On, entries are salted with the version and never outlive their weights.
                enable_prefix_caching=settings.prefix_caching,
                logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature included
                max_logprobs=max(20, settings.max_labels),
                disable_log_stats=True,
                worker_extension_cls=EXTENSION,
                weight_transfer_config=WeightTransferConfig(backend=TRANSFER_BACKEND),
                **text_model_alone(whole),
                **({"enable_return_routed_experts": settings.record_routes} if on_gpu else cpu_only),
            )
        )

    async def sample(self, request: SampleRequest) -> list[SampledAnswer]:
        """`request.num_samples` answers, in a fixed order. A stop token the model emitted is part of the answer.

        Raises ValueError for a prompt that leaves no room for `max_tokens`: a fault of this request, not of the engine.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self.settings.max_model_len - request.max_tokens
        if not 0 < len(request.prompt_ids) <= room:
            raise ValueError(
                f"request {request.request_id}: the prompt has {len(request.prompt_ids)} tokens; with max_tokens "
                f"{request.max_tokens} and max_model_len {self.settings.max_model_len} it may have 1 to {room}"
            )
        params = SamplingParams(
            n=request.num_samples,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            stop_token_ids=list(request.stop_token_ids),
            logprobs=0,  # of the chosen token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output, internal_id = await self._generate(request.prompt_ids, params, request.request_id, request.together)
        completions = sorted(output.outputs, key=lambda one: one.index)
        return [
            _answer(completion, routes[: len(request.prompt_ids) + len(completion.token_ids) - 1] if routes else None)
            for completion, routes in zip(completions, await self._routes(internal_id, completions))
        ]

    async def score_labels(
        self, prompts: list[list[int]], label_ids: list[int], priority: int = 0
    ) -> list[list[float]]:
        """log p(label | prompt) over the whole vocabulary, at temperature 1: a row per prompt, a column per label. A
        lower priority goes first."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self.settings.max_model_len - 1
        if not 0 < len(label_ids) <= self.settings.max_labels:
            raise ValueError(f"label_ids: {len(label_ids)} labels; 1 to {self.settings.max_labels} can be scored")
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= room:
                raise ValueError(f"prompts.{index} has {len(prompt)} tokens; 1 to {room} are possible")
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,  # the token itself is not used; log-probabilities are then those at temperature 1
            logprobs=len(label_ids),
            logprob_token_ids=list(label_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = await asyncio.gather(
            *(self._generate(prompt, params, "score", priority=priority) for prompt in prompts)
        )
        first_tokens = (output.outputs[0].logprobs[0] for output, _ in outputs)
        return [[entries[label].logprob for label in label_ids] for entries in first_tokens]

    async def _generate(
        self,
        prompt_ids: list[int],
        params: Any,
        request_id: str,
        together: tuple[str, int] | None = None,
        priority: int = 0,
    ) -> tuple[Any, str]:
        """Run one request to its end: its output, and vLLM's own name for it. Cancelling the caller takes it out of
        the engine."""
        if self.broken:
            raise RuntimeError(f"engine {self.name} is unusable: {self.broken}")
        prompt: dict[str, Any] = {"prompt_token_ids": prompt_ids}
        if self.settings.prefix_caching:
            prompt["cache_salt"] = self._cache_salt()
        # The number keeps a repeated request id apart from one still in flight, which vLLM would refuse.
        unique_id = f"{request_id}#{next(self._request_numbers)}"
        self._num_in_flight += 1
        answers = None
        try:
            if together is None:
                answers = await self._engine.add_request(unique_id, prompt, params, priority=priority)
            else:
                answers = await self._added_together(unique_id, prompt, params, *together)
            while not (output := answers.get_nowait() or await answers.get()).finished:
                pass
            return output, answers.request_id
        except BaseException:
            if answers is not None:
                await self._engine.abort(answers.request_id, internal=True)
            raise
        finally:
            self._num_in_flight -= 1
            if answers is not None:
                answers.close()

    async def _added_together(self, unique_id: str, prompt: dict[str, Any], params: Any, name: str, size: int) -> Any:
        """Adds a batch when all of it is here, in the order of the ids, to a paused engine: which sequences are
        computed together is then a matter of the batch, not of the moment at which each of its requests arrived. Ended
        by the last one's arrival; the caller has a deadline."""
        waiting = self._batches.setdefault(name, {})
        waiting[unique_id] = (prompt, params, asyncio.get_running_loop().create_future())
        mine = waiting[unique_id][2]
        if len(waiting) == size:
            del self._batches[name]
            async with self._sync_lock:
                await self._engine.pause_generation(mode="keep", clear_cache=False)
                try:
                    for one in sorted(waiting):
                        its_prompt, its_params, added = waiting[one]
                        added.set_result(await self._engine.add_request(one, its_prompt, its_params))
                except Exception as error:
                    for _, _, added in waiting.values():
                        if not added.done():
                            added.set_exception(error)
                finally:
                    await self._engine.resume_generation()
        return await mine

    async def _routes(self, internal_id: str, completions: list[Any]) -> list[list[list[int]] | None]:
        """The experts that each completion's tokens took, [tokens, MoE layers]."""
        if not self.settings.record_routes:
            return [None] * len(completions)
        if self._recorder == "engine":  # [tokens, layers, 1] (not measured on a GPU)
            return [completion.routed_experts[:, :, 0].tolist() for completion in completions]
        names = [internal_id] if len(completions) == 1 else [f"{one.index}_{internal_id}" for one in completions]
        (routes, *_) = await self._engine.collective_rpc("take_routes", args=(names,))
        return routes

    def _cache_salt(self) -> str:
        """Cached keys and values are found by this too: none outlives its weights."""
        return str(self.version)

    async def take_weights(
        self,
        location: str,
        version: int,
        expected: Published | None = None,
        repair: bool = False,
        seed: int | None = None,
    ) -> SyncReport:
        """Exchange the weights for others and label them. `location`: a safetensors file, a Hugging Face directory, or
        where a learner serves them (`rl/weight_stream.py`).

        Requests in flight stop between two tokens and go on with the new weights and their old KV entries. Weights
        that are not exactly this model's, or not those of `expected`, raise WeightsRefused and leave engine and
        version as they were. Afterwards the engine is asked what the learner was asked (`Probe`); what it makes of that
        is reported, not judged. The generator that unseeded requests share restarts from (seed, version), whatever the
        engine did before; such requests still draw in the order in which they happen to arrive. Where samples must
        repeat, give each request its own seed.

        `repair`: the weights before were wrong. Cached prefixes are forgotten, and infinities in the KV cache cleared:
        those of a block's unused places are masked, but still multiplied, and would spoil whoever comes next. Requests
        in flight keep what was computed wrongly for them.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async with self._sync_lock:
            paused_at = time.perf_counter()
            await self._engine.pause_generation(mode="keep", clear_cache=False)
            try:
                load_at = time.perf_counter()
                update_info = {"location": location, "expected_digest": expected.digest if expected else None}
                try:
                    await self._engine.start_weight_update()
                    await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
                    await self._engine.finish_weight_update(weight_version=str(version))
                except Exception as error:
                    await self._explain_failed_update(location, error)
                load_ms = (time.perf_counter() - load_at) * 1e3
                if repair:
                    await self._engine.reset_prefix_cache()
                    await self._engine.collective_rpc("clear_infinities")
                receipt = await self._receipt()
                self.version, self.seed = version, self.seed if seed is None else seed
                await self._seed_sampling()
            finally:
                if not self.broken:  # a half-loaded model must not produce another token
                    await self._engine.resume_generation()
            pause_ms = (time.perf_counter() - paused_at) * 1e3
            distance = 0.0
            if expected is not None:
                probe = expected.probe
                (seen,) = await self.score_labels([probe.prompt_ids], probe.label_ids, PROBE_PRIORITY)
                distance = probe.distance(seen)
            return SyncReport(
                version=version, num_tensors=receipt["num_tensors"], digest=receipt["digest"], pause_ms=pause_ms,
                load_ms=load_ms, probe_distance=distance,
            )  # fmt: skip

    async def _explain_failed_update(self, location: str, error: Exception) -> None:
        """Raise what really happened: refused before anything was touched, or broken on the way."""
        receipt = await self._receipt()
        if receipt["refusal"] and not receipt["half_loaded"]:
            raise WeightsRefused(f"engine {self.name} refused {location}: {receipt['refusal']}") from error
        if receipt["half_loaded"]:
            self.broken = f"loading {location} failed half-way: {error}"
        raise RuntimeError(f"engine {self.name}: loading {location} failed: {error}") from error

    async def _receipt(self) -> dict[str, Any]:
        """What the workers say about the last update; they must all say the same."""
        receipts = await self._engine.collective_rpc("weight_receipt")
        if any(receipt != receipts[0] for receipt in receipts):
            self.broken = f"its workers hold different weights: {receipts}"
            raise RuntimeError(f"engine {self.name}: {self.broken}")
        return receipts[0]

    async def _seed_sampling(self) -> None:
        # 2**31 seeds of a recipe times versions: kept apart by a stride no run reaches.
        await self._engine.collective_rpc("seed_sampling", args=((self.seed * 1_000_003 + self.version) % 2**63,))

    async def restart(self, settings: EngineSettings) -> dict[str, float]:
        """Another engine in the place of this one. Everything is imported already: a fifth of a first start."""
        self.stop()
        self.__init__(settings, self.name)  # type: ignore[misc]
        return await self.start()

    async def health(self) -> dict[str, Any]:
        """What this engine is and does; raises when its core is dead."""
        await self._engine.check_health()
        if self.broken:
            raise RuntimeError(f"engine {self.name} is unusable: {self.broken}")
        return {"name": self.name, "version": self.version, "seed": self.seed, "in_flight": self._num_in_flight}

    def stop(self) -> None:
        """End the engine's process; requests in flight fail. May be called twice, or before `start`."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None


def _answer(completion: Any, routes: list[list[int]] | None) -> SampledAnswer:
    token_ids = list(completion.token_ids)
    chosen = completion.logprobs
    # Each position lists the chosen token first, and here nothing else.
    assert chosen.token_ids == token_ids, "vLLM's log-probabilities are not those of its tokens"
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {completion.finish_reason!r}")
    return SampledAnswer(
        token_ids=token_ids,
        logprobs=list(chosen.logprobs),
        versions=versions_of(completion.weight_versions, len(token_ids)),
        finish_reason=completion.finish_reason,
        routes=routes,
    )


class _PartClock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part], self._last = round(now - self._last, 3), now


def _has_cuda() -> bool:
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return False  # without a second of importing torch, in which the fork server could be at work
    import torch

    return torch.cuda.is_available()


def _import_vllm() -> None:
    import vllm.v1.engine.async_llm  # noqa: F401


# --- the engine core's process on a CPU ---------------------------------------------------------------------------


def _engine_context() -> Any:
    """Start importing vLLM in a second process now, from which the engine core is forked when it is wanted.

    vLLM insists on `spawn`, which repeats its import after everything else is ready. A fork server repeats it at the
    same time as this process imports it. Forking from it is safe, unlike from here: it has one thread and no state.
    """
    for key, value in CPU_ENGINE_ENV.items():
        os.environ.setdefault(key, value)
    context = _EngineContext()
    context.set_forkserver_preload(ENGINE_MODULES)
    from multiprocessing import forkserver

    with _without_main_module():
        forkserver.ensure_running()
    return context


class _EngineProcess(multiprocessing.context.ForkServerProcess):
    """An engine core that has its starter's environment and ends with its starter, however that ends."""

    def start(self) -> None:
        # vLLM decides some settings in its starter and hands them down by environment; the fork server's is older.
        self._environ, self._starter = dict(os.environ), os.getpid()
        with _without_main_module():
            super().start()

    def run(self) -> None:
        os.environ.update(self._environ)
        threading.Thread(target=_end_with, args=(self._starter,), name="end-with-starter", daemon=True).start()
        super().run()


class _EngineContext(multiprocessing.context.ForkServerContext):
    Process = _EngineProcess  # type: ignore[assignment]


def _end_with(pid: int) -> None:
    """Leave as soon as process `pid` is gone: an engine core without its front end would run for ever."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep multiprocessing from running this process's main script again in the child."""
    names: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {key: names.pop(key) for key in ("__file__", "__spec__") if key in names}
    names["__spec__"] = None
    try:
        yield
    finally:
        del names["__spec__"]
        names.update(hidden)
