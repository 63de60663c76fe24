"""The engine in a process of its own: messages, the socket, the child, its supervisor."""
