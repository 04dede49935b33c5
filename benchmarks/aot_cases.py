"""The calls that the ahead-of-time gate compiles: every config that can be picked, by real shapes.

Tensors are on the meta device: they have shapes, strides and dtypes, and no memory. A case names
one call of a launcher; `DOMAINS` lists what each `pick_config` may be asked, so that the gate can
tell whether some config is reached by no case.
"""

import aot_attention_cases
import aot_row_cases
from aot_case import Case, Domains

CASES: tuple[Case, ...] = (*aot_attention_cases.CASES, *aot_row_cases.CASES)

# By op: the arguments that its `pick_config` is asked for on a given capability.
DOMAINS: Domains = {**aot_attention_cases.DOMAINS, **aot_row_cases.DOMAINS}
