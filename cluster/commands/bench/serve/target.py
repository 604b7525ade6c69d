"""The server that `manta bench serve` loads, and how to speak with it. Opens a client; sends nothing itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.commands.bench.serve.load import Client, Load
from cluster.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class Target:
    """As the command line names it."""

    url: str
    model: str | None = None  # None: the first that it lists
    grpc: bool = False
    chat: bool = False  # text to the chat route
    extensions: bool = True  # ignore_eos and return_token_ids
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if self.grpc and self.chat:
            raise ConfigError("--chat is of HTTP; with --grpc prompts are token ids")

    @property
    def protocol(self) -> str:
        """For people and the JSON line."""
        return "grpc" if self.grpc else "http chat" if self.chat else "http completions"

    def key(self) -> str | None:
        """The API key. Raises RequestError when the file has none."""
        if self.key_file is None:
            return None
        try:
            words = self.key_file.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read {self.key_file}: {error}") from error
        if not words:
            raise RequestError(f"{self.key_file} is empty; its first line has to be the API key")
        return words[0]


@asynccontextmanager
async def connected(target: Target, load: Load) -> AsyncIterator[tuple[Client, str]]:
    """A client and the model's name. Raises Unavailable when nobody answers there."""
    if target.grpc:
        from cluster.commands.bench.serve.grpc import GrpcClient

        async with GrpcClient(target.url, target.key(), load) as grpc_client:
            grpc_client.model = target.model or await grpc_client.first_model()
            yield grpc_client, grpc_client.model
    else:
        from cluster.commands.bench.serve.http import HttpClient

        async with HttpClient(
            target.url, target.key(), load, chat=target.chat, extensions=target.extensions
        ) as http_client:
            http_client.model = target.model or await http_client.first_model()
            yield http_client, http_client.model
