"""Guards around an ASGI app and the connections below it; nothing here knows of engines.

From the outside in::

    listener.Listener             accepts connections, before TLS
    slots.Connections             counts them, and drops idle ones when there are too many
    connection.GuardedProtocol    one for each connection, below ASGI
    (CORS, where it is configured)
    request_id.RequestLog         request id, the log line, the 500 of a handler that raised
    auth.AuthGuard                API keys, owners, rate limits
    body.BodyGuard                size, time and type of the body
    the app
"""
