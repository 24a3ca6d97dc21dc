"""The trainer's side of stage 2: takes a batch, makes one optimiser step, publishes the weights.

A plain class, so that a test can build one; the cluster makes it an actor. Promises: a step changes nothing but
weights and optimiser; a batch without signal, or one whose gradient is not finite, leaves them as they are and still
counts as a version.

Weights, gradients and optimiser are fp32, whatever `dtype` says: at RL's learning rates most bf16 weights would round
back to themselves. With bfloat16 the forward pass runs under autocast, and what is published and saved is a cast copy.

All tensors of a step lie on one device, `model/device.py`: model and optimiser from `start` on, a batch from where it
is cut. What leaves a step (metrics, gauges, states, weights) leaves on the CPU. Not measured on a GPU.

Several learners divide model, gradients and optimiser among them (FSDP2, and expert parallelism where it is asked for:
`model/parallel.py`) and share a batch: each takes every world_size-th micro-batch, gradients are summed, and all make
the same step. Whatever needs the whole model (a pass, the weights to publish) is then done by all of them, in the same
order; the first one writes. What ends the wait for a neighbour: its share, or `NEIGHBOUR_DEADLINE_S`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from model.disk import naming
from model.precision import Fp8Settings
from rl.losses import Denominators, Objective, PolicyLoss, Tokens, policy_loss
from rl.types import Probe, Published, StepReport, TrainBatch

if TYPE_CHECKING:
    import torch

    from model.fp8_training import Fp8Training
    from model.logprobs import TokenStatistics
    from model.optimizers import Kind, Part
    from model.router import Route
    from rl.batcher import MicroBatch
    from rl.weight_stream import WeightServer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """The few settings a learner reads; each is described on its field in `pipeline/config.py`."""

    checkpoint: str
    dtype: str  # of the forward pass and of published weights
    learning_rate: float
    warmup_steps: int
    num_steps: int = 1  # of the run; the learning rate declines linearly over them,
    last_rate: float = 1.0  # to this share of it
    weight_decay: float
    max_grad_norm: float
    micro_batch_tokens: int
    activation_checkpointing: bool = False
    temperature: float
    router_policy: str  # train, frozen or low_lr
    router_learning_rate_scale: float
    balance_coef: float
    z_coef: float
    objective: Objective
    optimizer: Kind = "adamw"
    rate_scales: Mapping[Part, float] = field(default_factory=dict)
    updates: int = 1  # of the optimiser, on each step's batch
    longest_answer: int  # tokens
    seed: int
    fp8: Fp8Settings | None = None
    rank: int = 0
    world_size: int = 1
    expert_parallel: int = 1  # learners that each layer's experts are spread over; divides world_size
    rendezvous: str = ""  # a file that does not exist yet, on a disk all learners see; needed for world_size > 1
    device: str = ""  # empty: `own_device` of model/device.py
    serve_at: str = ""  # host by which engines reach this process; empty: they read the published files themselves


NEIGHBOUR_DEADLINE_S = 300.0
STATE_BUFFER = 1 << 20  # bytes
PROBE_TOKENS = 160  # more than a block of the engine's cache, so that one that outlived its weights is seen
PROBE_LABELS, PROBE_STRIDE = 16, 7919
PROBE_TOLERANCE = 0.02  # nats; engine and learner in fp32 differ by 1e-6, or by the flip of one near-tie of a router
PROBE_TOLERANCE_ROUNDED = 0.3  # where one side rounds to bf16 or FP8


class PolicyLearner:
    def __init__(self, settings: LearnerSettings) -> None:
        self.settings = settings
        self.version = 0
        self.notes: list[str] = []  # for people; the next report takes them along
        self._server: WeightServer | None = None

    def start(self) -> dict[str, float]:
        """Load model and optimiser, meet the other learners; returns seconds by part."""
        begin = time.perf_counter()
        import torch

        from model.checkpoint import load_policy
        from model.device import backends, own_device
        from model.parallel import ParallelPlan, parallelise
        from model.router import freeze_routers
        from model.router_watch import RouterWatch
        from model.tokenizer import load_tokenizer

        imported = time.perf_counter()
        self.device = torch.device(self.settings.device) if self.settings.device else own_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where the shards of a mesh go
        if self.settings.world_size > 1:
            torch.distributed.init_process_group(
                backends(self.device), init_method=f"file://{self.settings.rendezvous}", rank=self.settings.rank,
                world_size=self.settings.world_size, timeout=timedelta(seconds=NEIGHBOUR_DEADLINE_S),
            )  # fmt: skip
        torch.manual_seed(self.settings.seed)
        self.model = load_policy(self.settings.checkpoint, "float32")
        self.model.train()
        if self.settings.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        if self.settings.router_policy == "frozen":
            freeze_routers(self.model)
        expert = self.settings.expert_parallel
        plan = ParallelPlan(data=self.settings.world_size // expert, expert=expert)
        parallelise(self.model, plan, self.device.type)
        self.tokenizer = load_tokenizer(self.settings.checkpoint)
        self.optimizers = self._optimizers()
        self.fp8 = self._fp8()
        self.routers = RouterWatch(
            self.model, balance_coef=self.settings.balance_coef, z_coef=self.settings.z_coef,
            autocast=self._autocast, gather=self._gathered,
        )  # fmt: skip
        return {"import_s": imported - begin, "load_s": time.perf_counter() - imported}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        from model.optimizers import make_optimizers
        from model.router import router_parameters

        settings, scales = self.settings, dict(self.settings.rate_scales)
        if settings.router_policy == "low_lr" and router_parameters(self.model):
            scales["router"] = settings.router_learning_rate_scale
        return make_optimizers(self.model, settings.optimizer, settings.learning_rate, settings.weight_decay, scales)

    def _fp8(self) -> Fp8Training | None:
        from model.fp8_training import Fp8Training

        if self.settings.fp8 is None:
            return None
        return Fp8Training(self.model, self.settings.fp8, self.notes.append, gather=self._gathered)

    def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport:
        """One step of the run, of as many updates as the settings say; with `publish_to`, the new weights are written
        there and their digest reported. Metrics are those of the first update: only there are engine and learner the
        same policy."""
        if batch.version != self.version:
            raise RuntimeError(f"a batch for version {batch.version} reached a learner at version {self.version}")
        begin = time.perf_counter()
        metrics, tokens = self._updates(batch)
        staleness = Counter(str(batch.version - version) for versions in batch.token_versions for version in versions)
        self.version += 1
        stepped = time.perf_counter()
        published = self.publish(publish_to) if publish_to else None
        metrics["learner_step_s"] = stepped - begin
        metrics["publish_ms"] = (time.perf_counter() - stepped) * 1e3
        return StepReport(
            version=self.version,
            metrics=metrics,
            trained_tokens=tokens,
            seconds=stepped - begin,
            published=published,
            extras={"staleness_counts": dict(staleness), "notes": self._taken_notes()},
        )

    def _taken_notes(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes

    def publish(self, path: str) -> Published:
        """Write the weights where engines can read them. Under FP8 they are what FP8 makes of them, so that an engine
        without it samples what the learner computes; a checkpoint holds the exact ones."""
        from model.checkpoint import stored_weights
        from rl.weight_sync import publish_weights

        weights = self._whole_weights()
        if self.fp8:
            weights = self.fp8.as_served(weights or self.model.named_parameters())
        digest = ""
        if self.settings.rank == 0:
            digest = publish_weights(stored_weights(self.model, self._published_dtype(), weights), path)
        else:
            self._take_part_in_gathering()
        return Published(digest=digest, probe=self._probe(), location=self._location(path))

    def _location(self, path: str) -> str:
        from rl.weight_stream import WeightServer

        if not self.settings.serve_at or self.settings.rank:
            return path
        if self._server is None:
            self._server = WeightServer(Path(path).parent, self.settings.serve_at)
        return self._server.location(path)

    def _whole_weights(self) -> Iterator[tuple[str, torch.Tensor]] | None:
        """The parameters, put together from all learners' shares; None where one holds them all."""
        from model.parallel import full_tensors

        return full_tensors(self.model) if self.settings.world_size > 1 else None

    def _take_part_in_gathering(self) -> None:
        for _ in self._whole_weights() or ():
            pass

    def _probe(self) -> Probe:
        """Many different tokens, so that every expert has some: nonsense, which a network must answer all the same."""
        import torch

        config = self.model.config.get_text_config()
        count = min(PROBE_TOKENS, config.max_position_embeddings // 2)
        ids = [(PROBE_STRIDE * i + 1) % config.vocab_size for i in range(count)]
        with torch.no_grad(), self._autocast():
            logits_V = self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0, -1].float()
        top = torch.log_softmax(logits_V, dim=-1).topk(PROBE_LABELS)
        exact = self.settings.dtype == "float32" and self.fp8 is None
        return Probe(
            prompt_ids=ids, label_ids=top.indices.tolist(), logprobs=top.values.tolist(),
            tolerance=PROBE_TOLERANCE if exact else PROBE_TOLERANCE_ROUNDED,
        )  # fmt: skip

    def save_state(self, path: str) -> None:
        """All that the next step depends on, and what its gauges are measured from; whole, for any number of
        learners."""
        import torch
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=self.settings.world_size > 1)
        model, optimizer = get_state_dict(self.model, self.optimizers, options=whole)
        if self.settings.rank:
            return
        fallen_back = self.fp8.watch.fallen_back if self.fp8 else {}
        state = {
            "version": self.version, "model": model, "optimizer": optimizer, "fp8_fallen_back": fallen_back,
            "routers": self.routers.state(), "random": torch.get_rng_state(),
        }  # fmt: skip
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        with naming(path), open(path, "wb", buffering=STATE_BUFFER) as file:  # torch's own names no full disk
            torch.save(state, file)

    def load_state(self, path: str) -> None:
        """What `save_state` wrote; after `start`."""
        import torch
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        # Whole, for any number of learners: it may be too large for one's device, onto which its share goes.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.version = state["version"]
        set_state_dict(
            self.model, self.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip
        if self.fp8:
            self.fp8.give_back(state["fp8_fallen_back"])
        self.routers.restore(state["routers"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and "random_cuda" in state:  # one saved on a CPU has none
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def save(self, directory: str) -> None:
        """Write a complete checkpoint."""
        from model.checkpoint import save_policy

        if self.settings.rank == 0:
            save_policy(self.model, self.tokenizer, directory, self.settings.dtype, weights=self._whole_weights())
        else:
            self._take_part_in_gathering()

    def _published_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.settings.dtype)

    def _updates(self, batch: TrainBatch) -> tuple[dict[str, float], int]:
        from rl.batcher import micro_batches

        shared = self._shares_prompts()
        cuts = micro_batches(batch, self.settings.micro_batch_tokens, share_prompts=shared)
        cuts = [cut.to(self.device) for cut in cuts]
        denominators = self._denominators(cuts)
        if denominators.tokens == 0:
            return {"loss": 0.0, "grad_norm": 0.0}, 0
        at_start: list[torch.Tensor] = []  # of each of this learner's cuts, log π of its tokens
        metrics = self._update(cuts, denominators, at_start)
        for _ in range(self.settings.updates - 1):
            if not math.isfinite(metrics["grad_norm"]):
                break
            again = self._update(cuts, denominators, at_start)
            metrics |= {"last_clip_share": again["clip_share"], "grad_norm": again["grad_norm"]}
        return metrics, int(denominators.tokens)

    def _update(
        self, cuts: Sequence[MicroBatch], denominators: Denominators, at_start: list[torch.Tensor]
    ) -> dict[str, float]:
        """One update of the optimiser. The first one fills `at_start`; later ones read it."""
        from model.parallel import clip_grad_norm
        from model.router_watch import RoutedBatch

        settings = self.settings
        routed = [RoutedBatch(cut.ids_BS, cut.real_BS, cut.replay_BSM, cut.position_BS) for cut in cuts]
        own = slice(settings.rank, None, settings.world_size)
        num_passes = -(-len(cuts) // settings.world_size)
        self.routers.begin_step(routed, routed[own], num_passes)
        gauges, is_first = Gauges(), not at_start
        for number, cut in enumerate(cuts[own]):
            stats, policy = self._backward(cut, denominators, None if is_first else at_start[number])
            gauges.add(cut, stats, policy)
            if is_first:
                at_start.append(stats.logprob_T.detach())
        for _ in range(num_passes - len(cuts[own])):
            self._backward_of_nothing(cuts[0])
        gauges = Gauges.joined(self._gathered(gauges))
        scale = self._rate_scale()
        norm = clip_grad_norm(self.model, settings.max_grad_norm).item()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        rates = {"grad_norm": norm, "learning_rate": settings.learning_rate * scale}
        routers = self.routers.end_step()
        fp8 = self.fp8.metrics() if self.fp8 else {}  # last: what the routers' probe left in its gauges is of this step
        return gauges.metrics() | rates | routers | fp8

    def _rate_scale(self) -> float:
        """Of the learning rate in this step: up from nothing in the first few, and down towards the last."""
        settings = self.settings
        warmup = min(1.0, (self.version + 1) / max(1, settings.warmup_steps))
        done = self.version / max(1, settings.num_steps - 1)
        return warmup * (1.0 - (1.0 - settings.last_rate) * min(1.0, done))

    def _denominators(self, cuts: Sequence[MicroBatch]) -> Denominators:
        return Denominators(
            tokens=float(sum(len(cut.advantages) for cut in cuts)),
            answers=float(sum(len(cut.ids_BS) for cut in cuts)),
            longest=float(self.settings.longest_answer),
        )

    def _shares_prompts(self) -> bool:
        """Only our own model can. The routers' losses count tokens, and how often a prompt's are computed would then
        depend on how the batch is cut."""
        from model.transformer import MoeForCausalLM

        counts_tokens = self.settings.balance_coef or self.settings.z_coef
        return isinstance(self.model, MoeForCausalLM) and not counts_tokens

    def _gathered(self, own: T) -> list[T]:
        """What each learner holds, in the order of their ranks."""
        import torch

        if self.settings.world_size == 1:
            return [own]
        parts: list[Any] = [None] * self.settings.world_size
        torch.distributed.all_gather_object(parts, own)
        return parts

    def _backward(
        self, cut: MicroBatch, denominators: Denominators, at_start: torch.Tensor | None = None
    ) -> tuple[TokenStatistics, PolicyLoss]:
        """Adds one micro-batch's gradient."""
        stats, routes = self._passed(cut)
        tokens = Tokens(
            stats.logprob_T,
            cut.generator_logprobs,
            cut.advantages,
            cut.staleness,
            cut.answer,
            stats.entropy_T,
            at_start,
        )
        policy = policy_loss(tokens, denominators, self.settings.objective)
        (policy.loss + self.routers.loss(routes)).backward()
        return stats, policy

    def _backward_of_nothing(self, cut: MicroBatch) -> None:
        """A pass without a gradient of its own, for the sake of the learners that make theirs."""
        stats, _ = self._passed(cut)
        (0.0 * stats.logprob_T.sum()).backward()

    def _passed(self, cut: MicroBatch) -> tuple[TokenStatistics, Sequence[Route]]:
        from model.logprobs import token_logprobs
        from model.parallel import within_forward

        with self._autocast():
            return within_forward(
                self.model, token_logprobs, self.model, cut.ids_BS, cut.answer_BS, self.settings.temperature,
                cut.real_BS, cut.replay_BSM, cut.position_BS,
            )  # fmt: skip

    def _autocast(self) -> Any:
        import torch

        dtype = self._published_dtype()
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


class Gauges:
    """Sums over micro-batches, on the CPU: learners hand them to one another.

    *Mismatch* is what engine and learner disagree on with the same weights, so it counts tokens of answers that are of
    the learner's own version from their first token on: one that went on over a weight sync is conditioned on keys and
    values of older weights. *Staleness* counts every token.
    """

    def __init__(self) -> None:
        self.loss = 0.0
        self.log_ratios: list[Any] = []  # log π - log μ, every trained token
        self.staleness: list[Any] = []
        self.entropy: list[Any] = []
        self.clipped: list[Any] = []
        self.masked: list[Any] = []
        self.fresh: list[Any] = []  # every token of the answer so far is of the learner's version
        self.positive: list[Any] = []  # advantage > 0

    def add(self, cut: MicroBatch, stats: TokenStatistics, policy: PolicyLoss) -> None:
        self.loss += policy.loss.item()
        self.log_ratios.append((stats.logprob_T.detach() - cut.generator_logprobs).cpu())
        self.staleness.append(cut.staleness.cpu())
        self.entropy.append(stats.entropy_T.cpu())
        self.clipped.append(policy.clipped.cpu())
        self.masked.append(policy.masked.cpu())
        self.positive.append((cut.advantages > 0).cpu())
        oldest = cut.staleness.new_zeros(len(cut.ids_BS)).scatter_reduce(0, cut.answer, cut.staleness, "amax")
        self.fresh.append((oldest[cut.answer] == 0).cpu())

    @classmethod
    def joined(cls, shares: Sequence[Gauges]) -> Gauges:
        whole = cls()
        for share in shares:
            whole.loss += share.loss
            whole.log_ratios += share.log_ratios
            whole.staleness += share.staleness
            whole.entropy += share.entropy
            whole.clipped += share.clipped
            whole.masked += share.masked
            whole.fresh += share.fresh
            whole.positive += share.positive
        return whole

    def metrics(self) -> dict[str, float]:
        import torch

        log_ratio, staleness = torch.cat(self.log_ratios), torch.cat(self.staleness)
        weight, positive = log_ratio.exp(), torch.cat(self.positive)
        dropped = torch.cat(self.clipped) | torch.cat(self.masked)
        metrics = {
            "loss": self.loss,
            "entropy": torch.cat(self.entropy).mean().item(),
            "clip_share": torch.cat(self.clipped).float().mean().item(),
            "mask_share": torch.cat(self.masked).float().mean().item(),
            "dropped_share_positive": _share(dropped[positive]),
            "dropped_share_negative": _share(dropped[~positive]),
            "is_weight_mean": weight.mean().item(),
            "ess": (weight.sum().square() / weight.square().sum() / len(weight)).item(),
            "staleness_mean": staleness.float().mean().item(),
            "staleness_max": float(staleness.max()),
        }
        fresh, stale = log_ratio[torch.cat(self.fresh)], log_ratio[~torch.cat(self.fresh)]
        if len(stale):
            metrics["staleness_k3"] = (stale.exp() - 1 - stale).mean().item()
        if len(fresh):  # the same weights on both sides: what is left is numerics
            metrics["mismatch_k3"] = (fresh.exp() - 1 - fresh).mean().item()
            metrics["mismatch_max"] = fresh.abs().max().item()
            metrics["mean_exp_abs_diff"] = fresh.abs().exp().mean().item()
        return metrics


def _share(flags: Any) -> float:
    return flags.float().mean().item() if len(flags) else 0.0
