"""The automatic proxies against closed forms, brute force, planted neurons and a language model made by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.stats import mannwhitneyu, norm

from soluscope import UserError, results
from soluscope.comparison import auc
from soluscope.proxies import Seen, Window, bag_of_context, lm_detection
from soluscope.rating import calibration, scored
from soluscope.rating.calibration import answers_of
from soluscope.rating.database import Rating
from soluscope.rating.language_model import WAITS_S, over_http
from soluscope.rating.plan import Kind
from soluscope.rating.scored import FOUR_CLASSES, ONE_CLASS, Score
from soluscope.rating.settings import ProxyConfig
from soluscope.report import proxies as section
from soluscope.results import Proxied, ProxyTerm

N_VOCAB = 12
KEY = "sk-secret-1234"


# --- the AUC --------------------------------------------------------------------------------------


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    upper, lower = rng.integers(6, size=14), rng.integers(5, size=9)  # with ties
    pairs = [(a > b) + (a == b) / 2 for a in upper for b in lower]
    assert auc.auc(upper, lower) == pytest.approx(np.mean(pairs), abs=1e-12)
    wanted = mannwhitneyu(upper, lower).statistic / (14 * 9)
    assert auc.auc(upper, lower) == pytest.approx(wanted, abs=1e-12)
    assert np.isnan(auc.auc([], [1.0]))


def test_interval_of_the_auc_at_its_ends_and_in_the_middle() -> None:
    """Of separate groups of n, the bound solves 1 - t = z^2 t (1 + (n - 1) ((1-t)/(2-t) + t/(1+t))) / n^2."""
    n, z = 31, norm.ppf(0.975)
    found = auc.interval(range(100, 100 + n), range(n))
    assert (found.value, found.high) == (1, 1)
    t = found.low
    assert t is not None
    spread = 1 + (n - 1) * ((1 - t) / (2 - t) + t / (1 + t))
    assert 1 - t == pytest.approx(z**2 * t * spread / n**2, abs=1e-9)
    mirrored = auc.interval(range(n), range(100, 100 + n))
    assert (mirrored.low, mirrored.value) == (0, 0)
    assert mirrored.high == pytest.approx(1 - t, abs=1e-9)
    assert auc.interval([1.0] * 4, [0.0] * 50).low is None


@pytest.mark.parametrize(("n", "truth"), [(10, 0.5), (10, 0.95), (30, 0.8)])
def test_intervals_of_the_auc_contain_the_truth_as_often_as_they_say(n: int, truth: float) -> None:
    """Of 200 intervals, at least 90% contain the truth: under 95% coverage, fewer are so few in 1 of 500 cases."""
    rng, distance = np.random.default_rng(0), norm.ppf(truth) * np.sqrt(2)
    found = [auc.interval(rng.normal(distance, 1, n), rng.normal(0, 1, n)) for _ in range(200)]
    hits = [low <= truth <= high for low, high in ((each.low, each.high) for each in found)]
    assert np.mean(hits) >= 0.9


# --- (b) the classifier ---------------------------------------------------------------------------


def text(
    is_active: Callable[[np.ndarray, int], bool], halves: tuple[int, ...] = (0, 1), n: int = 30
) -> Seen:
    """Return windows of random text, in which a rule of the tokens before decides where a neuron is active."""
    rng = np.random.default_rng(1)
    windows = []
    for row in range(n):
        tokens = rng.integers(N_VOCAB, size=41)
        active = np.array([is_active(tokens, at) for at in range(41)], float)
        half = halves[row % len(halves)]
        windows.append(Window(row, 1, tokens, active, int(active.argmax()), half))
    return Seen(windows, 0.5, 0.25, [f" t{token}" for token in range(N_VOCAB)])


def test_classifier_finds_a_token_and_a_token_at_a_distance() -> None:
    assert bag_of_context.bag_of_context(text(lambda t, at: t[at] == 7), str) == 1
    found = bag_of_context.bag_of_context(text(lambda t, at: at >= 2 and t[at - 2] == 5), str)
    assert found == 1


def test_classifier_finds_a_token_anywhere_in_the_context() -> None:
    def rule(tokens: np.ndarray, at: int) -> bool:
        return 3 in tokens[: max(0, at - bag_of_context.N_ORDERED)]

    found = bag_of_context.bag_of_context(text(rule), str)
    assert found == 1


def test_classifier_is_at_chance_where_text_decides_nothing() -> None:
    """With 615 tokens in half 1 and a fifth of them active, the AUC of noise has a standard error of .03."""
    rng = np.random.default_rng(2)
    found = bag_of_context.bag_of_context(text(lambda t, at: rng.random() < 0.2), str)
    assert found == pytest.approx(0.5, abs=0.1)


def test_classifier_is_tested_on_the_other_half() -> None:
    """A rule that half 1 reverses gives an AUC of 0, and none without a half."""
    seen = text(lambda t, at: t[at] < 6)
    other = [
        Window(w.row, w.start, w.tokens, 1 - w.activations, w.peak, 1)
        for w in seen.windows
        if w.half
    ]
    reversed_ = Seen([*(w for w in seen.windows if not w.half), *other], 0.5, None, seen.vocabulary)
    assert bag_of_context.bag_of_context(reversed_, str) == pytest.approx(0, abs=0.02)
    assert bag_of_context.bag_of_context(text(lambda t, at: t[at] < 6, (0,)), str) is None
    assert bag_of_context.bag_of_context(text(lambda t, at: False), str) is None


def test_a_token_in_several_windows_counts_once() -> None:
    seen = text(lambda t, at: t[at] == 7)
    doubled = [*seen.windows, *(shifted(each) for each in seen.windows)]
    again = Seen(doubled, seen.level, None, seen.vocabulary)
    for half in (0, 1):
        (rows, columns), active = bag_of_context._observations(seen, half)
        (rows_2, columns_2), active_2 = bag_of_context._observations(again, half)
        assert np.array_equal(active, active_2)
        assert np.array_equal(rows, rows_2)
        assert np.array_equal(columns, columns_2)


def shifted(window: Window) -> Window:
    return Window(
        window.row, window.start + 10, window.tokens[10:], window.activations[10:], 0, window.half
    )


def test_weights_are_those_of_a_fit_without_gradients() -> None:
    rng = np.random.default_rng(0)
    features, active = rng.integers(2, size=(40, 2)).astype(float), rng.random(40) < 0.3
    weight = np.where(active, 20 / active.sum(), 20 / (~active).sum())

    def loss(x: np.ndarray) -> float:
        odds = features @ x[:2] + x[2]
        chance = 1 / (1 + np.exp(-np.where(active, odds, -odds)))
        return float(-(weight * np.log(chance)).sum() + (x[:2] ** 2).sum() / 2)

    wanted = minimize(
        loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}
    )
    found = bag_of_context._weights(csr_array(features), active)
    assert found == pytest.approx(wanted.x[:2], abs=1e-3)


# --- (c) a language model -------------------------------------------------------------------------


class Reader:
    """A language model made by hand, which knows that the neuron is active at ` t7`."""

    def __init__(self, answer: Callable[[list[bool]], list[bool]]) -> None:
        self.answer, self.prompts = answer, []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        if "<<" in prompt:
            return "the token\n t7"
        lines = [line for line in prompt.splitlines() if line[:1].isdigit()]
        says = self.answer([" t7" in line for line in lines])
        return ", ".join(str(i) for i, yes in enumerate(says, 1) if yes) or "none"


def half_without() -> Seen:
    """Return windows of both halves, half of which have no ` t7` and so no active token."""
    seen = text(lambda t, at: t[at] == 7)
    windows = []
    for number, each in enumerate(seen.windows):
        tokens = np.where(each.tokens == 7, 8, each.tokens) if number // 2 % 2 else each.tokens
        active = (tokens == 7).astype(float)
        windows.append(Window(each.row, 1, tokens, active, int(active.argmax()), each.half))
    return Seen(windows, 0.5, None, seen.vocabulary)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [(lambda truth: truth, 1.0), (lambda truth: [False] * len(truth), 0.5),
     (lambda truth: [not each for each in truth], 0.0)],
)  # fmt: skip
def test_detection_is_the_balanced_accuracy_of_the_answers(
    answer: Callable[[list[bool]], list[bool]], wanted: float
) -> None:
    assert lm_detection.lm_detection(half_without(), Reader(answer)) == wanted


def test_the_model_explains_from_one_half_and_is_tested_on_the_other() -> None:
    seen, reader = half_without(), Reader(lambda truth: truth)
    lm_detection.lm_detection(seen, reader)
    explained, tested = reader.prompts
    texts = {
        half: [
            "".join(seen.vocabulary[t] for t in w.tokens) for w in seen.windows if w.half == half
        ]
        for half in (0, 1)
    }
    plain = explained.replace("<<", "").replace(">>", "")
    assert any(each in plain for each in texts[0])
    assert not any(each in plain for each in texts[1])
    assert sum(each in tested for each in texts[1]) == lm_detection.N_TESTED
    assert not any(each in tested for each in texts[0])
    assert "<<" not in tested
    assert "description of these tokens: the token t7\n" in tested  # one line


def test_too_few_texts_have_no_number_and_ask_nobody() -> None:
    reader = Reader(lambda truth: truth)
    assert lm_detection.lm_detection(text(lambda t, at: True), reader) is None
    assert reader.prompts == []


# --- a language model over HTTP -------------------------------------------------------------------


@contextmanager
def serving(*replies: tuple[int, bytes, dict[str, str]]) -> Iterator[tuple[str, list[Any]]]:
    """Serve replies in turn on this machine; yield the address and the requests."""
    waiting, seen = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), json.loads(content)))
            code, body, headers = waiting.pop(0)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            """Write no line."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


