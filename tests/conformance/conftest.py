import re
from pathlib import Path

from skips import OUT_OF_SCOPE


collect_ignore = ["stand_ins"]


def pytest_collection_modifyitems(config, items):
    """Deselects what cannot run, being out of scope or in want of a device or package."""
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    deselected = {item for item in here if is_out_of_scope(item) or lacks_requirement(item)}
    config.hook.pytest_deselected(items=list(deselected))
    items[:] = [item for item in items if item not in deselected]


def is_out_of_scope(item):
    return any(re.search(pattern, item.name) for pattern in OUT_OF_SCOPE)


def lacks_requirement(item):
    """Whether a decorator such as `require_torch_accelerator` has found its requirement missing."""
    return any(getattr(test, "__unittest_skip__", False) for test in (item.obj, item.cls))
