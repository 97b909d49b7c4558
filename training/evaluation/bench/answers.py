"""Asking a judge: every answer is on the disk before it counts, so that a run that was stopped asks nothing twice."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from qwen_image_fast.chat import EndpointError, NoText
from qwen_image_fast.training.evaluation.bench.items import Answer, Question

JudgeCall = Callable[[Question], str]
_WRONG_SETTINGS = (401, 403, 404, 405)
_LONGEST_WAIT = 60.0
_SENSELESS = 10  # answers without sense in a row that are the judge's fault, not the pictures'


class JudgeDown(RuntimeError):
    """The judge does not answer, or fails; what it has said is kept."""


class AnswerFile:
    """`answers.jsonl`: a line for each answer, of this judge and of others before.

    An answer counts for a question with the same key, judge, words and pictures. A line that a killed process left
    half written is dropped.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self.path, self.judge = path, judge
        self._known: dict[str, Answer] = {}
        self._lock = threading.Lock()
        whole = b""
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            for line in whole.splitlines():
                record = json.loads(line)
                if record["judge"] == judge:
                    self._known[record["about"]] = Answer(record["key"], record["text"], record["value"])
        self._file = open(path, "r+b" if path.exists() else "xb")  # noqa: SIM115  closed by `close`
        self._file.truncate(len(whole))
        self._file.seek(0, os.SEEK_END)

    def known(self, question: Question) -> Answer | None:
        return self._known.get(about(question))

    def put(self, question: Question, answer: Answer) -> None:
        record = {"key": question.key, "judge": self.judge, "about": about(question), "text": answer.text,
                  "value": answer.value}  # fmt: skip
        with self._lock:
            self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._known[record["about"]] = answer

    def close(self) -> None:
        self._file.close()


def about(question: Question) -> str:
    """A hash of what a judge is shown: key, words and the bytes of the pictures."""
    digest = hashlib.sha256(json.dumps([question.key, question.system, question.prompt]).encode())
    for path in question.pictures:
        status = path.stat()
        digest.update(_digest(path, status.st_mtime_ns, status.st_size))
    return digest.hexdigest()[:32]


@functools.lru_cache(maxsize=256)
def _digest(path: Path, time: int, size: int) -> bytes:
    """Of a file; `time` and `size` tell whether it is still the same."""
    return hashlib.sha256(path.read_bytes()).digest()


def ask_all(
    questions: Iterable[Question],
    judge: JudgeCall,
    file: AnswerFile,
    *,
    attempts: int = 3,
    parallel: int = 1,
    pause: float = 1.0,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Answer]:
    """The answers by key: those of the file, and of the judge to what is not there.

    An answer that makes no sense is asked for `attempts` times; then it counts as one, with the value None. A judge
    that cannot be reached is tried as often, after `pause` seconds, twice as many, and so on, or as long as it asks.

    Raises:
        JudgeDown: it cannot be reached, refuses, fails by a ValueError of its own, or made no sense for `_SENSELESS`
            questions in a row, or for all that there are, which are asked again; all other answers so far are in the
            file, and none is made up.
    """
    found: dict[str, Answer] = {}
    senseless: list[tuple[Question, Answer]] = []  # since the last answer with sense
    stop = threading.Event()
    pending: dict[Future[Answer], Question] = {}

    def settle(futures: Sequence[Future[Answer]]) -> None:
        for future in futures:
            question = pending.pop(future)
            found[question.key] = answer = future.result()
            if answer.value is None:
                senseless.append((question, answer))
                if len(senseless) >= _SENSELESS:
                    raise no_sense(f"{len(senseless)} times in a row")
            else:
                keep_senseless()
            progress()

    def no_sense(how: str) -> JudgeDown:
        return JudgeDown(
            f"evaluate bench: the judge made no sense {how}, the last time by {senseless[-1][1].text[:80]!r}; what it "
            "has said before is kept"
        )

    def keep_senseless() -> None:
        for question, answer in senseless:
            file.put(question, answer)
        senseless.clear()

    with ThreadPoolExecutor(parallel) as pool:
        try:
            for question in questions:
                if (known := file.known(question)) is not None:
                    found[question.key] = known
                    progress()
                    continue
                if len(pending) >= parallel:
                    settle(list(wait(pending, return_when=FIRST_COMPLETED).done))
                pending[pool.submit(_answer, question, judge, file, attempts, pause, stop)] = question
            while pending:
                settle(list(wait(pending, return_when=FIRST_COMPLETED).done))
            if found and len(senseless) == len(found):
                raise no_sense("whatever it was asked")
            keep_senseless()
        finally:
            stop.set()
            for future in pending:
                future.cancel()
    return found


def _answer(
    question: Question, judge: JudgeCall, file: AnswerFile, attempts: int, pause: float, stop: threading.Event
) -> Answer:
    """The file gets it where it makes sense."""
    text, failure = "", None
    for attempt in range(attempts):
        if attempt and stop.is_set():
            break
        try:
            failure = None
            text = judge(question)
        except NoText as error:  # no text may be a filter's doing, of this picture
            text = text or str(error)
            continue
        except ValueError as error:  # it has not answered: a score of 0 would be a lie
            raise JudgeDown(
                f"evaluate bench: the judge failed at {question.key}, {question.pictures[-1]}: {error}; what it has "
                "said is kept, run the same command again to go on"
            ) from error
        except EndpointError as error:
            failure = error
            if error.status in _WRONG_SETTINGS:
                break
            if attempt + 1 < attempts:
                stop.wait(min(error.retry_after or pause * 2**attempt, _LONGEST_WAIT))
            continue
        try:
            answer = Answer(question.key, text, question.read(text))
        except ValueError:
            continue
        file.put(question, answer)
        return answer
    if failure is not None:
        raise JudgeDown(
            f"evaluate bench: the judge does not answer: {failure}; what it has said is kept, run the same command "
            "again to go on"
        ) from failure
    return Answer(question.key, text, None)