GOOD = json.dumps({"choices": [{"message": {"role": "assistant", "content": "1, 4"}}]}).encode()


def test_a_prompt_is_posted_with_the_key_and_a_busy_server_is_asked_again() -> None:
    waited: list[float] = []
    with serving((429, b"", {}), (503, b"", {}), (200, GOOD, {})) as (url, seen):
        assert over_http(url, "reader", KEY, waited.append)("Which?") == "1, 4"
    path, headers, body = seen[-1]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("reader", 0)
    assert body["messages"] == [{"role": "user", "content": "Which?"}]
    assert waited == list(WAITS_S[:2])


@pytest.mark.parametrize(
    ("reply", "said"),
    [((401, b"", {}), "status 401"), ((200, b"<html>", {}), "malformed"),
     ((200, b'{"choices": []}', {}), "no choices"), ((200, b'{"choices": [{}]}', {}), "message"),
     ((302, b"", {"Location": "/elsewhere"}), "status 302")],
)  # fmt: skip
def test_a_bad_answer_is_one_line_without_the_key(
    reply: tuple[int, bytes, dict[str, str]], said: str
) -> None:
    with serving(reply) as (url, seen), pytest.raises(UserError, match=said) as caught:
        over_http(url, "reader", KEY)("Which?")
    assert len(seen) == 1  # no redirect is followed
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert "lm_url=" in str(caught.value)


