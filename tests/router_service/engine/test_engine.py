"""The engine against transformers' MixtralForCausalLM and MistralForCausalLM on the same weights, and itself."""

import pickle
import random
import time
from types import SimpleNamespace

import pytest
import torch

from cluster.deadline import Deadline
from cluster.errors import DeadlineExceeded, EngineDead, Overloaded
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import CUTS, Bench, cut_by
from tests.router_service.requests import make_request

CONFIGS = {
    "plain": {},
    "one-kv-head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "no-gqa": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "head-dim": {"head_dim": 24},
    "four-experts-top-1": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "sixteen-experts-top-3": {"num_local_experts": 16, "num_experts_per_tok": 3},
    "tied": {"tie_word_embeddings": True},
    "sliding-window": {"sliding_window": 24},
    "dense": {"dense": True},
    "dense-tied": {"dense": True, "tie_word_embeddings": True},
    "dense-sliding-window": {"dense": True, "sliding_window": 24},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny Mixtral, and the reference."""
    directory = tmp_path_factory.mktemp("tiny")
    return directory, write_checkpoint(directory, layout="huggingface", num_local_experts=8)


@pytest.fixture(scope="module")
def tiny_dense(tmp_path_factory):
    """A random tiny Mistral."""
    directory = tmp_path_factory.mktemp("dense")
    write_checkpoint(directory, dense=True)
    return directory


def prompt(length, seed=0):
    return random.Random(seed).choices(range(3, 90), k=length)


def reference_ids(model, prompt_ids, count):
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt_ids], device=model.device),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64, device=model.device),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt_ids) :].tolist()


def logits_of(bench, prompt_ids):
    request = make_request(prompt_ids, max_tokens=1)
    bench.add(request)
    captured = []
    forward = bench.engine.model_runner.forward
    bench.engine.model_runner.forward = lambda batch: captured.append(forward(batch)) or captured[-1]
    while bench.engine._sequences:
        bench.engine.step()
    bench.engine.model_runner.forward = forward
    return captured[-1].logits[-1]


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        *(("huggingface", config) for config in CONFIGS),
        *(("fused", config) for config in ("plain", "sixteen-experts-top-3", "tied")),
        *(
            ("mistral", config)
            for config in ("plain", "one-kv-head", "head-dim", "sixteen-experts-top-3", "dense", "dense-sliding-window")
        ),
    ],
)
def test_logits_and_200_greedy_tokens_equal_transformers(tmp_path, config, layout, device):
    model = write_checkpoint(tmp_path, layout=layout, **CONFIGS[config]).to(device)
    bench = Bench(tmp_path, prefix_caching=False, device=device)
    ids = prompt(40)
    with torch.inference_mode():
        expected = model(torch.tensor([ids], device=device)).logits[0, -1]
    torch.testing.assert_close(logits_of(bench, ids), expected, atol=1e-4, rtol=0)
    request = make_request(ids, max_tokens=200, ignore_eos=True, min_tokens=200)
    assert bench.run(request) == [reference_ids(model, ids, 200)]


def mixed_requests():
    """Sixteen prompts of different lengths, greedy and sampled in every way."""
    ways = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.2, "top_k": 7},
        {"temperature": 1.0, "min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": ((5, 3.0), (6, -100.0)), "temperature": 0.5},
    ]
    return [
        make_request(prompt(3 + 5 * i, seed=i), max_tokens=24, ignore_eos=True, seed=i, **ways[i % len(ways)])
        for i in range(16)
    ]


@pytest.fixture(scope="module")
def alone(tiny, device):
    """What each of the mixed requests gets when nothing else runs."""
    return Bench(tiny[0], prefix_caching=False, device=device).one_by_one(*mixed_requests())


@cut_by(*(name for name in CUTS if name not in ("token-by-token", "one-at-a-time", "preempted-in-chunks")))
def test_the_same_tokens_however_the_work_is_cut(tiny, alone, config, device):
    bench = Bench(tiny[0], **{"prefix_caching": False, "device": device, **config})
    assert bench.run(*mixed_requests()) == alone
    if config.get("num_kv_blocks") == 34:
        assert bench.engine.stats().preemptions_total > 0, "the test is meant to preempt"
    assert bench.engine.stats().num_kv_blocks_used == 0
    assert bench.engine.stats().num_requests_running == bench.engine.stats().num_requests_waiting == 0


@cut_by("together", "chunked-prefill", "preempted", "two-microbatches")
def test_the_same_tokens_of_a_dense_model_however_the_work_is_cut(tiny_dense, config, device):
    alone = Bench(tiny_dense, prefix_caching=False, device=device).one_by_one(*mixed_requests())
    bench = Bench(tiny_dense, prefix_caching=False, device=device, **config)
    assert bench.run(*mixed_requests()) == alone
    stats = bench.engine.stats()
    assert stats.preemptions_total > 0 or "num_kv_blocks" not in config
    assert (stats.num_kv_blocks_used, stats.rows_per_expert) == (0, ())


def test_a_second_request_with_the_same_beginning_reuses_it_and_answers_the_same(tiny):
    bench = Bench(tiny[0])
    first, second = make_request(prompt(50), max_tokens=8), make_request(prompt(50), max_tokens=8)
    assert bench.run(first) == bench.run(second)
    assert bench.chunks[first.key][0].num_cached_tokens == 0
    assert bench.chunks[second.key][0].num_cached_tokens == 48


def test_a_request_is_told_how_long_it_waited_for_a_place(tiny):
    bench = Bench(tiny[0], max_num_seqs=1)
    first, second = (make_request(prompt(9, seed=seed), max_tokens=8, ignore_eos=True) for seed in (1, 2))
    steps_of_first = []

    def observe_step(seconds, batch):
        steps_of_first.extend(seconds for one in batch if one.sequence.request is first)

    bench.engine._observe_step = observe_step
    began = time.perf_counter()
    bench.run(first, second)
    took = time.perf_counter() - began
    waited = [{chunk.queue_s for chunk in bench.chunks[one.key]} for one in (first, second)]
    assert [len(one) for one in waited] == [1, 1], "from the first chunk on"
    [[short], [long]] = waited
    assert 0 < short < long < took
    assert len(steps_of_first) == 8
    assert long > sum(steps_of_first)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "frequency_penalty": 1.0}])
@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_sequence_continued_elsewhere_gets_the_same_tokens(tiny, sampling, cut):
    whole = make_request(prompt(20), max_tokens=20, seed=11, ignore_eos=True, **sampling)
    [expected] = Bench(tiny[0]).run(whole)
    resumed = make_request(prompt(20), output=expected[:cut], max_tokens=20, seed=11, ignore_eos=True, **sampling)
    bench = Bench(tiny[0])
    assert bench.run(resumed) == [expected[cut:]]
    assert bench.chunks[resumed.key][0].first_position == cut


def test_a_sequence_that_had_ended_already_ends_at_once(tiny):
    bench = Bench(tiny[0])
    request = make_request([5, 6], output=[7, 8, 9], max_tokens=3)
    assert bench.run(request) == [[]]
    assert bench.chunks[request.key][0].finish_reason == "length"


def test_choices_differ_by_their_index_and_seeds_by_their_value(tiny):
    def outputs(**fields):
        request = make_request(prompt(10), temperature=1.0, max_tokens=16, ignore_eos=True, **fields)
        return tuple(Bench(tiny[0]).run(request)[0])

    drawn = [outputs(seed=1), outputs(seed=2), outputs(seed=1, choice_index=1)]
    assert len(set(drawn)) == 3
    assert outputs(seed=1) == drawn[0]


def test_logprobs_are_those_of_the_reference(tiny):
    directory, model = tiny
    bench = Bench(directory)
    ids = prompt(12)
    request = make_request(ids, max_tokens=3, logprobs=4, ignore_eos=True)
    [output] = bench.run(request)
    with torch.inference_mode():
        expected = model(torch.tensor([ids + output])).logits[0].log_softmax(-1)
    for index, chunk in enumerate(bench.chunks[request.key]):
        row = expected[len(ids) - 1 + index]
        [logprobs] = chunk.logprobs
        assert logprobs.token_logprob == pytest.approx(row[output[index]].item(), abs=1e-4)
        assert [token for token, _ in logprobs.top] == row.topk(4).indices.tolist()


def test_a_late_request_fails_and_leaves_nothing(tiny):
    bench = Bench(tiny[0])
    late = make_request(prompt(5), deadline=Deadline.after(-1))
    bench.run(late, make_request(prompt(5)))
    assert isinstance(bench.errors[late.key], DeadlineExceeded)
    assert bench.engine.stats().num_kv_blocks_used == 0


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_how_long_a_request_may_take_is_not_read_from_the_clock(tiny, monkeypatch, ahead_s):
    """A gateway's clock said until when: a coordinator an hour ahead failed every request, one behind let it run on."""
    bench, now = Bench(tiny[0]), time.time
    sent = [pickle.dumps(make_request(prompt(5), deadline=Deadline.after(seconds))) for seconds in (60, 0.01)]
    time.sleep(0.02)
    monkeypatch.setattr(time, "time", lambda: now() + ahead_s)
    in_time, late = map(pickle.loads, sent)
    time.sleep(0.02)
    bench.run(in_time, late)
    assert bench.token_ids(in_time)
    assert in_time.key not in bench.errors
    assert isinstance(bench.errors[late.key], DeadlineExceeded)


def test_abort_frees_the_blocks_of_running_and_waiting(tiny):
    bench = Bench(tiny[0], max_num_seqs=1)
    running, waiting = make_request(prompt(40), max_tokens=400), make_request(prompt(40), max_tokens=400)
    bench.add(running, waiting)
    bench.engine.step()
    assert bench.engine.stats().num_kv_blocks_used > 0
    bench.engine.abort(running.key)
    bench.engine.abort(waiting.key)
    bench.engine._take_pending_commands()
    stats = bench.engine.stats()
    assert (stats.num_kv_blocks_used, stats.num_requests_running, stats.num_requests_waiting) == (0, 0, 0)


def test_rows_per_expert_are_counted(tiny):
    bench = Bench(tiny[0], prefix_caching=False)
    bench.run(make_request(prompt(10), max_tokens=5, ignore_eos=True))
    architecture = bench.engine.model_runner.decoder.architecture
    assert sum(bench.engine.stats().rows_per_expert) == 14 * architecture.top_k * architecture.num_layers


def test_an_engine_that_dies_fails_what_it_had_and_refuses_more(tiny):
    bench = Bench(tiny[0])
    engine = bench.engine

    def explode():
        raise RuntimeError("a bug")

    engine.scheduler.schedule = explode  # whose fault it is nobody can tell
    engine.start()
    request = make_request(prompt(5))
    engine.submit(request)
    engine._thread.join(10)
    assert isinstance(bench.errors[request.key], EngineDead)
    with pytest.raises(EngineDead, match="a bug"):
        engine.check_alive()
    with pytest.raises(EngineDead):
        engine.submit(make_request(prompt(5)))


def test_a_stopped_engine_leaves_nobody_waiting(tiny):
    bench = Bench(tiny[0])
    bench.engine.start()
    request = make_request(prompt(5), max_tokens=400, ignore_eos=True)
    bench.engine.submit(request)
    bench.engine.stop()
    assert isinstance(bench.errors[request.key], EngineDead)


def test_past_the_bound_of_waiting_requests_more_are_refused(tiny):
    bench = Bench(tiny[0], max_waiting=2, max_num_seqs=1)
    bench.add(*(make_request(prompt(5)) for _ in range(2)))
    bench.engine.start()

    def submit_fifty():
        for _ in range(50):
            bench.engine.submit(make_request(prompt(5), max_tokens=400, ignore_eos=True))

    with pytest.raises(Overloaded, match="2 requests wait"):
        submit_fifty()
    bench.engine.stop()


def test_in_a_full_queue_a_more_urgent_request_takes_the_place_of_the_least_urgent(tiny):
    bench = Bench(tiny[0], max_waiting=3, max_num_seqs=1)
    bench.engine._thread = SimpleNamespace(is_alive=lambda: True)  # steps are taken by hand
    lowest, low, middle, urgent, last = (
        make_request(prompt(5), max_tokens=3, priority=priority, ignore_eos=True) for priority in (9, 5, 0, -5, 9)
    )
    for request in (lowest, low, middle):
        bench.engine.submit(request)
    bench.engine._take_pending_commands()
    bench.engine.check_admission(urgent)
    bench.engine.submit(urgent)
    bench.engine._take_pending_commands()
    assert bench.errors[lowest.key].reason == "shed_queue"
    with pytest.raises(Overloaded, match="3 requests wait"):
        bench.engine.submit(last)
    assert bench.engine.num_waiting == 3
    with pytest.raises(Overloaded):
        bench.engine.submit(make_request(prompt(5), priority=5))  # as urgent as the least urgent
    ended = []
    while bench.engine._sequences:
        bench.engine.step()
        ended += [key for key, chunks in bench.chunks.items() if chunks[-1].finish_reason and key not in ended]
    assert ended == [urgent.key, middle.key, low.key]
    assert list(bench.errors) == [lowest.key]


def test_two_that_come_for_one_place_at_once_do_not_both_get_it(tiny):
    bench = Bench(tiny[0], max_waiting=1, max_num_seqs=1)
    bench.engine._thread = SimpleNamespace(is_alive=lambda: True)
    low, *urgent = (make_request(prompt(5), max_tokens=3, priority=priority) for priority in (9, 0, 0))
    bench.engine.submit(low)
    bench.engine._take_pending_commands()
    for request in urgent:
        bench.engine.submit(request)
    bench.engine._take_pending_commands()
    assert list(bench.errors) == [low.key, urgent[1].key]
    assert bench.engine.num_waiting == 1


def test_who_asks_for_several_choices_puts_none_out(tiny):
    """The first choice put one out, the second found none, and then the whole request was refused as well."""
    bench = Bench(tiny[0], max_waiting=1, max_num_seqs=1)
    bench.engine._thread = SimpleNamespace(is_alive=lambda: True)
    low = make_request(prompt(5), max_tokens=3, priority=9)
    bench.engine.submit(low)
    bench.engine._take_pending_commands()
    for index in range(2):
        choice = make_request(prompt(5), max_tokens=3, priority=0, choice_index=index, num_siblings=1)
        for refuse in (bench.engine.check_admission, bench.engine.submit):
            with pytest.raises(Overloaded):
                refuse(choice)
    bench.engine._take_pending_commands()
    assert bench.errors == {}
    assert bench.engine.num_waiting == 1


def test_a_queue_that_was_full_when_an_urgent_request_came_may_have_room_when_it_arrives(tiny):
    """It was refused, or put another out, though there was a place."""
    bench = Bench(tiny[0], max_waiting=2, max_num_seqs=1)
    bench.engine._thread = SimpleNamespace(is_alive=lambda: True)
    first, low, urgent = (make_request(prompt(5), max_tokens=3, priority=priority) for priority in (9, 9, 0))
    for request in (first, low):
        bench.engine.submit(request)
    bench.engine._take_pending_commands()
    bench.engine.submit(urgent)
    bench.engine.step()  # the first is begun
    bench.engine._take_pending_commands()
    assert bench.errors == {}
    assert bench.engine.num_waiting == 2


def test_a_full_queue_still_takes_another_tenants_request_and_serves_it_next(tiny):
    bench = Bench(tiny[0], max_waiting=4, max_num_seqs=1)
    bench.engine._thread = SimpleNamespace(is_alive=lambda: True)  # steps are taken by hand
    flood = [make_request(prompt(5), max_tokens=3, cache_salt="flood", ignore_eos=True) for _ in range(9)]
    for request in flood[:4]:
        bench.engine.submit(request)
    for refuse in (bench.engine.check_admission, bench.engine.submit):
        with pytest.raises(Overloaded):
            refuse(flood[4])
    other = make_request(prompt(5), max_tokens=3, cache_salt="other", ignore_eos=True)
    bench.engine.submit(other)
    assert bench.engine.num_waiting == 5
    bench.engine._take_pending_commands()
    assert bench.engine.num_waiting == 5
    ended = []
    while bench.engine._sequences:
        bench.engine.step()
        ended += [key for key, chunks in bench.chunks.items() if chunks[-1].finish_reason and key not in ended]
    assert ended.index(other.key) == 1
    assert len(ended) == 5
    assert bench.engine.num_waiting == 0


def test_two_tenants_never_share_a_block_and_one_does(tiny):
    bench = Bench(tiny[0], block_size=4, num_kv_blocks=128)
    requests = [make_request(prompt(30), cache_salt=salt) for salt in ("alice", "bob", "alice", "bob")]
    outputs = bench.one_by_one(*requests)
    cached = [bench.chunks[request.key][-1].num_cached_tokens for request in requests]
    assert cached == [0, 0, 28, 28]
    assert bench.engine.stats().prefix_cache_hit_tokens_total == 56
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
