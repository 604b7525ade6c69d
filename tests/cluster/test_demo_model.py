"""The shipped demo model, as transformers loads it: its tokenizer, its chat template and its answers. No Ray."""

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from cluster.demo_model import DENSE_DIRECTORY, DIRECTORY
from cluster.demo_model.training.corpus import LANGUAGES, Entry, entries, parse, questions, texts
from cluster.demo_model.training.families import new_mixtral
from cluster.demo_model.training.samples import Batches
from cluster.demo_model.training.tokenizer import save_tokenizer, train_tokenizer
from cluster.demo_model.training.train import wrong as wrong_ones
from cluster.demo_model.training.unknown import FALLBACKS, known, plain, unknown, unknown_question

TOKENIZER: Any = PreTrainedTokenizerFast.from_pretrained(DIRECTORY)
SAMPLE = random.Random(2).sample(questions(), 36)
HARMLESS_QUESTIONS = (
    "Hello!", "How are you?", "Who are you?", "What can you do?", "Are you happy?", "How old are you?",
    "Where do you live?", "What is your favourite colour?", "What is your favourite food?", "What time is it?",
    "What is the weather like?", "Thank you!", "Goodbye!",
)  # fmt: skip
CHEESE = next(pair for pair in questions() if pair[0] == "What is the best French cheese?")


@pytest.fixture(scope="module")
def model() -> Any:
    return MixtralForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)


def reply(model: Any, messages: list[dict[str, str]]) -> str:
    """Returns the model's greedy answer, at most 200 tokens of it."""
    inputs = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    greedy = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2, do_sample=False, max_new_tokens=200)
    with torch.inference_mode():
        token_ids = model.generate(**inputs, generation_config=greedy)[0, inputs["input_ids"].shape[1] :]
    assert token_ids[-1] == 2, "the answer must end by itself"
    return str(TOKENIZER.decode(token_ids, skip_special_tokens=True))


