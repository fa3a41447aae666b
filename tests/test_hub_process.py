"""The process that talks to the Hub: how long it waits, and when it gives up. Its jobs are tried in test_hub.py."""

from datetime import UTC, datetime

import pytest

from ijepa_hf import hub_process
from ijepa_hf.hub import RETRY_WAITS
from ijepa_hf.hub_process import TemporaryError, asked_wait, next_wait, retrying


def test_waits_double_and_a_server_may_ask_for_more_up_to_a_limit():
    waits = RETRY_WAITS
    assert [next_wait(count, waits, None) for count in range(1, 8)] == [2, 4, 8, 16, 32, 64, None]
    assert next_wait(1, waits, 100.0) == 100
    assert next_wait(6, waits, 1.0) == 64
    assert next_wait(1, waits, 86400.0) == 300


def test_a_servers_wish_is_read_as_seconds_as_a_date_and_as_the_hub_writes_it():
    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    assert asked_wait({"Retry-After": "120"}, now) == 120
    assert asked_wait({"Retry-After": "Sun, 01 Mar 2026 12:01:30 GMT"}, now) == 90
    assert asked_wait({"Retry-After": "Sun, 01 Mar 2026 11:00:00 GMT"}, now) == 0
    assert asked_wait({"Retry-After": "soon"}, now) is None
    assert asked_wait({"RateLimit": '"api";r=0;t=55'}, now) == 55
    assert asked_wait({}, now) is None


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(hub_process.time, "sleep", seconds.append)
    return seconds


def test_a_wait_longer_than_the_limit_is_cut_and_said(slept):
    events, errors = [], [TemporaryError("HTTP 429 at GET /x", 86400.0)]

    def attempt(_):
        if errors:
            raise errors.pop()
        return {"url": "there"}

    assert retrying(attempt, {"repo_id": "me/model", "waits": RETRY_WAITS}, events.append) == {"url": "there"}
    assert slept == [300]
    assert events == [{"event": "retry", "reason": "HTTP 429 at GET /x, which asks to wait 86400 s", "seconds": 300}]


def test_bytes_that_arrive_renew_the_patience_and_the_same_bytes_again_do_not(slept):
    tries = []

    def attempt(report):
        tries.append(None)
        report({"event": "sent", "bytes": 10 if len(tries) < 6 else 20, "total": 30})
        raise TemporaryError("dropped")

    with pytest.raises(TemporaryError):
        retrying(attempt, {"repo_id": "me/model", "waits": RETRY_WAITS}, lambda event: None)
    assert slept == [2, 4, 8, 16, 32, 2, 4, 8, 16, 32, 64]
