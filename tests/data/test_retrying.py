"""Reading from sources that fail: which failures are tried again, how long, and that what comes has the same bits."""

import errno
import io
import itertools
import logging
import os
import pickle
import socketserver
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import datasets
import fsspec
import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, UnidentifiedImageError

from ijepa_hf.data import retrying, streaming
from ijepa_hf.data.order import StreamLayout, StreamOrder
from ijepa_hf.data.reading import CropReader, ImageColumn, ImageRows
from ijepa_hf.data.retrying import (
    DataSourceError,
    RetryPolicy,
    StalledReadError,
    describe,
    end_reading_thread,
    is_shard_failure,
    is_source_failure,
)
from ijepa_hf.data.sources.opening import ImageSource, load_split, open_stream
from ijepa_hf.data.streaming import StreamedBatches, shard_lengths

IMPATIENT = RetryPolicy(seconds=20.0, timeout=5.0)
STALLED = threading.Event()


# -- which failures --------------------------------------------------------------------------------------------------


def answer(status):
    request = httpx2.Request("GET", "https://somewhere/a.parquet")
    return httpx2.Response(status, request=request)


def of_requests(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("no", response=response)


def of_aiohttp(status):
    return aiohttp.ClientResponseError(SimpleNamespace(real_url="http://a/b"), (), status=status, message="no")


SOURCE_FAILURES = [
    *(OSError(code, os.strerror(code)) for code in (
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN, errno.EREMOTEIO, errno.ENODEV,
        errno.EMFILE, errno.ENOMEM,
    )),
    TimeoutError(), ConnectionError("Server Disconnected"), ConnectionResetError(), EOFError(),
    OSError("Unexpected end of stream"), pa.ArrowIOError("gone"), tarfile.ReadError("unexpected end of data"),
    fsspec.exceptions.FSTimeoutError(), aiohttp.ServerDisconnectedError(), aiohttp.ClientPayloadError("cut"),
    requests.ConnectionError(), httpx2.ConnectTimeout("late"), httpx2.RemoteProtocolError("cut"),
    *(make(status) for make in (of_aiohttp, of_requests) for status in (500, 502, 503, 504, 408, 425, 429)),
    HfHubHTTPError("no", response=answer(503)),
]  # fmt: skip
OTHERS = [
    FileNotFoundError("memory://a"), FileNotFoundError(errno.ENOENT, "no"), PermissionError(errno.EACCES, "no"),
    IsADirectoryError(errno.EISDIR, "no"), OSError(errno.ELOOP, "no"), OSError(errno.ENAMETOOLONG, "no"),
    ValueError("no picture"), KeyError("image"), pa.ArrowInvalid("no parquet"), MemoryError(),
    *(make(status) for make in (of_aiohttp, of_requests) for status in (401, 403, 404, 410)),
]  # fmt: skip


def test_failures_of_disk_network_or_server_are_told_from_names_that_lead_nowhere_and_bad_data():
    assert [error for error in SOURCE_FAILURES if not is_source_failure(error) or not is_shard_failure(error)] == []
    assert [error for error in OTHERS if is_source_failure(error)] == []


def test_a_shard_that_was_there_is_tried_again_whatever_its_name_leads_to_now_but_not_when_it_is_bad():
    for error in (FileNotFoundError("a"), PermissionError(errno.EACCES, "no"), of_aiohttp(403), of_requests(404)):
        assert is_shard_failure(error)
    for error in (ValueError("no"), pa.ArrowInvalid("no parquet"), KeyError("image")):
        assert not is_shard_failure(error)


def test_an_error_is_described_on_one_line_with_its_cause_and_without_signatures():
    assert describe(OSError(errno.EIO, "Input/output error", "/a")) == "OSError: Input/output error"
    assert describe(TimeoutError()) == "TimeoutError"
    error = ConnectionError("Server\nDisconnected")
    error.__cause__ = ValueError("503, url='https://a/b.parquet?X-Signature=abc&x=1'")
    assert describe(error) == ("ConnectionError: Server Disconnected (ValueError: 503, url='https://a/b.parquet?...')")


# -- how long --------------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that goes on only while somebody sleeps, or by so many seconds a try."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(retrying, "time", fake)
    return fake


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch):
    """So that shards of a few rows are read in several parts, and fail in the middle."""
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 4)


