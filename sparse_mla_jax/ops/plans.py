"""The block sizes, splits and warps that an operator's kernel uses on a machine; see `pallas_kernels.plans`."""

from pallas_kernels.plans import plan_for as plan_for
from pallas_kernels.plans import plans_for as plans_for
