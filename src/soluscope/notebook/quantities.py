"""`soluscope.quantities`: everything that the probes measure."""

from __future__ import annotations

import pandas as pd

from soluscope import plugins
from soluscope.probes import Probe

PACKAGE = "soluscope.probes"


def quantities() -> pd.DataFrame:
    """Return a table of the quantities that the probes measure, in the order of protocol.md section 7.

    Returns:
        The columns `probe` (name of a file in probes/), `quantity`, `unit`, `meaning`, and `confirmatory`: True if
        its change by training is a confirmatory test, which is corrected for multiple testing (protocol.md
        section 5). The other quantities are exploratory.
    """
    probes: dict[str, Probe] = {
        name: plugins.pick(PACKAGE, name) for name in plugins.names(PACKAGE)
    }
    return pd.DataFrame(
        [
            {
                "probe": name,
                "quantity": quantity,
                "unit": described.unit,
                "meaning": described.meaning,
                "confirmatory": probe.confirmatory and quantity == probe.tested,
            }
            for name, probe in sorted(probes.items(), key=lambda item: int(item[1].section[1:]))
            for quantity, described in (probe.quantities | probe.estimates).items()
        ]
    )
