"""Compiled and checkpointed blocks compute what uncompiled blocks compute; forward hooks run in all of them."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from dino.errors import ConfigError
from dino.models.backbone import (
    Backbone,
    BackboneSpec,
    build_backbone,
    compile_blocks,
    should_compile,
)
from dino.models.blocks import Block

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEPTH = 3


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def no_warning(message: str) -> None:
    raise AssertionError(message)


def backbone() -> Backbone:
    return build_backbone(
        BackboneSpec(f"vit:dim=32,depth={DEPTH},heads=2,registers=2", "patch", 3, (32, 32), 16), seed=0
    )


def views(size: int) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))


def masks() -> torch.Tensor:
    """Multipliers of residual branches, of which half are skipped."""
    return 2.0 * torch.randint(0, 2, (4, DEPTH, 2), generator=torch.Generator().manual_seed(1))


def train(network: Backbone) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients over views of two sizes, a teacher's pass beside them as in a step."""
    with torch.no_grad():
        target = network(views(32), cls_only=True).cls
    found = [network(views(size), keep=masks(), cls_only=True).cls for size in (32, 16)]
    loss = torch.stack([(cls - target).square().mean() for cls in found]).sum()
    network.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def assert_close(one: Backbone, other: Backbone, rtol: float) -> None:
    (loss, gradients), (expected, uncompiled) = train(one), train(other)
    assert loss == pytest.approx(float(expected), rel=rtol)
    assert gradients.keys() == uncompiled.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, uncompiled[name], rtol=rtol, atol=rtol * float(uncompiled[name].abs().max()))


def test_one_graph_serves_all_blocks_and_the_values_stay() -> None:
    compiled, plain = backbone(), backbone()
    compile_blocks(compiled, no_warning, backend="aot_eager")
    assert_close(compiled, plain, rtol=1e-5)
    # Student: two sizes, with and without the end for the cls token alone; teacher: one size, likewise.
    assert counters["stats"]["unique_graphs"] == 6
    train(compiled)
    assert counters["stats"]["unique_graphs"] == 6


@pytest.mark.slow
def test_inductor_computes_what_an_uncompiled_block_computes() -> None:
    compiled = backbone()
    compile_blocks(compiled, no_warning)
    blocks: list[Block] = [compiled.vit.blocks[0], backbone().vit.blocks[0]]
    tokens, keep = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0)), masks()[:, 1]
    found = []
    for block in blocks:
        given = tokens.clone().requires_grad_()
        out = block(given, keep, 1)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), [given, *block.parameters()])))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_compiling_changes_no_name_in_the_state_dict() -> None:
    network = backbone()
    names = list(network.state_dict())
    compile_blocks(network, no_warning, backend="aot_eager")
    network.checkpointing = True
    train(network)
    assert list(network.state_dict()) == names
    backbone().load_state_dict(network.state_dict())


def test_inference_mode_is_not_compiled() -> None:
    network = backbone()
    compile_blocks(network, no_warning, backend="aot_eager")
    with torch.inference_mode():
        found = network(views(48)).cls
    assert not counters["stats"]["unique_graphs"]
    assert torch.equal(found, backbone()(views(48)).cls)


def test_blocks_that_cannot_be_compiled_run_uncompiled_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """A machine without a C++ compiler, as torch itself meets it."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or it would find what it compiled earlier
    warnings: list[str] = []
    network, plain = backbone(), backbone()
    compile_blocks(network, warnings.append)
    (loss, gradients), (expected, uncompiled) = train(network), train(plain)
    assert torch.equal(loss, expected) and all(torch.equal(gradients[name], uncompiled[name]) for name in uncompiled)
    assert len(warnings) == 1 and "no-such-compiler" in warnings[0] and "speed.compile=false" in warnings[0]


def test_checkpointed_blocks_give_the_same_bits_and_keep_less() -> None:
    network, plain = backbone(), backbone()
    network.checkpointing = True
    (loss, gradients), (expected, uncompiled) = train(network), train(plain)
    assert torch.equal(loss, expected) and gradients.keys() == uncompiled.keys()
    assert all(torch.equal(gradients[name], uncompiled[name]) for name in uncompiled)
    assert kept(network) < kept(plain) / 3


def kept(network: Backbone) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters aside."""
    own, sizes = {p.data_ptr() for p in network.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        keep_alive = network(views(32).repeat(8, 1, 1, 1), keep=masks().repeat(8, 1, 1)).cls
    del keep_alive
    return sum(sizes.values())


def test_compiled_blocks_can_be_checkpointed() -> None:
    network = backbone()
    compile_blocks(network, no_warning, backend="aot_eager")
    network.checkpointing = True
    assert_close(network, backbone(), rtol=1e-5)


def test_the_choice_follows_the_device() -> None:
    assert not should_compile("auto", CPU) and not should_compile("False", GPU)
    assert should_compile("auto", GPU) and should_compile("true", CPU) and should_compile("True", GPU)
    with pytest.raises(ConfigError, match=r"speed\.compile auto, true or false, found 'always'"):
        should_compile("always", CPU)


def test_a_copy_of_a_compiled_backbone_is_compiled_and_has_its_own_weights() -> None:
    network = backbone()
    compile_blocks(network, no_warning, backend="aot_eager")
    teacher = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.vit.blocks.parameters():
            parameter.zero_()
    assert torch.allclose(teacher(views(32)).cls, backbone()(views(32)).cls, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_forward_hooks_on_blocks_run(compiled: bool, checkpointing: bool) -> None:
    network, plain = backbone(), backbone()
    if compiled:
        compile_blocks(network, no_warning, backend="aot_eager")
    network.checkpointing = checkpointing
    seen = []
    for index, block in enumerate(network.vit.blocks):
        block.register_forward_pre_hook(lambda block, args, index=index: seen.append(("before", index)))
        block.register_forward_hook(lambda block, args, out, index=index: seen.append(("after", tuple(out.shape))))
    network.vit.blocks[1].register_forward_hook(lambda block, args, out: out * 2)
    plain.vit.blocks[1].register_forward_hook(lambda block, args, out: out * 2)
    found = network(views(32), cls_only=True).cls
    shapes = [(4, 7, 32), (4, 7, 32), (4, 1, 32)]
    assert seen == [entry for i, shape in enumerate(shapes) for entry in (("before", i), ("after", shape))]
    assert torch.allclose(found, plain(views(32)).cls, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert all(p.grad is not None for p in network.vit.blocks.parameters())
