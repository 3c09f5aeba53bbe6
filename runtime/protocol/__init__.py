"""What travels between clients and daemon: messages, codec, sockets."""
