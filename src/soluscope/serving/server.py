"""A server on this machine's loopback address, which runs until Ctrl-C."""

from __future__ import annotations

import socket

import uvicorn

from soluscope.errors import UserError
from soluscope.serving.guard import Guard

HOST = "127.0.0.1"


def listening(port: int) -> socket.socket:
    """Return a socket on this machine's loopback address.

    Args:
        port: its port; 0 for a free one.

    Raises:
        UserError: if the port is in use.
    """
    result = socket.socket()
    result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        result.bind((HOST, port))
        result.listen()  # a browser may come as soon as the address is printed
    except OSError as error:
        result.close()
        raise UserError(
            f"port={port} cannot be used ({error.strerror}): omit it, or give another"
        ) from error
    return result


def link(of: socket.socket, token: str) -> str:
    """Return the address that opens the page of a socket."""
    return f"http://{HOST}:{of.getsockname()[1]}/?token={token}"


def run(app: Guard, on: socket.socket) -> None:
    """Answer requests until Ctrl-C, and close the socket."""
    settings = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, server_header=False, ws="none"
    )
    try:
        uvicorn.Server(settings).run(sockets=[on])
    except KeyboardInterrupt:  # uvicorn has closed the page
        pass
    finally:
        on.close()
