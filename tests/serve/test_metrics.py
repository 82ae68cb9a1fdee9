"""The numbers of `/metrics`, read back with Prometheus' own parser."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Value by name and label values (in the order of the label names)."""
    return {
        (sample.name, tuple(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_requests_latency_and_tokens_by_model() -> None:
    metrics = Metrics()
    metrics.know(["base", "support@v1"])
    metrics.finished("support@v1", "ok", 2.0, 0.2, 40)
    metrics.finished("support@v1", "aborted", 1.0, 0.1, 5)
    metrics.finished("base", "failed", 0.5, None, 0)
    found = samples(metrics)
    assert found["lit_ft_requests_total", ("support@v1", "ok")] == 1
    assert found["lit_ft_requests_total", ("support@v1", "aborted")] == 1
    assert found["lit_ft_requests_total", ("support@v1", "failed")] == 0  # there from the beginning
    assert found["lit_ft_requests_total", ("base", "failed")] == 1
    assert found["lit_ft_tokens_total", ("support@v1",)] == 45
    assert found["lit_ft_request_seconds_count", ("support@v1",)] == 2
    assert found["lit_ft_request_seconds_sum", ("support@v1",)] == 3.0
    assert found["lit_ft_time_to_first_token_seconds_sum", ("support@v1",)] == pytest.approx(0.3)
    assert found["lit_ft_request_seconds_bucket", ("1.0", "support@v1")] == 1  # 1 s is within `le=1`
    assert ("lit_ft_time_to_first_token_seconds_count", ("base",)) not in found


def test_names_that_clients_ask_for_never_become_labels() -> None:
    metrics = Metrics()
    metrics.know(["base"])
    size = len(metrics.text().splitlines())
    for number in range(1000):
        metrics.finished(f'evil"}}\n{number}', "refused", 0.0)
        metrics.voted(f"kind{number}", "left")
        metrics.voted("compare", f"verdict{number}")
    found = samples(metrics)
    assert found["lit_ft_requests_total", ("other", "refused")] == 1000
    assert found["lit_ft_votes_total", ("other", "other")] == 2000
    assert "evil" not in metrics.text().decode()
    assert len(metrics.text().splitlines()) - size < 10


def test_a_folder_of_thousands_is_bounded() -> None:
    metrics = Metrics()
    metrics.know(f"support@v{number}" for number in range(5000))
    metrics.finished("support@v4999", "ok", 1.0, 0.1, 1)
    metrics.finished("support@v0", "ok", 1.0, 0.1, 1)
    found = samples(metrics)
    assert len({labels[0] for name, labels in found if name == "lit_ft_requests_total"}) <= Metrics.MAX_MODELS + 1
    assert found["lit_ft_requests_total", ("other", "ok")] == 1
    assert found["lit_ft_requests_total", ("support@v0", "ok")] == 1
    metrics.know(["support@v0"])  # again
    assert samples(metrics)["lit_ft_requests_total", ("support@v0", "ok")] == 1


def test_odd_names_are_escaped() -> None:
    metrics = Metrics()
    metrics.know(['a"b\\c\nd'])
    metrics.finished('a"b\\c\nd', "ok", 1.0, None, 3)
    assert samples(metrics)["lit_ft_tokens_total", ('a"b\\c\nd',)] == 3


def test_engine_swaps_votes_and_streams() -> None:
    metrics = Metrics()
    before = samples(metrics)
    assert before["lit_ft_engine_up", ()] == 0 and before["lit_ft_engine_restarts_total", ()] == 0
    assert before["lit_ft_votes_total", ("compare", "left")] == 0
    metrics.engine_up(True)
    metrics.engine_restarted()
    metrics.swapped("loaded")
    metrics.swapped("loaded")
    metrics.swapped("quarantined")
    metrics.voted("compare", "left")
    metrics.voted("thumbs", "up")
    with metrics.stream():
        within = samples(metrics)
    with pytest.raises(RuntimeError), metrics.stream():
        raise RuntimeError
    after = samples(metrics)
    assert within["lit_ft_open_streams", ()] == 1 and after["lit_ft_open_streams", ()] == 0
    assert after["lit_ft_engine_up", ()] == 1 and after["lit_ft_engine_restarts_total", ()] == 1
    assert after["lit_ft_swaps_total", ("loaded",)] == 2 and after["lit_ft_swaps_total", ("unloaded",)] == 0
    assert after["lit_ft_swaps_total", ("quarantined",)] == 1
    assert after["lit_ft_votes_total", ("compare", "left")] == 1 and after["lit_ft_votes_total", ("thumbs", "up")] == 1
    metrics.engine_up(False)
    assert samples(metrics)["lit_ft_engine_up", ()] == 0


def test_words_that_are_none_of_ours() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="crashed"):
        metrics.finished("base", "crashed", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replaced"):
        metrics.swapped("replaced")  # type: ignore[arg-type]


def test_a_clock_that_went_back_breaks_nothing() -> None:
    metrics = Metrics()
    metrics.know(["base"])
    metrics.finished("base", "ok", -5.0, -1.0, -3)
    found = samples(metrics)
    assert found["lit_ft_request_seconds_sum", ("base",)] == 0 and ("lit_ft_tokens_total", ("base",)) not in found


def test_each_server_counts_for_itself() -> None:
    first, second = Metrics(), Metrics()
    first.engine_restarted()
    assert samples(second)["lit_ft_engine_restarts_total", ()] == 0
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("lit_ft")]
    assert first.content_type.startswith("text/plain")


def test_threads_lose_nothing() -> None:
    metrics = Metrics()
    metrics.know(["base"])

    def work() -> None:
        for _ in range(500):
            metrics.finished("base", "ok", 1.0, 0.1, 2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics)["lit_ft_tokens_total", ("base",)] == 4000
