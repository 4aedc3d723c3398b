"""The GPU kernels of the losses, in triton's interpreter on the CPU: they compute what torch's operations do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino.objectives import cross_entropy
from dino.objectives.cross_entropy import dino_loss

CASES = [(2, 10, 3, 5000), (2, 2, 1, 7), (1, 4, 2, 64), (3, 5, 2, 4096), (2, 3, 2, 8193)]  # G, V, B, K


def in_interpreter(program: str) -> str:
    """Run a program in a process whose triton interprets: it decides so when a kernel is declared."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:dino", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PAIRWISE = f'''
import torch
from dino.objectives.kernel import loss_and_gradient

def pairwise(student, targets, temp):
    """Caron et al. 2021, eq. 3, pair by pair, in double precision; the gradient by autograd."""
    logs = (student / temp).log_softmax(-1)
    pairs = [-(targets[g] * logs[v]).sum(-1).mean() for g in range(len(targets)) for v in range(len(student)) if v != g]
    return torch.stack(pairs).mean()

for teachers, views, batch, prototypes in {CASES}:
    generator = torch.Generator().manual_seed(prototypes)
    student = 2 * torch.rand(views, batch, prototypes, generator=generator) - 1
    student[0, 0, 0] = 40.0  # exp(40 / 0.1) is far beyond what a float holds
    targets = (torch.randn(teachers, batch, prototypes, generator=generator) / 0.3).softmax(-1)
    exact = student.double().requires_grad_()
    expected = pairwise(exact, targets.double(), 0.1)
    expected.backward()
    gradient = torch.full_like(student, float("nan"))
    before = student.clone()
    loss = loss_and_gradient(student, targets, 0.1, gradient)
    assert torch.isclose(loss.double(), expected, rtol=1e-5), (loss, expected)
    error = (gradient - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 1e-5, error
    assert torch.equal(student, before)
    assert torch.equal(loss_and_gradient(student, targets, 0.1, None), loss) and torch.equal(student, before)
    assert torch.equal(loss_and_gradient(student, targets, 0.1, student), loss)  # over the logits
    assert torch.equal(student, gradient)
    for bad in (float("nan"), float("inf")):
        before[-1, -1, -1] = bad
        assert not torch.isfinite(loss_and_gradient(before, targets, 0.1, None))
print("equal")
'''


def test_the_kernel_computes_the_loss_and_its_gradient() -> None:
    assert in_interpreter(PAIRWISE) == "equal\n"


TOKENS = """
import torch
from dino.objectives.kernel import token_loss_and_gradient

for tokens, prototypes in [(3, 5000), (1, 7), (4, 4096), (2, 8193)]:
    generator = torch.Generator().manual_seed(prototypes)
    student = 2 * torch.rand(tokens, prototypes, generator=generator) - 1
    student[0, 0] = 40.0  # exp(40 / 0.1) is far beyond what a float holds
    targets = (torch.randn(tokens, prototypes, generator=generator) / 0.3).softmax(-1)
    weights = torch.rand(tokens, generator=generator)
    exact = student.double().requires_grad_()
    expected = (-(targets.double() * (exact / 0.1).log_softmax(-1)).sum(-1) * weights.double()).sum()
    expected.backward()
    gradient = torch.full_like(student, float("nan"))
    before = student.clone()
    loss = token_loss_and_gradient(weights, student, targets, 0.1, gradient)
    assert torch.isclose(loss.double(), expected, rtol=1e-5), (loss, expected)
    error = (gradient - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 1e-5, error
    assert torch.equal(student, before)
    assert torch.equal(token_loss_and_gradient(weights, student, targets, 0.1, None), loss)
    assert torch.equal(token_loss_and_gradient(weights, student, targets, 0.1, student), loss)  # over the logits
    assert torch.equal(student, gradient)
    for bad in (float("nan"), float("inf")):
        before[-1, -1] = bad
        assert not torch.isfinite(token_loss_and_gradient(weights, before, targets, 0.1, None))
nothing = torch.empty(0, 5)
assert token_loss_and_gradient(nothing[:, 0], nothing, nothing, 0.1, nothing) == 0
print("equal")
"""


