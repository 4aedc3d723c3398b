"""Meta's published models: state dicts with random values, and forward passes written from the published code.

Everything is a function of the state dict under Meta's names, so that nothing of this package or of timm is used:
facebookresearch/dinov2 ``models/vision_transformer.py``, facebookresearch/dinov3 ``models/vision_transformer.py``,
``layers/attention.py`` and ``layers/rope_position_encoding.py``, and the settings of their ``hub/backbones.py``.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    tokens = ("mask_token", "pos_embed", "cls_token", "register_tokens", "storage_tokens")
    for name, tensor in state.items():
        if name.endswith("gamma"):
            tensor.add_(1)
        elif name in tokens:
            tensor.mul_(10)
    return state


def block_shapes(depth: int, dim: int, mlp: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    layers = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,)}
    layers |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(depth):
        for layer, shape in layers.items():
            shapes[f"blocks.{index}.{layer}.weight"] = shape
            shapes[f"blocks.{index}.{layer}.bias"] = shape[:1]
        shapes |= {f"blocks.{index}.{name}.gamma": (dim,) for name in ("ls1", "ls2")}
    return {**shapes, "norm.weight": (dim,), "norm.bias": (dim,)}


def dinov2(dim: int, depth: int, side: int, registers: int = 0, swiglu: int = 0, patch: int = 14) -> State:
    """A DINOv2 state dict with a table of side x side tokens; ``swiglu`` is the hidden width, 0 for a plain MLP."""
    mlp = {"fc1": (4 * dim, dim), "fc2": (dim, 4 * dim)}
    if swiglu:
        mlp = {"w12": (2 * swiglu, dim), "w3": (dim, swiglu)}
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + side * side, dim)}
    shapes |= {"register_tokens": (1, registers, dim)} if registers else {}
    shapes |= {"mask_token": (1, dim), "patch_embed.proj.weight": (dim, 3, patch, patch)}
    return random_state({**shapes, "patch_embed.proj.bias": (dim,), **block_shapes(depth, dim, mlp)})


def dinov3(dim: int, depth: int, heads: int, swiglu: int = 0, registers: int = 4) -> State:
    """A DINOv3 state dict, with a bias for keys that the mask switches off."""
    mlp = {"fc1": (4 * dim, dim), "fc2": (dim, 4 * dim)}
    if swiglu:
        mlp = {"w1": (swiglu, dim), "w2": (swiglu, dim), "w3": (dim, swiglu)}
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "storage_tokens": (1, registers, dim)}
    shapes |= {"mask_token": (1, dim), "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    state = random_state({**shapes, **block_shapes(depth, dim, mlp)})
    size = dim // heads
    state["rope_embed.periods"] = 100.0 ** (2 * torch.arange(size // 4) / (size // 2))
    keys = torch.ones(3 * dim)
    keys[dim : 2 * dim] = 0
    return state | {f"blocks.{index}.attn.qkv.bias_mask": keys.clone() for index in range(depth)}


def dinov2_tokens(state: State, x: Tensor, heads: int) -> Tensor:
    """All tokens after the final norm: cls, registers, patches."""
    patch, registers = state["patch_embed.proj.weight"].shape[-1], state.get("register_tokens")
    tokens = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    height, width = tokens.shape[-2:]
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + _dinov2_positions(state["pos_embed"], height, width, has_registers=registers is not None)
    if registers is not None:
        tokens = torch.cat([tokens[:, :1], registers.expand(len(x), -1, -1), tokens[:, 1:]], dim=1)
    return _blocks(state, tokens, heads, eps=1e-6)


def _dinov2_positions(table: Tensor, height: int, width: int, has_registers: bool) -> Tensor:
    side = math.isqrt(table.shape[1] - 1)
    if (height, width) == (side, side):
        return table
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if has_registers:  # hub: interpolate_antialias=True, interpolate_offset=0.0
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", antialias=True)
    else:  # hub: interpolate_antialias=False, interpolate_offset=0.1
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def dinov3_tokens(state: State, x: Tensor, heads: int) -> Tensor:
    """All tokens after the final norm: cls, storage tokens, patches."""
    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    height, width = patches.shape[-2:]
    prefix = [state[name].expand(len(x), -1, -1) for name in ("cls_token", "storage_tokens")]
    tokens = torch.cat([*prefix, patches.flatten(2).transpose(1, 2)], dim=1)
    rows, columns = (2 * torch.arange(0.5, n) / n - 1 for n in (height, width))
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    angles = 2 * math.pi * coordinates[:, :, None] / state["rope_embed.periods"]
    angles = angles.flatten(1).tile(2)  # (N, d)

    def rotate(x: Tensor) -> Tensor:
        first = x.shape[2] - len(angles)
        patches = x[:, :, first:]
        low, high = patches.chunk(2, dim=-1)
        turned = patches * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()
        return torch.cat([x[:, :, :first], turned], dim=2)

    return _blocks(state, tokens, heads, eps=1e-5, rotate=rotate)


def _blocks(
    state: State, tokens: Tensor, heads: int, eps: float, rotate: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    dim = tokens.shape[-1]

    def linear(name: str, x: Tensor) -> Tensor:
        bias = state[f"{name}.bias"]
        return F.linear(x, state[f"{name}.weight"], bias * state.get(f"{name}.bias_mask", 1))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def mlp(block: str, x: Tensor) -> Tensor:
        if f"{block}.mlp.w12.weight" in state:
            gate, value = linear(f"{block}.mlp.w12", x).chunk(2, dim=-1)
            return linear(f"{block}.mlp.w3", F.silu(gate) * value)
        if f"{block}.mlp.w1.weight" in state:
            hidden = F.silu(linear(f"{block}.mlp.w1", x)) * linear(f"{block}.mlp.w2", x)
            return linear(f"{block}.mlp.w3", hidden)
        return linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", x)))

    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for block in (f"blocks.{index}" for index in range(depth)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).unflatten(-1, (3, heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value).transpose(1, 2).flatten(2)
        tokens = tokens + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", mixed)
        tokens = tokens + state[f"{block}.ls2.gamma"] * mlp(block, norm(f"{block}.norm2", tokens))
    return norm("norm", tokens)


def chunked(state: State, size: int) -> State:
    """The names of a DINOv2 model built with ``block_chunks``: blocks.CHUNK.INDEX."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda found: f"blocks.{int(found[1]) // size}.{found[1]}.", name): tensor
        for name, tensor in state.items()
    }


