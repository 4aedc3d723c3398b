"""Compiled and checkpointed blocks compute what the blocks compute as they are written."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from dino.errors import ConfigError
from dino.models.backbone import Backbone, BackboneSpec, build_backbone
from dino.models.runners import CompiledBlocks, choose_runner, run_block, with_checkpoints

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
        target = network(views(32)).cls
    found = [network(views(size), keep=masks()).cls for size in (32, 16)]
    loss = torch.stack([(cls - target).square().mean() for cls in found]).sum()
    network.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def assert_close(one: Backbone, other: Backbone, rtol: float) -> None:
    (loss, gradients), (expected, as_written) = train(one), train(other)
    assert loss == pytest.approx(float(expected), rel=rtol)
    assert gradients.keys() == as_written.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, as_written[name], rtol=rtol, atol=rtol * float(as_written[name].abs().max()))


def test_one_graph_serves_all_blocks_and_the_values_stay() -> None:
    compiled, plain = backbone(), backbone()
    compiled.run_block = CompiledBlocks(no_warning, backend="aot_eager")
    assert_close(compiled, plain, rtol=1e-5)
    # Student: two sizes, with and without the end for the cls token alone; teacher: one size, likewise.
    assert counters["stats"]["unique_graphs"] == 6
    train(compiled)
    assert counters["stats"]["unique_graphs"] == 6


@pytest.mark.slow
def test_inductor_computes_what_the_block_computes() -> None:
    block = backbone().vit.blocks[0]
    runs = [CompiledBlocks(no_warning), run_block]
    tokens, keep = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0)), masks()[:, 1]
    found = []
    for run in runs:
        given = tokens.clone().requires_grad_()
        out = run(block, given, keep, 1)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), [given, *block.parameters()])))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_names_and_copies_of_the_weights_do_not_change() -> None:
    network = backbone()
    names = list(network.state_dict())
    network.run_block = with_checkpoints(CompiledBlocks(no_warning, backend="aot_eager"))
    train(network)
    assert list(network.state_dict()) == names
    backbone().load_state_dict(network.state_dict())


def test_judging_is_not_compiled() -> None:
    network = backbone()
    network.run_block = CompiledBlocks(no_warning, backend="aot_eager")
    with torch.inference_mode():
        found = network(views(48)).cls
    assert not counters["stats"]["unique_graphs"]
    assert torch.equal(found, backbone()(views(48)).cls)


def test_what_cannot_be_compiled_is_run_as_written_with_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A machine without a C++ compiler, as torch itself meets it."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or it would find what it compiled earlier
    said: list[str] = []
    network, plain = backbone(), backbone()
    network.run_block = CompiledBlocks(said.append)
    (loss, gradients), (expected, as_written) = train(network), train(plain)
    assert torch.equal(loss, expected) and all(torch.equal(gradients[name], as_written[name]) for name in as_written)
    assert len(said) == 1 and "no-such-compiler" in said[0] and "speed.compile=false" in said[0]


def test_checkpointed_blocks_give_the_same_bits_and_keep_less() -> None:
    network, plain = backbone(), backbone()
    network.run_block = with_checkpoints(run_block)
    (loss, gradients), (expected, as_written) = train(network), train(plain)
    assert torch.equal(loss, expected) and gradients.keys() == as_written.keys()
    assert all(torch.equal(gradients[name], as_written[name]) for name in as_written)
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
    network.run_block = with_checkpoints(CompiledBlocks(no_warning, backend="aot_eager"))
    assert_close(network, backbone(), rtol=1e-5)


def test_the_choice_follows_the_device() -> None:
    assert choose_runner("auto", False, CPU, no_warning) == (run_block, False)
    assert choose_runner("False", False, GPU, no_warning) == (run_block, False)
    for word, device in (("auto", GPU), ("true", CPU), ("True", GPU)):
        run, compiles = choose_runner(word, False, device, no_warning)
        assert isinstance(run, CompiledBlocks) and compiles
    assert choose_runner("auto", True, CPU, no_warning)[0] is not run_block
    with pytest.raises(ConfigError, match=r"speed\.compile auto, true or false, found 'always'"):
        choose_runner("always", False, CPU, no_warning)


def test_a_network_is_copied_with_its_runner() -> None:
    network = backbone()
    network.run_block = CompiledBlocks(no_warning, backend="aot_eager")
    assert torch.allclose(copy.copy(network)(views(32)).cls, backbone()(views(32)).cls, rtol=1e-5)
