"""Rows sorted by expert, cut into tiles of 128 of which none spans two experts.

    rows     ▏   e=0: 300   ▏ e=1: 0 ▏  e=2: 5 ▏         R = 305
    tiles    ▏128▏128▏ 44▏             ▏ 5 ▏             R // 128 + E = 5 numbers, one of them an empty tile

How many there are depends on the routing, for which the host should not have to wait. So tile t of expert e has number
⌊start_e / 128⌋ + e + t of R // 128 + E, which never collides; a number nobody has is an empty tile.

Axes: R rows sorted by expert, E experts, S tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

TILE = 128


class RowTiles(NamedTuple):
    starts_S: torch.Tensor  # first row; integers, as all three
    stops_S: torch.Tensor  # one past the last row
    expert_S: torch.Tensor  # whose rows they are; any expert for an empty tile


def row_tiles(ends_E: torch.Tensor, num_rows: int) -> RowTiles:
    starts_E = starts(ends_E)
    first_E = starts_E // TILE + torch.arange(len(ends_E), device=ends_E.device)
    tile_S = torch.arange(num_rows // TILE + len(ends_E), device=ends_E.device)
    expert_S = torch.searchsorted(first_E, tile_S, right=True) - 1
    starts_S = starts_E[expert_S] + (tile_S - first_E[expert_S]) * TILE
    stops_S = torch.minimum(starts_S + TILE, ends_E[expert_S])
    return RowTiles(torch.minimum(starts_S, stops_S), stops_S, expert_S)


def starts(ends_E: torch.Tensor) -> torch.Tensor:
    """The first row of each expert."""
    return F.pad(ends_E[:-1], (1, 0))
