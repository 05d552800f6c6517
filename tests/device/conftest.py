"""Device tests have a process of their own: autograd counts the devices once, at the first backward pass.

``pytest -m device`` is such a process. Where other tests run too, ``test_process.py`` starts one.
"""

from __future__ import annotations

import pytest
from torch.utils import backend_registration

# The simulated device is built on what older versions of torch do not have.
collect_ignore_glob = [] if hasattr(backend_registration, "_DummyBackendModule") else ["*.py"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    theirs = [item for item in items if item.get_closest_marker("device") is not None]
    if len(theirs) < len(items):
        config.hook.pytest_deselected(items=theirs)
        items[:] = [item for item in items if item not in theirs]
    elif theirs:
        from tests.device import simulated

        simulated.register()
