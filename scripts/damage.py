"""Damages bytes, JSON and command lines at random: for scripts/fuzz_inputs.py."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

NOTHING = (None, True, "", [], {}, 0)
NUMBERS = (-1, 1, 2**31, 2**63, 10**30, -(10**30), 1e308, 1e-320, 0.5, -0.0)
STRANGE = (float("nan"), float("inf"), float("-inf"), "9" * 400, "\x1b[2J", "\u202e", "\ud800")
WORDS = ("../../etc/passwd", "/dev/zero", "x" * 5000, "a\0b", "nan", "[0:1]", "gpu0", "1e999")
HOSTILE: tuple[Any, ...] = (*NOTHING, *NUMBERS, *STRANGE, *WORDS)


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut off, repeat, insert."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(changed) + 1)
        way = draw.randrange(5)
        if way == 0:
            del changed[at:]
        elif way == 1 and at < len(changed):
            changed[at] = draw.randrange(256)
        elif way == 2:
            changed[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
        elif way == 3:
            changed[at:at] = changed[draw.randrange(len(changed) + 1) :][:200]
        else:
            del changed[at : at + draw.choice((1, 4, 100))]
    return bytes(changed)


def damaged_json(data: Any, draw: random.Random) -> str:
    """Put something hostile in place of a part, take parts away, or nest without end."""
    changed = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 1, 3))):
        places = list(_places(changed))
        holder, key = draw.choice(places)
        way = draw.randrange(10)
        if way == 0:
            del holder[key]
        elif way == 1:
            holder[key] = copy.deepcopy(draw.choice(places)[0])
        elif way == 2 and isinstance(holder, dict):
            holder[draw.choice(("\x1b]0;x\x07", "", "-1", "9" * 30))] = holder.pop(key)
        elif way == 3 and isinstance(holder[key], (int, float)):
            holder[key] *= draw.choice((-1, 0, 1.5, 10**6, 10**12))
        elif way == 4 and isinstance(holder[key], str) and holder[key]:
            data = holder[key].encode("utf-8", "replace")
            holder[key] = damaged_bytes(data, draw).decode("latin-1")
        else:
            holder[key] = draw.choice(HOSTILE)
        if not isinstance(changed, (dict, list)) or not list(_places(changed)):
            break
    text = json.dumps(changed)
    if draw.random() < 0.03:
        deep = draw.choice(("[", '{"a":')) * draw.choice((500, 100_000))
        text = text.replace("1", deep, 1)
    return text


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index of it."""
    left = [data]
    while left:
        item = left.pop()
        keys: Any = item.keys() if isinstance(item, dict) else range(len(item))
        for key in list(keys):
            yield item, key
            if isinstance(item[key], (dict, list)):
                left.append(item[key])


def damaged_words(words: list[str], draw: random.Random) -> list[str]:
    """Leave words out, repeat, exchange or damage them."""
    changed = list(words)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(changed)) if changed else 0
        way = draw.randrange(5)
        if way == 0 and changed:
            del changed[at]
        elif way == 1:
            changed.insert(at, draw.choice(words))
        elif way == 2 and changed and changed[at]:
            data = changed[at].encode("utf-8", "replace")
            changed[at] = damaged_bytes(data, draw).decode("latin-1")
        else:
            changed[at : at + 1] = [str(draw.choice(HOSTILE)).replace("\0", "")]
    return changed
