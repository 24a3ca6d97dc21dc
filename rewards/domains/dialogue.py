"""Following instructions about form: name so many things, written just so. Level L asks for L+1 words, and for one more
condition on their form every third level.

Careful answers count the words out first. Hasty answers stop early, run on, or forget a condition. Wrong ones
forget every condition but the number.
"""

from __future__ import annotations

import random
from typing import Any

from rewards.task import Task, Verifier

WORDS: dict[str, list[str]] = {
    "animals": "ant bat bear cat cow crow deer dog duck fox frog goat hare hen horse lion mole mouse owl pig".split(),
    "foods": (
        "apple bean beet bread cake corn date egg fig fish grape jam kale lemon melon nut oat pea pear plum".split()
    ),
    "things": "axe bag bell boat book box cup desk door fork hat key lamp lock map nail pen pot ring rope".split(),
    "places": (
        "bank barn bay beach bridge cave city farm field fort hill lake mill park port road school shop street town"
    ).split(),
}
SEPARATORS = {"commas": ", ", "dashes": "-", "slashes": "/"}


def draw(level: int, rng: random.Random) -> tuple[str, Verifier, dict[str, Any]]:
    count, topic = level + 1, rng.choice(list(WORDS))
    separator = rng.choice(list(SEPARATORS))
    constraints: list[dict[str, Any]] = [
        {"kind": "separator", "text": SEPARATORS[separator]},
        {"kind": "word_count", "n": count, "separator": SEPARATORS[separator]},
    ]
    asked = []
    extras = rng.sample(["capitals", "mark", "sorted"], min(3, (level + 2) // 3))
    if "sorted" in extras:
        asked.append("in alphabetical order")
        constraints.append({"kind": "sorted"})
    if "capitals" in extras:
        asked.append("in capitals")
        constraints.append({"kind": "case", "case": "upper"})
    if "mark" in extras:
        mark = rng.choice("!?.")
        asked.append(f"ending with {mark}")
        constraints.append({"kind": "ends_with", "text": mark})
    constraints += [{"kind": "distinct"}, {"kind": "from_list", "words": WORDS[topic]}]
    verb = rng.choice(["Name", "List", "Write", "Give"])
    prompt = f"{verb} {count} {topic}, split by {separator}, {', '.join(asked)}"
    return prompt, "form", {"constraints": constraints}


def _wanted(task: Task) -> dict[str, dict[str, Any]]:
    return {constraint["kind"]: constraint for constraint in task.check["constraints"]}


def solve(task: Task, style: str, rng: random.Random) -> str:
    wanted = _wanted(task)
    count = wanted["word_count"]["n"]
    if style == "hasty":
        from rewards.domains import hasty_is_right

        if not hasty_is_right(task.level, rng):
            conditions = [kind for kind in ("case", "ends_with", "sorted") if kind in wanted]
            forgotten = rng.choice(["word_count", "word_count", *conditions])
            if forgotten == "word_count":
                count = max(1, count + rng.choice([-2, -1, 1, 2]))
            else:
                del wanted[forgotten]
    elif style == "wrong":
        for kind in ("case", "ends_with", "sorted"):
            wanted.pop(kind, None)
    words = rng.sample(wanted["from_list"]["words"], count)
    if "sorted" in wanted:
        words.sort()
    written = [word.upper() if "case" in wanted else word for word in words]
    final = wanted["separator"]["text"].join(written) + wanted.get("ends_with", {}).get("text", "")
    if style == "hasty":
        return f"Answer: {final}"
    opener = "Steps:" if style == "careful" else "Roughly:"
    return "\n".join([opener, *(f"{i} {word}" for i, word in enumerate(words, 1)), f"Answer: {final}"])
