"""Where a router sends the prompts of several sets."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from chassis_utils import ChassisError, Probes, Router


def confusion(router: Router, sets: Mapping[str | None, Probes]) -> pd.DataFrame:
    """Prompts of each set (by the right choice) that go where; ChassisError: an unknown name, prompts fitted on."""
    names = [*router.names, None]
    if bad := [one.name for truth, one in sets.items() if truth not in names or router.fitted_on & one.fingerprints]:
        raise ChassisError(f"'{bad[0]}' is under no expert's name, or holds passages fitted on: take other prompts")
    told = {truth or "none": router(one.prompts)["choice"].tolist() for truth, one in sets.items()}
    rows = [[choices.count(name) for name in names] for choices in told.values()]
    return pd.DataFrame(rows, index=[*told], columns=[*router.names, "none"])
