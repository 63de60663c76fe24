"""``python -m dllmserve.server.probe FILE``: is the server well whose --address-file this is?

For health checks of containers, which know neither the port nor whether it speaks TLS. It imports
nothing but the standard library, since it runs every few seconds.
"""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import RemoteDisconnected
from pathlib import Path

#: seconds for the whole answer
_TIMEOUT_S = 4.0


def probe(file: str) -> str:
    """What is wrong; "" if the server answers requests now.

    A server that asks for client certificates, of which there is none here, is well if it gets so
    far as to ask; it then ends the connection, in one way or another.

    Args:
        file: the server's ``--address-file``.
    """
    # nothing is sent or believed that a certificate would protect
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address = ""
    try:
        address = Path(file).read_text(encoding="ascii").strip()
        urllib.request.urlopen(f"{address}/health", timeout=_TIMEOUT_S, context=context).close()
    except (ssl.SSLError, RemoteDisconnected, ConnectionResetError) as error:
        return "" if address.startswith("https:") else str(error)
    except urllib.error.URLError as error:
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
