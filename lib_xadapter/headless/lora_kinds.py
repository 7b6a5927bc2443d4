"""What each kind of LoRA changes about a layer's weight: LoRA, LoHa, LoKr, GLoRA, (IA)³, OFT, full differences, norms.

One row a kind in `KINDS`, under the names that `lora_layers.split_key` gives to the tensors. The maths is that of the
kinds' papers; where trainers disagree, what the WebUI's Lora extension reads decides, so that a file means the same in
both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]
"""The tensors that a file has for a layer, in float32."""


@dataclass(frozen=True)
class Change:
    """What is added to a layer at a weight of 1.

    Attributes:
        weight: of the shape of the layer's weight.
        bias: None where it stays as it is.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of LoRA.

    Attributes:
        needs: the tensors that it must have.
        delta: the change of a weight, before α / rank; the last argument is the rank that is used, None for all of it.
        may_have: tensors that it can have besides.
        rank: what α is divided by; None where the kind has no such scale.
        bias: the tensor that is added to the bias.
    """

    needs: frozenset[str]
    delta: Callable[[Factors, Tensor, int | None], Tensor]
    may_have: frozenset[str] = frozenset()
    rank: Callable[[Factors], int | None] = lambda factors: None
    bias: str | None = None

    def takes(self, names: set[str]) -> bool:
        """Whether it is of this kind, as far as the names of a layer's tensors tell."""
        return self.needs <= names <= self.needs | self.may_have | EVERYWHERE


EVERYWHERE = frozenset({"alpha", "scale", "dora_scale", "lora_magnitude_vector"})


def change_of(factors: Factors, weight: Tensor, used_rank: int | None = None) -> Change | None:
    """What a layer's tensors change about its weight, in float32; None where they are of no kind that is known.

    Args:
        factors: the layer's tensors.
        weight: as it is before.
        used_rank: how much of a LoRA's rank is used; None for all of it.
    """
    kind = next((kind for kind in KINDS if kind.takes(set(factors))), None)
    if kind is None:
        return None
    delta = _shaped_like(weight, kind.delta(factors, weight, used_rank)) * _scale(factors, kind)
    if "dora_scale" in factors or "lora_magnitude_vector" in factors:
        delta = _decomposed(factors, weight, delta)
    return Change(delta, factors[kind.bias] if kind.bias is not None and kind.bias in factors else None)


def _shaped_like(weight: Tensor, delta: Tensor) -> Tensor:
    """Linear layers and 1x1 convolutions stand for each other; an inpainting model's further channels stay."""
    if delta.numel() == weight.numel() and delta.shape[0] == weight.shape[0]:
        return delta.reshape(weight.shape)
    if delta.ndim == weight.ndim == 4 and (delta.shape[1], weight.shape[1]) == (4, 9):
        return torch.cat([delta, torch.zeros_like(weight[:, 4:])], dim=1)
    return delta


def _scale(factors: Factors, kind: Kind) -> float:
    if "scale" in factors:
        return float(factors["scale"])
    rank = kind.rank(factors)
    return float(factors["alpha"]) / rank if rank is not None and "alpha" in factors else 1.0


def _decomposed(factors: Factors, weight: Tensor, delta: Tensor) -> Tensor:
    """DoRA: the changed weight keeps its direction and gets a magnitude of its own.

    Magnitudes in `dora_scale` are by the norm over each input channel, as the WebUI reads them; peft's are by the norm
    over each output channel.
    """
    changed = weight + delta
    if "dora_scale" in factors:
        over, magnitude = [axis for axis in range(weight.ndim) if axis != 1], factors["dora_scale"]
    else:
        over = list(range(1, weight.ndim))
        magnitude = factors["lora_magnitude_vector"].reshape(-1, *[1] * (weight.ndim - 1))
    return changed * (magnitude / changed.square().sum(dim=over, keepdim=True).sqrt()) - weight


# --- one function a kind ----------------------------------------------------------------------------------------------