def test_the_kernel_of_masked_tokens_computes_the_loss_and_its_gradient() -> None:
    assert in_interpreter(TOKENS) == "equal\n"


def test_the_check_before_first_use_knows_right_from_wrong() -> None:
    program = """
import warnings
import torch
from dino.objectives import cross_entropy, kernel

cpu = torch.device("cpu")
with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert kernel.usable(cpu, cross_entropy._loss_and_gradient)
    assert kernel.usable_for_tokens(cpu, cross_entropy._masked_tokens)

def other(*given):
    return cross_entropy._loss_and_gradient(*given) * 1.001

def failing(*given):
    raise OSError("no C compiler\\nfound")

for wrong, said in ((other, "values differ"), (failing, "OSError: no C compiler")):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not kernel.usable(cpu, wrong) and not kernel.usable(cpu, wrong)
    assert len(caught) == 1 and said in str(caught[0].message), caught
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not kernel.usable_for_tokens(cpu, lambda *given: 1.001 * cross_entropy._masked_tokens(*given))
assert len(caught) == 1 and "values differ" in str(caught[0].message), caught
print("known")
"""
    assert in_interpreter(program) == "known\n"


@pytest.mark.parametrize("capability", [70, 80, 90])
@pytest.mark.parametrize("name", ["_row", "_token"])
def test_the_kernels_compile_for_gpus_that_are_not_here(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    from dino.objectives import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"prototypes": "i32", "views": "i32", "temp": "fp32"}
    constants = {"teachers": 2, "block": kernel.BLOCK, "with_gradient": True}
    function = getattr(kernel, name)
    aligned = [i for i, a in enumerate(function.arg_names) if a not in {"views", "temp", *constants}]
    source = compiler.ASTSource(
        fn=function,
        signature={a: "constexpr" if a in constants else kinds.get(a, "*fp32") for a in function.arg_names},
        constexprs={argument: constants[argument] for argument in function.arg_names if argument in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = backends.GPUTarget("cuda", capability, 32)
    code = compiler.compile(source, target=target, options={"num_warps": kernel.WARPS}).asm
    assert len(code["cubin"]) > 0
    assert "ld.global.v4.b32" in code["ptx"] and "st.global.v4.b32" in code["ptx"]  # 16 bytes at a time


class Pretended:
    """What :func:`_fastest` asks of a tensor, as if it were on a GPU."""

    def __init__(self, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        self.device, self.dtype, self.contiguous = torch.device("cuda", 0), dtype, contiguous

    def is_contiguous(self) -> bool:
        return self.contiguous


def test_it_is_used_on_a_gpu_where_it_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("dino.objectives.kernel")
    written = cross_entropy._loss_and_gradient
    for usable, expected in ((True, kernel.loss_and_gradient), (False, written)):
        monkeypatch.setattr(kernel, "usable", lambda device, reference, usable=usable: usable)
        assert cross_entropy._fastest(Pretended(), Pretended()) is expected  # type: ignore[arg-type]
        monkeypatch.setattr(kernel, "usable_for_tokens", lambda device, reference, usable=usable: usable)
        of_tokens = kernel.token_loss_and_gradient if usable else cross_entropy._masked_tokens
        assert cross_entropy._fastest_for_tokens(Pretended(), Pretended()) is of_tokens  # type: ignore[arg-type]
    monkeypatch.setattr(kernel, "usable", lambda device, reference: True)
    for other in (Pretended(torch.float64), Pretended(contiguous=False)):
        assert cross_entropy._fastest(other, Pretended()) is written  # type: ignore[arg-type]
    monkeypatch.setattr(cross_entropy, "find_spec", lambda name: None)  # no triton
    assert cross_entropy._fastest(Pretended(), Pretended()) is written  # type: ignore[arg-type]
    student = torch.randn(3, 2, 8, requires_grad=True)
    dino_loss(student, torch.rand(2, 2, 8).softmax(-1), 0.1).backward()  # on a CPU: torch's operations
    assert student.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_usable_on_this_gpu() -> None:
    from dino.objectives import kernel

    assert kernel.usable(torch.device("cuda", 0), cross_entropy._loss_and_gradient)
    assert kernel.usable_for_tokens(torch.device("cuda", 0), cross_entropy._masked_tokens)
