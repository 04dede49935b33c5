"""Tensor parallelism: every rank computes some of each layer's heads and feed-forward columns.

Ranks go through the layers in step, each with the same tokens. What a layer's products give each
rank is one term of a sum, which the ranks add up twice a layer, and twice more going back. All that
is not a product of a layer (embeddings, norms, task heads) is computed on every rank.

Source: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, section 3.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from bertgpt import ops
from bertgpt.layers import Attend, FeedForward, Linear, SelfAttention
from bertgpt.ops._linear import linear
from bertgpt.pretrained import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def tensor_parallel(model: Model, mesh: DeviceMesh) -> Model:
    """Splits a model's layers over the ranks of a mesh, in place; every rank must call.

    Parameters become DTensors: attention's by heads and the feed-forward network's by its inner
    width are in parts, the others whole on every rank. All take the values of the mesh's first
    rank. Call it before an optimiser is made. From then on every rank must call the model with the
    same inputs; outputs are whole, and the same on all. In training each forward pass takes over
    the state of torch's default generator from the first rank, so that dropout is the same too.

    Args:
        model: a model of this library, on the mesh's kind of device.
        mesh: one-dimensional, such as `mesh["tp"]` of a larger one.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no model of this library, or `mesh` no `DeviceMesh`.
        ValueError: the mesh has not one dimension or is of another device, the model is split
            already, or its heads or inner width do not split into the mesh's ranks; nothing has
            changed.
    """
    _check(model, mesh)
    for module in [*model.modules()]:
        if isinstance(module, SelfAttention):
            module.__class__ = _Attention
            module.heads //= mesh.size()
            module.add_module("qkv", _Projections(module.qkv))
        elif isinstance(module, FeedForward):
            module.__class__ = _FeedForward
    _distribute(model, mesh)
    for module in [*model.modules()]:
        names = tuple(name for name, value in module._parameters.items() if value is not None)
        if names:
            kind: Any = type(module)  # mypy knows no class of modules to be hashable
            module.__class__ = _local(kind, names)
        if isinstance(module, _Attention | _FeedForward | PreTrainedModel):
            module.mesh = mesh
    model.register_forward_pre_hook(partial(_share_random_state, mesh))
    return model


def _check(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"tensor_parallel takes a model of this library, not a {type(model).__name__}"
        )
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, not a {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, not {mesh.ndim}: take one of it, such as mesh['tp']"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("the model's weights are DTensors: it is split over ranks already")
    if model.device.type != mesh.device_type:
        raise ValueError(
            f"the model is on {model.device.type} but the mesh on {mesh.device_type}; move one"
        )
    for module in model.modules():
        if isinstance(module, SelfAttention):
            _check_size("num_attention_heads", module.heads, mesh)
        elif isinstance(module, FeedForward):
            _check_size("intermediate_size", module.inner.out_features, mesh)


def _check_size(name: str, size: int, mesh: DeviceMesh) -> None:
    if size % mesh.size():
        raise ValueError(
            f"{name} (or what the family calls it) is {size}, which {mesh.size()} ranks cannot "
            "share evenly: take a number of ranks that divides it"
        )


def _distribute(model: nn.Module, mesh: DeviceMesh) -> None:
    """Makes every parameter a DTensor."""
    placements: dict[nn.Module, tuple[Placement, Placement]] = {}  # of weight and bias
    for module in model.modules():
        if isinstance(module, _Attention):
            placements |= {part: (Shard(0), Shard(0)) for part in module.qkv.children()}
            placements[module.out] = (Shard(1), Replicate())
        elif isinstance(module, _FeedForward):
            placements[module.inner] = (Shard(0), Shard(0))
            placements[module.outer] = (Shard(1), Replicate())
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        of_weight, of_bias = placements.get(module, (Replicate(), Replicate()))
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                place = of_weight if name == "weight" else of_bias
                spread = distribute_tensor(parameter.detach(), mesh, [place])
                made[parameter] = nn.Parameter(spread, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]


class _Projections(nn.Module):
    """Queries', keys' and values' rows of a fused projection, each on its own to be split by heads.

    Whoever loads or saves sees them fused.
    """

    def __init__(self, fused: Linear) -> None:
        super().__init__()
        width, rows = fused.in_features, fused.out_features // 3
        for i, name in enumerate("qkv"):
            with torch.device("meta"):
                part = Linear(width, rows, bias=fused.bias is not None)
            for key, whole in fused.named_parameters():
                rows_of = whole.detach().unflatten(0, (3, rows))[i]
                setattr(part, key, nn.Parameter(rows_of, requires_grad=whole.requires_grad))
            self.add_module(name, part)
        self.register_load_state_dict_pre_hook(_part_in_state)
        self.register_state_dict_post_hook(_fuse_in_state)


def _part_in_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in ("weight", "bias"):
        if prefix + key in state:
            parts = state.pop(prefix + key).chunk(3)
            state.update({f"{prefix}{n}.{key}": t for n, t in zip("qkv", parts, strict=True)})


def _fuse_in_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in ("weight", "bias"):
        if f"{prefix}q.{key}" in state:
            state[prefix + key] = torch.cat([state.pop(f"{prefix}{n}.{key}") for n in "qkv"])


class _Attention(SelfAttention):
    """Some of the heads: `out` gives one term of a sum."""

    mesh: DeviceMesh

    def project(self, x_TE: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of this rank's heads: `[T, E]` → `[T, H, D]` each."""
        heads = (self.heads, self.head_dim)
        return tuple(part(x_TE).unflatten(-1, heads) for part in self.qkv.children())

    def forward(self, x_TE: Tensor, attend: Attend) -> Tensor:
        """`[T, E]` → `[T, E]`.

        Raises:
            ValueError: attention weights are to be dropped.
        """
        if self.training and self.dropout:
            raise ValueError(
                f"attention dropout of {self.dropout} is not done under tensor parallelism, since "
                "its bits go by the heads' numbers in the whole model: set "
                "attention_probs_dropout_prob (attn_pdrop, attention_dropout) to 0"
            )
        mixed_TE = self.mix(_spread(x_TE, self.mesh), attend)
        return _sum(linear(mixed_TE, self.out.weight, None), self.mesh) + self.out.bias


