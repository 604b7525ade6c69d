"""A Model Context Protocol server on standard input and output, which the agents' suite starts."""

from typing import Literal

from mcp.server.mcpserver import MCPServer

server = MCPServer("weather")


@server.tool()
def weather(city: Literal["Paris", "Lyon"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


@server.tool()
def forecast(city: Literal["Paris", "Lyon"], days: Literal[2, 3]) -> list[str]:
    """The weather in a city on each of the next days: an answer of several parts."""
    return [f"Day {day} in {city}: rain." for day in range(1, days + 1)]


if __name__ == "__main__":
    server.run()
