"""The clients: requests and replies without a socket, connections, streams, `Client`, `AsyncClient`."""