def test_a_server_that_is_always_busy_or_absent_is_given_up() -> None:
    with serving(*[(500, b"", {})] * 4) as (url, _), pytest.raises(UserError, match="status 500"):
        over_http(url, "reader", sleep=lambda _: None)("Which?")
    with pytest.raises(UserError, match="refused"):
        over_http(url, "reader")("Which?")


@pytest.mark.parametrize(
    ("url", "key"),
    [("file:///etc/passwd", ""), ("127.0.0.1:8080", ""), ("http://user:pw@host/v1", ""), ("http://[", ""),
     ("http://example.org/v1", KEY), ("https://example.org/v1", f"{KEY}\n")],
)  # fmt: skip
def test_an_address_or_a_key_that_is_not_safe_is_refused(url: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        over_http(url, "reader", key)
    assert KEY not in str(caught.value)


def test_settings_of_a_language_model_come_together() -> None:
    with pytest.raises(UserError, match="lm_model="):
        ProxyConfig(lm_url="http://127.0.0.1/v1")
    with pytest.raises(UserError, match="There are: mid, post"):
        ProxyConfig(stages=["pre"])


# --- planted neurons ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[Score]:
    return scored.of_planted(tmp_path_factory.mktemp("planted"), ProxyConfig(stages=["post"]), None)


def numbers(scores: list[Score], proxy: str, arm: str) -> list[float]:
    return [
        each.value
        for each in scores
        if (each.proxy, each.arm) == (proxy, arm) and each.value is not None
    ]


def test_planted_neurons_are_scored_as_their_text_says(planted: list[Score]) -> None:
    """13 classes have a rule; a class is a quarter of a neuron of four: F1 .4 if classes are equally frequent.

    The 31 neurons of classes have a number, and the one of BOS has none.
    """
    one, four = (numbers(planted, "rule_f1", arm) for arm in (ONE_CLASS, FOUR_CLASSES))
    assert len(one) == len(four) == 31
    assert sum(value > 0.99 for value in one) >= 8
    assert max(four) < 0.8
    assert auc.auc(one, four) > 0.5
    one, four = (numbers(planted, "bag_of_context", arm) for arm in (ONE_CLASS, FOUR_CLASSES))
    assert np.mean(one) > 0.97  # text decides in both models
    assert np.mean(four) > 0.94


# --- from numbers to records ----------------------------------------------------------------------


def made_up() -> list[Score]:
    """Return numbers of two arms of one run each: .8 and .3, .5 before training; post is mid plus .1."""
    rng = np.random.default_rng(0)
    levels = {("good", True): 0.8, ("base", True): 0.3, ("good", False): 0.5, ("base", False): 0.5}
    return [
        Score("p", arm, f"{arm}-s0", trained, i, stage, level + 0.1 * (stage == "post") + noise[i])
        for (arm, trained), level in levels.items()
        for noise in [rng.normal(0, 0.02, 40)]
        for i in range(40)
        for stage in ("mid", "post")
    ]


def of_scores(scores: list[Score], **options: Any) -> list[Proxied]:
    given = {"planted": [], "answers": {}} | options
    return [
        *calibration.records(
            "first", scores, given["planted"], given["answers"], {"p": ("proxy P", "F1")}, "abc", "base"
        )
    ]  # fmt: skip


def one_of(records: list[Proxied], term: ProxyTerm, **names: Any) -> Proxied:
    (found,) = [
        each
        for each in records
        if each.term is term and all(getattr(each, name) == value for name, value in names.items())
    ]
    return found


def test_means_differences_and_twins_are_those_of_the_numbers() -> None:
    scores = made_up()
    records = of_scores(scores)
    cell = ("good", True, "mid")
    own = [each.value for each in scores if (each.arm, each.trained, each.stage) == cell]
    mean = one_of(records, ProxyTerm.MEAN, arm="good", stage="mid", untrained=False)
    assert mean.value == pytest.approx(np.mean(own), abs=1e-12)
    assert (mean.n, mean.cluster, mean.unit, mean.commit) == (40, "neuron", "F1", "abc")
    assert mean.low is not None
    assert mean.low < 0.8 < (mean.high or 0)
    moved = one_of(records, ProxyTerm.STAGES, arm="good")
    assert moved.value == pytest.approx(0.1, abs=1e-12)
    away = one_of(records, ProxyTerm.DIFFERENCE, stage="post")
    assert (away.arm, away.against) == ("good", "base")
    assert away.low is not None
    assert away.low < 0.5 < (away.high or 0)
    assert one_of(records, ProxyTerm.TWIN, arm="good", stage="mid").value == 1
    assert one_of(records, ProxyTerm.TWIN, arm="base", stage="mid").value == 0
    assert not [each for each in records if each.term in (ProxyTerm.RATINGS, ProxyTerm.PLANTED)]


def test_neurons_without_a_number_are_counted_and_rated_ones_left_out_of_the_mean() -> None:
    scores = [Score("p", "base", "base-s0", True, i, "post", 0.2) for i in range(25)]
    scores += [Score("p", "base", "base-s0", True, 90, "post", None)]
    scores += [Score("p", "base", "base-s0", True, 91, "post", 1.0, drawn=False)]
    mean = one_of(of_scores(scores), ProxyTerm.MEAN)
    assert mean.value == pytest.approx(0.2)
    assert mean.n == 25
    assert mean.note == "without a number: 1 neurons"


def answered(index: int, yes: bool, rater: str = "ann", kind: Kind = Kind.STUDY) -> Rating:
    return Rating(rater, index, yes, "", 60.0, kind, "top", "post", "good", "good-s0", index, None)


def test_ratings_calibrate_a_proxy_by_the_majority_of_answers() -> None:
    """Neurons 0 to 9 are interpretable and have high numbers; two people disagree about neuron 20."""
    ratings = [answered(i, i < 10) for i in range(20)]
    ratings += [answered(20, True), answered(20, False, "bob")]
    ratings += [
        answered(21, True, kind=Kind.RULE)
    ]  # a planted neuron's text is not a neuron of the run
    answers = answers_of(ratings)
    assert len(answers) == 21
    scores = [Score("p", "good", "good-s0", True, i, "post", -float(i)) for i in range(22)]
    scores += [Score("p", "good", "good-s0", False, i, "post", float(i)) for i in range(22)]
    found = one_of(of_scores(scores, answers=answers), ProxyTerm.RATINGS)
    assert (found.value, found.n, found.unit) == (1, 20, "AUC")
    assert found.low is not None


def test_planted_neurons_calibrate_a_proxy_and_a_failure_is_said() -> None:
    planted = [
        Score("p", arm, arm, True, i, "post", float(i))
        for arm in (ONE_CLASS, FOUR_CLASSES)
        for i in range(31)
    ]
    records = of_scores(made_up(), planted=planted)
    found = one_of(records, ProxyTerm.PLANTED)
    assert found.value == 0.5
    texts = str(section.blocks(records))
    assert "proxy P does not distinguish planted neurons" in texts
    assert "Not ratings." in texts
    assert "'soluscope rate DIR' makes ratings" in texts
    assert section.blocks([]) == []


def test_records_survive_the_file(tmp_path: Path) -> None:
    records = of_scores(made_up())
    results.write(tmp_path / "results.jsonl", records)
    assert results.read(tmp_path / "results.jsonl") == records
