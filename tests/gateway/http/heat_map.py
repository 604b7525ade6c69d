"""Reads the chat page's heat map as somebody does who has only a keyboard."""

from __future__ import annotations

import re
from typing import Any

WALK = """(canvas, [layers, experts]) => {
  const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  const told = () => document.getElementById("tip").textContent;
  for (let layer = 0; layer < layers; layer++) press("ArrowUp");
  const rows = [];
  for (let layer = 0; layer < layers; layer++) {
    press("Home");
    const row = [told()];
    while (row.length < experts) { press("ArrowRight"); row.push(told()); }
    rows.push(row);
    press("ArrowDown");
  }
  return rows;
}"""


def counts(page: Any, layers: int, experts: int) -> list[list[int]]:
    """Of the latest answer, by layer and expert, as the arrow keys tell them."""
    rows = page.locator("canvas.heat").last.evaluate(WALK, [layers, experts])
    told = [
        [re.fullmatch(r"layer (\d+), expert (\d+)\s+([\d,]+) of [\d,]+ tokens", cell) for cell in row] for row in rows
    ]
    assert all(cell for row in told for cell in row), rows[0][0]
    for layer, row in enumerate(told):
        assert [(cell[1], cell[2]) for cell in row] == [(str(layer), str(expert)) for expert in range(experts)]
    return [[int(cell[3].replace(",", "")) for cell in row] for row in told]
