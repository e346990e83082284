"""Which block sizes, splits and warps the kernel of an operator takes on a machine; see `pallas_kernels.plans`."""

from pallas_kernels.plans import plan_for as plan_for
from pallas_kernels.plans import plans_for as plans_for