def _lora(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """up · down."""
    down, up = factors["down"], factors["up"]
    return (up.flatten(1)[:, :used_rank] @ down.flatten(1)[:used_rank]).reshape(up.shape[0], *down.shape[1:])


def _lora_with_core(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """up · mid · down (CP decomposition of a convolution)."""
    up, core, down = factors["up"].flatten(1), factors["lora_mid_weight"], factors["down"].flatten(1)
    return torch.einsum("or,rshw,si->oihw", up, core, down)


def _loha(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """(w1_a · w1_b) ∘ (w2_a · w2_b)."""
    return _hadamard_half(factors, 1) * _hadamard_half(factors, 2)


def _hadamard_half(factors: Factors, number: int) -> Tensor:
    first, second = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
    core = factors.get(f"hada_t{number}")
    return first @ second.flatten(1) if core is None else _through_core(core, first, second)


def _through_core(core: Tensor, outside: Tensor, inside: Tensor) -> Tensor:
    """(rank, rank, h, w) between (rank, out) and (rank, in)."""
    return torch.einsum("rshw,ro,si->oihw", core, outside, inside)


def _lokr(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """w1 ⊗ w2, each whole or as a product of two halves."""
    first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if "lokr_w2" in factors:
        second = factors["lokr_w2"]
    elif "lokr_t2" in factors:
        second = _through_core(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
    else:
        second = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def _lokr_rank(factors: Factors) -> int | None:
    halves = [factors[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in factors]
    return halves[0].shape[0] if halves else None


def _glora(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """W · a2 · a1 + b2 · b1; newer files call the two halves of each the other way round."""
    a1, a2, b1, b2 = (factors[f"{name}_weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[0] > a1.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    return torch.einsum("oi...,ir,rj->oj...", weight, a2, a1) + (b2 @ b1).reshape(
        weight.shape[0], -1, *weight.shape[2:]
    )


def _ia3(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """W · w, one number an input channel or an output channel."""
    axis = 1 if bool(factors["on_input"]) else 0
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * factors["weight"].reshape(shape)


def _difference(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    return factors["diff"]


def _norm(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    return factors["w_norm"]


def _oft(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """R · W − W with a rotation of each block of output channels; with a step more, one such after the other."""
    rotations = _rotations(factors, weight.shape[0])
    turn = _turned if rotations.ndim == 3 else _turned_by_steps
    return _rescaled(turn(rotations, weight), factors) - weight


def _older_oft(factors: Factors, weight: Tensor, used_rank: int | None) -> Tensor:
    """The same with the rotations themselves in the file."""
    return _rescaled(_turned(factors["oft_diag"], weight), factors) - weight


def _turned(rotations: Tensor, weight: Tensor) -> Tensor:
    blocks = weight.reshape(*rotations.shape[:2], *weight.shape[1:])
    return torch.einsum("knm,kn...->km...", rotations, blocks).reshape(weight.shape)


def _turned_by_steps(steps: Tensor, weight: Tensor) -> Tensor:
    """BOFT: each step turns blocks of channels that lie farther apart than the last one's."""
    turned = weight
    for step, rotations in enumerate(steps):
        blocks, size = rotations.shape[:2]
        apart = 2**step * size // 2
        near = turned.reshape(-1, 2, apart, *weight.shape[1:]).transpose(1, 2).reshape(blocks, size, *weight.shape[1:])
        near = torch.einsum("kij,kj...->ki...", rotations, near)
        turned = near.reshape(-1, apart, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    return turned


def _rotations(factors: Factors, out_width: int) -> Tensor:
    """Cayley's transform (I + Q)(I − Q)⁻¹ of skew-symmetric Q, whose norm α times the output's width limits."""
    blocks = factors["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    limit = float(factors["alpha"]) * out_width if "alpha" in factors else 0.0
    if limit:
        norm = skew.norm()
        skew = skew * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))
    one = torch.eye(blocks.shape[-1])
    return (one + skew) @ (one - skew).inverse()


def _rescaled(turned: Tensor, factors: Factors) -> Tensor:
    return turned * factors["rescale"].reshape(-1, *[1] * (turned.ndim - 1)) if "rescale" in factors else turned


def _rank_of(name: str) -> Callable[[Factors], int]:
    return lambda factors: factors[name].shape[0]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOHA = _names("hada_w1_a hada_w1_b hada_w2_a hada_w2_b")
KINDS = (
    Kind(_names("down up"), _lora, rank=_rank_of("down")),
    Kind(_names("down up lora_mid_weight"), _lora_with_core, rank=_rank_of("down")),
    Kind(LOHA, _loha, _names("hada_t1 hada_t2"), _rank_of("hada_w1_b")),
    Kind(_names("lokr_w1 lokr_w2"), _lokr),
    Kind(_names("lokr_w1 lokr_w2_a lokr_w2_b"), _lokr, _names("lokr_t2"), _lokr_rank),
    Kind(_names("lokr_w1_a lokr_w1_b lokr_w2"), _lokr, rank=_lokr_rank),
    Kind(_names("lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b"), _lokr, _names("lokr_t2"), _lokr_rank),
    Kind(_names("a1_weight a2_weight b1_weight b2_weight"), _glora),
    Kind(_names("weight on_input"), _ia3),
    Kind(_names("diff"), _difference, _names("diff_b"), bias="diff_b"),
    Kind(_names("w_norm b_norm"), _norm, bias="b_norm"),
    Kind(_names("oft_blocks"), _oft, _names("rescale")),
    Kind(_names("oft_diag"), _older_oft, _names("rescale")),
)