@pytest.fixture
def at_once(monkeypatch):
    """Waits of a hundredth of a second between tries."""
    monkeypatch.setattr(retrying, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(retrying, "LONGEST_WAIT_SECONDS", 0.02)


def failing(times, error=None, result="rows"):
    """A read that fails so many times."""
    left = iter([error or OSError(errno.EIO, "Input/output error")] * times)

    def read():
        for one in left:
            raise one
        return result

    return read


def test_waits_double_from_half_a_second_to_half_a_minute_and_each_is_a_warning(clock, caplog):
    assert RetryPolicy(300, 0).call("shard 3", failing(9)) == "rows"
    assert clock.slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert len(caplog.records) == 9
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert caplog.records[1].getMessage() == (
        "shard 3 cannot be read: OSError: Input/output error; it is tried again in 1 s, for another 300 s"
    )


def test_a_source_that_goes_on_failing_is_given_up_after_the_time_with_file_reason_tries_and_time(clock):
    with pytest.raises(DataSourceError) as raised:
        RetryPolicy(10, 7).call("shard 3 (a.parquet)", failing(100))
    # the last wait is cut, so that the last try is at the end of the time
    assert clock.slept == [0.5, 1, 2, 4, 2.5]
    assert str(raised.value) == (
        "shard 3 (a.parquet) cannot be read: OSError: Input/output error; tried 6 times in 10.0 s "
        "(data_retry_seconds=10, data_timeout_seconds=7). When the source is back, the same command with "
        "--resume_from_checkpoint latest goes on."
    )
    assert isinstance(raised.value.__cause__, OSError)
    sent = pickle.loads(pickle.dumps(raised.value))
    assert (type(sent), str(sent)) == (DataSourceError, str(raised.value))


def test_time_spent_in_tries_counts(clock):
    def read():
        clock.now += 100
        raise TimeoutError

    with pytest.raises(DataSourceError, match="tried 3 times in 301.5 s"):
        RetryPolicy(300, 0).call("a", read)


def test_zero_seconds_try_once(clock):
    with pytest.raises(DataSourceError, match="tried once in 0.0 s"):
        RetryPolicy(0, 0).call("a", failing(1))
    assert clock.slept == []


def test_what_is_no_failure_of_the_source_is_raised_as_it_is_at_once(clock):
    for error in (ValueError("no picture"), FileNotFoundError("a")):
        with pytest.raises(type(error)) as raised:
            RetryPolicy(300, 0).call("a", failing(1, error))
        assert raised.value is error
    assert clock.slept == []


# -- the time limit --------------------------------------------------------------------------------------------------


def test_a_read_that_takes_too_long_is_left_behind_and_the_next_gets_its_own_result():
    policy, gate = RetryPolicy(0, 0.2), threading.Event()
    started = time.monotonic()
    with pytest.raises(StalledReadError, match=r"no answer within 0.2 s"):
        policy.within(lambda: gate.wait(20) and "late")
    assert time.monotonic() - started < 5
    gate.set()
    assert [policy.within(lambda number=number: number) for number in range(50)] == list(range(50))
    end_reading_thread()


def test_a_read_under_the_limit_raises_what_it_raises_and_zero_needs_no_thread(threads_since):
    with pytest.raises(KeyError, match="x"):
        RetryPolicy(0, 9).within(lambda: {}["x"])
    assert RetryPolicy(0, 9).within(threading.current_thread) is not threading.current_thread()
    assert RetryPolicy(0, 0).within(threading.current_thread) is threading.current_thread()
    end_reading_thread()
    assert not threads_since("time limit")


def test_every_thread_has_its_own_reading_thread_and_it_ends_with_it(threads_since):
    end_reading_thread()
    threads = [threading.Thread(target=RetryPolicy(0, 9).within, args=(int,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and threads_since("time limit"):
        time.sleep(0.01)
    assert not threads_since("time limit")


STUCK_AT_THE_END = """
import sys, threading
import pyarrow.parquet as pq
from ijepa_hf.data.retrying import *

class Stuck:
    closed = False
    def __init__(self, file): self.file, self.reads = file, 0
    def read(self, size):
        self.reads += 1
        if self.reads > 1: threading.Event().wait()
        return self.file.read(size)
    def seek(self, *place): return self.file.seek(*place)
    def tell(self): return self.file.tell()
    def close(self): raise AssertionError("would wait for ever")

with RetryPolicy(0, 0.3).open(lambda: Stuck(open(sys.argv[1], "rb"))) as file:
    try:
        table = pq.ParquetFile(file).read(use_threads=False)
    except StalledReadError as error:
        print(error)
"""


def test_a_process_with_a_stuck_read_ends_at_once_and_with_its_own_exit_code(tmp_path, child_environment):
    pq.write_table(pa.table({"a": range(1000), "b": range(1000)}), tmp_path / "a.parquet", row_group_size=100)
    command = [sys.executable, "-W", "ignore", "-c", STUCK_AT_THE_END, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no answer within 0.3 s\n", "")


# -- shards on a source that fails -----------------------------------------------------------------------------------


def encoded(number):
    """A picture of noise, so that files have more than a footer; its first pixel says its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    pixels[0, 0] = number, 2 * number, 3 * number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


LENGTHS = [11, 0, 1, 21, 27]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    features = datasets.Features({"image": datasets.Image()})
    for index, (first, last) in enumerate(itertools.pairwise(itertools.accumulate([0, *LENGTHS]))):
        rows = {"image": [{"bytes": encoded(number), "path": None} for number in range(first, last)]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"{index}.parquet"), batch_size=3)
    return folder


class Failing(fsspec.AbstractFileSystem):
    """Local files, of which the chosen opens and reads, counted over all files, fail."""

    protocol = "failing"
    cachable = False
    plan: dict = {}  # noqa: RUF012
    count = 0

    @classmethod
    def prepare(cls, plan):
        cls.plan, cls.count = plan, 0

    @classmethod
    def step(cls):
        cls.count += 1
        failure = cls.plan.get(cls.count)
        if isinstance(failure, Exception):
            raise failure
        return failure

    def _open(self, path, mode="rb", **options):
        del options
        self.step()
        return FailingFile(open(f"/{path.lstrip('/')}", mode))

    def info(self, path, **options):
        del options
        return {"name": path, "size": Path("/", path).stat().st_size, "type": "file"}


class FailingFile(io.BufferedReader):
    def __init__(self, file):
        super().__init__(file.detach())

    def read(self, size=-1):
        failure = Failing.step()
        if failure == "stall":
            STALLED.wait(30)
        content = super().read(size)
        return content[: len(content) // 2] if failure == "short" else content


@pytest.fixture(scope="module", autouse=True)
def _failing():
    fsspec.register_implementation("failing", Failing, clobber=True)


@pytest.fixture(autouse=True)
def _stalled():
    """Reads that stall go on when the test is over."""
    STALLED.clear()
    yield
    STALLED.set()
    end_reading_thread()


@pytest.fixture
def impatient_datasets(monkeypatch):
    """What `datasets` itself waits between its own tries."""
    for name in ("READ_RETRY_INTERVAL", "READ_SERVER_UNAVAILABLE_RETRY_INTERVAL", "OPEN_RETRY_INTERVAL"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}", 0.001)
    for name in ("READ", "OPEN"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_MAX_RETRIES", 1)


def opened(shards, addresses):
    stream = open_stream(ImageSource(str(shards)), "train")
    column = ImageColumn(stream.rows, "image", 3)
    return stream._replace(rows=column.undecoded(stream.rows), files=addresses), column


def batches_of(stream, column, retries, num_steps=11, start_step=0):
    order = StreamOrder(LENGTHS, [StreamLayout(0, 1, 0, 5, 1)], 0, 7)
    crops = CropReader(column, (32, 32), 0.5, 0)
    batches = StreamedBatches(stream, order, crops, num_steps=num_steps, start_step=start_step, retries=retries)
    try:
        return [[(row["sample_key"], row["pixel_values"].numpy().tobytes()) for row in batch] for batch in batches]
    finally:
        batches.close()


@pytest.fixture(scope="module")
def healthy(shards):
    stream, column = opened(shards, sorted(map(str, shards.glob("*.parquet"))))
    return batches_of(stream, column, IMPATIENT)


def addresses_of(shards):
    return [f"failing://{file}" for file in sorted(shards.glob("*.parquet"))]


EIO = OSError(errno.EIO, "Input/output error")
FAULTS = {
    "opens and reads": {1: EIO, 5: EIO, 9: EIO, 10: EIO, 11: EIO, 30: EIO},
    "other answers": {
        7: of_aiohttp(503), 8: FileNotFoundError("a"), 9: OSError(errno.ESTALE, "Stale file handle"),
        15: of_aiohttp(403), 20: ConnectionResetError(), 21: of_requests(502),
    },
    "reads cut short": {6: "short", 14: "short"},
    "a stall": {10: "stall"},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stream_whose_source_fails_for_a_while_gives_the_very_batches_of_one_that_did_not(
    shards, healthy, fault, at_once, impatient_datasets, caplog
):
    del at_once, impatient_datasets
    Failing.prepare(FAULTS[fault])
    stream, column = opened(shards, addresses_of(shards))
    policy = RetryPolicy(seconds=20, timeout=0.3 if fault == "a stall" else 5.0)
    with caplog.at_level(logging.WARNING):
        assert batches_of(stream, column, policy) == healthy
    said = [record.getMessage() for record in caplog.records if record.name == "ijepa_hf.data.retrying"]
    assert said
    assert all("shard" in text and ".parquet) cannot be read: " in text for text in said)
    assert Failing.count > max(FAULTS[fault])


def test_a_resumed_stream_too(shards, healthy, at_once):
    del at_once
    for start in (3, 7):
        Failing.prepare({2: EIO, 5: EIO, 6: EIO})
        stream, column = opened(shards, addresses_of(shards))
        assert batches_of(stream, column, IMPATIENT, start_step=start) == healthy[start:]
        assert Failing.count > 6


def test_a_stream_whose_source_stays_away_ends_in_an_error_that_names_the_shard(shards, at_once):
    del at_once
    Failing.prepare(dict.fromkeys(range(14, 10_000), EIO))
    stream, column = opened(shards, addresses_of(shards))
    with pytest.raises(DataSourceError, match=r"shard \d of the stream \(failing://.*\.parquet\) .*tried \d+ times"):
        batches_of(stream, column, RetryPolicy(0.2, 5))


def test_a_shard_that_is_broken_in_the_middle_is_named_at_once(shards, tmp_path, clock):
    content = bytearray((shards / "4.parquet").read_bytes())
    column = pq.read_metadata(shards / "4.parquet").row_group(4).column(0)
    place = column.dictionary_page_offset or column.data_page_offset
    content[place : place + 300] = bytes(300)
    (tmp_path / "4.parquet").write_bytes(content)
    files = [*sorted(map(str, shards.glob("*.parquet")))[:4], str(tmp_path / "4.parquet")]
    stream, column = opened(shards, files)
    with pytest.raises(DataSourceError, match=r"shard 4 of the stream \(.*4\.parquet\)"):
        batches_of(stream, column, RetryPolicy(3, 0))
    assert sum(clock.slept) <= 3


def test_footers_are_read_again_too_but_a_file_that_is_not_there_is_said_at_once(shards, at_once, tmp_path):
    del at_once
    Failing.prepare({2: EIO, 5: EIO, 9: EIO})
    stream, _ = opened(shards, addresses_of(shards))
    assert shard_lengths(stream, "image", IMPATIENT) == LENGTHS
    assert Failing.count > 9
    missing = stream._replace(files=[*stream.files[:4], str(tmp_path / "none.parquet")])
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        shard_lengths(missing, "image", RetryPolicy(300, 5))


def test_tars_are_opened_again_at_the_row_where_they_were(tmp_path, monkeypatch, at_once):
    del at_once
    for index in range(2):
        with tarfile.open(tmp_path / f"{index}.tar", "w") as archive:
            for number in range(30 * index, 30 * index + 30):
                entry = tarfile.TarInfo(f"{number:04d}.png")
                entry.size = len(encoded(number))
                archive.addfile(entry, io.BytesIO(encoded(number)))
    stream = open_stream(ImageSource(str(tmp_path)), "train")
    column = ImageColumn(stream.rows, "png", 3)
    stream = stream._replace(rows=column.undecoded(stream.rows))
    iter_rows, calls = datasets.IterableDataset.iter, itertools.count()

    def failing_iter(self, batch_size):
        for number, batch in enumerate(iter_rows(self, batch_size)):
            if number == 3 and next(calls) % 3 < 2:
                raise EIO
            yield batch

    def rows():
        read = streaming._read_patiently(stream, 1, 5, IMPATIENT)
        return [row["png"]["bytes"] for batch in read for row in batch]

    expected = rows()
    assert expected == [encoded(number) for number in range(35, 60)]
    monkeypatch.setattr(datasets.IterableDataset, "iter", failing_iter)
    assert rows() == expected
    assert shard_lengths(stream, "png", IMPATIENT) == [30, 30]
    assert next(calls) >= 5


# -- a server --------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serves parts of files; the chosen requests (of parts) go wrong."""

    protocol_version = "HTTP/1.1"
    folder: Path
    plan: dict = {}  # noqa: RUF012
    count = 0

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self):
        type(self).count += 1
        failure = self.plan.get(self.count)
        if isinstance(failure, int):
            self.send_response(failure)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        size = len(content)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or size), size - 1)
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if failure == "stall":
            STALLED.wait(30)
        self.wfile.write(part[: len(part) // 2] if failure == "cut" else part)
        if failure == "cut":
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)


@pytest.fixture
def server(shards):
    Handler.folder, Handler.count = shards, 0
    socketserver.TCPServer.allow_reuse_address = True
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.handle_error = lambda *_: None  # clients that hang up
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield [f"http://127.0.0.1:{running.server_port}/{file.name}" for file in sorted(shards.glob("*.parquet"))]
        running.shutdown()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_shards_of_a_server_that_fails_for_a_while_give_the_very_batches(
    shards, server, healthy, at_once, impatient_datasets
):
    del at_once, impatient_datasets
    Handler.plan = {2: 503, 3: "stall", 4: 429, 5: "cut", 6: 502}
    stream, column = opened(shards, server)
    assert batches_of(stream, column, RetryPolicy(30, 0.5)) == healthy
    assert Handler.count > 6


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_server_that_stays_away_is_named_with_its_last_answer(shards, server, at_once, impatient_datasets):
    del at_once, impatient_datasets
    Handler.plan = dict.fromkeys(range(3, 10_000), 503)
    stream, column = opened(shards, server)
    with pytest.raises(DataSourceError, match=r"http://127.*\.parquet.*503"):
        batches_of(stream, column, RetryPolicy(0.3, 10))


# -- pictures in files -----------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(number))
    return ImageRows(load_split(ImageSource(str(folder)), "train"), "image", 3, IMPATIENT)


def test_a_picture_whose_disk_fails_or_stalls_is_read_again_and_not_replaced(pictures, monkeypatch, at_once, caplog):
    del at_once
    from ijepa_hf.data import reading

    read, failures = reading.read_image_file, iter([EIO, "stall", OSError(errno.ESTALE, "Stale file handle")])

    def failing_read(path):
        failure = next(failures, None)
        if failure == "stall":
            STALLED.wait(30)
        elif failure is not None:
            raise failure
        return read(path)

    monkeypatch.setattr(reading, "read_image_file", failing_read)
    pictures.images.retries = RetryPolicy(20, 0.2)
    assert pictures[3].getpixel((0, 0)) == (3, 6, 9)
    said = [record.getMessage() for record in caplog.records]
    assert [part in text for part, text in zip(("Input", "no answer", "Stale"), said, strict=True)] == [True] * 3


def test_a_picture_whose_disk_stays_away_is_no_broken_image_but_an_error_of_the_source(pictures, monkeypatch, at_once):
    del at_once
    from ijepa_hf.data import reading

    def failing_read(path):
        raise EIO

    monkeypatch.setattr(reading, "read_image_file", failing_read)
    pictures.images.retries = RetryPolicy(0.1, 5)
    with pytest.raises(DataSourceError, match=r"image file '.*2\.png' cannot be read: OSError: Input/output error"):
        _ = pictures[2]


def test_a_missing_file_and_bytes_that_are_no_picture_are_broken_images(pictures, clock):
    assert issubclass(UnidentifiedImageError, OSError)
    path = Path(pictures.raw_rows([1])[0]["image"]["path"])
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        _ = pictures[1]
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        _ = pictures[1]
    assert clock.slept == []


def test_pictures_of_another_file_system_are_read_too():
    memory = fsspec.filesystem("memory")
    memory.pipe("memory://pictures/5.png", encoded(5))
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": None, "path": "memory://pictures/5.png"}]}
    images = ImageRows(datasets.Dataset.from_dict(rows, features=features), "image", 3)
    assert images[0].getpixel((0, 0)) == (5, 10, 15)
