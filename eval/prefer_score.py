"""Answers to a page of `eval.prefer` -> preferences with confidence intervals, and judges checked by their controls.

Entry: `read_answers`, `score`. Imports neither torch nor numpy until it computes.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.errors import UsageError

CHOICES = {"1": "a", "a": "a", "2": "b", "b": "b", "0": "tie", "tie": "tie"}
LEVEL = 0.95
LEAST_RIGHT = 0.8  # of the controls; a judge below it is flagged
METHOD = (
    "share: mean over images of (wins + ties / 2) / answers of the judges that count. The image is the unit, since "
    f"judges of one image agree: Clopper-Pearson interval, level {LEVEL}, with the sum of these shares as successes of "
    "as many trials as images, exact for one judge without ties and wider than exact otherwise; p: two-sided binomial "
    "test against 1/2 of the images that more answers give to the one codec than to the other."
)


@dataclass(frozen=True)
class Answers:
    """What one judge answered.

    Attributes:
        judge: a name for tables.
        path: of the file.
        choices: pair's id -> "a", "b" or "tie".
    """

    judge: str
    path: Path
    choices: Mapping[str, str]


def read_key(folder: Path) -> dict[str, Any]:
    """Read key.json of a page.

    Raises:
        UsageError: it is missing, no JSON, or not the key of a page.
    """
    path = folder / "key.json"
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exception:
        raise UsageError(f"{path}: no such file: --score takes the folder that codec-eval prefer wrote") from exception
    except (OSError, ValueError) as exception:
        raise UsageError(f"{path}: cannot be read as JSON: {exception}") from exception
    if not isinstance(key, dict) or key.get("kind") != "prefer" or not isinstance(key.get("pairs"), list):
        raise UsageError(f"{path}: not the key of a page of codec-eval prefer")
    return key


def read_answers(path: Path, key: Mapping[str, Any]) -> Answers:
    """Read a file of answers: JSON as the page saves it, or CSV with the columns pair and choice (empty = none).

    Raises:
        UsageError: it is neither; it belongs to another page; a pair is unknown or answered twice; a choice is none of
            1, 2, 0, a, b, tie; or there is no answer at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exception:
        raise UsageError(f"{path}: cannot be read: {exception}") from exception
    judge, rows = path.stem, _from_csv(text, path)
    if rows is None:
        judge, rows = _from_json(text, path, str(key["page"]))
    known = {pair["pair"] for pair in key["pairs"]}
    choices: dict[str, str] = {}
    for pair, choice in rows:
        if pair not in known:
            raise UsageError(f"{path}: pair {pair!r} is not on page {key['page']}")
        if pair in choices:
            raise UsageError(f"{path}: pair {pair} is answered twice")
        if choice.lower() not in CHOICES:
            raise UsageError(f"{path}: pair {pair}: choice {choice!r}, expected 1, 2 or 0 (or a, b, tie)")
        choices[pair] = CHOICES[choice.lower()]
    if not choices:
        raise UsageError(f"{path}: no answers")
    return Answers(judge or path.stem, path, choices)


def _from_csv(text: str, path: Path) -> list[tuple[str, str]] | None:
    """Return (pair, choice) of a CSV file; None if its first line is not the head of one."""
    lines = [line for line in csv.reader(text.splitlines()) if line]
    if not lines or [cell.strip().lower() for cell in lines[0][:2]] != ["pair", "choice"]:
        return None
    rows = []
    for line in lines[1:]:
        if len(line) < 2:
            raise UsageError(f"{path}: {','.join(line)!r}: expected pair,choice")
        if line[1].strip():
            rows.append((line[0].strip(), line[1].strip()))
    return rows


def _from_json(text: str, path: Path, page: str) -> tuple[str, list[tuple[str, str]]]:
    try:
        found = json.loads(text)
    except ValueError as exception:
        raise UsageError(f"{path}: neither JSON nor CSV with the columns pair,choice: {exception}") from exception
    if not isinstance(found, dict) or not isinstance(found.get("answers"), list):
        raise UsageError(f"{path}: no list of answers: expected what the page saves")
    if found.get("page") != page:
        raise UsageError(f"{path}: answers to page {found.get('page')}, the key is of page {page}")
    rows = []
    for answer in found["answers"]:
        if not isinstance(answer, dict) or not {"pair", "choice"} <= set(answer):
            raise UsageError(f"{path}: an answer without pair or choice: {answer!r}")
        rows.append((str(answer["pair"]), str(answer["choice"])))
    return str(found.get("judge") or ""), rows


