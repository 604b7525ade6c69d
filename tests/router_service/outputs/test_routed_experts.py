"""The experts that a request is told of are those that the reference's router chooses for the same rows."""

import numpy as np
import pytest
import torch

from cluster.token_chunks import join
from router_service.outputs.routed_experts import RoutedExperts
from router_service.scheduling.scheduler import ScheduledSequence
from router_service.scheduling.sequence import Sequence
from tests.checkpoints import write_checkpoint
from tests.router_service.engine.test_engine import prompt
from tests.router_service.engines import Bench, cut_by
from tests.router_service.requests import make_request


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return directory, write_checkpoint(directory, layout="huggingface", num_local_experts=8, num_experts_per_tok=3)


def routed(chunks, architecture):
    data = np.frombuffer(b"".join(chunk.routed_experts for chunk in chunks), np.uint16)
    return data.reshape(-1, architecture.num_layers, architecture.top_k)


@cut_by("together", "chunked-prefill", "two-microbatches", "preempted", "three-at-a-time")
def test_the_reference_chooses_the_same(tiny, config, device):
    directory, model = tiny
    bench = Bench(directory, **{"prefix_caching": False, "device": device, **config})
    asking = [make_request(prompt(9 + i, seed=i), max_tokens=6, ignore_eos=True, routed_experts=True) for i in range(5)]
    others = [make_request(prompt(12, seed=90 + i), max_tokens=6, ignore_eos=True) for i in range(3)]
    bench.run(*asking[:2], *others, *asking[2:])
    for request in asking:
        chunks = bench.chunks[request.key]
        whole = [*request.prompt_token_ids, *bench.token_ids(request)]
        with torch.inference_mode():
            logits = model(torch.tensor([whole]), output_router_logits=True).router_logits  # layers of [T, E]
        first = len(request.prompt_token_ids) - 1
        expected = torch.stack([layer.topk(3, dim=-1).indices for layer in logits], dim=1)[first:-1]  # [N, L, K]
        assert routed(chunks, bench.engine.model_runner.decoder.architecture).tolist() == expected.tolist()
    for request in others:
        assert all(chunk.routed_experts is None for chunk in bench.chunks[request.key])


def test_experts_from_256_on_are_told():
    """Expert 300 was told as expert 44."""
    sequence = Sequence(make_request(prompt(2), routed_experts=True))
    told = RoutedExperts([ScheduledSequence(sequence, 0, 2)])
    told.layers = [torch.tensor([[0, 0], [300, 44]]), torch.tensor([[0, 0], [255, 511]])]  # of each row, layer by layer
    told.launch()
    told.tell()
    assert np.frombuffer(sequence.routed_experts, np.uint16).tolist() == [300, 44, 255, 511]


def test_joined_chunks_hold_the_experts_of_all_their_tokens(tiny):
    bench = Bench(tiny[0])
    request = make_request(prompt(5), max_tokens=4, ignore_eos=True, routed_experts=True)
    bench.run(request)
    chunks = bench.chunks[request.key]
    joined = join(list(chunks))
    assert len(joined.token_ids) == 4
    assert joined.routed_experts == b"".join(chunk.routed_experts for chunk in chunks)
