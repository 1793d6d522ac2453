"""The server around the routes: connections, limits, clients, logs, metrics."""
