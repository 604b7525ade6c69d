"""The maths of experts: one grouped matmul equals one matmul for each."""

import pytest
import torch

from experts_service.kernels.experts import Experts, expert_tensor_names

EXPERTS, HIDDEN, INTERMEDIATE = (0, 2, 5), 32, 48


def make_experts(dtype, grouped, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def weights():
        for expert in EXPERTS:
            w1, w2, w3 = expert_tensor_names(0, expert)
            yield w1, torch.randn(INTERMEDIATE, HIDDEN, generator=generator).to(dtype) / 6
            yield w2, torch.randn(HIDDEN, INTERMEDIATE, generator=generator).to(dtype) / 6
            yield w3, torch.randn(INTERMEDIATE, HIDDEN, generator=generator).to(dtype) / 6

    return Experts(EXPERTS, [{name: weight.to(device) for name, weight in weights()}], grouped=grouped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(1, 0, 0), (3, 4, 5), (0, 7, 2), (40, 1, 0)])
def test_grouped_equals_one_by_one(dtype, counts, device):
    rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    one_by_one, grouped = (make_experts(dtype, way, device)(0, rows, counts) for way in (False, True))
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(grouped, one_by_one, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_bf16_is_grouped_and_equals_the_cpu():
    counts = (3, 4, 5)
    rows = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    on_cpu = make_experts(torch.bfloat16, False)(0, rows, counts)
    on_gpu = make_experts(torch.bfloat16, None, "cuda")(0, rows.cuda(), counts)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=3e-2, rtol=3e-2)
