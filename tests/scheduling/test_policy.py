"""The constants of the policy are told in one place, which all others follow."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from router.config.resolved import Config
from router.config.schema import Scheduling, System
from router.runtime.dispatcher import policy_of
from router.scheduling.policy import CONSTANTS, DEFAULTS, ByPriority
from router.scheduling.queue import BY_NAME, NAMES, Priority

DOCS = Path(__file__).parents[2] / "docs/scheduling.md"


def test_a_configuration_that_says_nothing_is_the_policy_as_it_is() -> None:
    config = Config(models={})
    policy = policy_of(config)
    assert {name: getattr(policy, name) for name in CONSTANTS} == {
        name: getattr(DEFAULTS, name) for name in CONSTANTS
    }


def test_every_constant_is_a_key_of_the_configuration_in_its_own_words() -> None:
    keys = {**System.model_fields, **Scheduling.model_fields}
    for name, constant in CONSTANTS.items():
        assert keys[name].description == constant.words


def test_what_is_configured_arrives() -> None:
    said: dict[str, Any] = {
        "scheduling": {"residency_factor": 7, "patience_sec": {"low": 50}},
        "system": {"keep_warm_models": 9, "idle_timeout_sec": 0, "base_port": 65530},
    }
    config = Config(
        models={},
        system=System.model_validate(said["system"]),
        scheduling=Scheduling.model_validate(said["scheduling"]),
    )
    policy = policy_of(config)
    assert (policy.residency_factor, policy.patience_sec) == (7, ByPriority(0, 15, 50))
    assert (policy.keep_warm_models, policy.idle_timeout_sec, policy.ports) == (9, math.inf, 6)


def test_the_table_of_the_docs_has_them_all() -> None:
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| ([^|]*) \| (.*) \|$", DOCS.read_text(), re.M)
    assert rows == [
        (
            "scheduling" if name in Scheduling.model_fields else "system",
            name,
            in_words(getattr(DEFAULTS, name)),
            constant.words,
        )
        for name, constant in CONSTANTS.items()
    ]


def in_words(figure: Any) -> str:
    if isinstance(figure, ByPriority):
        return ", ".join(f"{one:g}" for one in (figure.high, figure.normal, figure.low))
    return "null" if figure is None else str(figure)


def test_each_figure_by_priority_belongs_to_the_priority_of_its_name() -> None:
    figures = ByPriority(**{name: float(priority) for name, priority in BY_NAME.items()})
    assert [field.name for field in fields(ByPriority)] == list(BY_NAME)
    for priority in Priority:
        assert figures[priority] == priority
        assert NAMES[priority] == priority.name.lower()
