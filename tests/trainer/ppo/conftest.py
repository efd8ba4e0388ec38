from __future__ import annotations

from hypothesis import HealthCheck, settings

# The first tensor operation of a process can take longer than hypothesis gives a whole example.
settings.register_profile("tensors", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tensors")
