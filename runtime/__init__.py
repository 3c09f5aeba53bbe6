"""The daemon, its client library, configuration and command line."""
