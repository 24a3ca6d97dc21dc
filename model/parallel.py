"""A model spread over processes: fully sharded data parallelism and expert parallelism as one plan.

Called by the learner; tests run it on CPU with gloo. `ParallelPlan(data=2, expert=2)`, drawn for eight experts:

                    expert 0           expert 1
        data 0      rank 0  0123       rank 1  4567       routed experts: over `expert` by expert, and the experts of
        data 1      rank 2  0123       rank 3  4567       one column over `data` by rows; all else: over all ranks

Every parameter is cut over all ranks exactly once; nothing is replicated. Every rank reads its own tokens. To use
weights that are cut over `data`, or over all ranks, they are gathered, a layer at a time (FSDP2). To use those cut over
`expert`, the tokens travel: each goes to the rank of its row that owns its expert, and comes back.

Gradients are *summed* over ranks, where PyTorch's FSDP averages. So the loss of a rank is the sum over its tokens
divided by the tokens of *all* ranks: those losses add up to the loss of one process, and so do the gradients.

All ranks must make the same calls in the same order: as many forward and backward passes a step, the empty ones too.

Axes: T tokens of this rank, N tokens that arrive at it, D hidden size, F expert width, E experts, L of them owned by a
rank, R ranks of the expert axis. Not measured on a GPU.

All this holds for fp32. FP8 products under several ranks differ from those of one process (by 3 to 8 % of a gradient in
one check of a toy with `data` > 1), presumably since a scale is taken from the tokens that one rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from model.experts import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """Ranks by axis. Neighbouring ranks differ along `expert`, the axis that talks in the middle of every layer."""

    data: int = 1  # ranks that gather one another's weights: more of them, less memory each
    expert: int = 1  # ranks that all experts of a layer are spread over; must divide their number

    def __post_init__(self) -> None:
        for axis in fields(self):
            if getattr(self, axis.name) < 1:
                raise ValueError(f"parallel plan: {axis.name} is {getattr(self, axis.name)}; at least 1 is needed")

    @property
    def world_size(self) -> int:
        return self.data * self.expert

    def check(self, num_processes: int, expert_shapes: Iterable[tuple[int, int, int]]) -> None:
        """ValueError unless it fits the processes and experts of these shapes, [E, D, F]; a dense model has none."""
        plan, shapes = f"parallel plan data {self.data} × expert {self.expert}", set(expert_shapes)
        if self.world_size != num_processes:
            raise ValueError(f"{plan} is for {self.world_size} processes; {num_processes} are running")
        if self.expert > 1 and not shapes:
            raise ValueError(f"{plan}: the model is dense; without experts, expert must be 1")
        for num_experts, hidden_size, width in shapes:
            if num_experts % self.expert:
                raise ValueError(f"{plan}: expert must divide the number of experts, {num_experts}")
            if hidden_size % self.data or width % self.data:
                raise ValueError(
                    f"{plan}: data must divide the hidden size, {hidden_size}, and the width of an expert, {width}"
                )


def parallelise(model: PreTrainedModel, plan: ParallelPlan, device: str | None = None) -> PreTrainedModel:
    """Cut a model, in place, by the plan; it then takes its part in every collective of the default process group.

    Shards lie on `device`, the model's own where none is given. The model is whole on every rank, and then a layer at a
    time on `device`; or on the meta device: then each rank allocates its own shards only, and `load_full` fills them.
    One process moves all of it. Frozen parameters are cut as well; freeze them before, make the optimiser afterwards.
    ValueError where plan and model do not fit, or where the model does not name its layers.
    """
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    all_experts = [module for module in model.modules() if isinstance(module, Experts)]
    plan.check(
        num_processes, ((*experts.gate_up_proj.shape[:2], experts.down_proj.shape[1]) for experts in all_experts)
    )
    if plan.world_size == 1:
        return model if device is None else model.to(device)
    layers, device = _layers(model), device or model.device.type
    if device == "meta" or any(buffer.is_meta for buffer in model.buffers()):
        raise ValueError("a model on the meta device needs a device to be cut onto, and no buffers: nothing loads them")
    settled = _spread_experts(all_experts, plan, device) if plan.expert > 1 else set()
    everyone = init_device_mesh(device, (plan.world_size,), mesh_dim_names=("all",))
    for module in [*layers, model]:
        _fully_shard(module, everyone, settled)
    model._call = _call
    register_fsdp_forward_method(model, "_call")
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    return model


def _spread_experts(all_experts: list[Experts], plan: ParallelPlan, device: str) -> set[nn.Parameter]:
    """Cut routed experts over both axes; returns their parameters, which nothing must cut again."""
    mesh = init_device_mesh(device, (plan.data, plan.expert), mesh_dim_names=("data", "expert"))
    _keep_deadline(mesh, device)
    for experts in all_experts:
        ExpertParallel.take_over(experts, mesh["expert"])
        if plan.data > 1:  # alone on that axis there is nothing to gather; FSDP would only copy weights back and forth
            _fully_shard(experts, mesh["data"])
    return {parameter for experts in all_experts for parameter in experts.parameters()}


def _keep_deadline(mesh: DeviceMesh, device: str) -> None:
    """The groups of a mesh's axes wait as long as the default group; of themselves they would for half an hour."""
    everyone = dist.distributed_c10d._get_default_group()._get_backend(torch.device(device))
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(everyone.options._timeout, group)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose weights are gathered together."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of a class in its _no_split_modules, {sorted(names)}")
    return layers


