"""Which of the addresses given can connect from themselves to a listener on port 36000: prints one word for each."""

import socket
import sys

with socket.create_server(("::", 36000), family=socket.AF_INET6, dualstack_ipv6=True):
    for source in sys.argv[1:]:
        aim = "::1" if ":" in source else "127.0.0.1"
        try:
            socket.create_connection((aim, 36000), timeout=1.5, source_address=(source, 0)).close()
        except TimeoutError:
            print("dropped")
        else:
            print("accepted")
