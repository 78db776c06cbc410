"""Remote data against real servers: an S3 of moto, and an HTTP server that fails as it is told."""

import http.server
import json
import threading
import urllib.parse

import pytest

from data import source, storage
from data.errors import RunError

ROWS = b"".join(
    json.dumps({"instruction": f"q{i}", "output": "a"}).encode() + b"\n" for i in range(5)
)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("ZERO_OFFLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage.time, "sleep", lambda s: None)


def rows(spec):
    return [len([r for _, r in source.read(s)]) for s in source.resolve([spec])]


# -- S3 --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bucket():
    """Endpoint of an S3 server that holds s3://data/train/{a,b}.jsonl."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="KEYID",
        aws_secret_access_key="VERYSECRET",
    )
    client.create_bucket(Bucket="data")
    for name in ("train/a.jsonl", "train/b.jsonl", "train/notes.txt"):
        client.put_object(Bucket="data", Key=name, Body=ROWS)
    yield endpoint, client
    server.stop()


@pytest.fixture
def s3(bucket, monkeypatch):
    endpoint, client = bucket
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "KEYID",
        "AWS_SECRET_ACCESS_KEY": "VERYSECRET",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    return client


def test_s3(s3, capfd):
    assert rows("s3://data/train/a.jsonl") == [5]
    assert rows("s3://data/train") == [5, 5] == rows("s3://data/train/*.jsonl")
    assert (
        capfd.readouterr().err.count("downloading s3://data/train/a.jsonl") == 1
    )  # from the cache the second time


def test_s3_new_content_is_fetched(s3):
    s3.put_object(Bucket="data", Key="changing.jsonl", Body=ROWS)
    assert rows("s3://data/changing.jsonl") == [5]
    s3.put_object(Bucket="data", Key="changing.jsonl", Body=ROWS * 2)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # as in a new process
    assert rows("s3://data/changing.jsonl") == [10]


@pytest.mark.parametrize(
    "spec", ["s3://data/absent.jsonl", "s3://absent/a.jsonl", "s3://data/empty/"]
)
def test_s3_missing(s3, spec):
    with pytest.raises(RunError, match="s3://"):
        rows(spec)


def test_s3_without_credentials(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(RunError, match="AWS_ACCESS_KEY_ID"):
        rows("s3://data/train/a.jsonl")


# -- GCS -------------------------------------------------------------------------------------------
class Gcs(http.server.BaseHTTPRequestHandler):
    """What gcsfs needs of Google's JSON API for gs://data/train/{a,b}.jsonl."""

    NAMES = ("train/a.jsonl", "train/b.jsonl")

    def do_GET(self):
        address = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(address.query)
        name = urllib.parse.unquote(address.path.rpartition("/o/")[2])
        code, found = (
            200,
            {
                "kind": "storage#object",
                "bucket": "data",
                "size": str(len(ROWS)),
                "etag": "1",
                "generation": "1",
                "updated": "2026-01-01T00:00:00.000Z",
                "timeCreated": "2026-01-01T00:00:00.000Z",
            },
        )
        if address.path.rstrip("/").endswith("/o"):
            prefix = query.get("prefix", [""])[0]
            body = json.dumps(
                {"items": [{**found, "name": n} for n in self.NAMES if n.startswith(prefix)]}
            ).encode()
        elif name not in self.NAMES:
            code, body = 404, b'{"error": {"code": 404, "message": "Not Found"}}'
        else:
            body = (
                ROWS
                if query.get("alt") == ["media"]
                else json.dumps({**found, "name": name}).encode()
            )
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_gcs(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gcs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    assert rows("gs://data/train/a.jsonl") == [5] and rows("gs://data/train") == [5, 5] == rows(
        "gs://data/train/*.jsonl"
    )
    with pytest.raises(RunError, match="gs://data/absent.jsonl cannot be read"):
        rows("gs://data/absent.jsonl")
    server.shutdown()


# -- HTTP ------------------------------------------------------------------------------------------
class Server(http.server.BaseHTTPRequestHandler):
    """/rows.jsonl is fine; /flaky fails `failures` times; /forbidden, /gone, /short, /broken."""

    failures, seen = 0, []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        Server.seen.append((self.command, self.path))
        path = self.path.partition("?")[0]
        code = {"/forbidden.jsonl": 403, "/gone.jsonl": 404, "/broken.jsonl": 500}.get(path, 200)
        if path == "/flaky.jsonl" and Server.failures:
            Server.failures -= 1
            code = 503
        self.send_response(code)
        self.send_header("Content-Length", str(len(ROWS) if code == 200 else 0))
        if path == "/dated.jsonl":
            self.send_header("Last-Modified", "Tue, 24 Nov 2026 10:00:00 GMT")
        self.end_headers()
        if body and code == 200:
            self.wfile.write(ROWS[:-50] if path == "/short.jsonl" else ROWS)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_http(web):
    assert rows(f"{web}/rows.jsonl") == [5] and rows(f"{web}/rows.jsonl?token=SECRET") == [5]


def test_http_versions(web, monkeypatch):
    """A dated file is fetched once; one that says nothing of its version, once a run."""
    from types import SimpleNamespace

    for name, gets in (("dated", 1), ("rows", 2)):
        Server.seen.clear()
        for run in (1, 2):
            monkeypatch.setattr(
                "psutil.Process", lambda _, run=run: SimpleNamespace(create_time=lambda: run)
            )
            rows(f"{web}/{name}.jsonl?{name}"), rows(f"{web}/{name}.jsonl?{name}")
        assert [method for method, _ in Server.seen].count("GET") == gets


def test_malformed_addresses_are_not_tried_again(capfd):
    for url in ("https://", "http://[", "s3://"):
        with pytest.raises(RunError):
            rows(url)
    assert "attempt" not in capfd.readouterr().err


def test_http_retries_and_goes_on(web, capfd):
    Server.failures = 2
    assert rows(f"{web}/flaky.jsonl") == [5] and "attempt" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, words",
    [
        ("forbidden", "right to read it"),
        ("gone", "cannot be read"),
        ("broken", "after 4 attempts"),
        ("short", "after 4 attempts"),
    ],
)
def test_http_failures(web, name, words, capfd):
    Server.seen.clear()
    with pytest.raises(RunError, match=words) as error:
        rows(f"{web.replace('//', '//user:PASSWORD@')}/{name}.jsonl?token=SECRET")
    said = str(error.value) + "".join(capfd.readouterr())
    assert "SECRET" not in said and "PASSWORD" not in said and f"{name}.jsonl" in said
    assert len(Server.seen) <= 12  # bounded


def test_unreachable():
    with pytest.raises(RunError, match="after 4 attempts"):
        rows("http://127.0.0.1:9/rows.jsonl")


def test_file_address(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(ROWS)
    assert rows(f"file://{tmp_path}/d.jsonl") == [5] and rows(f"file://{tmp_path}") == [5] == rows(
        f"FILE://{tmp_path}/d.jsonl"
    )


# -- the cache's place -----------------------------------------------------------------------------
def test_cache_leaves_a_network_disk(monkeypatch, tmp_path):
    monkeypatch.delenv("ZERO_OFFLOAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path in storage.cache_directory().parents
    monkeypatch.setattr(storage, "filesystem_of", lambda path: "nfs4")
    assert str(storage.cache_directory()).startswith("/var/tmp/zero-offload-trainer-")


def test_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("ZERO_OFFLOAD_CACHE", "/proc/cache")
    with pytest.raises(RunError, match="ZERO_OFFLOAD_CACHE"):
        storage.cache_directory()
