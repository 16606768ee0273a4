"""x"""


def tracing(home):
    return None
