"""A vision-language model behind an endpoint as a reward: asked once for each picture, its answers kept in a file.

The answer is JSON with a score, at temperature 0. What is no such answer is asked for again; a judge that is down, or
answers nonsense to the end, ends the run with a sentence, and nothing that it said before is asked again: the answers
stand in `judged.jsonl` of the run's folder, by a hash of the picture, the prompt and the question.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from qwen_image_fast.chat import Chat, ChatEndpoint, EndpointError
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.rewards import JudgeReward
from qwen_image_fast.training.rewards.reward import Asked, RewardError

ANSWERS = "judged.jsonl"
SYSTEM = "You judge pictures. Answer with one JSON object and nothing else."
_LONGEST_WAIT = 30.0
_WRONG_SETTINGS = (400, 401, 403, 404, 405)


class Judge:
    """Scores from `low` to `high`, as 0 to 1.

    Args:
        settings: of the recipe. folder: of the run, for the answers; None: they are not kept. chat: instead of the
            endpoint. wait: between tries, in seconds.

    Raises:
        RecipeError: there is no file with the key.
    """

    name = "judge"

    def __init__(
        self, settings: JudgeReward, folder: Path | None = None, chat: Chat | None = None,
        wait: Callable[[float], object] = time.sleep,
    ):  # fmt: skip
        self.settings, self.wait = settings, wait
        self.path = folder / ANSWERS if folder is not None else None
        self.chat = chat or self._endpoint()
        self.lock = threading.Lock()
        self.known: dict[str, float] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.is_file() else ():
            try:
                found = json.loads(line)
                self.known[found["key"]] = float(found["score"])
            except (ValueError, LookupError, TypeError):
                continue  # the half line that a kill leaves

    def _endpoint(self) -> Chat:
        chosen, key = self.settings, None
        if chosen.api_key_file:
            try:
                key = Path(chosen.api_key_file).expanduser().read_text(encoding="utf-8").strip()
            except OSError as error:
                raise RecipeError(f"recipe: api_key_file must be a file that holds the key, got {chosen.api_key_file}"
                                  ) from error  # fmt: skip
        options = {"temperature": 0, **chosen.options}
        return ChatEndpoint(
            chosen.endpoint, chosen.model, api_key=key, timeout=chosen.timeout, options=options, who="judge"
        )

    def refuses(self, asked: Asked) -> str | None:
        return None

    def __call__(self, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
        with ThreadPoolExecutor(self.settings.parallel) as pool:
            return list(pool.map(self._score, pictures, asked))

    def question(self, asked: Asked) -> str:
        low, high = self.settings.low, self.settings.high
        form = f'Answer {{"score": a number from {low:g}, the worst, to {high:g}, the best}}.'
        return f"{self.settings.question.replace('{prompt}', asked.prompt)}\n{form}"

    def _score(self, picture: np.ndarray, asked: Asked) -> float:
        """From 0 to 1; RewardError where there is none."""
        question, values = self.question(asked), []
        for number in range(self.settings.answers):
            key = _key(picture, self.settings.endpoint, self.settings.model, question, number)
            value = self.known.get(key)
            if value is None:
                value = self._asked(picture, question)
                self._keep(key, value, asked.prompt)
            values.append(value)
        low, high = self.settings.low, self.settings.high
        return (float(np.mean(values)) - low) / (high - low)

    def _asked(self, picture: np.ndarray, question: str) -> float:
        shown, reason = Image.fromarray(picture), ""
        for attempt in range(self.settings.attempts):
            pause = 0.0
            try:
                return read_score(self.chat(SYSTEM, question, [shown]), self.settings.low, self.settings.high)
            except EndpointError as error:
                reason = str(error)
                if error.status in _WRONG_SETTINGS:
                    raise RewardError(f"{reason}; check endpoint, model and api_key_file, then resume") from error
                pause = min(error.retry_after or 2.0**attempt, _LONGEST_WAIT)
            except ValueError as error:
                reason = str(error)
            if attempt + 1 < self.settings.attempts:
                self.wait(pause)
        what = f"reward judge: no score after {self.settings.attempts} tries: {reason}"
        raise RewardError(f"{what}; what it said before is kept, resume when it answers")

    def _keep(self, key: str, value: float, prompt: str) -> None:
        with self.lock:
            self.known[key] = value
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "score": value, "prompt": prompt}, ensure_ascii=False) + "\n")


def read_score(answer: str, low: float, high: float) -> float:
    """The score of an answer: one JSON object, alone, in a code block or in a sentence.

    Raises:
        ValueError: it has none, or one that is not from `low` to `high`.
    """
    for text in re.findall(r"\{[^{}]*\}", answer):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        score = found.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            continue
        if not low <= score <= high:
            raise ValueError(f"judge: the score must be from {low:g} to {high:g}, got {score:g}")
        return float(score)
    raise ValueError(f'judge: the answer must hold {{"score": number}}, got {answer!r:.80}')


def _key(picture: np.ndarray, *parts: object) -> str:
    total = hashlib.sha256(f"{picture.shape}".encode())
    total.update(picture.tobytes())
    for part in parts:
        total.update(f"\x1f{part}".encode())
    return total.hexdigest()
