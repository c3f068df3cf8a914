class ExportTesterMixin:
    """Not in the source distribution."""