class _FeedForward(FeedForward):
    """Some of the inner columns: `outer` gives one term of a sum."""

    mesh: DeviceMesh

    def forward(self, x_TE: Tensor) -> Tensor:
        """`[T, E]` → `[T, E]`."""
        inner, outer = self.inner, self.outer
        x_TE = _spread(x_TE, self.mesh)
        term_TE = ops.gelu_ffn(
            x_TE, inner.weight, inner.bias, outer.weight, None, approximate=self.approximate
        )
        return _sum(term_TE, self.mesh) + outer.bias


def _spread(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same on all ranks; going back, the sum of their gradients."""
    spread = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return spread.to_local(grad_placements=[Partial()])


def _sum(term: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all ranks' terms; going back, the same on all ranks."""
    return DTensor.from_local(term, mesh, [Partial()], run_check=False).full_tensor()


@cache
def _local(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose parameters of these names read as this rank's part, a plain tensor."""
    read = {name: property(partial(_part, name)) for name in names}
    return type(kind.__name__, (kind,), {**read, "__doc__": kind.__doc__})


def _part(name: str, module: nn.Module) -> Tensor:
    parameter: Any = module._parameters[name]
    part: Tensor = parameter.to_local()
    return part


def _share_random_state(mesh: DeviceMesh, module: nn.Module, args: Any) -> None:
    if module.training:
        state = torch.get_rng_state().to(mesh.device_type)
        dist.broadcast(state, group=mesh.get_group(), group_src=0)
        torch.set_rng_state(state.cpu())