def _fully_shard(module: nn.Module, mesh: DeviceMesh, settled: Set[nn.Parameter] = frozenset()) -> None:
    """FSDP over all parameters of `module` but those that are cut already, with gradients summed in fp32.

    Resharding after forward holds for the root too: what `named_parameters` gives is then always the shards.
    """
    fully_shard(
        module, mesh=mesh, reshard_after_forward=True, shard_placement_fn=_cut_dimension, ignored_params=set(settled),
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
    )  # fmt: skip
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo knows neither averages nor premultiplied sums
    # A parameter that one rank did not use is reduced all the same: otherwise the others would wait for it.
    module.set_reduce_scatter_unused_params(True, recurse=False)


def _cut_dimension(parameter: nn.Parameter) -> Shard:
    """Routed experts [L, D, 2F] and [L, F, D] by their rows, since L may be smaller than the axis; all else by the
    first dimension."""
    return Shard(1 if parameter.dim() == 3 else 0)


def _call(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    return function(*args, **kwargs)


def within_forward(model: nn.Module, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Call a function that uses a model's inner modules and weights directly, as `token_logprobs` does with decoder and
    head: what the root itself holds is gathered around it, as it is around the model's own forward."""
    return model._call(function, *args, **kwargs) if isinstance(model, FSDPModule) else function(*args, **kwargs)


# --- expert parallelism -------------------------------------------------------------------------------------------


class ExpertParallel(Experts):
    """A rank's share of a layer's experts. Tokens come in and go out as if all were here.

    Under activation checkpointing the exchange is recomputed with the experts: keeping what arrived would double what
    is kept of a layer.
    """

    mesh: DeviceMesh  # the expert axis

    @classmethod
    def take_over(cls, experts: Experts, mesh: DeviceMesh) -> None:
        """Make whole experts a share of them."""
        for name, whole in list(experts.named_parameters()):
            own = whole.detach().chunk(mesh.size())[mesh.get_local_rank()]
            own = own.clone() if own.is_meta else own.to(mesh.device_type, copy=True)
            cut = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            setattr(experts, name, nn.Parameter(cut, requires_grad=whole.requires_grad))
        experts.__class__ = cls
        experts.mesh = mesh

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up_LD2F, down_LFD = super().weights()
        return gate_up_LD2F.to_local(), down_LFD.to_local()

    def forward(self, x_TD: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`, with ids over all experts. Gates are applied here: only rows travel."""
        ranks, group = self.mesh.size(), self.mesh.get_group()
        order_T = expert_T.argsort(stable=True)
        leaving_RL = expert_T.bincount(minlength=len(self.gate_up_proj)).view(ranks, -1)
        arriving_RL = torch.empty_like(leaving_RL)  # from whom, for which of our experts
        dist.all_to_all_single(arriving_RL, leaving_RL, group=group)
        leaving, arriving = torch.stack([leaving_RL.sum(1), arriving_RL.sum(1)]).tolist()  # the one wait for the device

        rows_TD = (x_TD * gate_T.unsqueeze(1).to(x_TD.dtype))[order_T]
        rows_ND = Exchange.apply(rows_TD, leaving, arriving, group)
        own_L = torch.arange(arriving_RL.shape[1], device=x_TD.device)
        expert_N = own_L.repeat(ranks).repeat_interleave(arriving_RL.flatten(), output_size=len(rows_ND))
        out_ND = super().forward(rows_ND, expert_N, gate_T.new_ones(len(rows_ND)))
        out_TD = Exchange.apply(out_ND, arriving, leaving, group)
        return torch.empty_like(out_TD).index_copy(0, order_T, out_TD)


class Exchange(torch.autograd.Function):
    """Rows, sorted by the rank that they go to, for the rows that come, sorted by the rank that sent them. Gradients
    take the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_TD: torch.Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.way_back = arriving, leaving, group
        rows_ND = rows_TD.new_empty(sum(arriving), rows_TD.shape[1])
        dist.all_to_all_single(rows_ND, rows_TD.contiguous(), arriving, leaving, group=group)
        return rows_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return Exchange.apply(grad_ND, *ctx.way_back), None, None, None


# --- whole tensors in and out -------------------------------------------------------------------------------------


def full_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, by name, whole, one at a time on every rank; what `save_policy` and `stored_weights` take.

    All ranks must run it to the end, though one alone may write: `for _ in full_tensors(model): pass`.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_full(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill a model, cut by any plan or none, from whole tensors: each rank keeps its part, none talks to another.

    ValueError where names or shapes are not the model's. Optimiser state is no part of this: it moves between plans by
    `get_optimizer_state_dict` and `set_optimizer_state_dict` of `torch.distributed.checkpoint.state_dict`.
    """
    missing = dict(model.named_parameters())
    for name, whole in tensors:
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != whole.shape:
            wanted = f"wanted {list(parameter.shape)}" if parameter is not None else "not the model's, or twice"
            raise ValueError(f"weights to load: {name} {list(whole.shape)}, {wanted}")
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(_own_part(whole, parameter))
        else:
            parameter.copy_(whole)
    if missing:
        raise ValueError(f"weights to load: {len(missing)} missing ({', '.join(list(missing)[:3])})")


def _own_part(whole: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """What this rank holds of a parameter: a view."""
    for axis, placement in enumerate(parameter.placements):
        assert isinstance(placement, Shard)
        parts = whole.chunk(parameter.device_mesh.size(axis), placement.dim)
        place = parameter.device_mesh.get_local_rank(axis)
        whole = parts[place] if place < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


# --- gradients ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm over all ranks is at most `max_norm`; returns the norm before, fp32.

    PyTorch's own refuses parameters that lie on different meshes. Since each is cut over all ranks exactly once, the
    squares of what every rank holds add up.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32).square() for gradient in own]
    total = torch.stack(squares).sum()
    if isinstance(model, FSDPModule):
        dist.all_reduce(total)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in own:
        gradient.mul_(scale)
    return norm
