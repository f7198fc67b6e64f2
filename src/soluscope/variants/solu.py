"""SoLU without a mid norm: the model with the performance loss that LayerNorm should recover.

Source: Elhage et al. 2022, sections 4.2 and 4.3.
"""

from soluscope.variants import Variant
from soluscope.variants._parts import solu

VARIANT = Variant(label="SoLU", nonlinearity=solu, hooked_act_fn="solu", role="plain")
