"""Stand-in."""


def build(control, texts):
    raise NotImplementedError