def score(key: Mapping[str, Any], answers: Sequence[Answers], drop_flagged: bool = False) -> dict[str, Any]:
    """Return preferences, judges and images as one result.

    Args:
        key: of the page.
        answers: of each judge.
        drop_flagged: count only judges whose controls are right.

    Raises:
        UsageError: the same answers twice; or no judge is left.
    """
    _check_copies(answers)
    judges = [_judge(key, one) for one in answers]
    counted = [one for one, judge in zip(answers, judges, strict=True) if not (drop_flagged and judge["flagged"])]
    if not counted:
        raise UsageError("every judge is flagged by the controls, and flagged judges do not count: nothing is left")
    pairs = [pair for pair in key["pairs"] if pair["kind"] == "pair"]
    preferences = []
    for codecs in dict.fromkeys(tuple(sorted((pair["a"], pair["b"]), key=key["codecs"].index)) for pair in pairs):
        of_these = [pair for pair in pairs if {pair["a"], pair["b"]} == set(codecs)]
        per_image = [
            {"image": pair["image"], **_counts(Counter(_votes(pair, counted)), codecs)}
            for pair in sorted(of_these, key=lambda pair: str(pair["image"]))
        ]
        preferences.append(_preference(per_image, codecs) | {"images": per_image})
    return {
        "kind": "preferences",
        "page": key["page"],
        "method": METHOD,
        "level": LEVEL,
        "settings": key["settings"],
        "dropped_flagged": drop_flagged,
        "judges": judges,
        "preferences": preferences,
        "left_out": key["left_out"],
    }


def _check_copies(answers: Sequence[Answers]) -> None:
    seen: dict[str, Path] = {}
    for one in answers:
        digest = hashlib.sha256(one.path.read_bytes()).hexdigest()
        if digest in seen:
            raise UsageError(f"{one.path}: the same answers as {seen[digest]}, which would count twice")
        seen[digest] = one.path


def _judge(key: Mapping[str, Any], answers: Answers) -> dict[str, Any]:
    """Return how many answers a judge gave, on which sides, and how the controls went."""
    controls = [pair for pair in key["pairs"] if pair["kind"] == "control" and pair["pair"] in answers.choices]
    # To see no difference between the original and a good file is honest: only a wrong choice counts against a judge.
    controls = [pair for pair in controls if answers.choices[pair["pair"]] != "tie"]
    n_right = sum(answers.choices[pair["pair"]] == pair["right"] for pair in controls)
    sides = Counter(answers.choices.values())
    return {
        "judge": answers.judge,
        "file": answers.path.name,
        "n_answers": len(answers.choices),
        "n_unanswered": len(key["pairs"]) - len(answers.choices),
        "n_a": sides["a"],
        "n_b": sides["b"],
        "n_ties": sides["tie"],
        "n_controls": len(controls),
        "n_controls_right": n_right,
        "flagged": bool(controls) and n_right < LEAST_RIGHT * len(controls),
    }


def _votes(pair: Mapping[str, Any], answers: Sequence[Answers]) -> Iterator[str]:
    """Yield the codec that each judge chose, or "tie"."""
    for one in answers:
        choice = one.choices.get(pair["pair"])
        if choice is not None:
            yield "tie" if choice == "tie" else str(pair[choice])


def _counts(votes: Mapping[str, int], codecs: Sequence[str]) -> dict[str, Any]:
    return {"wins": [votes.get(codec, 0) for codec in codecs], "ties": votes.get("tie", 0)}


def _preference(images: Sequence[Mapping[str, Any]], codecs: Sequence[str]) -> dict[str, Any]:
    """Return how often the first of two codecs was preferred, see METHOD."""
    wins = [sum(image["wins"][side] for image in images) for side in (0, 1)]
    ties = sum(image["ties"] for image in images)
    answered = [image for image in images if sum(image["wins"]) + image["ties"]]
    shares = [(image["wins"][0] + image["ties"] / 2) / (sum(image["wins"]) + image["ties"]) for image in answered]
    n, total = len(shares), sum(shares)
    row = {"codecs": list(codecs), "wins": wins, "ties": ties, "n": sum(wins) + ties, "n_images": n}
    row |= {"share": total / n if n else None, "interval": list(interval(total, n))}
    return row | {"p": sign_test(sum(share > 0.5 for share in shares), sum(share < 0.5 for share in shares))}


def interval(successes: float, n: int) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share at LEVEL (Clopper & Pearson 1934); (0, 1) for n = 0.

    Args:
        successes: 0 to n; halves, of ties, by the beta quantiles that are exact for whole numbers.
        n: trials.
    """
    from scipy.stats import beta  # type: ignore[import-untyped]

    tail = (1 - LEVEL) / 2
    low = float(beta.ppf(tail, successes, n - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return low, high


def sign_test(wins: int, losses: int) -> float | None:
    """Return p of the two-sided binomial test that both are equally likely; None without any."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else None
