"""The one error that means: the input is at fault, not the code; what its message may hold."""

import os
import re

SECRET_NAMES = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")
SECRET_LENGTH = 8  # a shorter value would be struck out of ordinary words
SHOWN = 80  # characters of a value in a message
HIDDEN = "***"

_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Let no message of this process show a value, whatever its environment variable is called."""
    if secret:
        _secrets.add(secret)


def redacted(text: str) -> str:
    """Return a text without the secrets of the environment and passwords in addresses.

    Servers and proxies quote the headers that they were sent, so a key can come back in an error.
    """
    named = {
        value.strip()
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name.upper()) and len(value.strip()) >= SECRET_LENGTH
    }
    for secret in sorted(named | _secrets, key=len, reverse=True):  # one may hold another
        text = text.replace(secret, HIDDEN)
    return re.sub(r"(://)[^/\s]*@", rf"\1{HIDDEN}@", text)


def one_line(text: str) -> str:
    """Return a text with line ends and whatever else a terminal doesn't print spelled out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def shown(value: object) -> str:
    """Return a value as a message quotes it: its beginning, where it is long or deep."""
    if isinstance(value, dict | list | tuple):
        return f"{'keys and values' if isinstance(value, dict) else 'a list'} ({len(value)})"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


class InputError(ValueError):
    """What a user gave can't be used; the message is one line: the key and what is allowed.

    Jobs print it without a traceback, and a job that failed with it is not tried again.
    """

    def __init__(self, message: object):
        """Keep the message as one line without secrets: it quotes what files and servers hold."""
        super().__init__(one_line(redacted(str(message))))
