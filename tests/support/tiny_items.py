"""How many items of each tiny task are written."""

from __future__ import annotations

NUM_ITEMS = 32
