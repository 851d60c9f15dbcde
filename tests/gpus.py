"""GPUs that stories are about: as their driver counts them, and as an engine counts those that it is shown."""

from __future__ import annotations

from router.system.devices import Device

GPU0, GPU1, GPU2 = (Device.gpu(index) for index in range(3))
SHOWN0, SHOWN1 = (Device.shown(index) for index in range(2))
