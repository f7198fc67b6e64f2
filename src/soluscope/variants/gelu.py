"""GELU without a mid norm: the baseline of every comparison.

Source: Elhage et al. 2022, section 5; Hendrycks and Gimpel 2016.
"""

from soluscope.variants import Variant
from soluscope.variants._parts import gelu

VARIANT = Variant(label="GELU", nonlinearity=gelu, hooked_act_fn="gelu", role="baseline")
