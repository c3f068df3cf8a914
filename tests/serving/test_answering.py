# SPDX-License-Identifier: Apache-2.0
"""Questions that wait together go through the model together, if they can."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from asking import QUESTION, answer, ask, text, video

from transformers_vamba.serving import answering
from transformers_vamba.serving.answering import overlap


@pytest.fixture
def held(server, monkeypatch):
    """Holds the model until `go_on`, once `num` questions wait behind the one that it answers; notes the batches."""
    ask(server, video("movement.mp4"), text("What?"), max_tokens=1)
    ask(server, video("sequence.mp4"), text("What?"), max_tokens=1)
    rows, go_on, waits = [], threading.Event(), threading.Event()
    generate, ask_question = server.handler.model.generate, server.handler.answering.ask

    def held_generate(*args, **kwargs):
        assert go_on.wait(30)
        rows.append(len(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    asked = []

    def noted_ask(question):
        ask_question(question)
        asked.append(question)
        if len(asked) == held.num:
            waits.set()

    monkeypatch.setattr(server.handler.model, "generate", held_generate)
    monkeypatch.setattr(server.handler.answering, "ask", noted_ask)

    def held(*requests):
        held.num = len(requests)
        with ThreadPoolExecutor(len(requests)) as threads:
            completions = [threads.submit(request) for request in requests]
            assert waits.wait(30)
            go_on.set()
            return [completion.result() for completion in completions], rows

    return held


def test_questions_about_one_video_are_one_batch(server, held):
    """Of several lengths, streamed or not, as alone."""

    def about(name, question, **options):
        def request():
            completion = ask(server, video(name), text(question), **options)
            if not options.get("stream"):
                return answer(completion)
            return "".join(choice.delta.content or "" for chunk in completion for choice in chunk.choices)

        return request

    requests = [about("movement.mp4", QUESTION.text, stream=stream) for stream in (True, False)] * 3
    requests += [about("movement.mp4", "What color moved?", max_tokens=max_tokens) for max_tokens in (1, 20)]
    requests += [about("sequence.mp4", "What came first?")]
    answers, rows = held(*requests)
    assert answers[:6] == [QUESTION.answer] * 6
    assert answers[7].startswith(answers[6]) and answers[7] != ""
    assert sum(rows) == len(requests)
    assert len(rows) <= 3, rows  # those that came first, the others about that video, and the other video
    assert answers == [request() for request in requests]


def test_what_differs_is_not_mixed(server, held):
    """A seed gives the same answer whoever asks beside; other ways to choose tokens are other batches."""

    def sampled(seed):
        options = {"temperature": 2, "seed": seed, "max_tokens": 8}
        return lambda: answer(ask(server, video("movement.mp4"), text("What?"), **options))

    greedy = lambda: answer(ask(server, video("movement.mp4"), text(QUESTION.text)))  # noqa: E731
    answers, rows = held(sampled(1), sampled(1), greedy, sampled(2))
    assert answers[0] == answers[1] and answers[2] == QUESTION.answer
    assert rows == [1, 1, 1, 1]
    assert answers[0] == sampled(1)() and answers[3] == sampled(2)()


def test_a_seed_is_of_its_question_alone(server):
    """What others are answered does not follow from it."""
    about = lambda **options: answer(ask(server, text("What?"), temperature=2, max_tokens=16, **options))  # noqa: E731
    after = []
    for _ in range(3):
        assert about(seed=5) == about(seed=5)
        after.append(about())
    assert len(set(after)) > 1


def test_a_batch_has_a_greatest_size(server, held, monkeypatch):
    monkeypatch.setattr(answering, "MAX_ROWS", 2)
    one = lambda: answer(ask(server, video("movement.mp4"), text(QUESTION.text)))  # noqa: E731
    answers, rows = held(*[one] * 5)
    assert answers == [QUESTION.answer] * 5
    assert sum(rows) == 5 and max(rows) == 2


def test_those_who_got_their_answers_together_are_waited_for(server, monkeypatch):
    """Of two who were answered at once, the first to ask again waits for the other."""
    one = lambda: answer(ask(server, video("movement.mp4"), text(QUESTION.text)))  # noqa: E731
    answers, generate, rows = server.handler.answering, server.handler.model.generate, []
    one()
    monkeypatch.setattr(server.handler.model, "generate", lambda **inputs: (rows.append(1), generate(**inputs)))
    one()  # alone before, alone again
    answers.submit(lambda: None).result()  # the client has its answer before the model's thread is done with it
    assert answers._num_expected == 1 and len(rows) == 1
    monkeypatch.setattr(answering, "GATHERING_SECONDS", 30)
    monkeypatch.setattr(answering, "LONGEST_GATHERING", 30)
    with answers._changed:
        answers._num_expected = 2
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(one)
        deadline = time.monotonic() + 30
        while not answers._waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [one(), first.result()] == [QUESTION.answer] * 2
    assert len(rows) == 2


def test_a_batch_that_does_not_fit_is_answered_one_by_one(server, held, monkeypatch):
    generate, rows = server.handler.model.generate, []

    def small(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*args, **kwargs)

    monkeypatch.setattr(server.handler.model, "generate", small)
    one = lambda: answer(ask(server, video("movement.mp4"), text(QUESTION.text)))  # noqa: E731
    answers, _ = held(*[one] * 4)
    assert answers == [QUESTION.answer] * 4
    assert sorted(rows)[:4] == [1] * 4 and max(rows) > 1


@pytest.mark.parametrize(
    ("held_text", "stop", "length"),
    [("a pur", "purple", 3), ("a purple", "purple", 6), ("", "x", 0), ("abab", "abc", 2), ("aaa", "aab", 2)],
)
def test_text_that_may_begin_a_stop_string(held_text, stop, length):
    assert overlap(held_text, stop) == length