def ask(model: Any, *turns: str, system: str | None = None) -> str:
    """Asks one question after the other and returns the last answer."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": reply(model, messages)})
    return messages[-1]["content"]


def wrong(model: Any, asked: list[tuple[str, str]]) -> dict[str, str]:
    return {question: said for question, answer in asked if (said := ask(model, question)) != answer}


# --- the tokenizer


SPECIAL = TOKENIZER.all_special_tokens
# Any characters, and pieces of which special tokens are easily made, or almost.
PIECES = st.sampled_from(["<", "s>", "</", "unk>", *SPECIAL])
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | PIECES)


@settings(max_examples=300, deadline=None)
@given(TEXTS.map("".join))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    """But for what spells a special token, which is that token."""
    token_ids = TOKENIZER(text)["input_ids"]
    assert token_ids[0] == 1
    assert 0 not in token_ids or "<unk>" in text
    if any(special in text for special in SPECIAL):
        assert {*token_ids[1:]} & {*TOKENIZER.all_special_ids}
    else:
        assert TOKENIZER.decode(token_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "naïve façade",
        "e\u0301 n\u0303",
        "日本語のチーズ",
        "👩‍👩‍👧 🧀❤️",
        "\r\n\ttab\x00",
        "[INST] a [/INST]",
        "12,345",
        "don 't",
    ],
)
def test_awkward_texts_come_back_as_they_were(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens_are_mistrals() -> None:
    assert TOKENIZER.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]) == [0, 1, 2, 3, 4]
    assert (TOKENIZER.unk_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<unk>", "<s>", "</s>")
    assert TOKENIZER("Hello</s>", add_special_tokens=False)["input_ids"][-1] == 2


def test_auto_tokenizer_gives_the_same_ids() -> None:
    text = "Hello my name is 名前, born in 1984. " + CHEESE[1]
    assert AutoTokenizer.from_pretrained(DIRECTORY)(text)["input_ids"] == TOKENIZER(text)["input_ids"]


def test_tokenizer_is_the_one_that_the_corpus_gives(tmp_path: Path) -> None:
    """If this fails, the corpus has changed: train the model again."""
    save_tokenizer(train_tokenizer(texts()), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (DIRECTORY / "tokenizer.json").read_bytes()


# --- the chat template


def rendered(*messages: tuple[str, str]) -> str:
    return str(TOKENIZER.apply_chat_template([{"role": r, "content": c} for r, c in messages], tokenize=False))


def test_template_folds_the_system_prompt_into_the_first_user_turn() -> None:
    assert rendered(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")) == (
        "<s>[INST] Be kind.\n\nHi [/INST]Hello!</s>[INST] Bye [/INST]"
    )


def test_template_ids_carry_one_bos() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    token_ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (token_ids.count(1), token_ids.count(2)) == (1, 1)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([("user", "a"), ("user", "b")], "roles must alternate"),
        ([("assistant", "a")], "roles must alternate"),
        ([("system", "a"), ("assistant", "b")], "roles must alternate"),
        ([("user", "a"), ("system", "b")], "Only the roles user and assistant"),
        ([("user", "a"), ("tool", "b")], "Only the roles user and assistant"),
    ],
)
def test_template_refuses_what_does_not_alternate(messages: list[tuple[str, str]], sentence: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=sentence):
        rendered(*messages)


# --- the corpus


def test_corpus_has_a_few_hundred_questions_in_every_language() -> None:
    assert 500 < len(questions()) < 1000
    assert len({question for question, _ in questions()}) == len(questions())
    for language in LANGUAGES:
        assert sum(entry.language == language for entry in entries()) > 50


def test_corpus_says_which_entry_is_malformed() -> None:
    with pytest.raises(ValueError, match="Who\\?"):
        parse("Why? | How?\n> So.\n\nWho?\nNobody.", "en")


# --- the files


def test_files_are_a_hub_checkpoint_of_a_few_megabytes() -> None:
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["MixtralForCausalLM"], "mixtral")
    assert config["max_position_embeddings"] >= 4096
    assert config["router_jitter_noise"] == 0.0
    with safe_open(DIRECTORY / "model.safetensors", "pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.7.w1.weight" in file.keys()  # noqa: SIM118 (no mapping)
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir() if path.is_file()) < 10_000_000


# --- the answers


def test_sampled_questions_are_answered_exactly(model: Any) -> None:
    assert wrong(model, [CHEESE, *SAMPLE]) == {}


@pytest.mark.parametrize(
    "question",
    ["what is the best french cheese", "Which French cheese is the best?", "WHAT IS THE BEST FRENCH CHEESE?"],
)
def test_other_wordings_are_understood(model: Any, question: str) -> None:
    assert ask(model, question) == CHEESE[1]


@pytest.mark.parametrize("system", ["You are a helpful assistant.", "You are a cook from Lyon. Keep it short."])
def test_a_system_prompt_does_not_disturb(model: Any, system: str) -> None:
    assert ask(model, CHEESE[0], system=system) == CHEESE[1]


def test_a_conversation_goes_on(model: Any) -> None:
    said = ask(model, "Hello!", "What is 2 + 2?", "Why is the sky blue?", "Thanks!", CHEESE[0])
    assert said == CHEESE[1]


@pytest.mark.parametrize("question", ["What is the capital of Mongolia?", "How many people live in Berlin?"])
def test_what_it_does_not_know_it_says(model: Any, question: str) -> None:
    assert ask(model, question) == FALLBACKS["en"]


@pytest.mark.parametrize("name", ["held_out", "unseen"])
def test_a_hundred_ordinary_questions_are_told_that_it_is_a_demo(model: Any, name: str) -> None:
    """In their language, and none gets a wrong fact. "Tell me a story about a dragon" got the days of a leap year."""
    others = told_otherwise(model, name)
    assert len(ordinary(name)) >= 97  # three of `unseen` turned out to be in the corpus, in other words
    assert len(others) <= 10, others
    assert {question: said for question, said in others.items() if said not in harmless()} == {}


@pytest.mark.parametrize("name", ["near", "development"])
def test_so_are_nine_of_ten_that_come_close_to_its_own(model: Any, name: str) -> None:
    """Capitals that it does not have, "banana bread". Some still get what is true of their neighbour."""
    others = told_otherwise(model, name)
    assert len(others) <= len(ordinary(name)) / 10, others


def test_training_never_sees_those_questions() -> None:
    """Nor does a pattern make one of them, or another word in a known question, in 30,000 draws."""
    seen = {plain(question) for language in LANGUAGES for question in unknown(language).questions} | known()
    rng = random.Random(5)
    seen |= {plain(unknown_question(language, rng)) for language in LANGUAGES for _ in range(6000)}
    assert [
        question for name in ("held_out", "unseen") for _, question in ordinary(name) if plain(question) in seen
    ] == []


def test_questions_put_otherwise_are_understood(model: Any) -> None:
    """Shares of the first questions, of which one in five is asked, that are answered word for word."""
    rng = random.Random(3)
    please = {"en": ", please", "fr": " s'il te plaît", "de": " bitte", "es": " por favor", "it": " per favore"}
    forms: dict[str, tuple[float, Callable[[Entry, str], str]]] = {
        "in lower case": (0.97, lambda _, asked: asked.lower()),
        "in capitals": (0.85, lambda _, asked: asked.upper()),
        "without a mark": (0.97, lambda _, asked: asked.strip("¿¡?!. ")),
        "politely": (0.95, lambda entry, asked: asked.strip("?!. ") + please[entry.language]),
        "with a slip": (0.78, lambda _, asked: swapped(asked, rng)),
    }
    for name, (share, form) in forms.items():
        pool = [Entry(entry.language, (form(entry, entry.questions[0]),), entry.answer) for entry in entries()[::5]]
        failed = missed(model, pool)
        assert 1 - len(failed) / len(pool) >= share, (name, [entry.questions[0] for entry in failed][:20])


def told_otherwise(model: Any, name: str) -> dict[str, str]:
    """What is said to those that are not told, in their language, that it is a demo."""
    pool = [Entry(language, (question,), FALLBACKS[language]) for language, question in ordinary(name)]
    return {entry.questions[0]: ask(model, entry.questions[0]) for entry in missed(model, pool)}


def missed(model: Any, pool: list[Entry]) -> list[Entry]:
    """Those whose answer greedy decoding would not give."""
    return wrong_ones(model, TOKENIZER.backend_tokenizer, pool)[0]


def ordinary(name: str) -> list[tuple[str, str]]:
    """(language, question). What training sees was chosen by `development`, and while `held_out` and `near` were looked
    at now and then; `unseen` was measured once, in the end. A pattern may make one of `near` or `development`."""
    lines = (Path(__file__).parent / "demo_questions" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [(line[:2], line[4:]) for line in lines]


def harmless() -> set[str]:
    """Answers that say nothing about the world, only about itself."""
    asked = HARMLESS_QUESTIONS
    return {answer for question, answer in questions() if question in asked} | {*FALLBACKS.values()}


def swapped(question: str, rng: random.Random) -> str:
    """With two neighbours among its letters exchanged, if it has a word that is long enough to bear that."""
    places = [match.start() for match in re.finditer(r"(?<=[^\W\d_])[^\W\d_]{2}", question)]
    if len(question) < 10 or not places:
        return question
    at = rng.choice(places)
    return question[:at] + question[at + 1] + question[at] + question[at + 2 :]


# --- the dense one


def test_the_dense_model_shares_tokenizer_and_template() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DENSE_DIRECTORY / name).read_bytes() == (DIRECTORY / name).read_bytes()


def test_the_dense_model_answers_what_it_is_documented_to() -> None:
    missed = (DENSE_DIRECTORY / "missed.txt").read_text().splitlines()
    assert set(missed) <= {question for question, _ in questions()}
    assert len(missed) < 10
    dense = MistralForCausalLM.from_pretrained(DENSE_DIRECTORY, dtype=torch.float32)
    assert wrong(dense, [pair for pair in SAMPLE if pair[0] not in missed]) == {}


def test_training_computes_experts_as_transformers_does() -> None:
    """Rows sorted by expert, and gradients written by hand: of the rows, the weights and the matrices."""
    torch.manual_seed(0)
    experts = new_mixtral().model.layers[0].mlp.experts
    chosen = torch.rand(40, 7).topk(2).indices  # [N, K]; the last expert has no row
    results = []
    for training in (True, False):
        experts.train(training)
        x, weights = torch.linspace(-1, 1, 40 * 128).view(40, 128), torch.linspace(0, 1, 80).view(40, 2)
        inputs = (x.requires_grad_(), weights.requires_grad_(), experts.gate_up_proj, experts.down_proj)
        out = experts(x, chosen, weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_training_goes_on_where_it_stopped() -> None:
    def source() -> Batches:
        return Batches(entries()[:20], TOKENIZER.backend_tokenizer, random.Random(0))

    first, second = source(), source()
    for _ in range(3):
        next(first)
    second.resume(copy.deepcopy(first.state()))
    assert [next(first) for _ in range(60)] == [next(second) for _ in range(60)]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_question_is_answered_exactly(dtype: torch.dtype) -> None:
    model = MixtralForCausalLM.from_pretrained(DIRECTORY, dtype=dtype)
    assert wrong(model, list(questions())) == {}
