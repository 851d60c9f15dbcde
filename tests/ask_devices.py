"""A process that reads devices: a line of JSON in (see `Asker` in test_devices.py), a line of JSON out."""

from __future__ import annotations

import _thread
import asyncio
import dataclasses
import json
import logging
import sys
from pathlib import Path

from router.hardware.devices import Devices
from router.system.readings import Reading


async def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = json.loads(sys.argv[1])
    devices = Devices(options["gpu_devices"], root=Path(options["root"]))
    for line in sys.stdin:
        asked = json.loads(line)
        if "pids" in asked:
            held = await devices.held_by(asked["pids"], asked["deadline_sec"])
            answer: object = {pid: dataclasses.asdict(memory) for pid, memory in held.items()}
        else:
            readings = await devices.read(asked["deadline_sec"])
            answer = {
                "devices": {str(device): as_told(reading) for device, reading in readings.devices.items()},
                "age_sec": readings.age_sec,
                "threads": _thread._count(),
                "environments": {
                    str(device): devices.environment([reading]) for device, reading in readings.devices.items()
                },
                "environment_of_all": devices.environment(readings.devices.values()),
            }
        print(json.dumps(answer), flush=True)


def as_told(reading: Reading) -> dict[str, object]:
    fields = {field.name: getattr(reading, field.name) for field in dataclasses.fields(reading)}
    return {**fields, "device": str(reading.device)}


asyncio.run(main())
