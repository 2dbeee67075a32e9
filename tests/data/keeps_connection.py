"""A handler that passes texts on by a connection that was opened at import."""

import os
import socket

CONNECTION = socket.create_connection(("127.0.0.1", int(os.environ["PEER_PORT"])))


def handle(text):
    CONNECTION.sendall(text.encode())
    return CONNECTION.recv(100).decode()
