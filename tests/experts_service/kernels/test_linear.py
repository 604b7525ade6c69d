"""A packed weight multiplies as the plain one does."""

import pytest
import torch
import torch.nn.functional as F

import tests.triton_interpreter  # noqa: F401
from experts_service.kernels import linear as linear_module
from experts_service.kernels.kernel import Kernel
from experts_service.kernels.linear import Linear
from experts_service.quantization.weight import dense
from tests.experts_service.kernels.compiled.test_quantized_matmul import weight_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32), (96, 40), (7, 13), (300, 128)])
def test_it_equals_linear_for_any_number_of_rows(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    linear = Linear(weight.clone())
    for rows in (0, 1, 2, 3, 4, 5, 16, 17, 200):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        exact = F.linear(x.double(), weight.double())
        torch.testing.assert_close(linear(x).double(), exact, rtol=0.02 if dtype is torch.bfloat16 else 1e-4, atol=0.1)
        if dtype is torch.float32:
            assert torch.equal(linear(x), F.linear(x, weight))


def test_a_slice_of_other_rows_is_taken_as_it_is():
    weight = torch.randn(16, 8).bfloat16()
    x = torch.randn(20, 8).bfloat16()
    assert torch.equal(Linear(weight)(x[3:7]), Linear(weight)(x[3:7].clone()))


@pytest.mark.parametrize("shape", [(64, 32), (7, 13)])
def test_a_row_has_the_same_bits_in_any_batch_where_kernels_for_gpus_multiply(device, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = Linear(weight.to(device), Kernel.TRITON)
    x = torch.randn(16, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    answers = linear(x.to(device))
    torch.testing.assert_close(answers.cpu().double(), F.linear(x.double(), weight.double()), rtol=0.02, atol=0.1)
    assert torch.equal(linear(x[5:8].to(device)), answers[5:8])


def test_a_quantised_matrix_stays_so_where_kernels_for_gpus_can_be_compiled(device, monkeypatch):
    monkeypatch.setattr(linear_module, "compiles_for", lambda _: True)
    weight = weight_of(40, 96, 4, 32)
    linear = Linear(weight.to(device))
    assert linear._matrices is not None
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.linear(x.double(), dense(weight).double())
    torch.testing.assert_close(linear(x.to(device)).cpu().double(), exact, rtol=0.02, atol=0.05)
    monkeypatch.setattr(linear_module, "compiles_for", lambda _: False)
    assert Linear(weight.to(device))._matrices is None, "Triton or a C compiler is missing: it is multiplied otherwise"
