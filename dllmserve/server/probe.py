"""``python -m dllmserve.server.probe FILE``: is the server well whose --address-file this is?

For health checks of containers, which know neither the port nor whether it speaks TLS. It imports
nothing but the standard library, since it runs every few seconds.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import Sequence
from http.client import RemoteDisconnected
from pathlib import Path
from urllib.error import URLError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

#: seconds for the whole answer
_TIMEOUT_S = 4.0


def probe(file: str) -> str:
    """What is wrong with the server; "" if it answers requests now.

    A server that requires a client certificate counts as well, although the probe has none: it
    asks for one, and then closes the connection.

    Args:
        file: the server's ``--address-file``.
    """
    # no certificate is checked: the probe sends no secret, and trusts no content
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address = ""
    try:
        address = Path(file).read_text(encoding="ascii").strip()
        # the server is on this machine, whatever proxy the environment names
        opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
        opener.open(f"{address}/health", timeout=_TIMEOUT_S).close()
    except (ssl.SSLError, RemoteDisconnected, ConnectionResetError) as error:
        return "" if address.startswith("https:") else str(error)
    except URLError as error:
        return "" if isinstance(error.reason, ssl.SSLError) else str(error)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def main(args: Sequence[str]) -> int:
    """0 if the server is well, else 1 and a line on standard error."""
    wrong = probe(*args)
    if wrong:
        sys.stderr.write(f"{wrong}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
