"""How gradreg is installed, in one place: messages ask here, and tests/test_install.py holds the pages to it.

On the day it is on a package index, `ON_INDEX = True` changes the messages, and the test names the pages to change.
"""

ON_INDEX = False


def install(*extras: str) -> str:
    """The command that installs gradreg with some extras.

    Example:
        >>> install("lab")
        "pip install '.[lab]'"
    """
    where = "gradreg" if ON_INDEX else "."
    return f"pip install '{where}[{','.join(extras)}]'" if extras else f"pip install {where}"


def how(*extras: str) -> str:
    """The same with the place where it works: the end of a message.

    Example:
        >>> how("lab")
        "in a clone of gradreg, pip install '.[lab]'"
    """
    return install(*extras) if ON_INDEX else f"in a clone of gradreg, {install(*extras)}"
