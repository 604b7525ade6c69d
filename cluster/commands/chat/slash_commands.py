"""The lines of a chat that begin with a slash. Changes the conversation and answers with one notice."""

from __future__ import annotations

import math

from cluster.commands.chat.conversation import Conversation

HELP = """\
/system TEXT      instructions for the model, from the next answer on; without TEXT, none
/temperature X    0 is greedy; without X, the server's default
/reset            forget the conversation; system text and temperature stay
/help             this list
/exit             leave, as Ctrl-D does
Ctrl-C stops the answer that is being written; pressed again at the prompt, it leaves."""


class Leave(Exception):
    """The user asked to end the chat."""


def obey(line: str, conversation: Conversation) -> str:
    """Carry out one slash command and say what it did. Raises Leave for /exit."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/system":
            conversation.system = argument or None
            return "system text set" if argument else "no system text"
        case "/temperature":
            return _set_temperature(argument, conversation)
        case "/reset":
            conversation.reset()
            return "conversation forgotten"
        case "/help":
            return HELP
        case "/exit" | "/quit":
            raise Leave
        case _:
            return f"unknown command {name}; /help lists them"


def _set_temperature(argument: str, conversation: Conversation) -> str:
    if not argument:
        conversation.temperature = None
        return "temperature: the server's default"
    try:
        temperature = float(argument)
    except ValueError:
        temperature = math.nan
    if not 0 <= temperature < math.inf:
        return f"/temperature needs a number of at least 0, not {argument!r}"
    conversation.temperature = temperature
    return f"temperature {temperature:g}"
