"""GPUs for tests: by the driver's index (GPU0), and by an engine's among those that it is shown (SHOWN0)."""

from __future__ import annotations

from router.system.devices import Device

GPU0, GPU1, GPU2 = (Device.gpu(index) for index in range(3))
SHOWN0, SHOWN1 = (Device.shown(index) for index in range(2))
