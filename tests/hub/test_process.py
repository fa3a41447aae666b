"""The process that talks to the Hub: how long it waits, and when it gives up. test_uploader.py tries its jobs."""

import pytest

from ijepa_hf.hub import process
from ijepa_hf.hub.client import RETRY_WAITS
from ijepa_hf.hub.process import TemporaryError, _asked_wait, retrying


def test_the_wait_that_a_server_asks_for_is_read_from_both_headers():
    assert _asked_wait({"Retry-After": "120"}) == 120
    assert _asked_wait({"Retry-After": "soon"}) is None
    assert _asked_wait({"ratelimit": '"api";r=0;t=55'}) == 55
    assert _asked_wait({"ratelimit": '"api";r=10;t=55'}) is None
    assert _asked_wait({}) is None


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(process.time, "sleep", seconds.append)
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