def as_transformers(state: State) -> State:
    """The state dict under the names of transformers' Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel."""
    third = "storage_tokens" in state
    renamed: State = {}
    for name, tensor in state.items():
        if name.startswith("rope_embed") or name.endswith("bias_mask"):
            continue
        if name in ("cls_token", "mask_token"):
            renamed[f"embeddings.{name}"] = tensor[None] if third and name == "mask_token" else tensor
        elif name in ("register_tokens", "storage_tokens"):
            renamed["embeddings.register_tokens"] = tensor
        elif name == "pos_embed":
            renamed["embeddings.position_embeddings"] = tensor
        elif name.startswith("patch_embed.proj."):
            middle = "" if third else "projection."
            renamed[name.replace("patch_embed.proj.", f"embeddings.patch_embeddings.{middle}")] = tensor
        elif name.startswith("norm."):
            renamed[name if third else name.replace("norm.", "layernorm.")] = tensor
        else:
            renamed |= _transformers_block(name, tensor, third)
    return renamed


def _transformers_block(name: str, tensor: Tensor, third: bool) -> State:
    _, index, rest = name.split(".", 2)
    block = f"layer.{index}" if third else f"encoder.layer.{index}"
    if rest.startswith("attn.qkv."):
        kind = rest.split(".")[-1]
        parts = zip(
            ("q_proj", "k_proj", "v_proj") if third else ("query", "key", "value"), tensor.chunk(3), strict=True
        )
        middle = "attention" if third else "attention.attention"
        # DINOv3's keys have no bias there.
        return {f"{block}.{middle}.{part}.{kind}": x for part, x in parts if (part, kind) != ("k_proj", "bias")}
    pairs = [("attn.proj.", "attention.o_proj." if third else "attention.output.dense.")]
    pairs += [("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")]
    pairs += [("mlp.w12.", "mlp.weights_in."), ("mlp.w1.", "mlp.gate_proj."), ("mlp.w2.", "mlp.up_proj.")]
    pairs += [("mlp.w3.", "mlp.down_proj." if third else "mlp.weights_out.")]
    pairs += [("mlp.fc1.", "mlp.up_proj."), ("mlp.fc2.", "mlp.down_proj.")] if third else []
    for old, new in pairs:
        rest = rest.replace(old, new)
    return {f"{block}.{rest}": tensor}
