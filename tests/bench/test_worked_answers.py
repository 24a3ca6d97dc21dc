"""Steps to reasoning-gym's answers: the last step must come to the answer that the data set gives."""

import importlib.util
from collections import Counter
from pathlib import Path

from pipeline.data import read_examples

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("worked_answers", ROOT / "bench" / "worked_answers.py")
worked_answers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worked_answers)
RESULT = {  # data set → what its last step says
    "chain_sum": lambda line: line.split("= ")[1],
    "products": lambda line: line.split("= ")[1],
    "letter_counting": lambda line: line.split()[-1],
    "spell_backward": lambda line: line.replace(" ", ""),
    "count_bits": lambda line: line.split()[-1],
    "gcd": lambda line: line.split()[2],  # the divisor that leaves nothing
}


def test_every_shipped_problem_s_last_step_is_its_answer():
    seen = Counter()
    for example in read_examples(ROOT / "recipes" / "reasoning_gym.jsonl.gz"):
        task = example.task
        *steps, last = worked_answers.worked(task.domain, task.prompt, task.check["answer"]).split("\n")
        assert last == example.answer
        if task.domain in RESULT:
            assert RESULT[task.domain](steps[-1]) == task.check["answer"], (task.prompt, steps)
            seen[task.domain] += 1
        else:
            assert steps == []
    assert set(seen) == set(RESULT) == set(worked_answers.STEPS)


def test_steps_by_hand():
    worked = worked_answers.worked
    ask = "\nEnd with a line 'Answer: ' and the answer alone."
    assert (
        worked("chain_sum", f"State the result of: 92 - 22 + 43 ={ask}", "113")
        == "92 - 22 = 70\n70 + 43 = 113\nAnswer: 113"
    )
    assert (
        worked("gcd", f"Find the GCD of these numbers: 12, 18{ask}", "6")
        == "12 mod 18 = 12\n18 mod 12 = 6\n12 mod 6 = 0\nAnswer: 6"
    )
    assert (
        worked("spell_backward", f"Spell this word backward (example: sun -> nus): Tim{ask}", "miT")
        == "T i m\nm i T\nAnswer: miT"
    )
