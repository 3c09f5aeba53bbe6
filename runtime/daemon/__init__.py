"""The daemon: its life, its ZeroMQ door, sessions, the link to the engine, its report on itself."""
