"""The maths of experts: the kernels that a GPU runs for all of them equal one matmul for each."""

import gc

import pytest
import torch

import tests.triton_interpreter  # noqa: F401
from experts_service.carriers.local import LocalTransport
from experts_service.kernels.compiled.matmul import Panels
from experts_service.kernels.experts import Experts, expert_tensor_names
from experts_service.quantization.weight import QuantizedWeight
from tests.experts_service.kernels.compiled.test_quantized_matmul import weight_of

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


def test_quantised_experts_stay_so_on_a_gpu(device):
    """They were widened to bf16 while they loaded, so no format needed fewer cards than bf16."""
    shapes = {"w1": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE), "w3": (INTERMEDIATE, HIDDEN)}
    names = [name for expert in EXPERTS for name in expert_tensor_names(0, expert)]
    small = {name: weight_of(*shapes[name.split(".")[-2]], 4, 32, seed=i) for i, name in enumerate(names)}
    wide = {name: weight.dequantize(torch.bfloat16) for name, weight in small.items()}
    ways = {"small": small, "wide": wide}
    experts = {
        way: Experts(EXPERTS, [{name: weight.to(device) for name, weight in weights.items()}], grouped=True)
        for way, weights in ways.items()
    }
    rows = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    answers = [experts[way](0, rows, (3, 0, 9)) for way in ways]
    torch.testing.assert_close(*answers, atol=2e-2 * answers[1].abs().max().item(), rtol=3e-2)
    held = {way: sum(m.weights.nbytes for m in (e._layers[0]._w13, e._layers[0]._w2)) for way, e in experts.items()}
    assert all(isinstance(weight, QuantizedWeight) for weight in small.values())
    assert held["small"] < held["wide"] / 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_bf16_is_grouped_and_equals_the_cpu():
    counts = (3, 4, 5)
    rows = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    on_cpu = make_experts(torch.bfloat16, False)(0, rows, counts)
    on_gpu = make_experts(torch.bfloat16, None, "cuda")(0, rows.cuda(), counts)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=3e-2, rtol=3e-2)


def test_weights_are_there_while_a_table_has_their_addresses():
    """A coordinator that stops closes its transport, also where a step takes longer than it waits: that step read
    freed memory.
    """

    def panels():
        gc.collect()
        return sum(type(one) is Panels for one in gc.get_objects())

    before = panels()
    transport = LocalTransport({0: make_experts(torch.bfloat16, False)})
    chained = transport.chained(0)
    if chained is None:
        pytest.skip("a library multiplies bf16 here")
    transport.close()
    del transport
    assert panels() == before + 2 * len(EXPERTS)
    del chained
    assert panels() == before
