"""Compiles the grammars of one model off the engine's thread, and keeps them. Knows event loop, threads and the trial.

A schema of few and plain words, or a list of texts, is compiled at once, in a thread of low priority. Any other
grammar is spelled and compiled on trial first, in a process that can be killed, and only if it passes compiled in a
thread here: the second time costs what the first did. The two kinds have a thread each, so a hostile one delays only
other costly ones, each by the time limit at most; and tenants take turns in both.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from cluster.errors import InvalidRequest, MantaError, Overloaded
from cluster.fairness import is_refused
from cluster.messages import Answer, Grammar, JsonSchema, Request
from router_service.grammar.cost import begins, is_plain, is_program
from router_service.grammar.grammar import GrammarState, param
from router_service.grammar.structural_tags.format import part_tag, parts, structural_tag
from router_service.grammar.trial import TrialProcess
from router_service.grammar.vocabulary import GrammarVocabulary, compile_tag, new_compiler
from router_service.grammar.workers import GrammarWorkers, yield_to_others

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, TokenizerInfo

_MAX_PENDING = 64  # grammars that wait to be compiled; past it those are refused who have most
_MAX_WAIT_TIMES = 4  # a request waits for its grammar this many time limits, in a queue that is not empty,
_START_S = 60.0  # and this long besides: xgrammar is imported when it is first needed, here and in the trial process


class GrammarCompiler:
    """Owns the cache. Its methods are called on one event loop; `close` from any thread."""

    def __init__(
        self, vocabulary: GrammarVocabulary, *, timeout_s: float, token_timeout_s: float, cache_bytes: int
    ) -> None:
        """`timeout_s` is for compiling, `token_timeout_s` of CPU time for following by one token."""
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[Grammar, tuple[int, CompiledGrammar | MantaError]] = OrderedDict()
        self._pending: dict[Grammar, tuple[str, asyncio.Task[CompiledGrammar | MantaError]]] = {}  # and whose they are
        self._turns: WeakValueDictionary[tuple[str, bool], asyncio.Lock] = WeakValueDictionary()
        self._trial = TrialProcess(vocabulary, timeout_s)
        self._plain = ThreadPoolExecutor(1, "grammar", initializer=yield_to_others)
        self._workers = GrammarWorkers(token_timeout_s)
        self._costly = ThreadPoolExecutor(1, "grammar-trial", initializer=yield_to_others)
        self._info: TokenizerInfo | None = None
        self._info_lock = threading.Lock()

    async def state(self, request: Request) -> GrammarState | None:
        """The beginning of the request's grammar, or where its resumed tokens have led; None without a grammar.

        Raises InvalidRequest, which names the schema, or Overloaded.
        """
        if request.grammar is None:
            return None
        compiled = await self._compiled(request.grammar, request.cache_salt)
        if isinstance(compiled, InvalidRequest):
            raise InvalidRequest(compiled.message, compiled.param)
        if isinstance(compiled, MantaError):
            raise compiled
        return await asyncio.to_thread(GrammarState, compiled, request, self._workers)

    def close(self) -> None:
        """End threads and child."""
        for pool in (self._plain, self._costly):
            pool.shutdown(wait=False, cancel_futures=True)
        self._workers.close()
        self._trial.close()

    async def _compiled(self, grammar: Grammar, tenant: str) -> CompiledGrammar | MantaError:
        if grammar in self._cache:
            self._cache.move_to_end(grammar)
            return self._cache[grammar][1]
        if grammar in self._pending:
            _, task = self._pending[grammar]
        else:
            if is_refused(Counter(owner for owner, _ in self._pending.values()), tenant, _MAX_PENDING):
                raise Overloaded(
                    f"{_MAX_PENDING} grammars wait to be compiled already; try again later", reason="shed_grammars"
                )
            task = asyncio.create_task(self._compile(grammar, tenant))
            self._pending[grammar] = tenant, task
            task.add_done_callback(lambda _: self._pending.pop(grammar))
        try:
            async with asyncio.timeout(_START_S + _MAX_WAIT_TIMES * self._timeout_s):
                return await asyncio.shield(task)  # others may wait for the same one
        except TimeoutError:
            raise Overloaded("too many grammars wait to be compiled; try again later", reason="shed_grammars") from None

    async def _compile(self, grammar: Grammar, tenant: str) -> CompiledGrammar | MantaError:
        """The compiled grammar, or what is wrong with it; both are kept, an error of our own is not."""
        plain = not any(map(is_program, parts(grammar))) and is_plain(
            [json.loads(part.text) for part in parts(grammar) if isinstance(part, JsonSchema)]
        )
        async with self._turn(tenant, plain):
            result = await asyncio.get_running_loop().run_in_executor(
                self._plain if plain else self._costly, self._compile_here, grammar, plain
            )
        if not isinstance(result, MantaError) or isinstance(result, InvalidRequest):
            text_bytes = sum(len(part.text) for part in parts(grammar))
            self._keep(grammar, result, text_bytes + getattr(result, "memory_size_bytes", 0))
        return result

    def _turn(self, tenant: str, plain: bool) -> asyncio.Lock:
        """Of a tenant's grammars one at a time is in a thread's queue."""
        turn = self._turns.get((tenant, plain))
        if turn is None:
            turn = self._turns[tenant, plain] = asyncio.Lock()
        return turn

    def _compile_here(self, grammar: Grammar, plain: bool) -> CompiledGrammar | MantaError:
        """In a thread. Each part is looked at alone as well, so that an error can name it."""
        field = param(grammar)
        try:
            if not plain:
                return self._compile_tag(self._trial.run(grammar))
            if not isinstance(grammar, Answer):
                for part in parts(grammar):
                    field = part.param
                    self._compile_tag(part_tag(part))
                field = param(grammar)
            return self._compile_tag(structural_tag(grammar))
        except MantaError as error:
            return error
        except ValueError as error:
            return InvalidRequest(f"{field}: {error}", param=field)

    def _compile_tag(self, tag: str) -> CompiledGrammar:
        """Raises ValueError."""
        compiled = compile_tag(new_compiler(self._tokenizer_info()), tag)
        if not begins(compiled, self._vocabulary.vocab_size):
            raise ValueError("nothing can satisfy it")
        return compiled

    def _keep(self, grammar: Grammar, result: CompiledGrammar | MantaError, size: int) -> None:
        self._cache[grammar] = (size, result)
        self._cached_bytes += size
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1][0]

    def _tokenizer_info(self) -> TokenizerInfo:
        with self._info_lock:
            if self._info is None:
                self._info = self._vocabulary.tokenizer_info()
            return self._info
