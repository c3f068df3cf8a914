class GenerationTesterMixin:
    """Not in the source distribution."""
